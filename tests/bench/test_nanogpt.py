# SPDX-License-Identifier: Apache-2.0
"""The nanoGPT port against the original, in turns: forward, backward, generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

pytestmark = [pytest.mark.benchmark(group="nanoGPT"), pytest.mark.usefixtures("one_thread")]

SIZES: dict[str, dict[str, int]] = {
    "small": {"n_layer": 4, "n_head": 4, "n_embd": 64, "block_size": 64, "vocab_size": 256},
    "medium": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 512},
    "generating": {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 600, "vocab_size": 512},
}
ROWS = 4
NEW_TOKENS = 512


def pair(size: str) -> tuple[Any, Any]:
    """Original and port with the same float32 weights, in evaluation mode."""
    import torch

    from reference_models.nanogpt.configuration_nanogpt import NanoGPTConfig
    from reference_models.nanogpt.modeling_nanogpt import NanoGPTLMHeadModel
    from reference_models.nanogpt.original import GPT, GPTConfig

    torch.manual_seed(0)
    original = GPT(GPTConfig(**SIZES[size])).eval()
    port = NanoGPTLMHeadModel(NanoGPTConfig(**SIZES[size])).eval()
    port.load_state_dict(original.state_dict())
    return original, port


def batch(size: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets, as long as the model takes them; with targets the original gives all logits."""
    import torch

    stream = torch.randint(SIZES[size]["vocab_size"], (ROWS, SIZES[size]["block_size"] + 1))
    return stream[:, :-1].contiguous(), stream[:, 1:].contiguous()


@pytest.mark.parametrize("cache", [False, True], ids=["no-cache", "cache"])
@pytest.mark.parametrize("size", ["small", "medium"])
def test_forward(benchmark: Any, against: Callable[..., None], size: str, cache: bool) -> None:
    """All logits and the loss without gradients; with a cache, the port also hands out keys and values."""
    import torch

    original, port = pair(size)
    tokens, targets = batch(size)
    benchmark.extra_info["what"] = f"forward, {size}, {'with' if cache else 'without'} a cache to return"
    with torch.no_grad():
        against(
            lambda: port(input_ids=tokens, targets=targets, use_cache=cache),
            lambda: original(tokens, targets),
            rounds=20 if size == "medium" else 200,
            warmup=3,
        )


@pytest.mark.parametrize("size", ["small", "medium"])
def test_forward_and_backward(benchmark: Any, against: Callable[..., None], size: str) -> None:
    original, port = pair(size)
    tokens, targets = batch(size)

    def train(model: Any, loss: Callable[[], torch.Tensor]) -> None:
        model.zero_grad(set_to_none=True)
        loss().backward()

    benchmark.extra_info["what"] = f"forward and backward, {size}"
    against(
        lambda: train(port, lambda: port(input_ids=tokens, targets=targets, use_cache=False).loss),
        lambda: train(original, lambda: original(tokens, targets)[1]),
        rounds=8 if size == "medium" else 100,
        warmup=2,
    )


def test_generation(benchmark: Any, against: Callable[..., None]) -> None:
    """One row sampled with the port's cache, and by the original's loop, which feeds everything again."""
    original, port = pair("generating")
    prompt = batch("generating")[0][:1, :8]
    benchmark.extra_info["what"] = f"generating {NEW_TOKENS} tokens, cached against the original's loop"
    against(
        lambda: port.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=True, top_k=0),
        lambda: original.generate(prompt, NEW_TOKENS),
        rounds=3,
        warmup=0,
    )
