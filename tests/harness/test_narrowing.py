# SPDX-License-Identifier: Apache-2.0
"""A part in float32 is recognised, reported and held to what float32 explains; nothing else is excused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness import Port, Result, check_parity

PlainPort = Callable[..., Port]

FLOAT32_NORM = "self.transformer.ln_f.register_forward_hook(lambda m, i, o: o.float().to(o.dtype))"
SMALL = "self.transformer.ln_f.register_forward_hook(lambda m, i, o: o * (1 + 3e-8 * o.sign()))"
LARGE = "self.transformer.ln_f.register_forward_hook(lambda m, i, o: o.float().to(o.dtype) * (1 + 1e-4))"


def judged(port: Port, *checks: str) -> list[Result]:
    return check_parity(port, checks=checks, backends=["torch-cpu"])


def test_a_norm_in_float32_is_reported_and_held_to_the_wider_bound(tmp_path: Path, plain_port: PlainPort) -> None:
    port = plain_port(tmp_path, forward=FLOAT32_NORM)
    causal, lengths = sorted(judged(port, "forward.lengths", "forward.causal"), key=lambda result: result.check)
    assert (causal.status, lengths.status) == ("passed", "passed"), (causal.reason, lengths.reason)
    assert lengths.metrics["float32_inside"] == 1.0
    assert 1e-9 < lengths.metrics["error"] < 1e-5
    assert "float32_inside" not in causal.metrics, "nothing there is compared with the original"


def test_the_same_error_without_float32_is_a_failure(tmp_path: Path, plain_port: PlainPort) -> None:
    (result,) = judged(plain_port(tmp_path, forward=SMALL), "forward.lengths")
    assert result.status == "failed"
    assert "bound 1e-09" in result.reason
    assert 1e-9 < result.metrics["error"] < 1e-5


def test_float32_excuses_no_more_than_it_explains(tmp_path: Path, plain_port: PlainPort) -> None:
    (result,) = judged(plain_port(tmp_path, forward=LARGE), "forward.lengths")
    assert result.status == "failed"
    assert "bound 1e-05" in result.reason


def test_the_place_of_a_fault_is_not_that_of_the_float32(tmp_path: Path, plain_port: PlainPort) -> None:
    first = "self.transformer.h[0].ln_1.register_forward_hook(lambda m, i, o: o.float().to(o.dtype))"
    last = "self.transformer.ln_f.register_forward_hook(lambda m, i, o: o * 1.01)"
    port = plain_port(
        tmp_path,
        more=f"""
def __init__(self, config):
    super().__init__(config)
    {first}
    {last}
""",
    )
    (result,) = judged(port, "forward.lengths")
    assert (result.status, result.first_divergence) == ("failed", "final_norm")


@pytest.mark.parametrize("end", ["raise SystemExit(0)", "import os; os._exit(0)"])
def test_a_port_that_ends_the_process_when_it_is_looked_at_again_does_not(
    tmp_path: Path, plain_port: PlainPort, end: str
) -> None:
    (result,) = judged(plain_port(tmp_path, forward=f"if labels is not None: {end}\n{SMALL}"), "forward.lengths")
    assert result.status == "failed"
    assert "bound 1e-09" in result.reason


def test_an_attention_that_only_some_checks_choose_is_looked_at_too(tmp_path: Path, plain_port: PlainPort) -> None:
    port = plain_port(
        tmp_path,
        forward=f"if self.attention == 'eager': {FLOAT32_NORM}\nelse: self.transformer.ln_f._forward_hooks.clear()",
        more="""
attention = "sdpa"

def set_attn_implementation(self, name):
    self.attention = name
""",
    )
    (result,) = judged(port, "backend.attention")
    assert result.status == "passed", result.reason
    assert result.metrics["float32_inside"] == 1.0


@pytest.mark.parametrize(("sign", "status"), [("", "passed"), ("-", "failed")])
def test_what_is_not_finite_in_float64_alone_is_judged_in_float32(
    tmp_path: Path, plain_port: PlainPort, sign: str, status: str
) -> None:
    # The lowest number of float64 is minus infinity in float32, as in the library's own softmax in float32.
    overflow = f"""
lowest = torch.finfo(self.lm_head.weight.dtype).min
masked = torch.full((2,), lowest, dtype=self.lm_head.weight.dtype).float().softmax(-1)
self.transformer.ln_f.register_forward_hook(lambda m, i, o: {sign}o * 2 * masked[0].to(o.dtype))
"""
    (result,) = judged(plain_port(tmp_path, forward=overflow.strip()), "forward.lengths")
    assert result.status == status, result.reason
    assert ("float32_inside" in result.metrics) == (status == "passed")
