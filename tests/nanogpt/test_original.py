# SPDX-License-Identifier: Apache-2.0
"""The built-in nanoGPT against vectors that the upstream code produced, and against its description."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from reference_models.nanogpt.original import GPT, GPTConfig

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden" / "nanogpt"
FILES = sorted(GOLDEN.glob("*.safetensors"))


class Vectors:
    """One golden file: its tensors, its metadata, and the model with its weights."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            self.metadata: dict[str, str] = file.metadata()
            self.tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def json(self, name: str) -> Any:
        return json.loads(self.metadata[name])

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def model(self, dtype: torch.dtype = torch.float64) -> GPT:
        weights = self.under("weights/")
        weights |= {alias: weights[name] for alias, name in self.json("tie_aliases").items()}
        model = GPT(GPTConfig(**self.json("config"))).to(dtype)
        model.load_state_dict(weights, strict=True)
        return model.eval()


def files_with(key: str) -> list[Path]:
    """Return the golden files whose metadata has a key, so that a test is never empty without notice."""
    found = [path for path in FILES if key in Vectors(path).metadata]
    assert found, f"no golden file has {key}"
    return found


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.pow(2).mean().sqrt()).item()


def named(paths: list[Path]) -> Any:
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def test_all_four_vectors_are_here() -> None:
    assert len(FILES) == 4


@named(FILES)
def test_forward(path: Path) -> None:
    golden = Vectors(path)
    model = golden.model()
    seen: dict[str, Tensor] = {}
    model.transformer.drop.register_forward_hook(lambda m, i, o: seen.update(embedding=o))
    model.transformer.ln_f.register_forward_hook(lambda m, i, o: seen.update(final_norm=o))
    for index, block in enumerate(model.transformer.h):
        block.register_forward_hook(lambda m, i, o, index=index: seen.update({f"block.{index}": o}))

    seen["logits"], seen["loss"] = model(golden["inputs/idx"], golden["inputs/targets"])

    expected = golden.under("outputs_f64/")
    expected.pop("adamw_losses", None)
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(seen[name], value) < 1e-12, name


@named(FILES)
def test_without_targets_only_the_last_position(path: Path) -> None:
    golden = Vectors(path)
    logits, loss = golden.model()(golden["inputs/idx"])
    assert loss is None
    assert relative_error(logits, golden["outputs_f64/logits"][:, [-1]]) < 1e-12


@named([path for path in FILES if Vectors(path).under("grads_f64/")])
def test_gradients(path: Path) -> None:
    golden = Vectors(path)
    model = golden.model()
    _, loss = model(golden["inputs/idx"], golden["inputs/targets"])
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    expected = golden.under("grads_f64/")
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(gradients[name], value) < 1e-12, name


@named(files_with("adamw"))
def test_weights_after_optimiser_steps(path: Path) -> None:
    golden = Vectors(path)
    model, run = golden.model(), golden.json("adamw")
    optimizer = model.configure_optimizers(run["weight_decay"], run["lr"], tuple(run["betas"]), "cpu")
    losses = []
    for idx, targets in zip(golden["inputs/adamw_idx"], golden["inputs/adamw_targets"], strict=True):
        optimizer.zero_grad()
        _, loss = model(idx, targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert relative_error(torch.stack(losses), golden["outputs_f64/adamw_losses"]) < 1e-12
    weights = dict(model.named_parameters())
    expected = golden.under("adamw3_f64/")
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        found = weights[name].detach()
        if name.endswith("attn.c_attn.bias"):
            # Softmax cannot see a key's bias: its gradient is rounding noise, which Adam blows up to a step of 1e-11.
            query, key, _ = found.chunk(3)
            assert relative_error(key, value.chunk(3)[1]) < 1e-8, name
            found, value = torch.cat((query, found.chunk(3)[2])), torch.cat((value.chunk(3)[0], value.chunk(3)[2]))
        assert relative_error(found, value) < 1e-12, name


@named(files_with("generation"))
def test_generation(path: Path) -> None:
    golden = Vectors(path)
    model, run = golden.model(torch.float32), golden.json("generation")
    prompt, count = golden["inputs/prompt"], run["max_new_tokens"]
    assert torch.equal(model.generate(prompt, count, top_k=1), golden["outputs_f32/generate.greedy"])
    torch.manual_seed(run["seed"])
    sampled = model.generate(prompt, count, temperature=run["temperature"], top_k=run["top_k"])
    assert torch.equal(sampled, golden["outputs_f32/generate.sampled"])


def tiny(**fields: Any) -> GPT:
    torch.manual_seed(0)
    sizes = {"block_size": 8, "vocab_size": 11, "n_layer": 2, "n_head": 2, "n_embd": 8}
    return GPT(GPTConfig(**(sizes | fields)))


def test_configuration_defaults_in_order() -> None:
    assert list(vars(GPTConfig()).items()) == [
        ("block_size", 1024),
        ("vocab_size", 50304),
        ("n_layer", 12),
        ("n_head", 12),
        ("n_embd", 768),
        ("dropout", 0.0),
        ("bias", True),
    ]


@pytest.mark.parametrize(("bias", "entries"), [(False, 6 * 3 + 4), (True, 12 * 3 + 5)])
def test_tensors_are_upstreams(bias: bool, entries: int) -> None:
    model = tiny(n_layer=3, bias=bias)
    state = model.state_dict()
    assert len(state) == entries
    assert len(list(model.parameters())) == entries - 1
    assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()
    assert list(state)[:3] == ["transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.ln_1.weight"]
    assert model.get_num_params(non_embedding=False) - model.get_num_params() == 8 * 8


def test_initialisation_draws_in_upstreams_order() -> None:
    model = tiny(n_layer=1, vocab_size=400, n_embd=64)
    # The same draws by hand: torch's own when the modules are made, then all weights, then c_proj once more.
    torch.manual_seed(0)
    for rows in (400, 8):
        torch.randn(rows, 64)
    for out_features, in_features in ((192, 64), (64, 64), (256, 64), (64, 256), (400, 64)):
        torch.nn.Linear(in_features, out_features, bias=out_features != 400)
    drawn = {}
    for name, shape in (
        ("transformer.wte.weight", (400, 64)),
        ("transformer.wpe.weight", (8, 64)),
        ("transformer.h.0.attn.c_attn.weight", (192, 64)),
        ("transformer.h.0.attn.c_proj.weight", (64, 64)),
        ("transformer.h.0.mlp.c_fc.weight", (256, 64)),
        ("transformer.h.0.mlp.c_proj.weight", (64, 256)),
        ("transformer.wte.weight", (400, 64)),
    ):
        drawn[name] = torch.empty(shape).normal_(0.0, 0.02)
    for name in ("transformer.h.0.attn.c_proj.weight", "transformer.h.0.mlp.c_proj.weight"):
        drawn[name] = torch.empty(drawn[name].shape).normal_(0.0, 0.02 / 2**0.5)
    for name, value in drawn.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_ignored_targets_and_their_absence() -> None:
    model = tiny().double()
    idx = torch.tensor([[1, 2, 3, 4]])
    logits, loss = model(idx, torch.tensor([[5, -1, 6, -1]]))
    log_probabilities = logits[0].log_softmax(-1)
    assert loss.item() == pytest.approx(-(log_probabilities[0, 5] + log_probabilities[2, 6]).item() / 2, rel=1e-12)
    assert model(idx, torch.full_like(idx, -1))[1].isnan()


def test_dropout_only_while_training() -> None:
    model = tiny(dropout=0.5)
    idx = torch.tensor([[1, 2, 3]])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


def test_top_k_keeps_ties_and_temperature_divides() -> None:
    model = tiny().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # all logits equal: the threshold of top_k cuts nothing off
    torch.manual_seed(1)
    tied = model.generate(torch.zeros(200, 1, dtype=torch.long), 1, temperature=0.1, top_k=1)
    assert tied[:, 1].unique().numel() == 11


def test_crop_block_size() -> None:
    model = tiny().double().eval()
    idx = torch.arange(5)[None]
    before = model(idx)[0]
    model.crop_block_size(5)
    assert model.config.block_size == 5
    assert model.transformer.wpe.weight.shape == (5, 8)
    assert torch.equal(model(idx)[0], before)
    with pytest.raises(ValueError, match=r"6 tokens.*block_size=5"):
        model(torch.arange(6)[None])
    with pytest.raises(ValueError, match=r"block_size=5 to 6"):
        model.crop_block_size(6)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match=r"n_embd=8.*n_head=3"):
        tiny(n_head=3)


def test_optimizer_groups() -> None:
    model = tiny()
    optimizer = model.configure_optimizers(0.3, 1e-2, (0.8, 0.9), "cpu")
    decayed, kept = optimizer.param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    assert decayed["betas"] == (0.8, 0.9)
    assert all(parameter.dim() >= 2 for parameter in decayed["params"])
    assert all(parameter.dim() < 2 for parameter in kept["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("from_directory", [False, True])
def test_gpt2_import(from_directory: bool, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_positions=16, vocab_size=29, n_layer=2, n_head=2, n_embd=16, activation_function="gelu", initializer_range=0.3
    )
    gpt2 = GPT2LMHeadModel(config).eval()
    if from_directory:
        gpt2.save_pretrained(tmp_path)
        ours = GPT.from_pretrained(tmp_path, {"dropout": 0.1})
    else:
        ours = GPT.from_gpt2(gpt2, {"dropout": 0.1})
    assert ours.config == GPTConfig(16, 29, 2, 2, 16, 0.1, True)
    idx = torch.randint(29, (2, 16))
    logits, _ = ours.double().eval()(idx, idx)
    # With the exact GELU on both sides a forgotten transpose is all that could make a difference.
    assert relative_error(logits, gpt2.double()(idx).logits) < 1e-12
    with pytest.raises(ValueError, match="n_layer"):
        GPT.from_gpt2(gpt2, {"n_layer": 1})
