# SPDX-License-Identifier: Apache-2.0
"""Generation with the Hugging Face nanoMoE: the originals' tokens, caches, padding, windows."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, StaticCache

from reference_models.nanomoe.modeling_nanomoe_gpt import TRANSFORMERS_5

Make = Callable[..., Any]

IDX = torch.randint(37, (2, 7), generator=torch.Generator().manual_seed(1))
GREEDY: dict[str, Any] = {"do_sample": False}
NO_DROPS: dict[str, Any] = {"n_exp": 4, "eval_capacity": 2.0}
DROPS: dict[str, Any] = {"n_exp": 4, "eval_capacity": 0.75, "min_capacity": 1}

both_architectures = pytest.mark.parametrize("architecture", ["nanomoe", "ancestor"])
where_nothing_is_dropped = pytest.mark.parametrize("fields", [{}, NO_DROPS], ids=["dense", "no drops"])
ways = pytest.mark.parametrize(
    "how", [{}, {"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str
)


def assert_close(a: Tensor, b: Tensor) -> None:
    assert ((a - b).abs().max() / b.pow(2).mean().sqrt()).item() < 1e-12


def lengths_of_steps(model: Any) -> list[int]:
    """Return a list to which every later call of the model adds its number of tokens per row."""
    lengths: list[int] = []
    model.transformer.wte.register_forward_hook(lambda module, inputs, output: lengths.append(output.shape[1]))
    return lengths


@both_architectures
@where_nothing_is_dropped
@ways
def test_greedy_is_the_originals(
    make_original_model: Make, make_port_model: Make, architecture: str, fields: dict[str, Any], how: dict[str, Any]
) -> None:
    model, source = make_port_model(architecture, **fields), make_original_model(architecture, **fields)
    expected = source.generate(IDX, 9, top_k=1)
    lengths = lengths_of_steps(model)
    assert torch.equal(model.generate(IDX, max_new_tokens=9, **GREEDY, **how), expected)
    cached = [7] + [1] * 8
    assert lengths == (list(range(7, 16)) if how == {"use_cache": False} else cached)
    padded = torch.cat((torch.zeros(2, 2, dtype=torch.long), IDX), dim=1)
    mask = (torch.arange(9) >= 2).long().expand(2, 9)
    output = model.generate(padded, attention_mask=mask, max_new_tokens=8, **GREEDY, **how)
    assert torch.equal(output[:, 2:], expected[:, :15])


@both_architectures
def test_with_drops_the_default_is_the_originals_tokens(
    make_original_model: Make, make_port_model: Make, architecture: str
) -> None:
    model, source = make_port_model(architecture, **DROPS), make_original_model(architecture, **DROPS)
    assert model.config.capacity_can_drop
    expected = source.generate(IDX, 9, top_k=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model.generate(IDX, max_new_tokens=9, **GREEDY), expected)
        given = GenerationConfig(max_new_tokens=9, **GREEDY)
        assert torch.equal(model.generate(IDX, generation_config=given), expected)
        assert torch.equal(model.generate_legacy(IDX, 9, top_k=1), expected)
        assert model(IDX).past_key_values is None
    padded = torch.cat((torch.zeros(2, 2, dtype=torch.long), IDX), dim=1)
    mask = (torch.arange(9) >= 2).long().expand(2, 9)
    output = model.generate(padded, attention_mask=mask, max_new_tokens=8, **GREEDY)
    assert torch.equal(output[:, 2:], expected[:, :15])


def test_the_capacity_that_is_advised_drops_nothing(make_port_model: Make) -> None:
    model = make_port_model(**DROPS | {"top_k": 3})
    with pytest.warns(UserWarning, match=r"eval_capacity to 1\.34"):
        model(IDX, use_cache=True)
    assert not make_port_model(**DROPS | {"top_k": 3, "eval_capacity": 1.34}).config.capacity_can_drop


def test_the_call_of_upstreams_scripts_says_what_to_call_instead(make_port_model: Make) -> None:
    with pytest.raises(TypeError, match=r"call generate_legacy\(x, 500\), or generate\(x, max_new_tokens=500\)"):
        make_port_model().generate(IDX, 500)


def test_a_cache_is_used_with_drops_only_where_asked_for(make_port_model: Make) -> None:
    clear = r"n_exp=4, moe_top_k=2 and eval_capacity=0\.75.*use_cache=False.*eval_capacity to 2"
    model = make_port_model(**DROPS)
    lengths = lengths_of_steps(model)
    for how in ({"use_cache": True}, {"cache_implementation": "static"}):
        lengths.clear()
        with pytest.warns(UserWarning, match=clear) as warned:
            model.generate(IDX, max_new_tokens=4, **GREEDY, **how)
        assert sum("a cache changes the result" in str(each.message) for each in warned) == 1
        assert lengths == [7, 1, 1, 1]
    with pytest.warns(UserWarning, match=clear):
        past = model(IDX, use_cache=True).past_key_values
    assert past.get_seq_length() == 7
    in_config = make_port_model(**DROPS, use_cache=True)
    with pytest.warns(UserWarning, match=clear):
        assert in_config(IDX).past_key_values is not None
    with pytest.warns(UserWarning, match=clear):
        in_config.generate(IDX, max_new_tokens=4, **GREEDY)
    dense = make_port_model(use_cache=False)
    assert dense(IDX).past_key_values is None
    lengths = lengths_of_steps(dense)
    dense.generate(IDX, max_new_tokens=3, **GREEDY)
    assert lengths == [7, 8, 9]


@pytest.mark.parametrize(
    ("fields", "can_drop"),
    [
        ({}, False),
        ({"n_exp": 4, "eval_capacity": 2.0}, False),
        ({"n_exp": 4, "eval_capacity": 1.99}, True),
        ({"n_exp": 8, "top_k": 1, "eval_capacity": 8}, False),
        ({"n_exp": 8, "top_k": 8, "eval_capacity": 1.0}, False),
        ({"n_exp": 7, "top_k": 3, "eval_capacity": 7 / 3}, False),
        ({"n_exp": 5, "top_k": 2}, True),
    ],
    ids=str,
)
def test_where_capacity_can_drop(make_port_model: Make, fields: dict[str, Any], can_drop: bool) -> None:
    model = make_port_model(**fields)
    assert model.config.capacity_can_drop is can_drop
    if not can_drop and fields:
        router = model.transformer.h[0].mlp.router
        for tokens in range(1, 200):
            assert router(torch.zeros(tokens, 16, dtype=torch.float64)).capacity >= tokens


@where_nothing_is_dropped
@ways
def test_beams(make_port_model: Make, fields: dict[str, Any], how: dict[str, Any]) -> None:
    model = make_port_model(**fields)
    batch = model.generate(IDX, max_new_tokens=6, num_beams=3, **GREEDY, **how)
    for row, expected in zip(IDX, batch, strict=True):
        padded = torch.cat((torch.zeros(3, dtype=torch.long), row))[None]
        mask = (torch.arange(10) >= 3).long()[None]
        alone = model.generate(padded, attention_mask=mask, max_new_tokens=6, num_beams=3, **GREEDY, **how)
        assert torch.equal(alone[0, 3:], expected)


@both_architectures
@pytest.mark.parametrize("fields", [{}, NO_DROPS, DROPS], ids=["dense", "no drops", "drops"])
def test_beyond_the_block_the_window_moves(
    make_original_model: Make, make_port_model: Make, architecture: str, fields: dict[str, Any]
) -> None:
    source = make_original_model(architecture, dtype=torch.float32, **fields)
    model = make_port_model(architecture, source=source, dtype=torch.float32)
    assert torch.equal(model.generate(IDX, max_new_tokens=40, **GREEDY), source.generate(IDX, 40, top_k=1))
    long = torch.randint(37, (1, 30))
    assert torch.equal(model.generate(long, max_new_tokens=5, **GREEDY), source.generate(long, 5, top_k=1))
    for top_k in (5, None):
        outputs = []
        for run in (source.generate, model.generate_legacy):
            torch.manual_seed(3)
            outputs.append(run(IDX, 40, temperature=0.8, top_k=top_k))
        torch.manual_seed(3)
        outputs.append(model.generate(IDX, max_new_tokens=40, do_sample=True, temperature=0.8, top_k=top_k or 0))
        assert torch.equal(outputs[1], outputs[0])
        assert torch.equal(outputs[2], outputs[0])
    padded = torch.cat((torch.zeros(2, 4, dtype=torch.long), IDX), dim=1)
    mask = (torch.arange(11) >= 4).long().expand(2, 11)
    output = model.generate(padded, attention_mask=mask, max_new_tokens=30, **GREEDY)
    assert torch.equal(output[:, 4:], source.generate(IDX, 30, top_k=1))


def test_the_number_of_experts_is_not_the_generation_parameter(make_port_model: Make) -> None:
    """`top_k` in the configuration neither changes what is drawn nor is changed by it."""
    outputs = []
    for top_k in (1, 4):
        model = make_port_model(n_exp=4, top_k=top_k, eval_capacity=4.0)
        assert model.config.top_k == top_k
        assert model.generation_config.top_k == GenerationConfig().top_k
        torch.manual_seed(0)
        hot = model.generate(IDX.repeat(20, 1), max_new_tokens=1, do_sample=True, temperature=50.0, top_k=0)
        outputs.append(len(set(hot[:, -1].tolist())))
        model.generate(IDX, max_new_tokens=1, do_sample=True, temperature=0.8, top_k=2, top_p=0.95)
        assert model.config.top_k == model.config.moe_top_k == top_k
        assert model.generate(IDX, max_new_tokens=1, top_k=1).shape == (2, 8)
    assert min(outputs) > 10


def test_beyond_the_block_a_cache_is_refused_at_once(make_port_model: Make) -> None:
    model = make_port_model()
    calls = lengths_of_steps(model)
    for how in ({"use_cache": True}, {"cache_implementation": "static"}, {"num_beams": 2, "use_cache": True}):
        with pytest.raises(ValueError, match=r"17 positions.*block_size=16.*use_cache=False"):
            model.generate(IDX, max_new_tokens=11, **GREEDY, **how)
    embeddings = model.get_input_embeddings()(IDX)
    calls.clear()
    with pytest.raises(ValueError, match=r"block_size=16.*input_ids"):
        model.generate(inputs_embeds=embeddings, max_new_tokens=18, **GREEDY)
    assert not calls


@where_nothing_is_dropped
@ways
def test_generate_from_embeddings_and_positions(
    make_original_model: Make, make_port_model: Make, fields: dict[str, Any], how: dict[str, Any]
) -> None:
    model = make_port_model(**fields)
    expected = model.generate(IDX, max_new_tokens=8, **GREEDY)
    embeddings = model.get_input_embeddings()(IDX)
    output = model.generate(inputs_embeds=embeddings, max_new_tokens=8, **GREEDY, **how)
    assert torch.equal(output, expected[:, 7:])
    positions = torch.arange(2, 9).expand(2, 7)
    rolled = make_original_model(**fields)
    with torch.no_grad():
        rolled.transformer.wpe.weight.copy_(rolled.transformer.wpe.weight.roll(-2, dims=0))
    output = model.generate(IDX, position_ids=positions, max_new_tokens=6, **GREEDY, **how)
    assert torch.equal(output, rolled.generate(IDX, 6, top_k=1))


@where_nothing_is_dropped
def test_cache_in_pieces(make_port_model: Make, fields: dict[str, Any]) -> None:
    model = make_port_model(**fields)
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


@where_nothing_is_dropped
def test_cache_with_padding(make_port_model: Make, fields: dict[str, Any]) -> None:
    model = make_port_model(**fields)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    whole = model(IDX, attention_mask=mask).logits
    past = model(IDX[:, :4], attention_mask=mask[:, :4]).past_key_values
    assert_close(model(IDX[:, 4:], attention_mask=mask, past_key_values=past).logits, whole[:, 4:])


@pytest.mark.filterwarnings("ignore:a cache changes the result")
def test_only_new_tokens_are_routed(make_port_model: Make) -> None:
    """With a cache, the mask covers what came before too; capacity is that of the new tokens that are not padding."""
    model = make_port_model(n_exp=4, eval_capacity=1.0, min_capacity=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]])
    past = model(IDX[:, :4], attention_mask=mask[:, :4], use_cache=True).past_key_values
    assert past.get_seq_length() == 4
    seen: list[Any] = []
    model.transformer.h[0].mlp.router.register_forward_hook(lambda module, inputs, output: seen.append(output))
    past = model(IDX[:, 4:], attention_mask=mask, past_key_values=past).past_key_values
    assert past.get_seq_length() == 7
    assert seen[0].logits.shape == (6, 4)
    assert seen[0].capacity == 2  # 2 * 1.0 * 5 / 4, rounded
    assert not seen[0].keep[2].any()
    others = seen[0].ranks[[0, 1, 3, 4, 5]]
    assert others.max() < 5
    assert (seen[0].ranks[2] > others.max()).all()


def test_continued_generation(make_original_model: Make, make_port_model: Make) -> None:
    model, source = make_port_model(**NO_DROPS), make_original_model(**NO_DROPS)
    first = model.generate(IDX, max_new_tokens=3, return_dict_in_generate=True, **GREEDY)
    output = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=3, **GREEDY)
    assert torch.equal(output, source.generate(IDX, 6, top_k=1))
    output = model.generate(IDX, max_new_tokens=6, prefill_chunk_size=3, **GREEDY)
    assert torch.equal(output, source.generate(IDX, 6, top_k=1))


@pytest.mark.parametrize("said", [True, False])
def test_what_a_generation_config_says(make_port_model: Make, said: bool) -> None:
    """5.x tells a value that was given from a default; 4.57 has true for both, so there only false says something."""
    model = make_port_model(**(DROPS if said else NO_DROPS))
    lengths = lengths_of_steps(model)
    given = GenerationConfig(max_new_tokens=3, use_cache=said, **GREEDY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.generate(IDX, generation_config=given)
    assert lengths == ([7, 1, 1] if said and TRANSFORMERS_5 else [7, 8, 9])
