# SPDX-License-Identifier: Apache-2.0
"""The numbers of the Hugging Face nanoMoE against the originals', on whichever transformers is installed."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import StaticCache

from reference_models.nanomoe import modeling_nanomoe_gpt
from reference_models.nanomoe.configuration_nanomoe_gpt import GPTConfig
from reference_models.nanomoe.modeling_nanomoe_gpt import GPT, MOELayer, Router, eager_attention_forward

Make = Callable[..., Any]

GOLDEN = sorted((Path(__file__).parents[2] / "fixtures" / "golden" / "nanomoe").glob("*.safetensors"))
IDX = torch.randint(37, (2, 7), generator=torch.Generator().manual_seed(1))
NEXT = torch.cat((IDX[:, 1:], torch.full((2, 1), -1)), dim=1)
NO_DROPS: dict[str, Any] = {"n_exp": 4, "eval_capacity": 2.0}
ALL_LOSSES: dict[str, Any] = {
    "use_aux_loss": True,
    "use_router_z_loss": True,
    "use_router_ortho_loss": True,
    "router_ortho_neg_corr_weight": 0.5,
}
# Every corner of the routing, by what it is.
CORNERS: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense, no bias": {"bias": False},
    "nothing dropped": NO_DROPS,
    "drops": {"n_exp": 4, "eval_capacity": 0.75, "train_capacity": 0.75, "min_capacity": 2},
    "one choice, dropped": {"n_exp": 3, "top_k": 1, "eval_capacity": 0.5, "train_capacity": 0.5, "min_capacity": 1},
    "all experts": {"n_exp": 3, "top_k": 3},
    "no bias, stride": {"n_exp": 5, "bias": False, "stride": 2, "n_layer": 3, "eval_capacity": 1.0},
    "many experts": {"n_exp": 20, "top_k": 2, "train_capacity": 1.0, "min_capacity": 1},
    "full precision": {"n_exp": 4, "router_use_full_prec": True},
}
OF_NANOMOE: dict[str, dict[str, Any]] = {
    "SwiGLU": {"n_exp": 4, "use_qwen3_moe_mlp": True, **ALL_LOSSES},
    "SwiGLU, drops": {"n_exp": 3, "use_qwen3_moe_mlp": True, "train_capacity": 0.6, "min_capacity": 1, **ALL_LOSSES},
    "SwiGLU, start": {"n_exp": 3, "use_qwen3_moe_mlp": True, "moe_start_layer": 1, "n_layer": 3},
    "SwiGLU, off": {
        "n_exp": 3,
        "use_qwen3_moe_mlp": True,
        "use_experts_ortho_loss": False,
        "use_gate_output_loss": False,
    },
    "plain, all flags": {"n_exp": 4, "use_router_ortho_loss": True, "use_aux_loss": True},
}
OF_THE_ANCESTOR: dict[str, dict[str, Any]] = {
    "losses": {
        "n_exp": 4,
        "use_aux_loss": True,
        "use_router_z_loss": True,
        "train_capacity": 0.75,
        "eval_capacity": 1.0,
    }
}

eager_and_sdpa = pytest.mark.parametrize("attention", ["eager", "sdpa"])
both_architectures = pytest.mark.parametrize("architecture", ["nanomoe", "ancestor"])
every_corner = pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        pytest.param(architecture, fields, id=f"{architecture}: {name}")
        for architecture, own in (("nanomoe", OF_NANOMOE), ("ancestor", OF_THE_ANCESTOR))
        for name, fields in (CORNERS | own).items()
    ],
)


def assert_close(a: Tensor, b: Tensor, bound: float = 1e-12) -> None:
    assert a.shape == b.shape
    assert ((a - b).abs().max() / b.pow(2).mean().sqrt().clamp(min=1e-30)).item() < bound


def routings(model: torch.nn.Module) -> list[Any]:
    """Return a list to which every later call of a router adds what it gives."""
    seen: list[Any] = []
    for name, module in model.named_modules():
        if name.endswith("mlp.router"):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    return seen


# Against the originals


@every_corner
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_logits_loss_and_gradients(
    make_original_model: Make, make_port_model: Make, architecture: str, fields: dict[str, Any], training: bool
) -> None:
    source = make_original_model(architecture, **fields).train(training)
    model = make_port_model(architecture, source=source).train(training)
    theirs, ours = routings(source), routings(model)
    idx = torch.randint(37, (3, 13), generator=torch.Generator().manual_seed(2))
    targets = idx.roll(-1, 1).masked_fill(torch.arange(13) > 10, -1)

    expected, expected_loss, *expected_losses = source(idx, targets)
    logits, loss, losses = model(idx, targets)
    expected_loss.backward()
    loss.backward()

    assert_close(logits, expected)
    assert_close(loss, expected_loss)
    for name, value in (expected_losses[0] if expected_losses else {}).items():
        assert abs(losses[name] - value) <= 1e-12 * max(1, abs(value)), name
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in source.named_parameters():
        assert (gradients[name] - parameter.grad).abs().max() < 1e-11, name
    for routed, as_routed in zip(ours, theirs, strict=True):
        assert_close(routed.logits, as_routed.logits)
        assert_close(routed.weights, as_routed.weights)
        assert routed.capacity == as_routed.capacity
        for name in ("indices", "ranks", "keep"):
            assert torch.equal(getattr(routed, name), getattr(as_routed, name)), name
    if fields.get("top_k") == 1:
        assert any(not routed.keep.any(1).all() for routed in ours), "no token is dropped altogether"


@every_corner
def test_hidden_states(
    make_original_model: Make, make_port_model: Make, architecture: str, fields: dict[str, Any]
) -> None:
    source = make_original_model(architecture, **fields)
    model = make_port_model(architecture, source=source)
    seen: list[Tensor] = []
    source.transformer.drop.register_forward_hook(lambda m, i, o: seen.append(o))
    for block in source.transformer.h[:-1]:
        block.register_forward_hook(lambda m, i, o: seen.append(o[0]))
    source.transformer.ln_f.register_forward_hook(lambda m, i, o: seen.append(o))
    source(IDX, IDX)
    # The library's contract: the input of each block, then the output of the last norm.
    outputs = model(IDX, output_hidden_states=True, output_router_logits=True)
    for ours, theirs in zip(outputs.hidden_states, seen, strict=True):
        assert_close(ours, theirs)
    with_experts = [block for block in source.transformer.h if hasattr(block.mlp, "router")]
    assert len(outputs.router_logits) == len(with_experts)
    for logits in outputs.router_logits:
        assert logits.shape == (14, fields["n_exp"])


def test_all_golden_files_are_here() -> None:
    assert len(GOLDEN) == 9


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    file = safe_open(path, "pt")
    metadata, names = file.metadata(), set(file.keys())
    architecture = "ancestor" if metadata["family"] == "nanomoe_ancestor" else "nanomoe"
    model = GPT(GPTConfig(**json.loads(metadata["config"]), architecture=architecture)).double()
    weights = {name.removeprefix("weights/"): file.get_tensor(name) for name in names if name.startswith("weights/")}
    weights |= {alias: weights[name] for alias, name in json.loads(metadata["tie_aliases"]).items()}
    model.load_state_dict(weights, strict=True)
    model.train(metadata["mode"] == "train")
    seen = routings(model)
    logits, loss, losses = model(file.get_tensor("inputs/idx"), file.get_tensor("inputs/targets"))

    def expected(name: str) -> Tensor:
        return file.get_tensor(f"outputs_f64/{name}")

    # The original computes some of its losses in float32 even here.
    in_float32 = 1e-7 if model.training or architecture == "ancestor" else 1e-12
    assert_close(logits, expected("logits"))
    assert_close(loss, expected("loss"), in_float32)
    for name, value in losses.items():
        if f"outputs_f64/loss_term.{name}" in names:
            assert abs(value - expected(f"loss_term.{name}")) <= in_float32 * max(1, value), name
    with_experts = [layer for layer in range(model.config.n_layer) if f"outputs_f64/router.{layer}.logits" in names]
    for layer, routing in zip(with_experts, seen, strict=True):
        assert_close(routing.logits, expected(f"router.{layer}.logits"))
        assert_close(routing.weights * routing.keep, expected(f"router.{layer}.probs_kept"))
        assert torch.equal(routing.indices, expected(f"router.{layer}.topk_indices"))
        assert torch.equal(routing.keep, expected(f"router.{layer}.keep").bool())
        assert routing.capacity == expected(f"router.{layer}.capacity")
        ranks = expected(f"router.{layer}.rank")
        assert torch.equal(routing.ranks[ranks >= 0], ranks[ranks >= 0])
    loss.backward()
    for name, parameter in model.named_parameters():
        if f"grads_f64/{name}" in names:
            assert_close(parameter.grad, file.get_tensor(f"grads_f64/{name}"), in_float32)
    if "inputs/prompt" in names:
        prompt, greedy = file.get_tensor("inputs/prompt"), file.get_tensor("outputs_f32/generate.greedy")
        new = greedy.shape[1] - prompt.shape[1]
        assert torch.equal(model.float().generate_legacy(prompt, new, top_k=1), greedy)
        assert torch.equal(model.generate(prompt, max_new_tokens=new, do_sample=False), greedy)


def test_routing_table() -> None:
    """The golden routing vector that was measured."""
    router = Router(GPTConfig(n_embd=4, n_head=1, n_exp=4, moe_top_k=2, eval_capacity=0.5, min_capacity=1)).eval()
    with torch.no_grad():
        router.w_g.weight.copy_(torch.eye(4))
    rows = [[2, 1, 0, -1], [2, 0, 1, -1], [0, 3, 1, -2], [3, 2, 1, 0], [1, 2, 0, -1], [0, 1, 2, -1]]
    routing = router(torch.tensor(rows, dtype=torch.float32))
    assert routing.capacity == 2
    assert routing.indices.tolist() == [[0, 1], [0, 2], [1, 2], [0, 1], [1, 0], [2, 1]]
    assert routing.ranks.tolist() == [[0, 2], [1, 1], [0, 2], [2, 3], [1, 3], [0, 4]]
    assert (routing.keep == (routing.ranks < 2)).all()
    kept = (routing.weights * routing.keep).flatten().tolist()
    assert kept == pytest.approx([0.7311, 0, 0.7311, 0.2689, 0.8808, 0, 0, 0, 0.7311, 0, 0.7311, 0], abs=1e-4)


@pytest.mark.parametrize(
    ("tokens", "training", "capacity"),
    [(1, True, 4), (7, False, 4), (16, True, 6), (16, False, 8), (31, True, 10), (31, False, 16), (100, False, 50)],
)
def test_capacity(tokens: int, training: bool, capacity: int) -> None:
    router = Router(GPTConfig(n_embd=4, n_head=1, n_exp=8, moe_top_k=2)).train(training)
    assert router(torch.randn(tokens, 4)).capacity == capacity
    # As many are padding as not, and padding takes no slot.
    is_token = torch.arange(2 * tokens) % 2 == 0
    assert router(torch.randn(2 * tokens, 4), is_token).capacity == capacity


def test_epsilon_of_the_norm_of_queries_and_keys(make_original_model: Make, make_port_model: Make) -> None:
    source = make_original_model()
    with torch.no_grad():
        for block in source.transformer.h:
            block.attn.c_attn.weight.mul_(1e-6)
            block.attn.c_attn.bias.mul_(1e-6)
    assert_close(make_port_model(source=source)(IDX).logits, source(IDX, IDX)[0])
    single = make_port_model(source=source, dtype=torch.float32)(IDX).logits
    assert_close(single, source.float()(IDX, IDX)[0], 1e-5)


def test_noise_is_the_originals(make_original_model: Make, make_port_model: Make) -> None:
    for architecture, training, noisy in (
        ("nanomoe", True, True),
        ("nanomoe", False, False),
        ("ancestor", True, True),
        ("ancestor", False, True),
    ):
        source = make_original_model(architecture, n_exp=4, use_noisy_top_k=True).train(training)
        model = make_port_model(architecture, source=source).train(training)
        torch.manual_seed(5)
        expected = source(IDX, NEXT)[0]
        torch.manual_seed(5)
        assert_close(model(IDX, NEXT)[0], expected)
        assert torch.equal(model(IDX).logits, model(IDX).logits) is not noisy


@pytest.mark.parametrize("fields", [{}, {"n_exp": 4, "train_capacity": 0.7}], ids=["dense", "experts"])
def test_dropout_of_the_ancestor(make_original_model: Make, make_port_model: Make, fields: dict[str, Any]) -> None:
    source = make_original_model("ancestor", dropout=0.3, **fields).train()
    model = make_port_model("ancestor", source=source).train()
    torch.manual_seed(5)
    expected = source(IDX, NEXT)[1]
    torch.manual_seed(5)
    assert_close(model(IDX, NEXT)[1], expected)


# Calls


def test_attentions_are_causal_probabilities(make_port_model: Make) -> None:
    attentions = make_port_model(attention="eager")(IDX, output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in attentions] == [(2, 2, 7, 7)] * 2
    for weights in attentions:
        assert_close(weights.sum(-1), torch.ones(2, 2, 7, dtype=torch.float64))
        assert weights.triu(1).count_nonzero() == 0


def test_legacy_and_library_calls(make_port_model: Make) -> None:
    model = make_port_model(**NO_DROPS)
    named = model(input_ids=IDX, labels=IDX, return_dict=True)
    assert named.logits.shape == (2, 7, 37)
    for legacy in (
        model(IDX, NEXT),
        model(IDX, NEXT, return_dict=True),
        model(idx=IDX, targets=NEXT, return_dict=False),
        model(input_ids=IDX, labels=IDX, return_dict=False),
    ):
        logits, loss, losses = legacy
        assert torch.equal(logits, named.logits)
        assert torch.equal(loss, named.loss)
        assert list(losses) == [
            *("ntp_loss", "aux_loss", "router_z_loss", "router_ortho_loss", "experts_ortho_loss", "gate_output_loss")
        ]
    assert model(IDX, return_dict=False)[1:] == (None, None)
    assert named.losses["ntp_loss"] == named.loss
    assert not named.losses["ntp_loss"].requires_grad
    assert model(IDX).losses is None
    # Any other second argument is the mask; in the configuration alone, return_dict means what it does to Trainer.
    assert torch.equal(model(IDX, torch.ones(2, 7).bool()).logits, named.logits)
    model.config.return_dict = False
    loss, logits, *_ = model(IDX, labels=IDX)
    assert torch.equal(loss, named.loss)
    assert torch.equal(logits, named.logits)
    assert torch.equal(model(IDX, labels=IDX, return_dict=True).loss, named.loss)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": IDX, "targets": NEXT}, "labels"),
        ({"idx": IDX}, "idx and input_ids"),
        ({"labels": IDX, "logits_to_keep": 1}, "logits_to_keep"),
        ({"inputs_embeds": torch.zeros(2, 7, 16)}, "exactly one"),
        ({"position_ids": torch.arange(10, 17)[None]}, r"position_ids.*10 to 16.*block_size=16"),
    ],
    ids=str,
)
def test_refused_calls(make_port_model: Make, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_port_model()(input_ids=IDX, **arguments)


def test_positional_arguments_beyond_two_are_refused(make_port_model: Make) -> None:
    with pytest.raises(ValueError, match="by its name"):
        make_port_model()(IDX, NEXT, None)
    with pytest.raises(ValueError, match="exactly one"):
        make_port_model()()


def test_kept_logits(make_port_model: Make) -> None:
    model = make_port_model()
    whole = model(IDX).logits
    assert_close(model(IDX, logits_to_keep=2).logits, whole[:, -2:])
    assert_close(model(IDX, num_logits_to_keep=1).logits, whole[:, -1:])
    assert_close(model(IDX, logits_to_keep=torch.tensor([1, 4])).logits, whole[:, [1, 4]])


def test_embeddings_and_positions(make_original_model: Make, make_port_model: Make) -> None:
    model, shifted = make_port_model(**NO_DROPS), make_original_model(**NO_DROPS)
    assert_close(model(inputs_embeds=model.get_input_embeddings()(IDX)).logits, model(IDX).logits)
    with torch.no_grad():
        shifted.transformer.wpe.weight.copy_(shifted.transformer.wpe.weight.roll(-3, dims=0))
    assert_close(model(IDX, position_ids=torch.arange(3, 10)[None]).logits, shifted(IDX, IDX)[0])


@eager_and_sdpa
def test_too_long(make_port_model: Make, attention: str) -> None:
    model = make_port_model(attention=attention)
    with pytest.raises(ValueError, match=r"17 tokens.*block_size=16.*use_cache=False"):
        model(torch.zeros(1, 17, dtype=torch.long))
    past = model(torch.zeros(1, 12, dtype=torch.long)).past_key_values
    with pytest.raises(ValueError, match=r"17 tokens.*block_size=16"):
        model(torch.zeros(1, 5, dtype=torch.long), past_key_values=past)


# Masks


@eager_and_sdpa
@both_architectures
@pytest.mark.parametrize("fields", [{}, {"n_exp": 4, "eval_capacity": 0.75, "min_capacity": 1}], ids=["dense", "drops"])
@pytest.mark.parametrize(
    "columns",
    [[0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 1, 1, 0, 1, 1, 1]],
    ids=["left", "right", "interior"],
)
def test_padding_takes_nothing(
    make_port_model: Make, attention: str, architecture: str, fields: dict[str, Any], columns: list[int]
) -> None:
    model = make_port_model(architecture, attention=attention, **fields)
    mask = torch.tensor([columns, columns])
    for dtype in (torch.long, torch.bool, torch.float32):
        padded = torch.randint(37, (2, 10))
        padded[mask.bool()] = IDX.flatten()
        logits = model(padded, attention_mask=mask.to(dtype)).logits
        assert_close(logits[mask.bool()], model(IDX).logits.flatten(0, 1))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@both_architectures
def test_gradients_of_a_padded_batch(make_port_model: Make, architecture: str, training: bool) -> None:
    fields = {"n_exp": 3, "use_aux_loss": True, "use_router_z_loss": True, "train_capacity": 0.7, "min_capacity": 1}
    if architecture == "nanomoe":
        fields |= {"use_qwen3_moe_mlp": True, "use_router_ortho_loss": True}
    model = make_port_model(architecture, **fields).train(training)
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), IDX), dim=1)
    mask = (torch.arange(10) >= 3).long().expand(2, 10)
    seen = []
    for inputs in (
        {"input_ids": IDX, "targets": NEXT},
        {"input_ids": padded, "attention_mask": mask, "targets": torch.nn.functional.pad(NEXT, (3, 0), value=-1)},
    ):
        model.zero_grad()
        outputs = model(**inputs)
        outputs.loss.backward()
        seen.append((outputs.losses, [parameter.grad for parameter in model.parameters()]))
    (losses, gradients), (with_padding, gradients_with_padding) = seen
    for name, loss in losses.items():
        assert abs(loss - with_padding[name]) < 1e-12 * max(1, loss), name
    for alone, padded_too in zip(gradients, gradients_with_padding, strict=True):
        assert (alone - padded_too).abs().max() < 1e-11


def test_padding_may_take_capacity(make_original_model: Make, make_port_model: Make) -> None:
    fields = {"n_exp": 4, "eval_capacity": 0.75, "min_capacity": 1}
    model = make_port_model(**fields, pad_tokens_take_capacity=True)
    mask = torch.ones(2, 7).long()
    mask[1, 5:] = 0
    # With padding on the right, the original cannot see the mask in what comes before it but by the capacity.
    assert_close(model(IDX, attention_mask=mask).logits[0], make_original_model(**fields)(IDX, IDX)[0][0])
    other = make_port_model(**fields)(IDX, attention_mask=mask).logits[0]
    assert (model(IDX, attention_mask=mask).logits[0] - other).abs().max() > 0.1


@eager_and_sdpa
def test_forms_of_no_mask(make_port_model: Make, attention: str) -> None:
    model = make_port_model(attention=attention, n_exp=4, eval_capacity=0.75)
    expected = model(IDX).logits
    seen = torch.ones(7, 7).tril().bool()[None, None]
    additive = torch.zeros(1, 1, 7, 7).masked_fill(~seen, float("-inf"))
    for mask in (torch.ones(2, 7), torch.ones(2, 7).bool(), seen.expand(2, 1, 7, 7), additive, additive.half()):
        assert_close(model(IDX, attention_mask=mask).logits, expected)


@eager_and_sdpa
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_row_without_any_token_stays_finite(make_port_model: Make, attention: str, dtype: torch.dtype) -> None:
    model = make_port_model(dtype=dtype, attention=attention, n_exp=4, use_aux_loss=True).train()
    lowest = torch.full((2, 1, 7, 7), torch.finfo(dtype).min, dtype=dtype)
    for mask in (torch.zeros(2, 7).long(), lowest, torch.full_like(lowest, float("-inf")), lowest.bool().logical_not()):
        outputs = model(IDX, attention_mask=mask, targets=NEXT)
        assert outputs.logits.isfinite().all()
        assert outputs.loss.isfinite()


def test_masked_scores_do_not_overflow_in_half_precision() -> None:
    query = torch.full((1, 1, 1, 4), 8.0, dtype=torch.float16)
    lowest = torch.full((1, 1, 1, 3), torch.finfo(torch.float16).min, dtype=torch.float16)
    keys = -query.expand(1, 1, 3, 4)  # every score is far below zero before the mask is added
    output, weights = eager_attention_forward(torch.nn.Module().eval(), query, keys, keys, lowest, scaling=0.5)
    assert output.dtype == weights.dtype == torch.float16
    assert_close(weights.float(), torch.full((1, 1, 1, 3), 1 / 3), 1e-3)


# Types and ways to compute


@both_architectures
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(
    make_original_model: Make, make_port_model: Make, architecture: str, dtype: torch.dtype
) -> None:
    fields = {"n_exp": 4, "use_aux_loss": True, "use_router_z_loss": True}
    source = make_original_model(architecture, **fields).to(dtype).train()
    model = make_port_model(architecture, source=source, dtype=dtype).train()
    expected = source(IDX, NEXT)[0]
    logits, loss, _ = model(IDX, NEXT)
    assert logits.dtype == dtype
    assert loss.dtype == torch.float32
    assert_close(logits.float(), expected.float(), 0.05)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@both_architectures
@pytest.mark.parametrize("full_precision", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(make_port_model: Make, architecture: str, full_precision: bool, dtype: torch.dtype) -> None:
    qwen = {"use_qwen3_moe_mlp": True} if architecture == "nanomoe" else {}
    model = make_port_model(
        architecture, dtype=torch.float32, n_exp=4, use_aux_loss=True, router_use_full_prec=full_precision, **qwen
    ).train()
    expected = model(IDX).logits
    seen = routings(model)
    with torch.autocast("cpu", dtype=dtype):
        outputs = model(IDX, targets=NEXT)
    assert {routing.logits.dtype for routing in seen} == {torch.float32 if full_precision else dtype}
    assert (outputs.logits.float() - expected).abs().mean() < 0.2
    outputs.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@both_architectures
@pytest.mark.parametrize(
    "fields",
    [{}, NO_DROPS, {"n_exp": 4, "eval_capacity": 0.75, "min_capacity": 1}, {"n_exp": 3, "use_qwen3_moe_mlp": True}],
    ids=["dense", "no drops", "drops", "SwiGLU"],
)
def test_compiles_in_one_graph(make_port_model: Make, architecture: str, fields: dict[str, Any]) -> None:
    if architecture == "ancestor" and "use_qwen3_moe_mlp" in fields:
        pytest.skip("the ancestor has no SwiGLU")
    torch._dynamo.reset()
    model = make_port_model(architecture, **fields)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        assert_close(compiled(IDX).logits, model(IDX).logits)
        assert_close(compiled(IDX, attention_mask=mask).logits, model(IDX, attention_mask=mask).logits)


def test_compiled_training(make_port_model: Make) -> None:
    torch._dynamo.reset()
    model = make_port_model(n_exp=3, use_qwen3_moe_mlp=True, train_capacity=0.7, min_capacity=1, **ALL_LOSSES).train()
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        run(IDX, targets=NEXT).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for eager, compiled in zip(*gradients, strict=True):
        assert (eager - compiled).abs().max() < 1e-11


def test_static_cache_compiles_once(make_port_model: Make) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model, backend = make_port_model(**NO_DROPS), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        pieces = [model(IDX[:, :2], past_key_values=cache, use_cache=True).logits]
        for position in range(2, 7):
            piece = IDX[:, position : position + 1]
            pieces.append(compiled(piece, past_key_values=cache, use_cache=True).logits)
    assert_close(torch.cat(pieces, dim=1), model(IDX).logits)
    assert backend.frame_count == 1


def test_attention_can_be_switched(make_port_model: Make) -> None:
    model = make_port_model(**NO_DROPS)
    expected = model(IDX).logits
    model.set_attn_implementation("eager")
    assert model(IDX, output_attentions=True).attentions is not None
    assert_close(model(IDX).logits, expected)


@pytest.mark.parametrize("experts", [4, 20])
def test_only_kept_slots_are_computed(make_port_model: Make, experts: int) -> None:
    model = make_port_model(n_exp=experts, n_layer=1, eval_capacity=1.0, min_capacity=1)
    rows: list[int] = []
    seen = routings(model)
    layer: MOELayer = model.transformer.h[0].mlp
    layer.experts.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    model(IDX)
    assert rows == [int(seen[0].keep.sum())]


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="this torch has no grouped matmul")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_kernel(make_port_model: Make, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """What a GPU computes, by the same function on the CPU; of 20 experts some get no token."""
    model = make_port_model(dtype=dtype, n_exp=20, eval_capacity=1.0, min_capacity=1)
    results = []
    for grouped in (False, True):
        monkeypatch.setattr(modeling_nanomoe_gpt, "_takes_grouped_mm", lambda rows, weight, taken=grouped: taken)
        model.zero_grad()
        outputs = model(IDX, targets=NEXT)
        outputs.loss.backward()
        results.append([outputs.logits, *(parameter.grad for parameter in model.parameters())])
    for segments, kernel in zip(*results, strict=True):
        assert_close(kernel.float(), segments.float(), 1e-5 if dtype == torch.float32 else 0.1)


def test_nothing_is_left_behind(make_port_model: Make) -> None:
    model = make_port_model(n_exp=3, use_qwen3_moe_mlp=True, **ALL_LOSSES).train()
    other = make_port_model("ancestor", n_exp=3, use_aux_loss=True)
    before = model(IDX, targets=NEXT)
    model(IDX)
    model.generate(IDX, max_new_tokens=3, do_sample=False)
    model(IDX, attention_mask=torch.zeros(2, 7).long(), output_hidden_states=True)
    other(IDX[:, :2])
    after = model(IDX, targets=NEXT)
    assert torch.equal(before.loss, after.loss)
    assert torch.equal(before.logits, after.logits)
    assert before.losses == after.losses
    assert after.hidden_states is None
    copied = copy.deepcopy(model)  # while the graph of a call is still there
    assert torch.equal(copied(IDX, targets=NEXT).loss, before.loss)
