# SPDX-License-Identifier: Apache-2.0
"""What a port does to the process around it would change the original too, so it has to be a finding of its own."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from harness import Port, check_parity
from harness.surroundings import reseeded, watched


def changes_of(run: Callable[[], object]) -> list[str]:
    found: list[str] = []
    with watched(found):
        run()
    return found


def test_what_is_left_alone_is_no_change() -> None:
    assert changes_of(lambda: torch.nn.functional.gelu(torch.ones(3))) == []


def test_a_setting_is_named_with_both_values() -> None:
    try:
        found = changes_of(lambda: torch.set_default_dtype(torch.float64))
    finally:
        torch.set_default_dtype(torch.float32)
    assert found[0] == "torch's default dtype is 'float64' instead of 'float32'"


def test_a_replaced_function_is_found_though_it_wraps_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    own = functional.gelu

    @functools.wraps(own)
    def other(*args: object, **options: object) -> torch.Tensor:
        return own(*args, **options) * 2  # type: ignore[operator, no-any-return]

    assert changes_of(lambda: monkeypatch.setattr(functional, "gelu", other)) == [
        "torch.nn.functional.gelu is replaced"
    ]


def test_a_method_of_a_class_and_an_entry_of_a_table_count(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    assert changes_of(lambda: monkeypatch.setattr(torch.nn.GELU, "forward", lambda self, x: x)) == [
        "torch.nn.GELU.forward is replaced"
    ]
    assert changes_of(lambda: monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", print)) == [
        "transformers' ALL_ATTENTION_FUNCTIONS['sdpa'] is replaced"
    ]
    assert changes_of(lambda: monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "one_of_its_own", print)) == []


def test_importing_the_compiler_is_no_change() -> None:
    import torch._dynamo

    found: list[str] = []
    with watched(found):
        torch._dynamo.reset()
    assert found == []


@pytest.mark.parametrize(
    ("run", "generators"),
    [
        (lambda: torch.rand(3), []),
        (lambda: random.random(), []),
        (lambda: torch.manual_seed(1), ["torch"]),
        (lambda: random.seed(1), ["random"]),
    ],
)
def test_drawing_is_allowed_and_seeding_is_found(run: Callable[[], object], generators: list[str]) -> None:
    before = torch.get_rng_state()
    assert reseeded(run) == generators
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.mlx
def test_seeding_mlx_is_found_and_its_state_comes_back() -> None:
    mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'parity-harness[mlx]'")
    mx.random.seed(3)
    before = mx.random.state[0].tolist()
    assert reseeded(lambda: mx.random.seed(0)) == ["mlx"]
    assert reseeded(lambda: mx.eval(mx.random.normal((2,)))) == []
    assert mx.random.state[0].tolist() == before


@pytest.mark.parametrize(
    ("source", "other", "reason"),
    [
        ("", "passed", None),
        (
            "torch.set_float32_matmul_precision('high')\n",
            "passed",
            "importing it changes the whole process: torch's float32",
        ),
        # What is replaced in torch fails every check: the original computes with it too.
        ("torch.nn.GELU.extra_repr = lambda self: ''\n", "failed", "torch.nn.GELU.extra_repr is replaced"),
    ],
)
def test_what_importing_a_port_changes_is_told_whichever_check_imported_it(
    source: str,
    other: str,
    reason: str | None,
    tmp_path: Path,
    plain_port: Callable[..., Port],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.nn.GELU, "extra_repr", torch.nn.GELU.extra_repr)
    lacks = {"roundtrip.*": "-", "generation.*": "-", "loss.*": "-"}
    port = plain_port(tmp_path, f"port_{len(source)}", lacks=lacks)
    file = tmp_path / f"port_{len(source)}.py"
    file.write_text(f"import torch\n{source}{file.read_text()}")
    results = check_parity(port, checks=("forward.causal", "process.settings"), backends=("torch-cpu",))
    assert [result.status for result in results] == [other, "failed" if reason else "passed"]
    assert reason is None or results[1].reason.startswith(reason)
