# SPDX-License-Identifier: Apache-2.0
"""Bounds hold only for the arithmetic they were made for: settings are set and given back, narrowing is recognised."""

import contextlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import harness.backends
from harness import check_parity
from harness.backends import BACKENDS, NO_FLOAT64, mark_of, pytorch, unavailable
from harness.backends.names import DTYPES, TORCH_SETTINGS
from harness.families import find_family
from harness.numerics import SEMANTICS_BOUND
from harness.ports import read_ports
from harness.runner import Options

ROOT = Path(__file__).parents[2]
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def attention(scores: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], torch.Tensor]:
    return lambda: scores(X @ X.T) @ X


def float32_softmax(scores: torch.Tensor) -> torch.Tensor:
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)


# What a computation is done in


def test_a_float64_model_narrows_nowhere() -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double().eval()
    assert pytorch.float32_inside(lambda: layer(X[None])) is None
    assert pytorch.float32_inside(attention(lambda scores: scores.softmax(dim=-1))) is None


@pytest.mark.parametrize(
    ("run", "operation"),
    [
        (attention(float32_softmax), "_to_copy"),
        (attention(lambda scores: scores.float().softmax(dim=-1).double()), "_to_copy"),
        (lambda: F.layer_norm(X.float(), (8,)).double(), "_to_copy"),
        (lambda: X.bfloat16().double(), "_to_copy"),
        (lambda: X.half() * 2, "_to_copy"),
    ],
    ids=["softmax(dtype=float32)", "float().softmax()", "layer_norm", "bfloat16", "float16"],
)
def test_a_part_in_less_than_float64_is_recognised(run: Callable[[], Any], operation: str) -> None:
    found = pytorch.float32_inside(run)
    assert found is not None
    assert operation in found or "softmax" in found


def test_what_was_float32_before_and_single_numbers_do_not_count() -> None:
    weights = torch.ones(8)
    assert pytorch.float32_inside(lambda: (weights * 2, X * 2)) is None
    assert pytorch.float32_inside(lambda: X.sum().float()) is None
    assert pytorch.float32_inside(lambda: X.argmax(dim=-1) + X.bool().sum()) is None


# Settings


@pytest.fixture
def other_settings() -> Iterator[dict[str, Any]]:
    """None of the settings is what checks run under; as they were before, afterwards."""
    before = pytorch.settings()
    other = {name: not value if isinstance(value, bool) else value for name, value in TORCH_SETTINGS.items()}
    other |= {"float32_matmul_precision": "medium", "threads": 2, "deterministic_algorithms": 1}  # 1: warn only
    pytorch.set_settings(other)
    yield other
    pytorch.set_settings(before)


@pytest.mark.parametrize("raises", [False, True])
def test_numeric_settings_are_full_precision_inside_and_as_before_afterwards(
    raises: bool, other_settings: dict[str, Any]
) -> None:
    matmul = torch.backends.cuda.matmul
    with contextlib.suppress(KeyError), pytorch.numeric_settings():
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
        assert not matmul.allow_bf16_reduced_precision_reduction
        assert not matmul.allow_fp16_reduced_precision_reduction
        assert torch.get_num_threads() == 1
        assert pytorch.settings() == TORCH_SETTINGS
        torch.set_float32_matmul_precision("high")  # a port that changes them changes them for itself alone
        if raises:
            raise KeyError("in a check")
    assert pytorch.settings() == other_settings


def test_autocast_is_bfloat16_and_only_where_it_is_asked_for() -> None:
    linear = torch.nn.Linear(8, 8)
    for dtype in DTYPES:
        with pytorch.autocast("torch-cpu", dtype):
            expected = torch.bfloat16 if dtype == "autocast" else torch.float32
            assert linear(X.float()).dtype == expected, dtype
    assert not torch.is_autocast_enabled("cpu")


def test_epsilon_is_the_distance_from_one_to_the_next_number() -> None:
    for name in DTYPES:
        computed = torch.bfloat16 if name == "autocast" else pytorch.DTYPES[name]
        one = torch.ones((), dtype=computed)
        assert pytorch.epsilon(name) == float(one.nextafter(2 * one) - one), name


# What is here


def test_a_torch_device_that_is_not_here_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert unavailable("torch-cpu") is None
    assert unavailable("torch-cuda") == "there is no CUDA device"
    assert unavailable("torch-mps") == "there is no Metal device (torch.backends.mps)"


def test_a_torch_device_that_is_here_has_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert [unavailable(f"torch-{device}") for device in ("cpu", "cuda", "mps")] == [None, None, None]


@pytest.mark.parametrize("backend", ["mlx-cpu", "mlx-gpu"])
def test_without_mlx_the_reason_says_how_to_get_it(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "mlx" else found(name, *rest))
    assert unavailable(backend) == "MLX is not installed (pip install 'parity-harness[mlx]')"


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module of MLX is imported anew inside, and is the one that it was afterwards."""
    # Set before they are taken away, so that what an import sets is taken back.
    monkeypatch.setitem(sys.modules, "harness.backends.mlx", types.ModuleType("mlx"))
    monkeypatch.delitem(sys.modules, "harness.backends.mlx")
    monkeypatch.setattr(harness.backends, "mlx", None, raising=False)
    monkeypatch.delattr(harness.backends, "mlx")


@pytest.mark.usefixtures("forgotten")
def test_an_mlx_that_cannot_be_loaded_says_why_and_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # On Linux `pip install mlx` alone gives a package without the library of its platform.
    package = types.ModuleType("mlx")
    package.__spec__ = importlib.util.spec_from_loader("mlx", None)
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "mlx", package)
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    for backend in ("mlx-cpu", "mlx-gpu"):
        reason = unavailable(backend)
        assert reason is not None and "\n" not in reason
        assert reason.startswith("MLX cannot be imported: import of mlx.core halted")
        assert reason.endswith(" (pip install 'parity-harness[mlx]')")


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(("gpu", "reason"), [(True, None), (False, "there is no MLX GPU (Metal or CUDA)")])
def test_mlx_without_a_gpu_says_so(gpu: bool, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    core = types.SimpleNamespace(gpu="gpu", Device=str, is_available=lambda device: gpu)
    package = types.ModuleType("mlx")
    package.core = core  # type: ignore[attr-defined]
    package.__spec__ = importlib.util.spec_from_loader("mlx", None)
    monkeypatch.setitem(sys.modules, "mlx", package)
    monkeypatch.setitem(sys.modules, "mlx.core", core)
    assert unavailable("mlx-gpu") == reason
    assert unavailable("mlx-cpu") is None


def test_markers_follow_the_device() -> None:
    marks = {backend: mark_of(backend) for backend in BACKENDS}
    assert marks == {
        "torch-cpu": None,
        "torch-cuda": "cuda",
        "torch-mps": "metal",
        "mlx-cpu": "mlx",
        "mlx-gpu": "mlx",
    }
    assert set(BACKENDS) >= NO_FLOAT64


def test_a_backend_that_is_not_here_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    results = check_parity(read_ports(ROOT)[0], backends=["torch-cuda"], checks=["forward.logits", "forward.blocks"])
    assert results
    assert {(result.status, result.reason) for result in results} == {("skipped", "there is no CUDA device")}


# Devices that few machines have


@pytest.mark.cuda
def test_forward_on_cuda_equals_the_float64_oracle_on_the_cpu() -> None:
    reason = unavailable("torch-cuda")
    if reason:
        pytest.skip(reason)
    port = read_ports(ROOT)[0]
    results = check_parity(port, backends=["torch-cuda"], checks=["forward.logits", "forward.blocks"])
    assert {(result.backend, result.dtype) for result in results} == {("torch-cuda", "float64")}
    assert [result.reason for result in results if result.status != "passed"] == []
    # Two devices sum in different orders: an error of exactly zero would mean that the CPU was asked twice.
    assert 0 < max(result.metrics["error"] for result in results) < SEMANTICS_BOUND


@pytest.mark.mlx
@pytest.mark.parametrize("special", [float("inf"), float("-inf"), float("nan"), -0.0])
def test_mlx_keeps_numbers_that_conversions_like_to_lose(special: float) -> None:
    pytest.importorskip("mlx.core", reason="MLX is not installed")
    from harness.backends import mlx

    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        tensor = torch.tensor([1.0, special], dtype=dtype)
        again = mlx.to_tensor(mlx.to_array(tensor))
        torch.testing.assert_close(again, tensor, rtol=0, atol=0, equal_nan=True)
        assert special != 0 or torch.equal(again.signbit(), tensor.signbit()), dtype


@pytest.mark.mlx
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 2, 3)])
def test_mlx_keeps_shapes(shape: tuple[int, ...]) -> None:
    pytest.importorskip("mlx.core", reason="MLX is not installed")
    from harness.backends import mlx

    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool):
        tensor = torch.ones(shape, dtype=dtype)
        assert torch.equal(mlx.to_tensor(mlx.to_array(tensor)), tensor), dtype


@pytest.mark.mlx
def test_an_array_is_handed_out_without_a_copy_and_in_with_one() -> None:
    mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
    import numpy

    from harness.backends import mlx

    array = mx.arange(6).astype(mx.float32).reshape(2, 3)
    tensor = mlx.to_tensor(array)
    assert tensor.data_ptr() == numpy.asarray(array).ctypes.data
    # What NumPy reads against the order of the memory is what torch cannot.
    for other in (array.T, array[::-1], array[:, ::2]):
        assert torch.equal(mlx.to_tensor(other), torch.tensor(other.tolist()))
    inward = mlx.to_array(tensor)
    tensor += 1
    assert inward.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_options_know_every_backend_and_dtype() -> None:
    Options(backends=BACKENDS, dtypes=DTYPES, require=("mlx",))
    assert set(find_family("nanogpt").backends) <= set(BACKENDS)
    assert set(pytorch.DTYPES) == set(DTYPES)
