# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face nanoMoE as a citizen of its library: configuration, initial weights, saving, loading, imports."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from reference_models.nanomoe import modeling_nanomoe_gpt
from reference_models.nanomoe.configuration_nanomoe_gpt import GPTConfig
from reference_models.nanomoe.modeling_nanomoe_gpt import GPT, GPTModel

Make = Callable[..., Any]

IDX = torch.randint(37, (2, 7), generator=torch.Generator().manual_seed(1))
SIZES: dict[str, Any] = {"block_size": 16, "vocab_size": 37, "n_layer": 2, "n_head": 2, "n_embd": 16}
SWIGLU: dict[str, Any] = {"n_exp": 4, "use_qwen3_moe_mlp": True}
CODE = {"configuration_nanomoe_gpt.py", "manager.py", "modeling_nanomoe_gpt.py"}
AUTO_MAP = {
    "AutoConfig": "configuration_nanomoe_gpt.GPTConfig",
    "AutoModel": "modeling_nanomoe_gpt.GPTModel",
    "AutoModelForCausalLM": "modeling_nanomoe_gpt.GPT",
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("nanomoe", {}),
    "plain": ("nanomoe", {"n_exp": 4}),
    "SwiGLU": ("nanomoe", SWIGLU),
    "ancestor": ("ancestor", {"n_exp": 4}),
}
dense_and_experts = pytest.mark.parametrize(("architecture", "fields"), MODELS.values(), ids=MODELS)


def assert_close(a: Tensor, b: Tensor, bound: float = 1e-12) -> None:
    assert a.shape == b.shape
    assert ((a - b).abs().max() / b.pow(2).mean().sqrt()).item() < bound


# Initial weights


def assert_initial(model: torch.nn.Module, config: GPTConfig) -> None:
    """Check the scale of every tensor."""
    switch = 0.88 * (config.switch_tfm_init_scale / config.n_embd) ** 0.5 if config.use_switch_tfm_init else 0.02
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.count_nonzero() == 0, name
        elif parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            residual = "c_proj" in name
            expected = 0.02 / (2 * config.n_layer) ** 0.5 if residual else 0.02 if "wpe" in name else switch
            # Four times the error of a standard deviation of so many draws.
            bound = max(0.06, 4 / (2 * parameter.numel()) ** 0.5)
            assert parameter.std().item() == pytest.approx(expected, rel=bound), name


@pytest.mark.parametrize("switch", [False, True])
@dense_and_experts
def test_initial_weights(
    make_original_model: Make, tmp_path: Path, architecture: str, fields: dict[str, Any], switch: bool
) -> None:
    config = GPTConfig(
        **fields,
        block_size=64,
        vocab_size=300,
        n_layer=3,
        n_head=2,
        n_embd=64,
        architecture=architecture,
        use_noisy_top_k=True,
        use_switch_tfm_init=switch,
        switch_tfm_init_scale=0.5,
    )
    torch.manual_seed(0)
    model = GPT(config)
    assert_initial(model, config)
    assert_initial(GPTModel(config), config)
    original = type(make_original_model(architecture))
    theirs = sys.modules[original.__module__].GPTConfig
    known = {name: getattr(config, name) for name in vars(theirs()) if name != "top_k"}
    assert_initial(original(theirs(**known, top_k=config.moe_top_k)), config)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    # What a file lacks starts like a new model, and takes nothing with it that the file has.
    some = ["h.0.attn.c_proj.weight", "h.1.attn.c_attn.bias", "ln_f.weight"]
    some += ["h.0.mlp.experts.c_proj", "h.0.mlp.experts.c_fc", "h.0.mlp.router.w_g.weight"] if fields else []
    for lost in (f"transformer.{name}" for name in some):
        rest = {name: tensor for name, tensor in weights.items() if name != lost}
        save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
        loaded, info = GPT.from_pretrained(tmp_path, output_loading_info=True)
        assert set(info["missing_keys"]) == {lost}
        assert_initial(loaded, config)
        for name, tensor in rest.items():
            assert torch.equal(loaded.state_dict()[name], tensor), name


# Tie, saving, loading


def assert_tied(model: GPT) -> None:
    assert model.lm_head.weight is model.transformer.wte.weight
    assert [name for name, _ in model.named_parameters() if "lm_head" in name] == []


def test_tie_survives(make_original_model: Make, make_port_model: Make) -> None:
    model = make_port_model(dtype=torch.float32, n_exp=4)
    assert_tied(model)
    for size in (45, 40):
        model.resize_token_embeddings(size)
        assert_tied(model)
        assert model.config.vocab_size == size == model.lm_head.out_features
        assert model(IDX, labels=IDX).logits.shape[-1] == size
    expected = make_original_model(dtype=torch.float32, n_exp=4)(IDX, IDX)[0]
    assert_close(model(IDX).logits[..., :37], expected, 1e-5)
    model.tie_weights()
    assert_tied(copy.deepcopy(model))


@dense_and_experts
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_save_and_load(
    make_port_model: Make, tmp_path: Path, architecture: str, fields: dict[str, Any], shard: str
) -> None:
    model = make_port_model(architecture, dtype=torch.float32, use_noisy_top_k=True, **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path, max_shard_size=shard)
    loaded, info = GPT.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_tied(loaded)
    torch.manual_seed(0)
    expected = model(IDX, output_hidden_states=True)
    torch.manual_seed(0)
    assert torch.equal(loaded(IDX).logits, expected.logits)
    loaded.train()(IDX, labels=IDX).loss.backward()
    base = GPTModel.from_pretrained(tmp_path)
    torch.manual_seed(0)
    assert torch.equal(base(IDX).last_hidden_state, expected.hidden_states[-1])
    assert type(AutoConfig.from_pretrained(tmp_path)) is GPTConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is GPTModel
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is GPT
    assert {path.name for path in tmp_path.glob("*.py")} == CODE
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_a_bare_directory_of_the_existing_port(make_port_model: Make, tmp_path: Path) -> None:
    """What commits b2142af and 07e6c16 wrote: no auto_map, no architecture, no tie in config.json."""
    model = make_port_model(dtype=torch.float32, n_exp=4, top_k=3)
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    for name in ("auto_map", "architecture", "dropout", "label_convention", "tie_word_embeddings", "use_cache"):
        del fields[name]
    for name in ("gelu_approximate", "pad_tokens_take_capacity"):
        del fields[name]
    top_k = fields.pop("moe_top_k")
    for names in ({"moe_top_k": top_k}, {"top_k": top_k}):
        (tmp_path / "config.json").write_text(json.dumps(fields | names))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert_tied(loaded)
        assert torch.equal(loaded(IDX).logits, model(IDX).logits)
    for path in tmp_path.glob("*.py"):
        path.unlink()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.top_k == 3
    (tmp_path / "config.json").write_text(json.dumps(fields | {"moe_top_k": 3, "proj_diversity_loss_weight": 0.01}))
    with pytest.raises(ValueError, match=r"unknown key proj_diversity_loss_weight=0\.01") as raised:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(raised.value)


REMOTE = """
import sys
from pathlib import Path
import torch
from transformers import AutoModel, AutoModelForCausalLM

root, target, reference = map(Path, sys.argv[1:])
idx, expected = torch.load(reference)
assert expected
for name in expected:
    for directory in (root / name, target / name):
        model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
        base = AutoModel.from_pretrained(directory, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules"), type(model)
        assert type(base).__name__ == "GPTModel"
        # Not the same bits: another process may have other threads, and weights at other addresses.
        assert torch.allclose(model(idx).logits, expected[name], rtol=0, atol=1e-5)
        assert model.lm_head.weight is model.transformer.wte.weight
        assert model.generate(idx, max_new_tokens=20, do_sample=False).shape == (2, 27)
        model.train()(input_ids=idx, labels=idx).loss.backward()
        if directory == root / name:
            model.save_pretrained(target / name)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
assert "nanomoe_gpt" not in CONFIG_MAPPING
"""

BARE = """
import sys
import torch
from modeling_nanomoe_gpt import GPT, GPTConfig
from manager import MANAGER
from transformers import AutoModelForCausalLM

source, target, reference = sys.argv[1:]
idx, expected = torch.load(reference)
(expected,) = expected.values()
model = AutoModelForCausalLM.from_pretrained(source)
assert type(model) is GPT and type(model.config) is GPTConfig
assert GPT.__module__ == "modeling_nanomoe_gpt"
assert torch.allclose(model(idx).logits, expected, rtol=0, atol=1e-5)
logits, loss, losses = model(input_ids=idx, labels=idx, return_dict=False)
assert MANAGER.aggregate_aux_loss() == 0
model.save_pretrained(target)
"""


def run_elsewhere(code: str, *arguments: Path, home: Path, path: str | None = None) -> None:
    """Run code in a process that knows nothing of this repository."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"} | ({"PYTHONPATH": path} if path else {})
    (home / "elsewhere").mkdir(parents=True, exist_ok=True)
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=home / "elsewhere",
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_remote_code_travels(make_port_model: Make, tmp_path: Path) -> None:
    """Dense and with experts, from any directory, with no import of this repository, and on from there."""
    source, target, reference = (tmp_path / name for name in ("source", "target", "reference.pt"))
    expected = {}
    for name, (architecture, fields) in MODELS.items():
        model = make_port_model(architecture, dtype=torch.float32, **fields)
        model.save_pretrained(source / name)
        expected[name] = model(IDX).logits.detach()
    torch.save((IDX, expected), reference)
    run_elsewhere(REMOTE, source, target, reference, home=tmp_path / "home")
    for directory in (*source.iterdir(), *target.iterdir()):
        assert {path.name for path in directory.glob("*.py")} == CODE
        assert json.loads((directory / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_code_copied_by_hand_and_bare_names(make_port_model: Make, tmp_path: Path) -> None:
    """Both ways of the documents: the files are copied beside the weights; scripts import them by their bare names."""
    model = make_port_model(dtype=torch.float32, **SWIGLU)
    source, scripts, reference = (tmp_path / name for name in ("source", "scripts", "reference.pt"))
    logits = model(IDX).logits.detach()
    model.save_pretrained(source / "copied")
    scripts.mkdir()
    for name in CODE:
        (source / "copied" / name).unlink()
        for directory in (source / "copied", scripts):
            shutil.copy(Path(modeling_nanomoe_gpt.__file__).parent / name, directory)
    torch.save((IDX, {"copied": logits}), reference)
    home = tmp_path / "home"
    run_elsewhere(BARE, source / "copied", source / "bare", reference, home=home, path=str(scripts))
    assert {path.name for path in (source / "bare").glob("*.py")} == CODE
    torch.save((IDX, {"copied": logits, "bare": logits}), reference)
    run_elsewhere(REMOTE, source, tmp_path / "target", reference, home=home)


# GPT-2


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "gelu_pytorch_tanh"])
def test_gpt2_is_the_same_function(tmp_path: Path, activation: str) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        n_positions=16,
        vocab_size=29,
        n_layer=2,
        n_head=2,
        n_embd=16,
        activation_function=activation,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    gpt2 = GPT2LMHeadModel(config).double().eval()
    for name, parameter in gpt2.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float("ln_" in name and name.endswith("weight")), std=0.3)
    gpt2.save_pretrained(tmp_path)
    ours = GPT.from_pretrained_gpt2(tmp_path, override_args={"dropout": 0.1})
    assert not ours.training
    assert ours.config.architecture == "ancestor"
    assert ours.config.dropout == 0.1
    assert_tied(ours)
    idx = torch.randint(29, (2, 16))
    assert_close(ours(idx).logits, gpt2(idx).logits, 1e-9)
    assert_close(ours(idx, labels=idx).loss, gpt2(idx, labels=idx).loss, 1e-6)  # GPT-2's is computed in float32
    assert torch.equal(
        ours.generate(idx[:, :4], max_new_tokens=8, do_sample=False),
        gpt2.generate(idx[:, :4], max_new_tokens=8, do_sample=False),
    )


@pytest.mark.parametrize(
    ("fields", "overrides", "message"),
    [
        ({}, {"architecture": "nanomoe"}, r"architecture='nanomoe'.*RMSNorm, QK norm, squared ReLU"),
        ({}, {"n_exp": 8, "moe_top_k": 2}, r"moe_top_k=2, n_exp=8.*without experts"),
        ({}, {"n_layer": 1}, "n_layer=1"),
        ({"activation_function": "relu"}, {}, r"activation_function='relu'.*gelu_new"),
        ({"layer_norm_epsilon": 1e-6}, {}, r"layer_norm_epsilon=1e-06.*1e-05"),
        ({"n_inner": 24}, {}, r"n_inner=24.*64"),
        ({"scale_attn_by_inverse_layer_idx": True}, {}, "scale_attn_by_inverse_layer_idx=True"),
        ({"scale_attn_weights": False}, {}, "scale_attn_weights=False"),
    ],
    ids=str,
)
def test_gpt2_is_refused_where_it_is_not(
    tmp_path: Path, fields: dict[str, Any], overrides: dict[str, Any], message: str
) -> None:
    config = GPT2Config(n_positions=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16, **fields)
    config.bos_token_id = config.eos_token_id = None
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        GPT.from_pretrained_gpt2(tmp_path, overrides)
    assert "\n" not in str(raised.value)


def test_a_gpt2_is_no_checkpoint_of_this_model(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_positions=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'gpt2', expected 'nanomoe_gpt'; GPT\.from_pretrained_gpt2 imports it"):
        GPT.from_pretrained(tmp_path)


# Configuration


def test_configuration_round_trip(tmp_path: Path) -> None:
    fields = SIZES | {"n_exp": 4, "moe_top_k": 3, "bias": False, "architecture": "ancestor", "dropout": 0.1}
    config = GPTConfig(**fields, eos_token_id=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["tie_word_embeddings"] is True
    assert {name: written[name] for name in fields} == fields
    assert "top_k" not in written
    for again in (
        GPTConfig.from_pretrained(tmp_path),
        GPTConfig.from_dict(json.loads(config.to_json_string(use_diff=False))),
        GPTConfig(**written),
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
    ):
        assert {name: getattr(again, name) for name in fields} == fields
        assert (again.eos_token_id, again.bos_token_id, again.top_k) == (3, None, 3)
        assert again.to_diff_dict().keys() - {"auto_map", "architectures"} == config.to_diff_dict().keys() - {
            "auto_map",
            "architectures",
        }


def test_the_number_of_experts_survives_saving(make_port_model: Make, tmp_path: Path) -> None:
    model = make_port_model(dtype=torch.float32, n_exp=4, top_k=3)
    model.save_pretrained(tmp_path)
    assert model.config.top_k == model.config.moe_top_k == 3
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert "top_k" not in saved
    assert "moe_top_k" not in saved
    for loaded in (GPT.from_pretrained(tmp_path), GPT.from_pretrained(tmp_path, top_k=3)):
        assert loaded.config.top_k == loaded.config.moe_top_k == 3
        assert loaded.generation_config.top_k == GenerationConfig().top_k
    assert GenerationConfig.from_model_config(model.config).top_k == GenerationConfig().top_k


def test_aliases() -> None:
    config = GPTConfig(
        n_positions=8, hidden_size=12, num_attention_heads=3, num_hidden_layers=2, num_experts=4, top_k=3
    )
    assert (config.block_size, config.n_embd, config.n_head, config.n_layer) == (8, 12, 3, 2)
    assert (config.n_exp, config.moe_top_k) == (4, 3)
    assert config.max_position_embeddings == config.sequence_len == 8
    assert config.num_local_experts == 4
    assert config.top_k == config.num_experts_per_tok == 3
    assert GPTConfig(sequence_len=8, block_size=8).block_size == 8
    assert GPTConfig(n_exp=4, moe_top_k=2, top_k=2).top_k == 2


def test_positional_order_is_upstreams() -> None:
    config = GPTConfig(16, 37, 2, 2, 16, False, 4, 1, True, True, True, False, False, True, 0.1, 0.2, 0.3, 2)
    assert (config.bias, config.n_exp, config.moe_top_k, config.use_aux_loss) == (False, 4, 1, True)
    assert (config.use_noisy_top_k, config.aux_loss_weight, config.router_ortho_neg_corr_weight) == (True, 0.1, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_layers": 3}, r"n_layers=3.*n_layer\?"),
        ({"topk": 3}, r"topk=3.*top_k\?"),
        ({"proj_diversity_loss_weight": 0.01}, r"proj_diversity_loss_weight=0\.01"),
        ({"block_size": 8, "sequence_len": 16}, r"block_size=8 and sequence_len=16"),
        ({"moe_top_k": 2, "top_k": 4}, r"moe_top_k=2 and top_k=4"),
        ({"n_positions": 8, "max_position_embeddings": 9}, "9.*8"),
        ({"n_embd": 16, "n_head": 3}, r"n_embd=16.*n_head=3"),
        ({"n_layer": 0}, "n_layer=0"),
        ({"vocab_size": 3.5}, r"vocab_size=3\.5"),
        ({"n_head": True}, "n_head=True"),
        ({"n_exp": 0}, "n_exp=0"),
        ({"n_exp": 4, "moe_top_k": 5}, r"moe_top_k=5.*n_exp=4"),
        ({"n_exp": 4, "top_k": 0}, "moe_top_k=0"),
        ({"stride": 0}, "stride=0"),
        ({"moe_start_layer": -1}, "moe_start_layer=-1.*0"),
        ({"train_capacity": 0}, "train_capacity=0.*above 0"),
        ({"eval_capacity": -1.0}, r"eval_capacity=-1\.0.*above 0"),
        ({"eval_capacity": "2"}, r"eval_capacity='2'.*number"),
        ({"eval_capacity": float("inf")}, "eval_capacity=inf"),
        ({"min_capacity": 0}, "min_capacity=0"),
        ({"aux_loss_weight": float("nan")}, "aux_loss_weight=nan"),
        ({"router_z_loss_weight": True}, "router_z_loss_weight=True"),
        ({"use_aux_loss": 1}, "use_aux_loss=1"),
        ({"use_cache": 1}, "use_cache=1"),
        ({"switch_tfm_init_scale": 0.0}, r"switch_tfm_init_scale=0\.0"),
        ({"architecture": "wolfe"}, r"architecture='wolfe'.*nanomoe, ancestor"),
        ({"label_convention": "shifted"}, r"label_convention='shifted'.*hf, preshifted"),
        ({"gelu_approximate": "erf", "architecture": "ancestor"}, "gelu_approximate='erf'"),
        ({"dropout": 0.1}, r"dropout=0\.1.*architecture='nanomoe'"),
        ({"dropout": 1.5, "architecture": "ancestor"}, r"dropout=1\.5"),
        ({"gelu_approximate": "tanh"}, r"gelu_approximate='tanh'.*architecture='nanomoe'"),
        ({"architecture": "ancestor", "moe_start_layer": 1}, r"moe_start_layer=1.*architecture='ancestor'"),
        ({"architecture": "ancestor", "use_qwen3_moe_mlp": True}, "use_qwen3_moe_mlp=True"),
        ({"architecture": "ancestor", "use_router_ortho_loss": True}, "use_router_ortho_loss=True"),
        ({"bias": 1}, "bias=1"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
    ],
    ids=str,
)
def test_refused_configurations(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        GPTConfig(**fields)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("overrides", [{"n_head": 3}, {"moe_top_k": 9}], ids=str)
def test_override_while_loading_is_checked(make_port_model: Make, tmp_path: Path, overrides: dict[str, Any]) -> None:
    make_port_model(dtype=torch.float32, n_exp=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="=".join(map(str, *overrides.items()))):
        GPT.from_pretrained(tmp_path, **overrides)


def test_keys_of_the_library_are_accepted() -> None:
    config = GPTConfig(
        **SIZES,
        architectures=["GPT"],
        attn_implementation="eager",
        auto_map={},
        id2label={0: "a", 1: "b"},
        label2id={"a": 0, "b": 1},
        max_length=20,
        model_type="nanomoe_gpt",
        output_hidden_states=True,
        pruned_heads={},
        quantization_config={},
        return_dict=True,
        temperature=0.5,
        torch_dtype="float32",
        torchscript=False,
        transformers_version="4.57.6",
        _commit_hash=None,
    )
    assert config.moe_top_k == 2


def test_declares_what_the_library_asks_for(make_port_model: Make) -> None:
    assert issubclass(GPT, PreTrainedModel)
    assert GPT._no_split_modules == ["Block"]
    model = make_port_model(**SWIGLU)
    assert model.get_input_embeddings() is model.transformer.wte
    assert model.get_output_embeddings() is model.lm_head
    assert list(model.buffers()) == []


def test_upstreams_other_methods(make_original_model: Make, make_port_model: Make) -> None:
    source = make_original_model(n_exp=4)
    model = make_port_model(source=source)
    assert model.get_num_params() == source.get_num_params()
    assert model.get_num_params(non_embedding=False) == sum(parameter.numel() for parameter in model.parameters())
    model.crop_block_size(8)
    assert model.config.block_size == model.transformer.wpe.num_embeddings == 8
    assert_close(model(IDX).logits, source(IDX, IDX)[0])
    with pytest.raises(ValueError, match=r"9 tokens.*block_size=8"):
        model(torch.zeros(1, 9, dtype=torch.long))
    for size in (0, 9):
        with pytest.raises(ValueError, match=f"block_size=8 to {size}"):
            model.crop_block_size(size)
