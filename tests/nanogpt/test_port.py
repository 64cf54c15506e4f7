# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face nanoGPT against the original, on whichever transformers is installed."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel, StaticCache
from transformers.trainer_pt_utils import get_parameter_names

from reference_models.nanogpt.configuration_nanogpt import NanoGPTConfig
from reference_models.nanogpt.modeling_nanogpt import NanoGPTLMHeadModel, NanoGPTModel, eager_attention_forward
from reference_models.nanogpt.original import GPT, GPTConfig

SIZES: dict[str, Any] = {"block_size": 16, "vocab_size": 37, "n_layer": 2, "n_head": 2, "n_embd": 16}
IDX = torch.randint(37, (2, 7), generator=torch.Generator().manual_seed(1))
NEXT = torch.cat((IDX[:, 1:], torch.full((2, 1), -1)), dim=1)
GREEDY: dict[str, Any] = {"do_sample": False}

eager_and_sdpa = pytest.mark.parametrize("attention", ["eager", "sdpa"])

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def own_registration() -> None:
    """Other tests import copies of the port, which register themselves in its place."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    AutoConfig.register(NanoGPTConfig.model_type, NanoGPTConfig, exist_ok=True)
    AutoModel.register(NanoGPTConfig, NanoGPTModel, exist_ok=True)
    AutoModelForCausalLM.register(NanoGPTConfig, NanoGPTLMHeadModel, exist_ok=True)


def original(dtype: torch.dtype = torch.float64, **fields: Any) -> GPT:
    """Return an original in eval mode with weights that show every defect: peaked attention, biases, gains."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**(SIZES | fields)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim > 1 else 0.2))
            if ".ln_" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model.to(dtype).eval()


def port(
    dtype: torch.dtype = torch.float64, attention: str = "sdpa", source: GPT | None = None, **fields: Any
) -> NanoGPTLMHeadModel:
    """Return the port with the weights of that original."""
    source = source or original(**fields)
    config = NanoGPTConfig(**vars(source.config))
    model = NanoGPTLMHeadModel._from_config(config, attn_implementation=attention)
    model.load_state_dict(source.state_dict(), strict=True)
    return model.to(dtype).eval()


def assert_close(a: Tensor, b: Tensor, bound: float = 1e-12) -> None:
    assert a.shape == b.shape
    assert ((a - b).abs().max() / b.pow(2).mean().sqrt()).item() < bound


# Forward


@eager_and_sdpa
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("length", [1, 7, 16])
def test_logits_and_hidden_states(attention: str, bias: bool, length: int) -> None:
    source = original(bias=bias)
    idx = torch.randint(37, (3, length))
    seen: list[Tensor] = []
    for module in (*source.transformer.h, source.transformer.ln_f):
        module.register_forward_hook(lambda m, i, o: seen.extend((i[0], o) if not seen else (o,)))
    logits, _ = source(idx, idx)

    outputs = port(attention=attention, bias=bias)(idx, output_hidden_states=True)

    assert_close(outputs.logits, logits)
    assert len(outputs.hidden_states) == 3
    # The library's contract: the input of each block, then the output of the last norm.
    for ours, theirs in zip(outputs.hidden_states, (*seen[:2], seen[-1]), strict=True):
        assert_close(ours, theirs)


def test_one_head_and_odd_head_size() -> None:
    for fields in ({"n_head": 1}, {"n_head": 3, "n_embd": 9}, {"n_head": 4, "n_embd": 4}):
        assert_close(port(**fields)(IDX).logits, original(**fields)(IDX, IDX)[0])


def test_attentions_are_causal_probabilities() -> None:
    attentions = port(attention="eager")(IDX, output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in attentions] == [(2, 2, 7, 7)] * 2
    for weights in attentions:
        assert_close(weights.sum(-1), torch.ones(2, 2, 7, dtype=torch.float64))
        assert weights.triu(1).count_nonzero() == 0


def test_tuple_order() -> None:
    model = port(attention="eager")
    named = model(IDX, labels=IDX, output_hidden_states=True, output_attentions=True)
    plain = model(IDX, labels=IDX, output_hidden_states=True, output_attentions=True, return_dict=False)
    assert isinstance(plain, tuple)
    assert list(named.keys()) == ["loss", "logits", "past_key_values", "hidden_states", "attentions"]
    assert torch.equal(plain[0], named.loss)
    assert torch.equal(plain[1], named.logits)
    assert [len(part) for part in plain[3:]] == [3, 2]
    model.config.return_dict = False
    assert torch.equal(model(IDX, use_cache=False)[0], named.logits)


def test_kept_logits() -> None:
    model = port()
    whole = model(IDX).logits
    assert_close(model(IDX, logits_to_keep=2).logits, whole[:, -2:])
    assert_close(model(IDX, num_logits_to_keep=1).logits, whole[:, -1:])
    assert_close(model(IDX, logits_to_keep=torch.tensor([1, 4])).logits, whole[:, [1, 4]])
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(IDX, labels=IDX, logits_to_keep=1)


def test_inputs_embeds() -> None:
    model = port()
    assert_close(model(inputs_embeds=model.get_input_embeddings()(IDX)).logits, model(IDX).logits)
    for inputs in ({}, {"input_ids": IDX, "inputs_embeds": model.get_input_embeddings()(IDX)}):
        with pytest.raises(ValueError, match="exactly one"):
            model(**inputs)


def test_position_ids() -> None:
    model, shifted = port(), original()
    with torch.no_grad():
        shifted.transformer.wpe.weight.copy_(shifted.transformer.wpe.weight.roll(-3, dims=0))
    positions = torch.arange(3, 10)[None]
    assert_close(model(IDX, position_ids=positions).logits, shifted(IDX, IDX)[0])
    with pytest.raises(ValueError, match=r"position_ids.*10 to 16.*block_size=16"):
        model(IDX, position_ids=positions + 7)


@eager_and_sdpa
def test_too_long(attention: str) -> None:
    model = port(attention=attention)
    with pytest.raises(ValueError, match=r"17 tokens.*block_size=16.*use_cache=False"):
        model(torch.zeros(1, 17, dtype=torch.long))
    past = model(torch.zeros(1, 12, dtype=torch.long), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"17 tokens.*block_size=16"):
        model(torch.zeros(1, 5, dtype=torch.long), past_key_values=past)


# Masks


@eager_and_sdpa
@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
@pytest.mark.parametrize(
    "columns",
    [[0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 1, 1, 0, 1, 1, 1]],
    ids=["left", "right", "interior"],
)
def test_padding_changes_nothing(attention: str, dtype: torch.dtype, columns: list[int]) -> None:
    model = port(attention=attention)
    mask = torch.tensor([columns, [1] * 10])
    padded = torch.randint(37, (2, 10))
    padded[0, mask[0].bool()] = IDX[0]
    logits = model(padded, attention_mask=mask.to(dtype)).logits
    assert_close(logits[0, mask[0].bool()], model(IDX[:1]).logits[0])
    assert_close(logits[1:], model(padded[1:]).logits)


@eager_and_sdpa
def test_forms_of_no_mask(attention: str) -> None:
    model = port(attention=attention)
    expected = model(IDX).logits
    seen = torch.ones(7, 7).tril().bool()[None, None]
    additive = torch.zeros(1, 1, 7, 7).masked_fill(~seen, float("-inf"))
    for mask in (torch.ones(2, 7), torch.ones(2, 7).bool(), seen.expand(2, 1, 7, 7), additive, additive.half()):
        assert_close(model(IDX, attention_mask=mask).logits, expected)


@eager_and_sdpa
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_row_without_any_token_stays_finite(attention: str, dtype: torch.dtype) -> None:
    model = port(dtype, attention)
    lowest = torch.full((2, 1, 7, 7), torch.finfo(dtype).min, dtype=dtype)
    for mask in (torch.zeros(2, 7).long(), lowest, torch.full_like(lowest, float("-inf")), lowest.bool().logical_not()):
        assert model(IDX, attention_mask=mask).logits.isfinite().all()


def test_masked_scores_do_not_overflow_in_half_precision() -> None:
    query = torch.full((1, 1, 1, 4), 8.0, dtype=torch.float16)
    lowest = torch.full((1, 1, 1, 3), torch.finfo(torch.float16).min, dtype=torch.float16)
    keys = -query.expand(1, 1, 3, 4)  # every score is far below zero before the mask is added
    output, weights = eager_attention_forward(torch.nn.Module().eval(), query, keys, keys, lowest, scaling=0.5)
    assert output.dtype == weights.dtype == torch.float16
    assert_close(weights.float(), torch.full((1, 1, 1, 3), 1 / 3), 1e-3)


@eager_and_sdpa
def test_gradients_of_a_padded_batch(attention: str) -> None:
    model = port(attention=attention).train()
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), IDX), dim=1)
    mask = (torch.arange(10) >= 3).long().expand(2, 10)
    gradients = []
    for inputs in (
        {"input_ids": IDX, "targets": NEXT},
        {"input_ids": padded, "attention_mask": mask, "targets": torch.nn.functional.pad(NEXT, (3, 0), value=-1)},
    ):
        model.zero_grad()
        model(**inputs).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for alone, with_padding in zip(*gradients, strict=True):
        assert (alone - with_padding).abs().max() < 1e-12


# Loss and training


def test_both_loss_conventions() -> None:
    model, source = port(), original()
    _, expected = source(IDX, NEXT)
    assert model(IDX, targets=NEXT).loss.dtype == torch.float64
    assert_close(model(IDX, targets=NEXT).loss, expected)
    assert_close(model(IDX, labels=IDX).loss, expected)
    ignored = IDX.clone()
    ignored[:, 3] = -100
    targets = NEXT.clone()
    targets[:, 2] = -1
    assert_close(model(IDX, labels=ignored).loss, source(IDX, targets)[1])
    assert_close(model(IDX, targets=targets).loss, source(IDX, targets)[1])
    with pytest.raises(ValueError, match="labels"):
        model(IDX, labels=IDX, targets=NEXT)


def test_micro_batches_add_up() -> None:
    model = port()
    whole = model(IDX, labels=IDX).loss
    for count in (12, torch.tensor(12)):
        parts = [model(row[None], labels=row[None], num_items_in_batch=count).loss for row in IDX]
        assert_close(torch.stack(parts).sum(), whole)
    parts = [model(i[None], targets=t[None], num_items_in_batch=12).loss for i, t in zip(IDX, NEXT, strict=True)]
    assert_close(torch.stack(parts).sum(), whole)


def test_half_precision_loss_is_float32() -> None:
    model = port(torch.bfloat16)
    logits = model(IDX).logits.float()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDX[:, 1:].flatten())
    loss = model(IDX, labels=IDX).loss
    assert loss.dtype == torch.float32
    assert_close(loss, expected, 1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_follows_the_original(dropout: float) -> None:
    source = original(dropout=dropout).train()
    model = port(source=source).train()
    theirs = source.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    decayed = set(get_parameter_names(model, [torch.nn.LayerNorm], ["bias"]))  # the library's Trainer's rule
    named = dict(model.named_parameters())
    ours = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if n in decayed], "weight_decay": 0.1},
            {"params": [p for n, p in named.items() if n not in decayed], "weight_decay": 0.0},
        ],
        lr=1e-3,
        betas=(0.9, 0.95),
    )
    for step in range(3):
        losses = []
        for optimizer, run in ((theirs, source), (ours, model)):
            torch.manual_seed(step)  # the same draws only if dropout is in the same places
            optimizer.zero_grad()
            loss = run(IDX, NEXT)[1] if run is source else run(IDX, targets=NEXT).loss
            loss.backward()
            optimizer.step()
            losses.append(loss)
        assert_close(losses[1], losses[0])
    for name, parameter in source.named_parameters():
        assert (named[name] - parameter).abs().max() < 1e-9, name
        assert (named[name].grad - parameter.grad).abs().max() < 1e-12, name


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    model = port(dropout=0.2).train()
    gradients = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.zero_grad()
        torch.manual_seed(3)
        outputs = model(IDX, labels=IDX)
        outputs.loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert outputs.past_key_values is None
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def assert_initial_stds(model: torch.nn.Module, layers: int) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name
        else:
            expected = 0.02 / (2 * layers) ** 0.5 if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.06), name


def test_initialisation(tmp_path: Path) -> None:
    config = NanoGPTConfig(block_size=64, vocab_size=300, n_layer=3, n_head=2, n_embd=64)
    model = NanoGPTLMHeadModel(config)
    assert_initial_stds(model, 3)
    assert_initial_stds(NanoGPTModel(config), 3)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    # What a file lacks starts like a new model, and takes nothing with it that the file has.
    for lost in ("transformer.h.0.mlp.c_proj.weight", "transformer.h.1.attn.c_attn.bias", "transformer.ln_f.weight"):
        rest = {name: tensor for name, tensor in weights.items() if name != lost}
        save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
        loaded, info = NanoGPTLMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
        assert set(info["missing_keys"]) == {lost}
        assert_initial_stds(loaded, 3)
        for name, tensor in rest.items():
            assert torch.equal(loaded.state_dict()[name], tensor), name


# Generation


@eager_and_sdpa
@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_greedy_is_the_originals(attention: str, how: dict[str, Any]) -> None:
    model = port(attention=attention)
    expected = original().generate(IDX, 10, top_k=1)
    assert torch.equal(model.generate(IDX, max_new_tokens=10, **GREEDY, **how), expected)
    padded = torch.cat((torch.zeros(2, 2, dtype=torch.long), IDX), dim=1)
    mask = (torch.arange(9) >= 2).long().expand(2, 9)
    output = model.generate(padded, attention_mask=mask, max_new_tokens=8, **GREEDY, **how)
    assert torch.equal(output[:, 2:], expected[:, :15])


@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_beams(how: dict[str, Any]) -> None:
    model = port()
    batch = model.generate(IDX, max_new_tokens=6, num_beams=3, **GREEDY, **how)
    for row, expected in zip(IDX, batch, strict=True):
        padded = torch.cat((torch.zeros(3, dtype=torch.long), row))[None]
        mask = (torch.arange(10) >= 3).long()[None]
        alone = model.generate(padded, attention_mask=mask, max_new_tokens=6, num_beams=3, **GREEDY, **how)
        assert torch.equal(alone[0, 3:], expected)


def test_beyond_the_block_the_window_moves() -> None:
    model, source = port(torch.float32), original(torch.float32)
    output = model.generate(IDX, max_new_tokens=40, use_cache=False, **GREEDY)
    assert torch.equal(output, source.generate(IDX, 40, top_k=1))
    long = torch.randint(37, (1, 30))
    assert torch.equal(
        model.generate(long, max_new_tokens=5, use_cache=False, **GREEDY), source.generate(long, 5, top_k=1)
    )
    torch.manual_seed(3)
    expected = source.generate(IDX, 40, temperature=0.8, top_k=5)
    torch.manual_seed(3)
    sampled = model.generate(IDX, max_new_tokens=40, use_cache=False, do_sample=True, temperature=0.8, top_k=5)
    assert torch.equal(sampled, expected)
    padded = torch.cat((torch.zeros(2, 4, dtype=torch.long), IDX), dim=1)
    mask = (torch.arange(11) >= 4).long().expand(2, 11)
    output = model.generate(padded, attention_mask=mask, max_new_tokens=30, use_cache=False, **GREEDY)
    assert torch.equal(output[:, 4:], source.generate(IDX, 30, top_k=1))


def test_beyond_the_block_a_cache_is_refused_at_once() -> None:
    model = port()
    calls = []
    model.transformer.register_forward_hook(lambda m, i, o: calls.append(1))
    for how in ({}, {"cache_implementation": "static"}, {"num_beams": 2}):
        with pytest.raises(ValueError, match=r"17 positions.*block_size=16.*use_cache=False"):
            model.generate(IDX, max_new_tokens=11, **GREEDY, **how)
    assert not calls


@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_generate_from_embeddings_and_positions(how: dict[str, Any]) -> None:
    model = port()
    expected = model.generate(IDX, max_new_tokens=8, **GREEDY)
    embeddings = model.get_input_embeddings()(IDX)
    output = model.generate(inputs_embeds=embeddings, max_new_tokens=8, **GREEDY, **how)
    assert torch.equal(output, expected[:, 7:])
    positions = torch.arange(2, 9).expand(2, 7)
    rolled = original()
    with torch.no_grad():
        rolled.transformer.wpe.weight.copy_(rolled.transformer.wpe.weight.roll(-2, dims=0))
    output = model.generate(IDX, position_ids=positions, max_new_tokens=6, **GREEDY, **how)
    assert torch.equal(output, rolled.generate(IDX, 6, top_k=1))


def test_cache_in_pieces() -> None:
    model = port()
    whole = model(IDX).logits
    for cuts in ([3, 5], [1, 2, 3, 4, 5, 6]):
        for cache in (None, StaticCache(config=model.config, max_cache_len=16)):
            pieces, past = [], cache
            for piece in IDX.tensor_split(cuts, dim=1):
                outputs = model(piece, past_key_values=past, use_cache=True)
                pieces.append(outputs.logits)
                past = outputs.past_key_values
            assert_close(torch.cat(pieces, dim=1), whole)
    assert model(IDX, use_cache=False).past_key_values is None


def test_cache_with_padding() -> None:
    model = port()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    whole = model(IDX, attention_mask=mask).logits
    past = model(IDX[:, :4], attention_mask=mask[:, :4], use_cache=True).past_key_values
    assert_close(model(IDX[:, 4:], attention_mask=mask, past_key_values=past).logits, whole[:, 4:])


def test_continued_generation() -> None:
    model = port()
    first = model.generate(IDX, max_new_tokens=3, return_dict_in_generate=True, **GREEDY)
    output = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=3, **GREEDY)
    assert torch.equal(output, original().generate(IDX, 6, top_k=1))
    output = model.generate(IDX, max_new_tokens=6, prefill_chunk_size=3, **GREEDY)
    assert torch.equal(output, original().generate(IDX, 6, top_k=1))


def test_nothing_is_left_behind() -> None:
    model, other = port(), port(n_layer=1)
    before = model(IDX, labels=IDX)
    model.generate(IDX, max_new_tokens=3, **GREEDY)
    model(IDX, attention_mask=torch.zeros(2, 7).long(), output_hidden_states=True)
    other(IDX[:, :2], labels=IDX[:, :2])
    after = model(IDX, labels=IDX)
    assert torch.equal(before.loss, after.loss)
    assert torch.equal(before.logits, after.logits)
    assert after.hidden_states is None


# Compilation and kernels


@eager_and_sdpa
def test_compiles_in_one_graph(attention: str) -> None:
    torch._dynamo.reset()
    model = port(attention=attention)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    inputs = {"input_ids": IDX, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    with torch.no_grad():
        assert_close(compiled(**inputs).logits, model(**inputs).logits)
    compiled(IDX, labels=IDX).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_static_cache_compiles_once() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model, backend = port(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        pieces = [model(IDX[:, :2], past_key_values=cache, use_cache=True).logits]
        for position in range(2, 7):
            piece = IDX[:, position : position + 1]
            pieces.append(compiled(piece, past_key_values=cache, use_cache=True).logits)
    assert_close(torch.cat(pieces, dim=1), model(IDX).logits)
    assert backend.frame_count == 1


def test_attention_can_be_switched() -> None:
    model = port(attention="sdpa")
    expected = model(IDX).logits
    model.set_attn_implementation("eager")
    assert model(IDX, output_attentions=True).attentions is not None
    assert_close(model(IDX).logits, expected)


# Tie, saving, loading


def assert_tied(model: NanoGPTLMHeadModel) -> None:
    assert model.lm_head.weight is model.transformer.wte.weight
    assert [n for n, _ in model.named_parameters() if "lm_head" in n] == []


def test_tie_survives() -> None:
    model = port(torch.float32)
    assert_tied(model)
    for size in (45, 40):
        model.resize_token_embeddings(size)
        assert_tied(model)
        assert model.config.vocab_size == size == model.lm_head.out_features
        assert model(IDX, labels=IDX).logits.shape[-1] == size
    assert_close(model(IDX).logits[..., :37], original(torch.float32)(IDX, IDX)[0], 1e-5)
    model.tie_weights()
    assert_tied(copy.deepcopy(model))


@pytest.mark.parametrize("shard", ["1GB", "10KB"])
def test_save_and_load(tmp_path: Path, shard: str) -> None:
    model = port(torch.float32)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    loaded, info = NanoGPTLMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_tied(loaded)
    assert torch.equal(loaded(IDX).logits, model(IDX).logits)
    base = NanoGPTModel.from_pretrained(tmp_path)
    assert torch.equal(base(IDX).last_hidden_state, model(IDX, output_hidden_states=True).hidden_states[-1])
    assert type(AutoConfig.from_pretrained(tmp_path)) is NanoGPTConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is NanoGPTModel
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is NanoGPTLMHeadModel


REMOTE = """
import json, os, sys
import torch
from transformers import AutoModel, AutoModelForCausalLM

source, target, reference = sys.argv[1:]
idx, expected = torch.load(reference)
for directory in (source, target):
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    base = AutoModel.from_pretrained(directory, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    assert type(base).__name__ == "NanoGPTModel"
    assert torch.equal(model(idx).logits, expected)
    assert model.lm_head.weight is model.transformer.wte.weight
    if directory == source:
        model.save_pretrained(target)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
assert "nanogpt" not in CONFIG_MAPPING
"""


def test_remote_code_travels(tmp_path: Path) -> None:
    model = port(torch.float32)
    source, target, reference = (tmp_path / name for name in ("source", "target", "reference.pt"))
    model.save_pretrained(source)
    torch.save((IDX, model(IDX).logits.detach()), reference)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    (tmp_path / "elsewhere").mkdir()
    arguments = [sys.executable, "-c", REMOTE, *map(str, (source, target, reference))]
    run = subprocess.run(
        arguments, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    code = {"checkpoint.py", "configuration_nanogpt.py", "modeling_nanogpt.py"}
    for directory in (source, target):
        assert {path.name for path in directory.glob("*.py")} == code
        assert json.loads((directory / "config.json").read_text())["auto_map"] == {
            "AutoConfig": "configuration_nanogpt.NanoGPTConfig",
            "AutoModel": "modeling_nanogpt.NanoGPTModel",
            "AutoModelForCausalLM": "modeling_nanogpt.NanoGPTLMHeadModel",
        }


# Configuration


def test_configuration_round_trip(tmp_path: Path) -> None:
    config = NanoGPTConfig(**SIZES, dropout=0.1, bias=False, eos_token_id=3)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["tie_word_embeddings"] is True
    assert {name: written[name] for name in SIZES} == SIZES
    for again in (
        NanoGPTConfig.from_pretrained(tmp_path),
        NanoGPTConfig.from_dict(json.loads(config.to_json_string(use_diff=False))),
        NanoGPTConfig(**written),
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
    ):
        assert {name: getattr(again, name) for name in SIZES} == SIZES
        assert (again.dropout, again.bias, again.eos_token_id, again.bos_token_id) == (0.1, False, 3, None)
        assert again.to_diff_dict().keys() - {"auto_map", "architectures"} == config.to_diff_dict().keys() - {
            "auto_map",
            "architectures",
        }


def test_aliases() -> None:
    config = NanoGPTConfig(n_positions=8, hidden_size=12, num_attention_heads=3, num_hidden_layers=2)
    assert (config.block_size, config.n_embd, config.n_head, config.n_layer) == (8, 12, 3, 2)
    assert config.max_position_embeddings == 8
    assert NanoGPTConfig(block_size=8, n_positions=8).block_size == 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_layers": 3}, r"n_layers=3.*n_layer\?"),
        ({"blocksize": 8}, r"blocksize=8.*block_size\?"),
        ({"block_size": 8, "n_positions": 16}, r"block_size=8 and n_positions=16"),
        ({"block_size": 1024, "n_positions": 16}, r"block_size=1024 and n_positions=16"),
        ({"n_positions": 8, "max_position_embeddings": 9}, "9.*8"),
        ({"n_embd": 16, "n_head": 3}, r"n_embd=16.*n_head=3"),
        ({"n_layer": 0}, "n_layer=0"),
        ({"vocab_size": 3.5}, r"vocab_size=3\.5"),
        ({"n_head": True}, "n_head=True"),
        ({"dropout": 1.5}, r"dropout=1\.5"),
        ({"bias": 1}, "bias=1"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
    ],
    ids=str,
)
def test_refused_configurations(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NanoGPTConfig(**fields)


def test_override_while_loading_is_checked(tmp_path: Path) -> None:
    port(torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"n_embd=16.*n_head=3"):
        NanoGPTLMHeadModel.from_pretrained(tmp_path, n_head=3)


def test_keys_of_the_library_are_accepted() -> None:
    NanoGPTConfig(
        **SIZES,
        architectures=["NanoGPTLMHeadModel"],
        attn_implementation="eager",
        auto_map={},
        id2label={0: "a", 1: "b"},
        label2id={"a": 0, "b": 1},
        max_length=20,
        model_type="nanogpt",
        output_hidden_states=True,
        pruned_heads={},
        quantization_config={},
        return_dict=True,
        torch_dtype="float32",
        torchscript=False,
        transformers_version="4.57.6",
        _commit_hash=None,
    )


def test_declares_what_the_library_asks_for() -> None:
    assert issubclass(NanoGPTLMHeadModel, PreTrainedModel)
    assert NanoGPTLMHeadModel._no_split_modules == ["NanoGPTBlock"]
    model = port()
    assert model.get_input_embeddings() is model.transformer.wte
    assert model.get_output_embeddings() is model.lm_head
    assert list(model.buffers()) == []
