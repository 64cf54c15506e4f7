# SPDX-License-Identifier: Apache-2.0
"""Both original nanoMoEs against vectors that the upstream code produced, and against their description."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import families
from harness.errors import DescriptionError
from harness.families import Family, LossConvention
from harness.golden import read_golden, record, verify
from reference_models.nanomoe import ancestor, original, shared
from reference_models.nanomoe import golden as golden_files
from reference_models.nanomoe.ancestor import GPT as Ancestor
from reference_models.nanomoe.original import GPT

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden" / "nanomoe"
FILES = sorted(path.name for path in GOLDEN.glob("*.safetensors"))
ALL_LOSSES = {
    "use_aux_loss": True,
    "use_router_z_loss": True,
    "use_router_ortho_loss": True,
    "use_experts_ortho_loss": True,
    "use_gate_output_loss": True,
}
BOTH = pytest.mark.parametrize("model_class", [GPT, Ancestor], ids=["original", "ancestor"])


def tiny(model_class: type = GPT, *, seed: int = 0, **fields: Any) -> Any:
    """A float64 model in evaluation whose weights are drawn wide enough that each of them matters."""
    sizes: dict[str, Any] = {"block_size": 16, "vocab_size": 23, "n_layer": 2, "n_head": 2, "n_embd": 8}
    torch.manual_seed(seed)
    module = original if issubclass(model_class, GPT) else ancestor
    model = model_class(module.GPTConfig(**(sizes | {"n_exp": 4, "stride": 1} | fields))).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "ln_" in name and name.endswith("weight") else 0.0, 0.25)
    return model


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(23, shape, generator=torch.Generator().manual_seed(seed))


def experts_of(model: Any, layer: int = 0) -> Any:
    return model.transformer.h[layer].mlp


# Vectors of the upstream code


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both families, with no more than golden files need."""
    monkeypatch.setattr(families, "_registered", {})

    def groups(module: Any, weight_decay: float) -> list[dict[str, Any]]:
        options = module.configure_optimizers(weight_decay, 1e-3, (0.9, 0.95), "cpu").param_groups
        return [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in options]

    for name, module in {"nanomoe": original, "nanomoe_ancestor": ancestor}.items():
        family = Family(
            name=name,
            features=frozenset({"logits", "loss", "generation"}),
            configurations=lambda: pytest.fail("a golden file needs no drawn configuration"),
            original=f"{module.__name__}:GPT",
            build_original=lambda kind, fields, module=module: kind(module.GPTConfig(**fields)).eval(),
            run_original=lambda *_: pytest.fail("golden files of this family are run by a function of its own"),
            maximum_length="block_size",
            loss=LossConvention(labels="preshifted", ignore_index=-1),
            generate_original=lambda model, prompt, **options: model.generate(prompt, **options),
            parameter_groups=groups,
            golden=golden_files.golden,
            golden_bounds=golden_files.bounds,
        )
        families.register_family(family)
    return


def test_all_nine_vectors_are_here() -> None:
    assert len(FILES) == 9


@pytest.mark.parametrize("file", FILES)
def test_vectors(registered: None, file: str) -> None:
    (result,) = verify(GOLDEN / file)
    assert (result.status, result.reason) == ("verified", "")
    routing = {name for name in result.bounds if name.endswith(("indices", "rank", "keep", "capacity"))}
    assert {result.bounds[name] for name in routing} <= {0.0}
    assert bool(routing) == ("dense" not in file)


TERMS = {"loss_term.aux_loss": 1e-6, "loss_term.experts_ortho_loss": 1e-6}


@pytest.mark.parametrize(
    ("file", "looser"),
    [
        # Upstream goes through float32 for two of the losses, where they are computed at all.
        ("nanomoe_qwen_k3_e6_start1", {}),
        ("nanomoe_dense_nexp1", {}),
        ("nanomoe_ancestor_k2_eval_auxz", {"loss": 1e-7, "router.0.aux_loss": 1e-6, "router.2.aux_loss": 1e-6}),
        ("nanomoe_relu2_train_auxz_adamw", TERMS | {"loss": 1e-7, "adamw_losses": 1e-7, "router.1.aux_loss": 1e-6}),
    ],
)
def test_bounds_are_those_of_rounding_but_behind_float32(registered: None, file: str, looser: dict[str, float]) -> None:
    (result,) = verify(GOLDEN / f"{file}.safetensors")
    floats = {name: bound for name, bound in result.bounds.items() if "_f64/" in name and bound > 0}
    outputs = {name.removeprefix("outputs_f64/"): bound for name, bound in floats.items() if "outputs" in name}
    assert {name: bound for name, bound in outputs.items() if bound != 1e-12} == looser
    weights = {bound for name, bound in floats.items() if "outputs" not in name}
    assert weights == ({1e-7} if "adamw" in file else set())


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(
    ("family", "module", "fields"),
    [
        ("nanomoe", original, {"use_qwen3_moe_mlp": True, **ALL_LOSSES}),
        ("nanomoe_ancestor", ancestor, {"use_aux_loss": True}),
    ],
)
def test_recording(
    registered: None, tmp_path: Path, mode: Any, family: str, module: Any, fields: dict[str, Any]
) -> None:
    sizes = {"block_size": 9, "vocab_size": 23, "n_layer": 2, "n_head": 2, "n_embd": 8, "n_exp": 3}
    out = tmp_path / "own.safetensors"
    # Fields that are not given are the original's defaults.
    record(f"{module.__name__}:GPT", out, fields=sizes | fields, family=family, mode=mode, adamw_steps=1)
    (result,) = verify(out)
    assert (result.status, result.reason) == ("verified", "")
    stored = {name.removeprefix("outputs_f64/") for name in result.errors if name.startswith("outputs_f64/router.0.")}
    layer = {"logits", "topk_indices", "rank", "keep", "probs_kept", "capacity", "moe_output"}
    if module is ancestor:
        layer |= {"used_capacity", "aux_loss"}
    elif mode == "train":
        layer |= {"aux_loss", "z_loss", "router_ortho_loss", "experts_ortho_loss", "gate_output_loss"}
    assert stored == {f"router.0.{name}" for name in layer}
    with pytest.raises(DescriptionError, match="its config is not that of"):
        golden_files.bounds(dataclasses.replace(read_golden(out), fields={"depth": 2}))


def test_a_file_without_targets(registered: None) -> None:
    golden = read_golden(GOLDEN / "nanomoe_qwen_k2_e5_drops.safetensors")
    produced = golden_files.golden(dataclasses.replace(golden, inputs={"idx": golden.inputs["idx"]}))
    torch.testing.assert_close(produced["outputs_f64/logits"], golden.stored["outputs_f64/logits"])
    assert not [name for name in produced if "loss" in name]


def test_a_router_of_another_kind_is_named(registered: None) -> None:
    class Silent(shared.Router):
        def forward(self, x: Tensor) -> Any:
            return tuple(super().forward(x))

    class Other(GPT):
        def __init__(self, config: original.GPTConfig) -> None:
            super().__init__(config)
            for block in self.transformer.h:
                block.mlp.router.__class__ = Silent

    path = GOLDEN / "nanomoe_relu2_k2_nodrop.safetensors"
    (result,) = verify(path, original_override={"nanomoe": Other})
    assert result.status == "failed"
    assert "the router returns tuple" in result.reason


# Configuration and state dict


def test_configuration_defaults_in_order() -> None:
    sizes = [("block_size", 1024), ("vocab_size", 50304), ("n_layer", 12), ("n_head", 12), ("n_embd", 768)]
    assert list(vars(original.GPTConfig()).items()) == [
        *sizes,
        ("bias", True),
        ("n_exp", 1),
        ("top_k", 2),
        ("use_aux_loss", False),
        ("use_router_z_loss", False),
        ("use_router_ortho_loss", False),
        ("use_experts_ortho_loss", True),
        ("use_gate_output_loss", True),
        ("use_noisy_top_k", False),
        ("aux_loss_weight", 0.01),
        ("router_z_loss_weight", 0.001),
        ("router_ortho_loss_weight", 0.01),
        ("router_ortho_neg_corr_weight", 1),
        ("experts_ortho_loss_weight", 0.01),
        ("gate_output_loss_weight", 0.01),
        ("train_capacity", 1.25),
        ("eval_capacity", 2.0),
        ("min_capacity", 4),
        ("stride", 1),
        ("moe_start_layer", 0),
        ("use_switch_tfm_init", False),
        ("switch_tfm_init_scale", 1.0),
        ("router_use_full_prec", False),
        ("use_qwen3_moe_mlp", False),
    ]
    assert list(vars(ancestor.GPTConfig()).items()) == [
        *sizes,
        ("dropout", 0.0),
        ("bias", True),
        ("n_exp", 1),
        ("top_k", 2),
        ("use_aux_loss", False),
        ("use_router_z_loss", False),
        ("use_noisy_top_k", False),
        ("aux_loss_weight", 0.01),
        ("router_z_loss_weight", 0.001),
        ("train_capacity", 1.25),
        ("eval_capacity", 2.0),
        ("min_capacity", 4),
        ("stride", 2),
        ("use_switch_tfm_init", False),
        ("switch_tfm_init_scale", 1.0),
        ("router_use_full_prec", False),
    ]


@pytest.mark.parametrize(
    ("model_class", "fields", "placement"),
    [
        (Ancestor, {"n_layer": 4, "stride": 2}, "MDMD"),
        (GPT, {"n_layer": 4, "stride": 2}, "DMDM"),
        (GPT, {"n_layer": 4, "stride": 1, "moe_start_layer": 2}, "DDMM"),
        (GPT, {"n_layer": 7, "stride": 3, "moe_start_layer": 3}, "DDDDDMD"),
        (Ancestor, {"n_layer": 3, "stride": 1, "n_exp": 1}, "DDD"),
        (GPT, {"n_layer": 3, "stride": 1, "n_exp": 1}, "DDD"),
    ],
)
def test_layer_placement(model_class: type, fields: dict[str, Any], placement: str) -> None:
    model = tiny(model_class, **fields)
    assert "".join("M" if hasattr(block.mlp, "experts") else "D" for block in model.transformer.h) == placement


def state_of(model: Any, layer: int) -> dict[str, tuple[int, ...]]:
    prefix = f"transformer.h.{layer}."
    state = model.state_dict().items()
    return {name.removeprefix(prefix): tuple(value.shape) for name, value in state if name.startswith(prefix)}


def test_tensors_of_plain_experts() -> None:
    model = tiny(use_noisy_top_k=True, moe_start_layer=1)
    assert list(state_of(model, 1).items()) == [
        ("ln_1.weight", (8,)),
        ("attn.c_attn.weight", (24, 8)),
        ("attn.c_attn.bias", (24,)),
        ("attn.c_proj.weight", (8, 8)),
        ("attn.c_proj.bias", (8,)),
        ("ln_2.weight", (8,)),
        ("mlp.router.w_g.weight", (4, 8)),
        ("mlp.router.w_noise.weight", (4, 8)),
        ("mlp.experts.c_fc", (4, 8, 32)),
        ("mlp.experts.c_proj", (4, 32, 8)),
        ("mlp.experts.fc_bias", (4, 1, 32)),
        ("mlp.experts.proj_bias", (4, 1, 8)),
    ]
    dense = [name for name in state_of(model, 0) if name.startswith("mlp")]
    assert dense == ["mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"]
    assert "transformer.ln_f.bias" not in model.state_dict()
    assert model.lm_head.weight is model.transformer.wte.weight


def test_tensors_of_swiglu_experts_and_of_the_ancestor() -> None:
    swiglu = [name for name in state_of(tiny(use_qwen3_moe_mlp=True), 0) if name.startswith("mlp")]
    assert swiglu == ["mlp.router.w_g.weight", "mlp.experts.gate_proj", "mlp.experts.c_fc", "mlp.experts.c_proj"]
    norms = {name for name in state_of(tiny(Ancestor), 0) if name.startswith("ln")}
    assert norms == {"ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"}
    without = tiny(Ancestor, bias=False).state_dict()
    assert not [name for name in without if "bias" in name]


@BOTH
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_head": 3}, r"n_embd=8.*n_head=3"),
        ({"top_k": 0}, r"top_k=0.*1 to n_exp=4"),
        ({"top_k": 5}, r"top_k=5.*1 to n_exp=4"),
        ({"n_exp": 0}, "n_exp=0"),
        ({"stride": 0}, "stride=0"),
        ({"min_capacity": 0}, "min_capacity=0"),
        ({"train_capacity": 0.0}, r"train_capacity=0\.0"),
        ({"eval_capacity": -1}, "eval_capacity=-1"),
        ({"eval_capacity": math.nan}, "eval_capacity=nan"),
        ({"vocab_size": None}, "vocab_size"),
    ],
)
def test_configurations_without_meaning(model_class: type, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        tiny(model_class, **fields)
    assert "\n" not in str(caught.value)


def test_more_configurations_without_meaning() -> None:
    with pytest.raises(ValueError, match="moe_start_layer=-1"):
        tiny(moe_start_layer=-1)
    assert tiny(n_exp=1, top_k=7)(tokens(1, 3))[0].shape == (1, 1, 23), "without experts nothing is chosen"


# Routing


def route(logits: Tensor, **fields: Any) -> shared.Routing:
    """What a router makes of tokens whose logits are these (N, E)."""
    n_exp = logits.shape[1]
    config = original.GPTConfig(n_embd=n_exp, n_head=1, n_exp=n_exp, **fields)
    router = shared.Router(config, noisy_evaluation=False).double().eval()
    with torch.no_grad():
        router.w_g.weight.copy_(torch.eye(n_exp))
    routing: shared.Routing = router(logits.double())
    return routing


def test_routing_table() -> None:
    logits = [[2, 1, 0, -1], [2, 0, 1, -1], [0, 3, 1, -2], [3, 2, 1, 0], [1, 2, 0, -1], [0, 1, 2, -1]]
    routing = route(torch.tensor(logits), top_k=2, eval_capacity=0.5, min_capacity=1)
    assert routing.capacity == 2
    assert routing.indices.tolist() == [[0, 1], [0, 2], [1, 2], [0, 1], [1, 0], [2, 1]]
    assert routing.ranks.tolist() == [[0, 2], [1, 1], [0, 2], [2, 3], [1, 3], [0, 4]]
    near, far = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))
    kept = [[near, 0], [near, 1 - near], [far, 0], [0, 0], [near, 0], [near, 0]]
    expected = torch.tensor(kept, dtype=torch.float64)
    torch.testing.assert_close(routing.weights.masked_fill(~routing.keep, 0), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("count", "train", "evaluation"),
    [(1, 4, 4), (7, 4, 4), (16, 6, 8), (31, 10, 16), (80, 26, 40), (100, 32, 50), (1000, 312, 500)],
)
def test_capacity_table(count: int, train: int, evaluation: int) -> None:
    config = original.GPTConfig(n_exp=8, top_k=2)
    assert shared.expert_capacity(config, count, training=True) == train
    assert shared.expert_capacity(config, count, training=False) == evaluation


def test_capacity_rounds_up_to_even_before_the_minimum() -> None:
    config = original.GPTConfig(n_exp=4, top_k=1, eval_capacity=1.0, min_capacity=3)
    assert [shared.expert_capacity(config, count, training=False) for count in (4, 12, 20)] == [3, 4, 6]


@pytest.mark.parametrize(("top_k", "n_exp"), [(1, 3), (2, 5), (3, 3)])
def test_ranks_follow_the_order_of_choices(top_k: int, n_exp: int) -> None:
    torch.manual_seed(0)
    indices = torch.randn(40, n_exp).topk(top_k).indices
    queues = [0] * n_exp
    expected = torch.full_like(indices, -1)
    for choice in range(top_k):
        for token in range(40):
            expert = int(indices[token, choice])
            expected[token, choice] = queues[expert]
            queues[expert] += 1
    assert torch.equal(shared.queue_ranks(indices, n_exp), expected)


@pytest.mark.parametrize(
    ("model_class", "fields"),
    [
        (GPT, {}),
        (GPT, {"bias": False, "top_k": 1}),
        (GPT, {"use_qwen3_moe_mlp": True, "top_k": 3}),
        (Ancestor, {}),
        (Ancestor, {"bias": False, "top_k": 1}),
    ],
)
def test_experts_token_by_token(model_class: type, fields: dict[str, Any]) -> None:
    layer = experts_of(tiny(model_class, eval_capacity=0.5, min_capacity=1, **fields))
    torch.manual_seed(3)
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    routing = layer.router(x.flatten(0, 1))
    assert (~routing.keep).any(), "without drops this would show less"
    experts, expected = layer.experts, torch.zeros(18, 8, dtype=torch.float64)
    for token, choice in routing.keep.nonzero().tolist():
        expert, row = int(routing.indices[token, choice]), x.flatten(0, 1)[token]
        inside = row @ experts.c_fc[expert]
        if "use_qwen3_moe_mlp" in fields:
            inside = inside * torch.nn.functional.silu(row @ experts.gate_proj[expert])
        else:
            inside = inside if experts.fc_bias is None else inside + experts.fc_bias[expert, 0]
            inside = torch.nn.functional.gelu(inside) if model_class is Ancestor else inside.clamp(min=0) ** 2
        given = inside @ experts.c_proj[expert]
        if getattr(experts, "proj_bias", None) is not None:
            given = given + experts.proj_bias[expert, 0]
        expected[token] += routing.weights[token, choice] * given
    output, losses = layer(x)
    torch.testing.assert_close(output.flatten(0, 1), expected, rtol=1e-12, atol=1e-13)
    assert losses == {}


def test_a_token_that_all_experts_drop_keeps_its_hidden_states() -> None:
    layer = experts_of(tiny(eval_capacity=0.1, min_capacity=1))
    x = torch.randn(1, 16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    keep = layer.router(x[0]).keep.any(dim=1)
    assert 0 < int(keep.sum()) < 16
    assert torch.equal(layer(x)[0][0].abs().sum(dim=1) > 0, keep)


# Losses


def test_load_balancing_and_z_loss_in_closed_form() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 1.0]])
    routing = route(logits, top_k=2)
    near = 1 / (1 + math.exp(-1))
    weight = [near / 2, (1 - near + near) / 2, (1 - near) / 2]
    slots = [1 / 2, 2 / 2, 1 / 2]
    expected = 3 * sum(p * f for p, f in zip(weight, slots, strict=True))
    assert shared.load_balancing_loss(routing).item() == pytest.approx(expected, rel=1e-14)
    sums = [math.log(sum(math.exp(value) for value in row)) for row in logits.tolist()]
    assert shared.z_loss(routing).item() == pytest.approx((sums[0] ** 2 + sums[1] ** 2) / 2, rel=1e-14)


def test_a_balanced_router_has_load_balancing_loss_k() -> None:
    cycle = torch.tensor([[3.0, 2, 1, 0]]).expand(4, 4)
    turned = torch.stack([row.roll(place) for place, row in enumerate(cycle)])
    for top_k in (1, 2, 3):
        assert shared.load_balancing_loss(route(turned, top_k=top_k)).item() == pytest.approx(top_k, rel=1e-14)


def test_load_balancing_counts_before_capacity() -> None:
    logits = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    scarce = route(logits, top_k=2, eval_capacity=0.2, min_capacity=1)
    ample = route(logits, top_k=2, eval_capacity=9.0)
    assert not scarce.keep.all() and ample.keep.all()
    assert torch.equal(shared.load_balancing_loss(scarce), shared.load_balancing_loss(ample))


def test_ortho_losses_in_closed_form() -> None:
    torch.manual_seed(0)
    w_g, gate = torch.randn(3, 4).double(), torch.randn(3, 4, 5).double()
    expected = 0.0
    for expert in range(3):
        for column in range(5):
            product = float(w_g[expert] @ gate[expert, :, column])
            expected += (1 if product >= 0 else 0.25) * product**2
    assert original.router_ortho_loss(w_g, gate, 0.25).item() == pytest.approx(expected, rel=1e-12)

    flat, pairs = gate.flatten(1), 0.0
    for first in range(3):
        for second in range(first + 1, 3):
            pairs += float(torch.cosine_similarity(flat[first], flat[second], dim=0)) ** 2
    assert original.experts_ortho_loss(gate).item() == pytest.approx(pairs / 9, rel=1e-12)

    buffer = torch.randn(3, 2, 4).double()
    buffer[0, 1] = 0  # nobody is there
    rows = torch.bmm(buffer, gate).square().mean(dim=-1).flatten()
    assert original.gate_output_loss(buffer, gate).item() == pytest.approx(float(rows.sum()) / 5, rel=1e-12)


def test_gradients_of_the_gate_losses_are_scaled_on_one_side() -> None:
    torch.manual_seed(0)
    w_g, gate, buffer = (torch.randn(*shape).double() for shape in ((3, 4), (3, 4, 5), (3, 2, 4)))
    tenth = float(torch.tensor(0.1, dtype=torch.float32))
    assert tenth != 0.1

    def check(found: Tensor, plain: Tensor, given: list[Tensor], scales: list[float]) -> None:
        for own, full, scale in zip(
            torch.autograd.grad(found, given), torch.autograd.grad(plain, given), scales, strict=True
        ):
            torch.testing.assert_close(own, full * scale, rtol=1e-14, atol=1e-15)

    given = [w_g.requires_grad_(), gate.requires_grad_()]
    plain = torch.einsum("ed,edm->em", w_g, gate).square().sum()
    check(original.router_ortho_loss(w_g, gate, 1), plain, given, [1.0, tenth])
    given = [buffer.requires_grad_(), gate]
    plain = torch.bmm(buffer, gate).square().mean()
    check(original.gate_output_loss(buffer, gate), plain, given, [tenth, 1.0])


def test_total_is_the_weighted_sum_of_terms_over_layers() -> None:
    weights = {f"{name}_weight": 0.5 + place for place, name in enumerate(original.LOSS_TERMS[1:])}
    model = tiny(use_qwen3_moe_mlp=True, **ALL_LOSSES, **weights).train()
    per_layer: list[dict[str, Tensor]] = []
    for block in model.transformer.h:
        block.mlp.register_forward_hook(lambda _module, _inputs, output: per_layer.append(output[1]))
    idx = tokens(2, 9)
    logits, loss, losses = model(idx, idx)
    assert tuple(losses) == original.LOSS_TERMS
    assert not any(term.requires_grad for term in losses.values())
    total = shared.cross_entropy(logits, idx)
    assert torch.equal(losses["ntp_loss"], total)
    for name in original.LOSS_TERMS[1:]:
        assert losses[name].item() == pytest.approx((per_layer[0][name] + per_layer[1][name]).item(), rel=1e-14)
        assert losses[name] > 0
        total = total + weights[f"{name}_weight"] * losses[name]
    assert loss.item() == pytest.approx(total.item(), rel=1e-14)


@pytest.mark.parametrize("flag", ALL_LOSSES)
def test_each_loss_has_a_flag(flag: str) -> None:
    model = tiny(use_qwen3_moe_mlp=True, **(dict.fromkeys(ALL_LOSSES, False) | {flag: True})).train()
    _, loss, losses = model(tokens(1, 9), tokens(1, 9))
    on = {name for name, term in losses.items() if term != 0}
    assert on == {"ntp_loss", flag.removeprefix("use_")}
    assert loss != losses["ntp_loss"]


def test_losses_of_gates_are_those_of_swiglu_experts_only() -> None:
    model = tiny(**ALL_LOSSES).train()
    _, loss, losses = model(tokens(1, 9), tokens(1, 9))
    assert {name for name, term in losses.items() if term != 0} == {"ntp_loss", "aux_loss", "router_z_loss"}
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_evaluation_is_pure_cross_entropy_but_for_the_ancestor() -> None:
    on = {"use_aux_loss": True, "use_router_z_loss": True}
    idx = tokens(2, 9)
    model = tiny(use_qwen3_moe_mlp=True, **ALL_LOSSES)
    logits, loss, losses = model(idx, idx)
    assert torch.equal(loss, shared.cross_entropy(logits, idx))
    assert all(term == 0 for name, term in losses.items() if name != "ntp_loss")
    older = tiny(Ancestor, **on, aux_loss_weight=0.5, router_z_loss_weight=0.25)
    terms: list[Tensor] = []
    for block in older.transformer.h:
        block.mlp.router.register_forward_hook(
            lambda _m, _i, routing: terms.append(
                0.5 * shared.load_balancing_loss(routing) + 0.25 * shared.z_loss(routing)
            )
        )
    logits, loss = older(idx, idx)
    assert loss.item() == pytest.approx((shared.cross_entropy(logits, idx) + sum(terms)).item(), rel=1e-14)


@BOTH
def test_the_loss_does_not_depend_on_earlier_calls(model_class: type) -> None:
    on = {"use_aux_loss": True, "use_router_z_loss": True, "min_capacity": 64}
    model, other, idx = tiny(model_class, **on).train(), tiny(model_class, **on).train(), tokens(2, 9)
    before = model(idx, idx)[1]
    model.generate(idx[:, :2], 3)
    other(idx)
    assert torch.equal(model(idx, idx)[1], before)


@BOTH
def test_ignored_targets_and_their_absence(model_class: type) -> None:
    model = tiny(model_class)
    idx = torch.tensor([[1, 2, 3, 4]])
    logits, loss, *_ = model(idx, torch.tensor([[5, -1, 6, -1]]))
    log_probabilities = logits[0].log_softmax(-1)
    assert loss.item() == pytest.approx(-(log_probabilities[0, 5] + log_probabilities[2, 6]).item() / 2, rel=1e-12)
    assert model(idx, torch.full_like(idx, -1))[1].isnan()
    last, none, *_ = model(idx)
    assert none is None
    torch.testing.assert_close(last, logits[:, [-1]], rtol=1e-12, atol=1e-14)


# Modes


def test_noise_acts_in_training_and_for_the_ancestor_always() -> None:
    idx = tokens(1, 9)

    def changes(model: Any) -> bool:
        torch.manual_seed(0)
        return not torch.equal(model(idx)[0], model(idx)[0])

    model, older = tiny(use_noisy_top_k=True), tiny(Ancestor, use_noisy_top_k=True)
    assert (changes(model), changes(older)) == (False, True)
    assert (changes(model.train()), changes(older.train())) == (True, True)
    assert not changes(tiny(Ancestor).train())


def test_noise_is_scaled_by_softplus_of_its_matrix() -> None:
    router = experts_of(tiny(Ancestor, use_noisy_top_k=True)).router
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(7)
    logits = router(x).logits
    torch.manual_seed(7)
    noise = torch.randn(5, 4, dtype=torch.float64) * torch.log1p(torch.exp(x @ router.w_noise.weight.t()))
    torch.testing.assert_close(logits, x @ router.w_g.weight.t() + noise, rtol=1e-12, atol=0)


def test_capacity_is_that_of_the_mode() -> None:
    layer = experts_of(tiny(train_capacity=0.5, eval_capacity=2.0, min_capacity=1))
    x = torch.randn(16, 8, dtype=torch.float64)
    assert layer.router(x).capacity == 16
    assert layer.train().router(x).capacity == 4


def test_dropout_of_the_ancestor_while_training() -> None:
    model = tiny(Ancestor, dropout=0.5, n_layer=1)
    idx = tokens(1, 9)
    assert torch.equal(model(idx)[0], model(idx)[0])
    buffer = torch.randn(4, 3, 8, dtype=torch.float64)
    model.train()
    for dropped in (model.transformer.h[0].mlp.experts(buffer), model.transformer.drop(buffer)):
        assert 0 < int((dropped == 0).sum()) < dropped.numel()
    assert not torch.equal(model(idx)[0], model(idx)[0])


# Causality


@BOTH
def test_without_drops_the_model_is_causal_and_rows_are_alone(model_class: type) -> None:
    model, idx = tiny(model_class, eval_capacity=2.0, top_k=2), tokens(4, 16)
    full = model(idx, idx)[0]
    changed = idx.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 23
    for other in (model(changed, changed)[0], model(idx[:, :10], idx[:, :10])[0]):
        torch.testing.assert_close(other[:, :10], full[:, :10], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(model(idx[:1], idx[:1])[0], full[:1], rtol=1e-11, atol=1e-12)


@BOTH
def test_with_drops_later_tokens_and_other_rows_count(model_class: type) -> None:
    model, idx = tiny(model_class, eval_capacity=0.5, min_capacity=1), tokens(4, 16)
    full = model(idx, idx)[0]
    changed = idx.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 23
    assert (model(changed, changed)[0][:, :10] - full[:, :10]).abs().max() > 1e-3
    assert (model(idx[:1], idx[:1])[0] - full[:1]).abs().max() > 1e-3
    assert (model(idx.flip(0), idx.flip(0))[0].flip(0) - full).abs().max() > 1e-3


# Initialisation


def initialised(model_class: type, **fields: Any) -> dict[str, Tensor]:
    module = original if model_class is GPT else ancestor
    torch.manual_seed(0)
    sizes = {"block_size": 64, "vocab_size": 600, "n_layer": 8, "n_head": 2, "n_embd": 128, "n_exp": 4, "stride": 1}
    state: dict[str, Tensor] = model_class(module.GPTConfig(**(sizes | fields))).state_dict()
    return state


@BOTH
@pytest.mark.parametrize("switch", [False, True])
def test_standard_deviations(model_class: type, switch: bool) -> None:
    fields = {"use_qwen3_moe_mlp": True, "moe_start_layer": 1} if model_class is GPT else {"stride": 2}
    scale = 0.5
    # Noise makes w_noise; experts of A0 are SwiGLU here, so its plain ones are looked at below.
    state = initialised(
        model_class, use_noisy_top_k=True, use_switch_tfm_init=switch, switch_tfm_init_scale=scale, **fields
    )
    cut = 0.879626  # what is left of the deviation of a normal distribution that is cut off at two deviations

    def expected(name: str, value: Tensor) -> float:
        if name.endswith(("c_proj.weight", "experts.c_proj")):
            return 0.02 / math.sqrt(16)
        if not switch or name == "transformer.wpe.weight":
            return 0.02
        fan_in = value.shape[-2] if value.dim() == 3 else value.shape[-1]
        return cut * math.sqrt(scale / fan_in)

    drawn = {name: value for name, value in state.items() if value.dim() >= 2 and not name.endswith("bias")}
    kinds = {name.split(".", 3)[-1] for name in drawn}
    assert {"mlp.router.w_g.weight", "mlp.router.w_noise.weight", "mlp.experts.c_fc", "mlp.c_fc.weight"} <= kinds
    assert ("mlp.experts.gate_proj" in kinds) == (model_class is GPT)
    for name, value in drawn.items():
        wanted = expected(name, value)
        # Five deviations of a standard deviation that so many numbers show.
        slack = 5 / math.sqrt(2 * value.numel())
        assert value.std().item() == pytest.approx(wanted, rel=slack), name
        if switch and not name.endswith(("c_proj.weight", "experts.c_proj", "wpe.weight")):
            assert value.abs().max() <= 2 * wanted / cut * (1 + 1e-6), name
    for name in set(state) - set(drawn):
        assert torch.equal(state[name], torch.full_like(state[name], float(not name.endswith("bias")))), name


def test_biases_of_experts_start_at_zero() -> None:
    state = initialised(Ancestor)
    assert {name for name in state if name.endswith("_bias") and state[name].any()} == set()
    assert "transformer.h.0.mlp.experts.fc_bias" in state


def test_initialisation_draws_in_order() -> None:
    sizes = {"block_size": 8, "vocab_size": 40, "n_layer": 2, "n_head": 2, "n_embd": 16, "n_exp": 3}
    torch.manual_seed(0)
    state = GPT(
        original.GPTConfig(**sizes, moe_start_layer=1, use_noisy_top_k=True, use_qwen3_moe_mlp=True)
    ).state_dict()
    # The same draws by hand: torch's own when the modules are made, then all weights, then c_proj once more.
    torch.manual_seed(0)
    for rows in (40, 8):
        torch.randn(rows, 16)
    dense = [(48, 16), (16, 16), (64, 16), (16, 64)]
    for out_features, in_features in [*dense, *dense[:2]]:
        torch.nn.Linear(in_features, out_features)
    for out_features in (3, 3, 40):
        torch.nn.Linear(16, out_features, bias=False)
    first, second = "transformer.h.0.", "transformer.h.1."
    drawn = {"transformer.wte.weight": (40, 16), "transformer.wpe.weight": (8, 16)}
    names = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    drawn |= {first + name: shape for name, shape in zip(names, dense, strict=True)}
    drawn |= {second + name: shape for name, shape in zip(names[:2], dense[:2], strict=True)}
    drawn |= {second + f"mlp.router.{name}.weight": (3, 16) for name in ("w_g", "w_noise")}
    drawn |= {second + f"mlp.experts.{name}": (3, 16, 64) for name in ("gate_proj", "c_fc")}
    drawn |= {second + "mlp.experts.c_proj": (3, 64, 16)}
    values = {name: torch.empty(shape).normal_(0.0, 0.02) for name, shape in drawn.items()}
    values["transformer.wte.weight"] = torch.empty(40, 16).normal_(0.0, 0.02)  # tied: the head's draw is the last
    for name in (first + names[1], first + names[3], second + names[1], second + "mlp.experts.c_proj"):
        values[name] = torch.empty(drawn[name]).normal_(0.0, 0.02 / math.sqrt(4))
    for name, value in values.items():
        assert torch.equal(state[name], value), name


# What stands around the model


@BOTH
def test_optimizer_groups(model_class: type) -> None:
    model = tiny(model_class, n_exp=3)
    optimizer = model.configure_optimizers(0.3, 1e-2, (0.8, 0.9), "cpu")
    decayed, kept = optimizer.param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    assert decayed["betas"] == (0.8, 0.9) and decayed["lr"] == 1e-2
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def kind(parameter: Tensor) -> str:
        return re.sub(r"^transformer\.(h\.\d\.)?", "", names[id(parameter)])

    assert {kind(parameter) for parameter in decayed["params"]} == {
        "wte.weight", "wpe.weight", "attn.c_attn.weight", "attn.c_proj.weight",
        "mlp.router.w_g.weight", "mlp.experts.c_fc", "mlp.experts.c_proj",
    }  # fmt: skip
    held = {kind(parameter) for parameter in kept["params"]}
    assert {"mlp.experts.fc_bias", "mlp.experts.proj_bias", "attn.c_attn.bias", "ln_1.weight"} <= held
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
    model.transformer.wpe.weight.requires_grad_(False)
    fewer = model.configure_optimizers(0.3, 1e-2, (0.8, 0.9), "cpu").param_groups
    assert [len(group["params"]) for group in fewer] == [len(decayed["params"]) - 1, len(kept["params"])]


@BOTH
def test_generation_runs_the_whole_window_anew(model_class: type) -> None:
    model, prompt = tiny(model_class, eval_capacity=0.5, min_capacity=1), tokens(2, 3)
    expected = prompt
    for _ in range(18):  # beyond the block
        window = expected[:, -16:]
        expected = torch.cat((expected, model(window, window)[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(model.generate(prompt, 18, top_k=1), expected)
    assert not model.training


def test_temperature_divides_and_top_k_keeps_ties() -> None:
    model = tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # all logits equal: the threshold of top_k cuts nothing off
    torch.manual_seed(1)
    tied = model.generate(torch.zeros(400, 1, dtype=torch.long), 1, temperature=0.1, top_k=1)
    assert tied[:, 1].unique().numel() == 23
    sharp = tiny().generate(tokens(8, 4), 3, temperature=1e-6)
    assert torch.equal(sharp, tiny().generate(tokens(8, 4), 3, top_k=1))


@BOTH
def test_crop_block_size(model_class: type) -> None:
    model, idx = tiny(model_class), torch.arange(5)[None]
    before = model(idx)[0]
    model.crop_block_size(5)
    assert model.config.block_size == 5
    assert model.transformer.wpe.weight.shape == (5, 8)
    assert model.transformer.wpe.num_embeddings == 5
    assert torch.equal(model(idx)[0], before)
    with pytest.raises(ValueError, match=r"6 tokens.*block_size=5"):
        model(torch.arange(6)[None])
    with pytest.raises(ValueError, match=r"block_size=5 to 6"):
        model.crop_block_size(6)


@BOTH
def test_number_of_parameters(model_class: type) -> None:
    model = tiny(model_class)
    state = model.state_dict()
    total = sum(value.numel() for name, value in state.items() if name != "lm_head.weight")
    assert model.get_num_params(non_embedding=False) == total
    assert model.get_num_params() == total - 16 * 8


# Precision and devices


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("model_class", "fields"),
    [
        (GPT, ALL_LOSSES),
        (GPT, ALL_LOSSES | {"use_qwen3_moe_mlp": True}),
        (Ancestor, {"use_aux_loss": True, "use_router_z_loss": True}),
    ],
)
def test_half_precision_and_autocast_run(model_class: type, fields: dict[str, Any], full: bool) -> None:
    fields = fields | {"router_use_full_prec": full, "train_capacity": 4.0}
    model, idx = tiny(model_class, **fields).train(), tokens(2, 9)
    expected = model(idx, idx)[1]
    model = model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(idx, idx)[1]
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)
    loss = model.bfloat16()(idx, idx)[1]
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)
    assert model(idx)[0].dtype == torch.bfloat16


def test_full_precision_takes_autocast_from_the_router_alone() -> None:
    for full, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        layer = experts_of(tiny(router_use_full_prec=full, bias=False).float())
        inside: list[torch.dtype] = []
        layer.experts.dropout.register_forward_pre_hook(lambda _module, given, to=inside: to.append(given[0].dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer.router(torch.randn(6, 8)).logits.dtype == dtype
            layer(torch.randn(1, 6, 8))
        assert inside == [torch.bfloat16]


def test_losses_that_upstream_widens_are_float32_at_least() -> None:
    routing = route(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    for dtype, wide in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        narrow = routing._replace(weights=routing.weights.to(dtype), logits=routing.logits.to(dtype))
        assert shared.load_balancing_loss(narrow).dtype == wide
        assert shared.z_loss(narrow).dtype == dtype
        assert original.experts_ortho_loss(torch.ones(2, 3, 4, dtype=dtype)).dtype == wide


def test_cosines_of_experts_are_not_taken_in_half_precision() -> None:
    c_fc = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = original.experts_ortho_loss(c_fc)
    assert loss.item() == pytest.approx(original.experts_ortho_loss(c_fc.double()).item(), rel=1e-5)


@BOTH
def test_a_model_made_without_storage_runs_once_it_has_weights(model_class: type) -> None:
    module = original if model_class is GPT else ancestor
    source = tiny(model_class, **({"use_qwen3_moe_mlp": True, **ALL_LOSSES} if model_class is GPT else {}))
    with torch.device("meta"):
        model = model_class(module.GPTConfig(**vars(source.config)))
    model.load_state_dict(source.state_dict(), assign=True)
    idx = tokens(2, 9)
    torch.manual_seed(0)
    expected = source.train()(idx, idx)[1]
    loss = model.train()(idx, idx)[1]
    assert torch.equal(loss, expected)
    loss.backward()


def test_epsilon_of_the_query_and_key_norm() -> None:
    attention = tiny().transformer.h[0].attn
    with torch.no_grad():
        attention.c_attn.bias.zero_()
        attention.c_attn.weight.zero_()
        # Queries and keys of 1e-4 in every channel, values that tell positions apart.
        attention.c_attn.weight[:16, 0] = 1e-4
        attention.c_attn.weight[16:, 1] = 1.0
        attention.c_proj.weight.copy_(torch.eye(8))
        attention.c_proj.bias.zero_()
    x = torch.zeros(1, 2, 8, dtype=torch.float64)
    x[0, :, 0] = torch.tensor([-1.0, 1.0])
    x[0, :, 1] = torch.tensor([0.0, 1.0])
    for dtype, normed in ((torch.float64, 1.0), (torch.float32, 1e-4 / math.sqrt(1e-8 + 2**-23))):
        given = attention.to(dtype)(x.to(dtype))[0, 1, 0].item()
        # Four channels a head over the root of four: scores are plus and minus 2 * normed^2.
        assert given == pytest.approx(1 / (1 + math.exp(-4 * normed**2)), rel=1e-5)


def test_gpt2_import_into_the_ancestor(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_positions": 16, "vocab_size": 29, "n_layer": 2, "n_head": 2, "n_embd": 16}
    gpt2 = GPT2LMHeadModel(GPT2Config(**sizes, activation_function="gelu", initializer_range=0.3)).eval()
    gpt2.save_pretrained(tmp_path)
    idx = torch.randint(29, (2, 16))
    expected = gpt2.double()(idx).logits
    for model in (Ancestor.from_gpt2(gpt2, {"dropout": 0.1}), Ancestor.from_pretrained(tmp_path, {"dropout": 0.1})):
        assert model.config == ancestor.GPTConfig(16, 29, 2, 2, 16, 0.1, True)
        torch.testing.assert_close(model.double().eval()(idx, idx)[0], expected, rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match="n_layer"):
        Ancestor.from_gpt2(gpt2, {"n_layer": 1})
