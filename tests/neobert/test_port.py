# SPDX-License-Identifier: Apache-2.0
"""The numbers of the Hugging Face NeoBERT against the training model's, on whichever transformers is installed."""

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from harness.cases.weights import sensitising_state
from reference_models.neobert import original
from reference_models.neobert.model import (
    NeoBERT,
    NeoBERTConfig,
    NeoBERTForSequenceClassification,
    NeoBERTLMHead,
    eager_attention_forward,
    masked_lm_loss,
)

GOLDEN = sorted((Path(__file__).parents[2] / "fixtures" / "golden" / "neobert").glob("*.safetensors"))
SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "vocab_size": 37,
    "max_length": 16,
}
IDX = torch.randint(1, 37, (3, 7), generator=torch.Generator().manual_seed(1))
LEFT, RIGHT, INTERIOR = [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 0, 1, 1]
MASK = torch.tensor([LEFT, RIGHT, INTERIOR])
EMPTY_ROW = torch.tensor([[1] * 7, [0] * 7, RIGHT])

VARIANTS: dict[str, dict[str, Any]] = {
    ", ".join((act, "RMSNorm" if rms else "LayerNorm", "rope" if rope else "learned", "tied" if tied else "untied")): {
        "hidden_act": act,
        "rms_norm": rms,
        "rope": rope,
        "tie_word_embeddings": tied,
    }
    for act, rms, rope, tied in itertools.product(("swiglu", "gelu"), *[(True, False)] * 3)
}
all_variants = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
eager_and_sdpa = pytest.mark.parametrize("attention", ["eager", "sdpa"])
rope_and_learned = pytest.mark.parametrize("rope", [True, False], ids=["rope", "learned"])

pytestmark = pytest.mark.usefixtures("one_thread")


def training_model(dtype: torch.dtype = torch.float64, head: Any = None, **fields: Any) -> Any:
    """Return a training model in eval mode with weights that show every defect: peaked attention, biases, gains."""
    model = (head or original.NeoBERTLMHead)(original.NeoBERTConfig(**{**SIZES, **fields})).double()
    model.load_state_dict(sensitising_state(model, gains={"qkv": 2.0}, seed=5))
    return model.to(dtype).eval()


def port_of(source: Any, attention: str = "sdpa", head: Any = None, **fields: Any) -> Any:
    """Return the port in eval mode with the weights and the type of a training model."""
    config = NeoBERTConfig(**vars(source.config), **fields)
    model = (head or NeoBERTLMHead)._from_config(config, attn_implementation=attention)
    dtype = next(source.parameters()).dtype
    model.to(dtype).load_state_dict(source.state_dict(), strict=True)
    return model.eval()


def assert_close(a: Tensor, b: Tensor, bound: float = 1e-12) -> None:
    assert a.shape == b.shape
    assert ((a - b).abs().max() / b.pow(2).mean().sqrt()).item() < bound


def additive(mask: Tensor, drop: float = -math.inf, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(mask == 0, drop)


# Forward


@eager_and_sdpa
@all_variants
def test_logits_and_hidden_states(attention: str, fields: dict[str, Any]) -> None:
    source = training_model(**fields)
    model = port_of(source, attention)
    for length, mask in ((1, None), (7, None), (16, None), (7, MASK), (7, EMPTY_ROW)):
        idx = torch.randint(0, 37, (3, length), generator=torch.Generator().manual_seed(length))
        states: dict[str, Tensor] = {}

        def keep(_: Any, inputs: tuple[Tensor, ...], result: Tensor, states: dict[str, Tensor] = states) -> None:
            states.update({"embedding": inputs[0], "block.0": result})

        hook = source.model.transformer_encoder[0].register_forward_hook(keep)
        expected = source(idx, None if mask is None else additive(mask))
        hook.remove()
        output = model(idx, attention_mask=mask, output_hidden_states=True)
        assert_close(output.logits, expected["logits"])
        assert len(output.hidden_states) == SIZES["num_hidden_layers"] + 1
        for state, wanted in zip(
            output.hidden_states, (*states.values(), expected["hidden_representation"]), strict=True
        ):
            assert_close(state, wanted)
        base = model.model(idx, attention_mask=mask, output_hidden_states=True)
        assert base.last_hidden_state is base.hidden_states[-1]
        assert torch.equal(base.last_hidden_state, output.hidden_states[-1])


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    with safe_open(path, "pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    stored, aliases = json.loads(about["config"]), json.loads(about["tie_aliases"])
    weights = {name.removeprefix("weights/"): t for name, t in tensors.items() if name.startswith("weights/")}
    weights |= {alias: weights[name] for alias, name in aliases.items()}
    config = NeoBERTConfig(**{**stored, "tie_word_embeddings": bool(aliases)})
    model = NeoBERTLMHead(config).double().eval()
    model.load_state_dict(weights, strict=True)
    for precision, bound in (("f64_nocast", 1e-12), ("f32", 1e-4)):
        at = f"outputs_{precision}/"
        wanted = {name.removeprefix(at): tensor for name, tensor in tensors.items() if name.startswith(at)}
        if precision == "f32":
            model.float()
        for attention, name in itertools.product(("sdpa", "eager"), ("attention_mask", "pad_mask")):
            model.set_attn_implementation(attention)
            model.zero_grad()
            output = model(
                tensors["inputs/src"],
                attention_mask=tensors.get(f"inputs/{name}"),
                labels=tensors["inputs/labels"],
                output_hidden_states=True,
            )
            assert_close(output.logits, wanted["logits"], bound)
            assert_close(output.loss, wanted["loss"], bound)
            assert_close(output.hidden_states[1], wanted["block.0"], bound)
            assert_close(output.hidden_states[-1], wanted["hidden_representation"], bound)
            output.loss.backward()
            for key, parameter in model.named_parameters():
                if (gradient := tensors.get(f"grads_{precision}/{key}")) is not None:
                    assert_close(parameter.grad, gradient, bound)


def test_all_golden_files_are_here() -> None:
    assert len(GOLDEN) == 6


@rope_and_learned
def test_attentions_are_probabilities(rope: bool) -> None:
    source = training_model(rope=rope)
    for attention in ("eager", "sdpa"):
        output = port_of(source, attention)(IDX, attention_mask=EMPTY_ROW, output_attentions=True)
        assert [weights.shape for weights in output.attentions] == [(3, 3, 7, 7)] * 2
        assert_close(output.logits, source(IDX, additive(EMPTY_ROW))["logits"])
        for weights in output.attentions:
            assert_close(weights[[0, 2]].sum(-1), torch.ones(2, 3, 7, dtype=torch.float64))
            assert weights[1].count_nonzero() == 0
            assert weights[2, :, :, 5:].count_nonzero() == 0


@pytest.mark.parametrize("length", [16, 17, 24, 600])
def test_rotary_positions_have_no_end(length: int) -> None:
    source = training_model()
    model = port_of(source)
    idx = torch.randint(1, 37, (2, length), generator=torch.Generator().manual_seed(length))
    expected = source(idx)["logits"]
    assert_close(model(idx).logits, expected)
    for shift, rows in ((0, 1), (5, 2), (10_000, 1)):  # only distances count
        ids = (torch.arange(length) + shift).expand(rows, length)
        assert_close(model(idx, position_ids=ids).logits, expected, 1e-8)
    other = torch.arange(length) * 2
    assert (model(idx, position_ids=other[None]).logits - expected).abs().max() > 0.1


def test_learned_positions() -> None:
    source = training_model(rope=False, pad_token_id=3)
    model = port_of(source)
    idx = torch.tensor([[3, 3, 5, 6, 3, 7], [5, 6, 7, 3, 3, 3]])
    expected = source(idx)["logits"]
    assert_close(model(idx).logits, expected)
    ids = torch.tensor([[0, 0, 1, 2, 0, 3], [1, 2, 3, 0, 0, 0]])
    assert_close(model(idx, position_ids=ids).logits, expected)
    assert (model(idx, position_ids=torch.arange(6)[None]).logits - expected).abs().max() > 0.1
    # A mask says nothing of positions where there are token ids.
    right = torch.tensor([[1, 1, 1, 1, 0, 0]] * 2)
    assert_close(model(idx, attention_mask=right).logits, source(idx, additive(right))["logits"])
    # Embeddings alone do not tell which ids they are of.
    embeds = model.model.encoder(IDX)
    content = IDX.clamp(min=4)
    assert_close(model(inputs_embeds=model.model.encoder(content)).logits, source(content)["logits"])
    for mask in (MASK, MASK.bool(), additive(MASK), additive(MASK, -1e4)):
        ids = MASK.cumsum(-1) * MASK
        expected = model(inputs_embeds=embeds, attention_mask=MASK, position_ids=ids).logits
        assert_close(model(inputs_embeds=embeds, attention_mask=mask).logits, expected)


def test_learned_positions_end() -> None:
    source = training_model(rope=False)
    model = port_of(source)
    idx = torch.ones(1, 17, dtype=torch.long)
    for run in (model, source):
        with pytest.raises(ValueError, match=r"17 tokens.*max_length=16"):
            run(idx)
    idx[0, 3] = 0  # padding needs no row of its own
    assert_close(model(idx).logits, source(idx)["logits"])
    assert model(IDX[:, :1], position_ids=torch.tensor([[16]])).logits.isfinite().all()
    for position in (17, -1):
        with pytest.raises(ValueError, match=f"from {position} to {position}.*max_length=16"):
            model(IDX[:, :1], position_ids=torch.tensor([[position]]))
    with pytest.raises(ValueError, match="max_length=16"):
        model(inputs_embeds=torch.zeros(1, 17, 24, dtype=torch.float64))


@rope_and_learned
def test_embeddings_are_the_same_input(rope: bool) -> None:
    model = port_of(training_model(rope=rope))
    embeds = model.get_input_embeddings()(IDX).detach().requires_grad_()
    output = model(inputs_embeds=embeds)
    assert_close(output.logits, model(IDX).logits)
    output.logits.sum().backward()
    assert embeds.grad.abs().max() > 0


def test_legacy_positional_order_and_tuples() -> None:
    model = port_of(training_model())
    expected = model(input_ids=IDX, attention_mask=MASK, labels=IDX, output_hidden_states=True)
    assert torch.equal(model(IDX, MASK).logits, expected.logits)
    plain = model(IDX, MASK, labels=IDX, return_dict=False)
    assert isinstance(plain, tuple)
    assert torch.equal(plain[0], expected.loss)
    assert torch.equal(plain[1], expected.logits)
    assert len(plain) == 2
    assert len(model(IDX, return_dict=False)) == 1
    assert torch.equal(model.model(IDX, MASK, return_dict=False)[0], expected.hidden_states[-1])
    for field in ("output_hidden_states", "output_attentions"):
        model.set_attn_implementation("eager")
        setattr(model.config, field, True)
    output = model(IDX)
    assert len(output.hidden_states) == 3
    assert len(output.attentions) == 2
    assert model(IDX, output_hidden_states=False, output_attentions=False).keys() == {"logits"}
    model.config.return_dict = False
    assert [len(part) for part in model(IDX)] == [3, 3, 2]
    assert model(IDX, return_dict=True).logits.shape == (3, 7, 37)


def test_token_types_change_nothing() -> None:
    for head in (NeoBERT, NeoBERTLMHead, NeoBERTForSequenceClassification):
        model = head(NeoBERTConfig(**SIZES)).eval()
        assert torch.equal(model(IDX, token_type_ids=torch.ones_like(IDX))[0], model(IDX)[0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"packed_seqlens": [[3, 4]]}, TypeError, "packed_seqlens.*training model only"),
        ({"cu_seqlens": None}, TypeError, "cu_seqlens.*training model only"),
        ({"cu_seq_lens_q": None}, TypeError, "cu_seq_lens_q.*training model only"),
        ({"max_seqlen": 4}, TypeError, "max_seqlen.*training model only"),
        ({"max_length_q": 4}, TypeError, "max_length_q.*training model only"),
        ({"past_key_values": None}, TypeError, "past_key_values"),
        ({"inputs_embeds": torch.zeros(3, 7, 24)}, ValueError, "exactly one"),
        ({"input_ids": None}, ValueError, "exactly one"),
        ({"attention_mask": torch.ones(3, 7, 7)}, ValueError, r"3 axes.*packed.*\(3, 7\)"),
        ({"attention_mask": torch.ones(3, 1, 7, 7)}, ValueError, "4 axes.*not supported"),
        ({"attention_mask": torch.ones(3, 6)}, ValueError, r"\(3, 6\).*\(3, 7\)"),
        ({"attention_mask": torch.ones(1, 7)}, ValueError, r"\(1, 7\).*\(3, 7\)"),
        ({"attention_mask": torch.ones(7)}, ValueError, r"\(7,\).*\(3, 7\)"),
        ({"attention_mask": torch.full((3, 7), math.nan)}, ValueError, "NaN"),
        ({"attention_mask": torch.full((3, 7), math.inf)}, ValueError, "infinity"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_refused_calls(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    config = NeoBERTConfig(**SIZES)
    for head in (NeoBERT, NeoBERTLMHead, NeoBERTForSequenceClassification):
        with pytest.raises(error, match=message) as raised:
            head(config)(**{"input_ids": IDX, **arguments})
        assert "\n" not in str(raised.value)


# Masks


@eager_and_sdpa
@rope_and_learned
def test_forms_of_a_mask(attention: str, rope: bool) -> None:
    source = training_model(rope=rope)
    model = port_of(source, attention)
    expected = source(IDX, additive(MASK))["logits"]
    assert (expected - source(IDX)["logits"]).abs().max() > 0.1
    forms = [MASK.to(dtype) for dtype in (torch.int64, torch.int32, torch.uint8, torch.bool)]
    forms += [MASK.to(dtype) for dtype in (torch.float16, torch.float32, torch.float64)]
    forms += [MASK * 3, -MASK, MASK * 0.5]
    forms += [additive(MASK), additive(MASK, dtype=torch.float32), additive(MASK, torch.finfo(torch.float32).min)]
    forms += [additive(MASK, -1e4)]
    for form in forms:
        assert_close(model(IDX, attention_mask=form).logits, expected)


@eager_and_sdpa
def test_forms_of_no_mask(attention: str) -> None:
    source = training_model()
    model = port_of(source, attention)
    expected = source(IDX)["logits"]
    zeros = torch.zeros(3, 7, dtype=torch.float64)
    for form in (torch.ones_like(IDX), torch.ones(3, 7).bool(), torch.ones(3, 7), zeros, zeros.half(), -zeros):
        assert_close(model(IDX, attention_mask=form).logits, expected)
    constant = zeros - 2.5  # the same for all keys
    assert_close(model(IDX, attention_mask=constant).logits, expected)


@eager_and_sdpa
def test_a_finite_bias_is_added(attention: str) -> None:
    source = training_model()
    bias = torch.randn(3, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = source(IDX, bias)["logits"]
    assert (expected - source(IDX)["logits"]).abs().max() > 0.1
    assert_close(port_of(source, attention)(IDX, attention_mask=bias).logits, expected)


@eager_and_sdpa
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_row_without_any_token_stays_finite(attention: str, dtype: torch.dtype) -> None:
    source = training_model(dtype)
    model = port_of(source, attention)
    forms = [EMPTY_ROW, EMPTY_ROW.bool(), additive(EMPTY_ROW, dtype=torch.float32), additive(EMPTY_ROW, dtype=dtype)]
    forms += [additive(EMPTY_ROW, torch.finfo(dtype).min, dtype)] if dtype != torch.float64 else []
    bound = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.1)
    for number, form in enumerate(forms):
        model.zero_grad()
        output = model(IDX, attention_mask=form, labels=IDX)
        output.loss.backward()
        assert output.logits.isfinite().all()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        alone = model(IDX[:1]).logits
        assert_close(output.logits[:1].double(), alone.double(), bound)
        if number < 4:
            wanted = source(IDX, additive(EMPTY_ROW, dtype=dtype))["logits"]
            assert_close(output.logits.double(), wanted.double(), bound)


def test_masked_scores_do_not_overflow_in_half_precision() -> None:
    query = torch.full((1, 1, 1, 4), 8.0, dtype=torch.float16)
    lowest = torch.full((1, 1, 1, 3), torch.finfo(torch.float16).min, dtype=torch.float16)
    keys = -query.expand(1, 1, 3, 4)  # every score is far below zero before the mask is added
    output, weights = eager_attention_forward(torch.nn.Module().eval(), query, keys, keys, lowest, scaling=0.5)
    assert output.dtype == weights.dtype == torch.float16
    assert_close(weights.float(), torch.full((1, 1, 1, 3), 1 / 3), 1e-3)


@eager_and_sdpa
def test_padding_changes_nothing(attention: str) -> None:
    """Rows of the batch alone, without their padding."""
    source = training_model()
    logits = port_of(source, attention)(IDX, attention_mask=MASK).logits
    for row, mask, actual in zip(IDX, MASK.bool(), logits, strict=True):
        if mask.tolist() == [bool(one) for one in INTERIOR]:
            continue  # rotary distances are those of the row as it stands
        assert_close(actual[mask], source(row[mask][None])["logits"][0])


@rope_and_learned
def test_nothing_at_all_gives_nothing(rope: bool) -> None:
    model = port_of(training_model(rope=rope))
    assert model(IDX[:, :0]).logits.shape == (3, 0, 37)
    assert model(IDX[:0], attention_mask=MASK[:0]).logits.shape == (0, 7, 37)


# Loss and training


@eager_and_sdpa
@all_variants
def test_gradients(attention: str, fields: dict[str, Any]) -> None:
    source = training_model(**fields)
    model = port_of(source, attention)
    idx, labels = IDX.clone(), IDX.roll(1, 0)
    idx[0, :2], idx[1, 5:] = 0, 0
    labels[MASK == 0] = -100
    expected = original.masked_lm_loss(source(idx, additive(MASK))["logits"], labels)
    expected.backward()
    loss = model(idx, attention_mask=MASK, labels=labels).loss
    loss.backward()
    assert_close(loss, expected)
    theirs = dict(source.named_parameters())
    assert theirs.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert (parameter.grad - theirs[name].grad).abs().max() < 1e-12, name


def test_micro_batches_add_up() -> None:
    model = port_of(training_model())
    labels = IDX.masked_fill(MASK == 0, -100)
    whole = model(IDX, labels=labels).loss
    for count in (15, torch.tensor(15)):
        parts = [model(row[None], labels=label[None], num_items_in_batch=count).loss
                 for row, label in zip(IDX, labels, strict=True)]  # fmt: skip
        assert_close(torch.stack(parts).sum(), whole)
    nothing = torch.full_like(IDX, -100)
    assert model(IDX, labels=nothing).loss.isnan()
    assert model(IDX, labels=nothing, num_items_in_batch=15).loss == 0
    assert model.loss_type == "ForMaskedLM"
    assert getattr(model, "accepts_loss_kwargs", True)


def test_half_precision_loss_is_float32() -> None:
    model = port_of(training_model(torch.bfloat16))
    output = model(IDX, labels=IDX)
    assert output.loss.dtype == torch.float32
    expected = torch.nn.functional.cross_entropy(output.logits.float().flatten(0, 1), IDX.flatten())
    assert_close(output.loss, expected, 1e-6)
    assert masked_lm_loss(torch.zeros(2, 3, dtype=torch.float64), torch.tensor([0, 1])).dtype == torch.float64


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_follows_the_original(dropout: float) -> None:
    """The same draws only if dropout is in the same places."""
    source = training_model(dropout=dropout).train()
    model = port_of(source).train()
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-3) for each in (source, model)]
    for step in range(3):
        losses = []
        for optimizer, run in zip(optimizers, (source, model), strict=True):
            torch.manual_seed(step)
            optimizer.zero_grad()
            logits = run(IDX)["logits"]
            loss = original.masked_lm_loss(logits, IDX.roll(1, 0))
            loss.backward()
            optimizer.step()
            losses.append(loss)
        assert_close(losses[1], losses[0])
    for name, parameter in source.named_parameters():
        assert (dict(model.named_parameters())[name] - parameter).abs().max() < 1e-9, name


def test_dropout_of_eager_attention() -> None:
    model = port_of(training_model(dropout=0.5), "eager").train()
    torch.manual_seed(0)
    output = model(IDX, output_attentions=True)
    assert_close(output.attentions[0].sum(-1), torch.ones(3, 3, 7, dtype=torch.float64))  # before dropout
    assert not torch.equal(model(IDX).logits, model(IDX).logits)
    model.eval()
    assert torch.equal(model(IDX).logits, model(IDX).logits)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    model = port_of(training_model(dropout=0.2)).train()
    gradients, calls = [], []
    model.model.transformer_encoder[0].wo.register_forward_hook(lambda *_: calls.append(enable))
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.zero_grad()
        torch.manual_seed(3)
        model(IDX, attention_mask=MASK, labels=IDX).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert calls == [False, True, True]
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


# Half precision and casts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@all_variants
def test_half_precision_rounds_where_training_rounds(dtype: torch.dtype, fields: dict[str, Any]) -> None:
    source = training_model(dtype, **fields)
    model = port_of(source)
    exact = copy.deepcopy(source).double()(IDX)["logits"]
    theirs = (source(IDX)["logits"].double() - exact).abs().mean()
    assert (model(IDX).logits.double() - exact).abs().mean() < 1.2 * theirs
    norm = "attention_norm"
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    one, other = (getattr(each.model.transformer_encoder[0], norm)(x) for each in (source, model))
    assert torch.equal(one, other)


@rope_and_learned
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_casts_before_and_after_a_call_are_one(rope: bool, dtype: torch.dtype) -> None:
    source = training_model(torch.float32, rope=rope)
    before, after = port_of(source), port_of(source)
    after(IDX)
    assert torch.equal(after.to(dtype)(IDX).logits, before.to(dtype)(IDX).logits)
    assert list(after.buffers()) == []
    longer = torch.ones(1, 40, dtype=torch.long)
    if rope:
        assert copy.deepcopy(after)(longer).logits.isfinite().all()


def test_autocast() -> None:
    source = training_model(torch.float32)
    model = port_of(source)
    exact = source.double()(IDX, additive(EMPTY_ROW))["logits"]
    with torch.autocast("cpu", torch.bfloat16):
        output = model(IDX, attention_mask=EMPTY_ROW, output_hidden_states=True)
    assert all(state.dtype == torch.float32 for state in output.hidden_states)
    assert (output.logits.double() - exact).abs().mean() < 0.05 * exact.abs().mean() + 0.05


# Compilation and kernels


@eager_and_sdpa
@rope_and_learned
def test_compiles_in_one_graph(attention: str, rope: bool) -> None:
    torch._dynamo.reset()
    model = port_of(training_model(rope=rope), attention)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for mask in (None, MASK, MASK.bool(), additive(MASK)):
            expected = model(IDX, attention_mask=mask).logits
            assert_close(compiled(IDX, attention_mask=mask).logits, expected)
        ids = torch.arange(2, 9)[None]
        assert_close(compiled(IDX, position_ids=ids).logits, model(IDX, position_ids=ids).logits)
    compiled(IDX, labels=IDX).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    torch._dynamo.reset()


def test_attention_can_be_switched() -> None:
    model = port_of(training_model(), "sdpa")
    expected = model(IDX, attention_mask=MASK).logits
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    assert_close(model(IDX, attention_mask=MASK).logits, expected)
    assert not torch.equal(model(IDX, attention_mask=MASK).logits, expected)  # it is another computation
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(IDX, attention_mask=MASK).logits, expected)


def test_sdpa_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: calls.append(kwargs) or plain(*args, **kwargs),
    )
    source = training_model()
    port_of(source, "eager")(IDX)
    assert calls == []
    port_of(source, "sdpa")(IDX)
    assert [call["is_causal"] for call in calls] == [False, False]


def test_nothing_is_left_behind() -> None:
    model, other = port_of(training_model()), port_of(training_model(num_hidden_layers=1))
    before = model(IDX, labels=IDX)
    model(IDX, attention_mask=torch.zeros(3, 7).long(), output_hidden_states=True)
    model(torch.ones(1, 30, dtype=torch.long))
    other(IDX[:, :2], labels=IDX[:, :2])
    after = model(IDX, labels=IDX)
    assert torch.equal(before.loss, after.loss)
    assert torch.equal(before.logits, after.logits)
    assert after.hidden_states is None


# Classification


@eager_and_sdpa
@pytest.mark.parametrize("labels", [1, 3])
def test_classifier(attention: str, labels: int) -> None:
    def head(config: Any) -> Any:
        return original.NeoBERTForSequenceClassification(config, num_labels=labels)

    source = training_model(head=head)
    model = port_of(source, attention, NeoBERTForSequenceClassification, num_labels=labels)
    targets = torch.tensor([0.5, -1.0, 2.0]) if labels == 1 else torch.tensor([2, 0, 1])
    output = model(IDX, attention_mask=MASK, token_type_ids=torch.zeros_like(IDX), labels=targets)
    expected = source(IDX, MASK, targets)
    assert_close(output.logits, expected["logits"])
    assert_close(output.loss, expected["loss"])
    assert model(IDX, attention_mask=MASK, labels=targets, return_dict=False)[0] == output.loss
    full = model(IDX, attention_mask=MASK, output_hidden_states=True, output_attentions=True)
    assert_close(full.hidden_states[-1], expected["hidden_representation"])
    assert len(full.attentions) == 2
    for each in (source, model):
        each.train()
    drawn = []
    for run in (source, model):
        torch.manual_seed(4)
        drawn.append(run(IDX)["logits"])
    assert_close(drawn[1], drawn[0])


def classifier(**fields: Any) -> NeoBERTForSequenceClassification:
    torch.manual_seed(0)
    return NeoBERTForSequenceClassification(NeoBERTConfig(**SIZES, **fields)).double().eval()


def test_the_kind_of_problem_is_that_of_each_call() -> None:
    model = classifier(num_labels=3)
    logits = model(IDX).logits
    functional = torch.nn.functional
    classes = torch.tensor([2, -100, 1])
    multi = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]])
    for _ in range(2):
        for labels, expected in (
            (classes, functional.cross_entropy(logits, classes)),
            (classes.int(), functional.cross_entropy(logits, classes)),
            (multi.float(), functional.binary_cross_entropy_with_logits(logits, multi.double())),
            (multi.bool(), functional.binary_cross_entropy_with_logits(logits, multi.double())),
        ):
            assert_close(model(IDX, labels=labels).loss, expected)
            assert model.config.problem_type is None
    numbers = torch.randn(3, 3)
    model.config.problem_type = "regression"
    assert_close(model(IDX, labels=numbers).loss, functional.mse_loss(logits, numbers.double()))
    model.config.problem_type = "multi_label_classification"
    assert_close(model(IDX, labels=multi).loss, functional.binary_cross_entropy_with_logits(logits, multi.double()))
    with pytest.raises(ValueError, match=r"\(3,\).*\(3, 3\)"):
        model(IDX, labels=classes)


def test_regression_of_one_number() -> None:
    model = classifier(num_labels=1)
    numbers = torch.tensor([0.5, 1.0, -2.0])
    expected = torch.nn.functional.mse_loss(model(IDX).logits[:, 0], numbers.double())
    for labels in (numbers, numbers[:, None], numbers.double()):
        assert_close(model(IDX, labels=labels).loss, expected)
    whole = torch.tensor([0, 1, 5])  # a score of stars
    expected = torch.nn.functional.mse_loss(model(IDX).logits[:, 0], whole.double())
    assert_close(model(IDX, labels=whole).loss, expected)
    assert_close(model(IDX[:1], labels=whole[:1]).loss, (model(IDX[:1]).logits[0, 0] - 0).square())


@pytest.mark.parametrize(
    ("labels", "count"), [(torch.tensor([2, 0, 1]), 3), (torch.eye(3), 9)], ids=["single", "multi"]
)
def test_micro_batches_of_a_classifier_add_up(labels: Tensor, count: int) -> None:
    model = classifier(num_labels=3)
    parts = [model(IDX[i, None], labels=labels[i, None], num_items_in_batch=count).loss for i in range(3)]
    assert_close(torch.stack(parts).sum(), model(IDX, labels=labels).loss)


def test_dropout_of_a_classifier() -> None:
    assert classifier().dropout.p == 0.1
    assert classifier(classifier_dropout=0.0).dropout.p == 0.0
    assert classifier(classifier_dropout=None, dropout=0.25).dropout.p == 0.25
