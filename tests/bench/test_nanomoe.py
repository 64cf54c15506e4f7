# SPDX-License-Identifier: Apache-2.0
"""The nanoMoE port against the original, transformers' Qwen3-MoE and itself: forward, training step, generation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

pytestmark = [pytest.mark.benchmark(group="nanoMoE"), pytest.mark.usefixtures("one_thread")]

# One layer of experts, and so many tokens that their products are most of the work.
WIDTH, HEADS, LAYERS, LENGTH, ROWS, VOCABULARY = 256, 4, 1, 256, 8, 256
INSIDE = 4 * WIDTH
PROMPT, NEW_TOKENS = 96, 32
ROUNDS = 4
# (experts, k)
SIZES = [(8, 2), (64, 1), (64, 2), (64, 4)]
TRAINING = pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])

Step = Callable[[], Any]


def fields(n_exp: int, *, drops: bool = True) -> dict[str, Any]:
    """What the two configurations have in common: SwiGLU experts, which Qwen3-MoE has as well, and no losses of them.

    Without `drops` every expert has a slot for every token; with them capacity is the originals' default.
    """
    shape = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "block_size": LENGTH, "vocab_size": VOCABULARY}
    losses = {"use_experts_ortho_loss": False, "use_gate_output_loss": False}
    capacity = {} if drops else {"train_capacity": float(n_exp), "eval_capacity": float(n_exp)}
    return {**shape, **losses, **capacity, "bias": False, "n_exp": n_exp, "use_qwen3_moe_mlp": True}


def make_port(n_exp: int, k: int, *, drops: bool = True) -> Any:
    import torch

    from reference_models.nanomoe.configuration_nanomoe_gpt import GPTConfig
    from reference_models.nanomoe.modeling_nanomoe_gpt import GPT

    torch.manual_seed(0)
    return GPT(GPTConfig(**fields(n_exp, drops=drops), moe_top_k=k))


def make_original(port: Any) -> Any:
    """The original with the port's configuration and weights."""
    from reference_models.nanomoe.original import GPT, GPTConfig

    n_exp, drops = port.config.n_exp, port.config.capacity_can_drop
    original = GPT(GPTConfig(**fields(n_exp, drops=drops), top_k=port.config.moe_top_k))
    original.load_state_dict(port.state_dict())
    return original


def make_qwen3_moe(n_exp: int, k: int) -> Any:
    """Qwen3-MoE of the same sizes, with its default way of computing experts.

    Equal are width, layers, heads, tied vocabulary, experts, k, width inside, SwiGLU without offsets, weights that are
    a softmax over the chosen, the norm of heads, and that nothing is dropped. Not equal are rotary positions for a
    table, gains in the norm of heads, three matrices in attention for one, and one for gate and input of an expert
    where the port has two.
    """
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=WIDTH // HEADS,
        max_position_embeddings=LENGTH,
        moe_intermediate_size=INSIDE,
        num_experts=n_exp,
        num_experts_per_tok=k,
        norm_topk_prob=True,
        tie_word_embeddings=True,
    )
    return Qwen3MoeForCausalLM(config)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets, as long as the models take them."""
    import torch

    stream = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return stream[:, :-1].contiguous(), stream[:, 1:].contiguous()


def step(model: Any, loss: Callable[[Any], torch.Tensor], *, training: bool) -> Step:
    """All logits and the loss without gradients in evaluation, or with those of all parameters in training."""
    import torch

    model.train(training)

    def run() -> None:
        with torch.set_grad_enabled(training):
            value = loss(model)
        if training:
            value.backward()
            model.zero_grad(set_to_none=True)

    return run


def port_step(model: Any, *, training: bool) -> Step:
    tokens, targets = batch()
    return step(model, lambda port: port(input_ids=tokens, targets=targets, use_cache=False).loss, training=training)


def peak_mib(run: Step, directory: Path) -> float:
    """The most that tensors held at one time, beyond what was there before; the same in every run.

    It is counted from torch's own record of allocations, in which the load of the machine does not show. What matrix
    libraries allocate for themselves, past torch, is not in it.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        run()
    file = directory / "trace.json"
    measured.export_chrome_trace(str(file))
    held, peak = 0, 0
    events = [one for one in json.loads(file.read_text())["traceEvents"] if one["name"] == "[memory]"]
    for one in sorted(events, key=lambda one: one["ts"]):
        held += one["args"]["Bytes"]
        peak = max(peak, held)
    return peak / 2**20


@pytest.fixture
def note(benchmark: Any, tmp_path: Path) -> Callable[..., None]:
    """`note(what, run, baseline, name)`: puts beside the times what was run, tokens per second and peak memory."""

    def write(what: str, run: Step, baseline: Step, name: str, tokens: int = ROWS * LENGTH) -> None:
        benchmark.extra_info["what"] = what
        benchmark.extra_info["baseline"] = name
        benchmark.extra_info["tokens_per_second"] = tokens / benchmark.stats.stats.median
        benchmark.extra_info["peak_mib"] = peak_mib(run, tmp_path)
        benchmark.extra_info["baseline_peak_mib"] = peak_mib(baseline, tmp_path)

    return write


def name_of(training: bool) -> str:
    return "training step" if training else "forward"


@TRAINING
@pytest.mark.parametrize("n_exp", [8, 64])
def test_against_the_original(
    against: Callable[..., None], note: Callable[..., None], n_exp: int, training: bool
) -> None:
    """With the default capacity, which drops."""
    port = make_port(n_exp, 2)
    original = make_original(port)
    tokens, targets = batch()
    run = port_step(port, training=training)
    baseline = step(original, lambda model: model(tokens, targets)[1], training=training)
    against(run, baseline, rounds=ROUNDS)
    note(f"{name_of(training)}, {n_exp} experts, k = 2", run, baseline, "the original")


@TRAINING
@pytest.mark.parametrize(("n_exp", "k"), SIZES)
def test_against_qwen3_moe(
    against: Callable[..., None], note: Callable[..., None], n_exp: int, k: int, training: bool
) -> None:
    """With a capacity that drops nothing, as there is no capacity in Qwen3-MoE."""
    tokens, targets = batch()
    run = port_step(make_port(n_exp, k, drops=False), training=training)
    baseline = step(
        make_qwen3_moe(n_exp, k),
        lambda model: model(input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False).loss,
        training=training,
    )
    against(run, baseline, rounds=ROUNDS)
    note(f"{name_of(training)}, {n_exp} experts, k = {k}, nothing dropped", run, baseline, "Qwen3-MoE")


@TRAINING
@pytest.mark.parametrize(("size", "other"), [((64, 2), (8, 2)), ((64, 4), (64, 1))], ids=["n_exp", "k"])
def test_growth(
    against: Callable[..., None],
    note: Callable[..., None],
    size: tuple[int, int],
    other: tuple[int, int],
    training: bool,
) -> None:
    """The port against itself: what more experts cost, and what a larger k."""
    run, baseline = (port_step(make_port(*of, drops=False), training=training) for of in (size, other))
    against(run, baseline, rounds=ROUNDS)
    names = [f"{n_exp} experts, k = {k}" for n_exp, k in (size, other)]
    note(f"{name_of(training)}, {names[0]}, nothing dropped", run, baseline, f"itself with {names[1]}")


@pytest.mark.parametrize("cache", [False, True], ids=["no-cache", "cache"])
def test_generation(against: Callable[..., None], note: Callable[..., None], cache: bool) -> None:
    """One row sampled by the library's loop, and by the original's, which feeds everything again.

    Nothing can be dropped, so that a cache changes no token.
    """
    port = make_port(8, 2, drops=False).eval()
    original = make_original(port).eval()
    prompt = batch()[0][:1, :PROMPT]

    def run() -> None:
        port.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=True, top_k=0, use_cache=cache)

    def baseline() -> None:
        original.generate(prompt, NEW_TOKENS)

    against(run, baseline, rounds=3, warmup=0)
    what = f"generating {NEW_TOKENS} tokens after {PROMPT}, 8 experts, k = 2, {'with' if cache else 'without'} a cache"
    note(what, run, baseline, "the original's loop", NEW_TOKENS)
