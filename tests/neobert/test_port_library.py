# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face NeoBERT as a citizen of its library: configuration, initial weights, saving, loading, imports."""

import copy
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.trainer_pt_utils import get_parameter_names

from harness.checks.roundtrip import poison
from reference_models.neobert import original
from reference_models.neobert.configuration_neobert import NeoBERTConfig
from reference_models.neobert.model import NeoBERT, NeoBERTForSequenceClassification, NeoBERTLMHead

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 37,
    "max_length": 16,
}
LEARNED: dict[str, Any] = {"rope": False, "rms_norm": False, "hidden_act": "gelu"}
IDX = torch.randint(1, 37, (2, 7), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
CODE = {"configuration_neobert.py", "model.py", "rotary.py"}
AUTO_MAP = {
    "AutoConfig": "configuration_neobert.NeoBERTConfig",
    "AutoModel": "model.NeoBERT",
    "AutoModelForMaskedLM": "model.NeoBERTLMHead",
    "AutoModelForSequenceClassification": "model.NeoBERTForSequenceClassification",
}
HEAD = {"classifier.bias", "classifier.weight", "dense.bias", "dense.weight"}

rope_and_learned = pytest.mark.parametrize("fields", [{}, LEARNED], ids=["rope", "learned"])
tied_and_untied = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def own_registration() -> None:
    """Other tests import copies of the port, which register themselves in its place."""
    AutoConfig.register(NeoBERTConfig.model_type, NeoBERTConfig, exist_ok=True)
    AutoModel.register(NeoBERTConfig, NeoBERT, exist_ok=True)
    AutoModelForMaskedLM.register(NeoBERTConfig, NeoBERTLMHead, exist_ok=True)
    AutoModelForSequenceClassification.register(NeoBERTConfig, NeoBERTForSequenceClassification, exist_ok=True)


def make(cls: Any = NeoBERTLMHead, **fields: Any) -> Any:
    """Return a model in eval mode with every parameter drawn, in float32."""
    model = cls(NeoBERTConfig(**{**SIZES, **fields}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4 + (parameter.ndim == 1))
    return model.eval()


def assert_tied(model: Any, tied: bool = True) -> None:
    assert (model.decoder.weight is model.model.encoder.weight) is tied
    assert ("decoder.weight" in dict(model.named_parameters())) is not tied


def missing(information: dict[str, Any]) -> set[str]:
    """What a loading left out, once nothing else is wrong with it."""
    assert not any(information[name] for name in information if name != "missing_keys"), information
    return set(information["missing_keys"])


# Initial weights


def assert_initial(model: torch.nn.Module, config: NeoBERTConfig) -> None:
    """Check range, distribution and padding row of every tensor."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.count_nonzero() == 0, name
        elif parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.startswith(("dense", "classifier")):
            assert parameter.std().item() == pytest.approx(config.classifier_init_range, rel=0.3), name
            if name.startswith("dense"):
                assert parameter.abs().max() > 3 * config.classifier_init_range, name  # no uniform has tails
        else:
            is_embedding = "encoder.weight" in name or "positional" in name
            bound = config.embedding_init_range if is_embedding else config.decoder_init_range
            assert 0.98 * bound < parameter.abs().max() <= bound, name
            drawn = parameter[[row for row in range(len(parameter)) if row or not is_embedding]]
            assert drawn.std().item() == pytest.approx(bound / 3**0.5, rel=0.1), name
            if is_embedding:
                assert parameter[0].count_nonzero() == 0, name


@rope_and_learned
@tied_and_untied
def test_initial_weights(tmp_path: Path, fields: dict[str, Any], tied: bool) -> None:
    sizes: dict[str, Any] = {**SIZES, **fields, "hidden_size": 48, "vocab_size": 150, "max_length": 50}
    ranges = {"embedding_init_range": 0.03, "decoder_init_range": 0.05, "classifier_init_range": 0.07}
    config = NeoBERTConfig(**sizes, **ranges, tie_word_embeddings=tied)
    torch.manual_seed(0)
    model = NeoBERTLMHead(config)
    assert_initial(model, config)
    assert_initial(NeoBERT(config), config)
    assert_initial(NeoBERTForSequenceClassification(config), config)
    theirs = original.NeoBERTLMHead(original.NeoBERTConfig(**sizes, **ranges, tie_word_embeddings=tied))
    assert_initial(theirs, config)
    assert {name: tensor.shape for name, tensor in theirs.state_dict().items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    # What a file lacks starts like a new model, and takes nothing with it that the file has.
    some = ["model.transformer_encoder.0.qkv.weight", "model.transformer_encoder.1.ffn_norm.weight", "decoder.bias"]
    some += ["model.positional_embedding.weight"] if fields else []
    some += [] if tied else ["decoder.weight", "model.encoder.weight"]
    for lost in some:
        rest = {name: tensor for name, tensor in weights.items() if name != lost}
        save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
        loaded, info = NeoBERTLMHead.from_pretrained(tmp_path, output_loading_info=True)
        assert missing(info) == {lost}
        assert_initial(loaded, config)
        for name, tensor in rest.items():
            assert torch.equal(loaded.state_dict()[name], tensor), name


# Tie


def test_tie_survives() -> None:
    model = make()
    logits = model(IDX).logits
    assert_tied(model)
    for size in (45, 40, 37):
        model.resize_token_embeddings(size, mean_resizing=False)
        assert_tied(model)
        assert model.config.vocab_size == size == model.decoder.out_features == len(model.decoder.bias)
        labels = torch.full_like(IDX, size - 1)
        assert model(IDX, labels=labels).loss.isfinite()
        assert torch.allclose(model(IDX).logits[..., :37], logits, atol=1e-5)
    model.tie_weights()
    assert_tied(copy.deepcopy(model))
    assert_tied(pickle.loads(pickle.dumps(model)))
    replaced = torch.nn.Embedding(37, 16)
    model.set_input_embeddings(replaced)
    model.tie_weights()
    assert_tied(model)
    assert model.decoder.weight is replaced.weight


def test_untied_stays_untied() -> None:
    model = make(tie_word_embeddings=False)
    logits = model(IDX).logits
    model.resize_token_embeddings(40, mean_resizing=False)
    model.tie_weights()
    assert_tied(model, tied=False)
    assert model.decoder.weight.shape == (40, 16)
    assert model.decoder.bias.shape == (40,)
    assert torch.allclose(model(IDX).logits[..., :37], logits, atol=1e-5)


@pytest.mark.parametrize("declared", [True, None], ids=["declared", "not declared"])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "shards"])
def test_a_file_whose_two_matrices_differ_is_not_tied(tmp_path: Path, declared: bool | None, file: str) -> None:
    """Upstream's exports say nothing of the tie, and where 5.x trained them hold two matrices."""
    model = make(tie_word_embeddings=False)
    model.save_pretrained(tmp_path, **({"max_shard_size": "4KB"} if file == "shards" else {}))
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    del fields["tie_word_embeddings"]
    path.write_text(json.dumps(fields | ({} if declared is None else {"tie_word_embeddings": declared})))
    if file == "pytorch_model.bin":
        torch.save(model.state_dict(), tmp_path / file)
        (tmp_path / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"decoder.weight and model.encoder.weight .* differ"):
        loaded = NeoBERTLMHead.from_pretrained(tmp_path)
    assert_tied(loaded, tied=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.config.tie_word_embeddings is False
    loaded.tie_weights()
    assert_tied(loaded, tied=False)
    loaded.save_pretrained(tmp_path / "again")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = NeoBERTLMHead.from_pretrained(tmp_path / "again")
    assert torch.equal(again(IDX).logits, model(IDX).logits)


@pytest.mark.parametrize("present", ["both", "decoder.weight", "model.encoder.weight"])
def test_a_file_with_one_matrix_or_two_equal_ones_is_tied(tmp_path: Path, present: str) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    names = ("decoder.weight", "model.encoder.weight") if present == "both" else (present,)
    matrix = tensors.pop("model.encoder.weight")
    tensors |= {name: matrix.clone() for name in names}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded, info = NeoBERTLMHead.from_pretrained(tmp_path, output_loading_info=True)
    assert missing(info) == set()
    assert_tied(loaded)
    assert torch.equal(loaded(IDX).logits, model(IDX).logits)


# Saving and loading


@rope_and_learned
@tied_and_untied
@pytest.mark.parametrize("shard", ["1GB", "8KB"])
def test_save_and_load(tmp_path: Path, fields: dict[str, Any], tied: bool, shard: str) -> None:
    model = make(tie_word_embeddings=tied, **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path, max_shard_size=shard)
        loaded, info = NeoBERTLMHead.from_pretrained(tmp_path, output_loading_info=True)
        base, base_info = NeoBERT.from_pretrained(tmp_path, output_loading_info=True)
    assert missing(info) == missing(base_info) == set()
    assert not loaded.training
    assert_tied(loaded, tied)
    expected = model(IDX, attention_mask=MASK, output_hidden_states=True)
    assert torch.equal(loaded(IDX, attention_mask=MASK).logits, expected.logits)
    assert torch.equal(base(IDX, attention_mask=MASK).last_hidden_state, expected.hidden_states[-1])
    assert type(AutoConfig.from_pretrained(tmp_path)) is NeoBERTConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is NeoBERT
    assert type(AutoModelForMaskedLM.from_pretrained(tmp_path)) is NeoBERTLMHead
    assert {path.name for path in tmp_path.glob("*.py")} == CODE
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_a_classifier_from_a_language_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True, num_labels=3, problem_type="regression"
    )
    assert type(loaded) is NeoBERTForSequenceClassification
    assert missing(info) == HEAD
    assert loaded.classifier.weight.shape == (3, 16)
    assert torch.equal(loaded.model(IDX).last_hidden_state, model.model(IDX).last_hidden_state)
    target = tmp_path / "classifier"
    loaded.save_pretrained(target)
    written = json.loads((target / "config.json").read_text())
    assert written["auto_map"] == AUTO_MAP
    assert len(written["id2label"]) == 3
    assert {path.name for path in target.glob("*.py")} == CODE
    again, info = NeoBERTForSequenceClassification.from_pretrained(target, output_loading_info=True)
    assert missing(info) == set()
    assert again.config.problem_type == "regression"
    assert torch.equal(again(IDX).logits, loaded(IDX).logits)


def test_every_class_saves_the_code_of_all(tmp_path: Path) -> None:
    for cls in (NeoBERT, NeoBERTLMHead, NeoBERTForSequenceClassification):
        directory = tmp_path / cls.__name__
        make(cls).save_pretrained(directory)
        assert {path.name for path in directory.glob("*.py")} == CODE
        written = json.loads((directory / "config.json").read_text())
        assert written["auto_map"] == AUTO_MAP
        assert written["architectures"] == [cls.__name__]


def test_a_base_model_grows_a_head(tmp_path: Path) -> None:
    base = make(NeoBERT)
    base.save_pretrained(tmp_path)
    loaded, info = NeoBERTLMHead.from_pretrained(tmp_path, output_loading_info=True)
    assert missing(info) == {"decoder.bias"}
    assert_tied(loaded)
    assert torch.equal(loaded.model(IDX).last_hidden_state, base(IDX).last_hidden_state)
    assert loaded.decoder.bias.count_nonzero() == 0
    assert loaded(IDX).logits.isfinite().all()


@rope_and_learned
def test_poisoned_memory_and_meta_device(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = make(**fields)
    expected = model(IDX, attention_mask=MASK).logits
    model.save_pretrained(tmp_path)
    with poison():
        loaded = NeoBERTLMHead.from_pretrained(tmp_path)
        classifier = NeoBERTForSequenceClassification.from_pretrained(tmp_path)
    assert torch.allclose(loaded(IDX, attention_mask=MASK).logits, expected, atol=1e-5)
    assert classifier(IDX).logits.isfinite().all()
    with torch.device("meta"):
        empty = NeoBERTLMHead(NeoBERTConfig(**{**SIZES, **fields}))
        inputs = {"input_ids": IDX, "attention_mask": MASK.float(), "position_ids": torch.arange(7, device="cpu")[None]}
        logits = empty(**{name: tensor.to("meta") for name, tensor in inputs.items()}).logits
        assert logits.shape == (2, 7, 37)
    empty.load_state_dict(model.state_dict(), assign=True, strict=True)
    empty.tie_weights()
    assert torch.allclose(empty.eval()(IDX, attention_mask=MASK).logits, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_travels(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make().to(dtype)
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    loaded = NeoBERTLMHead.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == dtype
    assert torch.equal(loaded(IDX).logits, model(IDX).logits)


def test_options_of_loading_count(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    for attention in ("eager", "sdpa"):
        loaded = NeoBERTLMHead.from_pretrained(tmp_path, attn_implementation=attention, dropout=0.25)
        assert loaded.config._attn_implementation == attention
        assert loaded.model.transformer_encoder[0].ffn_dropout.p == 0.25
    with pytest.raises(ValueError, match=r"flash_attention_2|Flash Attention 2|FlashAttention2"):
        NeoBERTLMHead.from_pretrained(tmp_path, attn_implementation="flash_attention_2")
    assert NeoBERTConfig.from_pretrained(tmp_path, max_position_embeddings=9).max_length == 9
    with pytest.raises(ValueError, match=r"hidden_size=16.*num_attention_heads=3"):
        NeoBERTLMHead.from_pretrained(tmp_path, num_attention_heads=3)


def test_a_tokenizer_in_the_auto_map_stays(tmp_path: Path) -> None:
    model = make()
    model.config.auto_map = {"AutoTokenizer": ["tokenizer.T", None]}
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert written == {**AUTO_MAP, "AutoTokenizer": ["tokenizer.T", None]}


REMOTE = """
import sys
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

source, target, reference = sys.argv[1:]
idx, mask, expected = torch.load(reference)
for directory in (source, target):
    model = AutoModelForMaskedLM.from_pretrained(directory, trust_remote_code=True)
    base = AutoModel.from_pretrained(directory, trust_remote_code=True)
    classifier = AutoModelForSequenceClassification.from_pretrained(directory, trust_remote_code=True)
    for each, name in ((model, "LMHead"), (base, ""), (classifier, "ForSequenceClassification")):
        assert type(each).__module__.startswith("transformers_modules"), type(each)
        assert type(each).__name__ == "NeoBERT" + name
    # Not the same bits: another process may have other threads, and weights at other addresses.
    assert torch.allclose(model(idx, attention_mask=mask).logits, expected, rtol=0, atol=1e-5)
    assert model.decoder.weight is model.model.encoder.weight
    model.set_attn_implementation("eager")
    assert torch.allclose(model(idx, attention_mask=mask).logits, expected, rtol=0, atol=1e-5)
    classifier.train()(idx, labels=torch.tensor([0, 1])).loss.backward()
    if directory == source:
        base.save_pretrained(target + "-base")
        classifier.save_pretrained(target + "-classifier")
        model.save_pretrained(target)
for kind, auto in (("base", AutoModel), ("classifier", AutoModelForSequenceClassification)):
    auto.from_pretrained(target + "-" + kind, trust_remote_code=True)(idx)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
assert "neobert" not in CONFIG_MAPPING
assert not any(name.startswith(("reference_models", "harness")) for name in sys.modules)
"""


@rope_and_learned
def test_remote_code_travels(tmp_path: Path, fields: dict[str, Any]) -> None:
    """From any directory, with no import of this repository, and on from there."""
    model = make(**fields)
    source, target, reference = (tmp_path / name for name in ("source", "target", "reference.pt"))
    model.save_pretrained(source)
    torch.save((IDX, MASK, model(IDX, attention_mask=MASK).logits.detach()), reference)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    (tmp_path / "elsewhere").mkdir()
    run = subprocess.run(
        [sys.executable, "-c", REMOTE, *map(str, (source, target, reference))],
        cwd=tmp_path / "elsewhere",
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    for directory in (source, target, tmp_path / "target-base", tmp_path / "target-classifier"):
        assert {path.name for path in directory.glob("*.py")} == CODE
        assert json.loads((directory / "config.json").read_text())["auto_map"] == AUTO_MAP


# Configuration


@pytest.mark.parametrize("max_length", [16, 20, 1024])
def test_configuration_round_trip(tmp_path: Path, max_length: int) -> None:
    """20 is what 4.57 takes for the default of a generation parameter of this name."""
    config = NeoBERTConfig(**{**SIZES, "max_length": max_length}, dropout=0.1, rope=False, pad_token_id=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["tie_word_embeddings"] is True
    assert written["max_length"] == written["max_position_embeddings"] == max_length
    assert "dropout_prob" not in written
    for again in (
        NeoBERTConfig.from_pretrained(tmp_path),
        NeoBERTConfig.from_dict(json.loads(config.to_json_string(use_diff=False))),
        NeoBERTConfig(**written),
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
    ):
        assert (again.max_length, again.dropout, again.rope, again.pad_token_id) == (max_length, 0.1, False, 3)
        ignored = {"auto_map", "architectures"}
        assert again.to_diff_dict().keys() - ignored == config.to_diff_dict().keys() - ignored
        again.save_pretrained(tmp_path / "again")
        assert json.loads((tmp_path / "again" / "config.json").read_text()) == written


def test_names_of_one_field() -> None:
    config = NeoBERTConfig(max_position_embeddings=77, dropout_prob=0.2)
    assert config.max_length == config.max_position_embeddings == 77
    assert config.dropout == config.dropout_prob == 0.2
    assert NeoBERTConfig(max_length=77).max_position_embeddings == 77
    assert NeoBERTConfig(max_length=8, max_position_embeddings=8).max_length == 8
    config.max_position_embeddings = 9
    assert config.max_length == 9


def test_defaults_are_upstreams() -> None:
    config, theirs = NeoBERTConfig(), original.NeoBERTConfig()
    differing = {name: value for name, value in vars(theirs).items() if getattr(config, name) != value}
    assert differing == {"vocab_size": 32064}
    assert (config.vocab_size, config.num_labels, config.classifier_dropout) == (30522, 2, 0.1)
    assert config.flash_attention is False
    assert (config.bos_token_id, config.eos_token_id) == (None, None)
    assert NeoBERTConfig(hidden_act="SwiGLU").hidden_act == "swiglu"
    assert NeoBERTConfig(hidden_act="GELU", flash_attention=True, attn_backend="flash_attn_varlen").flash_attention


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layer": 3}, r"num_hidden_layer=3.*num_hidden_layers\?"),
        ({"norm_epsilon": 1}, r"norm_epsilon=1.*norm_eps\?"),
        ({"model_type": "bert"}, "type 'bert', expected 'neobert'"),
        ({"max_length": 8, "max_position_embeddings": 16}, "max_length=8 and max_position_embeddings=16"),
        ({"max_length": 1024, "max_position_embeddings": 16}, "max_length=1024 and max_position_embeddings=16"),
        ({"dropout": 0.0, "dropout_prob": 0.1}, r"dropout=0.0 and dropout_prob=0\.1"),
        ({"hidden_size": 16, "num_attention_heads": 3}, "hidden_size=16.*num_attention_heads=3"),
        ({"hidden_size": 9, "num_attention_heads": 3}, "even head dimension.*hidden_size=9.*gives 3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"vocab_size": 3.5}, r"vocab_size=3\.5"),
        ({"num_attention_heads": True}, "num_attention_heads=True"),
        ({"dropout": 1.5}, r"dropout=1\.5"),
        ({"classifier_dropout": -1}, "classifier_dropout=-1"),
        ({"norm_eps": -1e-5}, "norm_eps=-1e-05"),
        ({"rope": 1}, "rope=1"),
        ({"hidden_act": "relu"}, "hidden_act='relu'.*swiglu, gelu"),
        ({"hidden_act": None}, "hidden_act=None"),
        ({"attn_backend": "xformers"}, "attn_backend='xformers'.*sdpa"),
        ({"kernel_backend": "triton"}, "kernel_backend='triton'.*auto"),
        ({"ngpt": True}, "ngpt=True.*not supported"),
        ({"pad_token_id": 37, "vocab_size": 37}, "pad_token_id=37.*36"),
        ({"pad_token_id": None}, "pad_token_id=None"),
        ({"dim_head": 32}, "dim_head=32.*64"),
    ],
    ids=str,
)
def test_refused_configurations(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        NeoBERTConfig(**fields)
    assert "\n" not in str(raised.value)


def test_an_odd_head_needs_no_rope() -> None:
    model = NeoBERTLMHead(NeoBERTConfig(**{**SIZES, "hidden_size": 9, "num_attention_heads": 3}, rope=False))
    assert model(IDX).logits.shape == (2, 7, 37)


def test_keys_of_the_library_and_of_upstream_are_accepted() -> None:
    config = NeoBERTConfig(
        **SIZES,
        architectures=["NeoBERTLMHead"],
        attn_implementation="eager",
        auto_map={},
        dim_head=8,
        id2label={0: "a", 1: "b", 2: "c"},
        label2id={"a": 0, "b": 1, "c": 2},
        kwargs={"architectures": ["NeoBERTLMHead"]},
        model_type="neobert",
        output_hidden_states=True,
        problem_type="regression",
        pruned_heads={},
        quantization_config={},
        return_dict=True,
        temperature=0.5,
        torch_dtype="float32",
        torchscript=False,
        transformers_version="4.57.6",
        use_cache=False,
        _commit_hash=None,
    )
    assert config.num_labels == 3
    assert "kwargs" not in config.to_dict()


def test_declares_what_the_library_asks_for() -> None:
    assert NeoBERTLMHead._no_split_modules == ["NeoBERTBlock"]
    for cls in (NeoBERT, NeoBERTLMHead, NeoBERTForSequenceClassification):
        model = make(cls)
        assert isinstance(model, PreTrainedModel)
        assert model.main_input_name == "input_ids"
        assert not model.can_generate()
        assert model.get_input_embeddings() is model.base_model.encoder
        assert list(model.buffers()) == []
    model = make()
    assert model.get_output_embeddings() is model.decoder
    # The Trainer's rule: norms and offsets do not decay.
    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decayed = set(get_parameter_names(model, [torch.nn.LayerNorm], patterns))
    assert {name for name, parameter in model.named_parameters() if parameter.ndim == 2} <= decayed
    assert not {name for name, parameter in model.named_parameters() if parameter.ndim == 1} & decayed


def test_frozen_models_give_their_inputs_gradients() -> None:
    model = make()
    model.requires_grad_(False)
    model.enable_input_require_grads()
    assert model(IDX).logits.requires_grad
    model.disable_input_require_grads()
    assert not model(IDX).logits.requires_grad
