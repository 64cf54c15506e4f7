# SPDX-License-Identifier: Apache-2.0
"""Frameworks and devices that may not be here: what runs on them, skipped with the reason where they are absent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness import check_parity
from harness.backends import BACKENDS, unavailable
from harness.ports import read_ports

REPOSITORY = Path(__file__).parents[2]


def needs(backend: str) -> None:
    reason = unavailable(backend)
    if reason:
        pytest.skip(reason)


def test_every_backend_is_here_or_says_why_not() -> None:
    reasons = {name: unavailable(name) for name in BACKENDS}
    assert reasons["torch-cpu"] is None
    assert all(reason is None or reason for reason in reasons.values())


@pytest.mark.mlx
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool]
)
def test_tensors_reach_mlx_and_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    needs("mlx-cpu")
    from harness.backends import mlx

    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    tensor = (values > 0) if dtype == torch.bool else values.to(dtype)
    again = mlx.to_tensor(mlx.to_array(tensor.T))
    assert again.dtype == dtype
    assert torch.equal(again, tensor.T)


@pytest.mark.mlx
def test_mlx_names_its_device() -> None:
    needs("mlx-cpu")
    from harness.backends import mlx

    assert mlx.device_name() in ("Metal", "CUDA", "CPU")


@pytest.mark.cuda
def test_the_gate_holds_on_a_cuda_device() -> None:
    needs("torch-cuda")
    results = check_parity(read_ports(REPOSITORY)[0], backends=["torch-cuda"])
    assert [result.reason for result in results if result.status not in ("passed", "skipped")] == []
    assert sum(result.status == "passed" for result in results) > 30


# Without MLX, whether it is installed or not


INSTALL = "MLX is not installed (pip install 'parity-harness[mlx]')"
# The checks of masks are those that an MLX backend could run; the one of the library needs transformers.
CHECKS = ("masks.none_is_ones", "roundtrip.sharded", "loss.value")
FILES = {
    "conftest.py": """
from hypothesis import strategies
from harness.families import Family, register_family

register_family(Family(
    name="apples",
    framework="mlx",
    features=frozenset({"logits", "masks"}),
    backends=("mlx-cpu", "mlx-gpu"),
    configurations=lambda: strategies.fixed_dictionaries({"vocab_size": strategies.integers(5, 9)}),
    original="port.py:Model",
    build_original=None,
    run_original=None,
    mutants="mutants.py:MUTANTS",
))
""",
    "port.py": """
import dataclasses

import mlx.nn as nn


@dataclasses.dataclass
class Config:
    vocab_size: int = 7


class Model(nn.Module):
    pass
""",
    "mutants.py": """
from harness.mutants import planted

MUTANTS = (planted("port.py", "other", "another size", "config.fields", "vocab_size: int = 7", "vocab_size: int = 8"),)
""",
    "parity.toml": """
[[port]]
name = "apple"
family = "apples"
model = "port.py:Model"
config = "port.py:Config"
code = ["port.py"]
min_checks = 40
""",
    # Of every interpreter that is started here: what is None there cannot be imported, and is not found.
    "without/sitecustomize.py": "import sys\nsys.modules['mlx'] = None\n",
}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with a port to MLX, in whose processes there is no MLX."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def without_mlx(repository: Path, *command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(repository / "without"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("name", ["mlx", "mlx-cpu", "mlx-gpu"])
def test_requiring_mlx_where_it_is_not_exits_with_3_and_says_how_to_get_it(name: str, repository: Path) -> None:
    done = without_mlx(repository, "harness.cli", "check", "--require", name, "--json")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == f"parity: {INSTALL} (required: {name})\n"


def test_pytest_that_requires_mlx_where_it_is_not_exits_with_3_and_says_how_to_get_it(repository: Path) -> None:
    done = without_mlx(repository, "pytest", "-m", "parity", "--parity-require", "mlx", "-p", "no:cacheprovider")
    assert done.returncode == 3, done.stdout
    assert f"parity: {INSTALL} (required: mlx)" in done.stdout + done.stderr
    assert "passed" not in done.stdout and "skipped" not in done.stdout


def test_without_mlx_the_checks_of_its_ports_are_skipped_and_say_how_to_get_it(repository: Path) -> None:
    arguments = [word for check in CHECKS for word in ("--checks", check)]
    done = without_mlx(repository, "harness.cli", "check", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    found = {(result["check"], result["backend"]): (result["status"], result["reason"]) for result in results}
    assert found == {
        ("masks.none_is_ones", "mlx-cpu"): ("skipped", INSTALL),
        ("masks.none_is_ones", "mlx-gpu"): ("skipped", INSTALL),
        ("roundtrip.sharded", "mlx-cpu"): (
            "skipped",
            "ports of family 'apples' are models of mlx, not of transformers",
        ),
        ("loss.value", "mlx-cpu"): ("skipped", "family 'apples' has no loss"),
        ("loss.value", "mlx-gpu"): ("skipped", "family 'apples' has no loss"),
    }


def test_without_mlx_pytest_skips_them_with_the_same_reason(repository: Path) -> None:
    command = ("pytest", "-m", "parity", "-rs", "-p", "no:cacheprovider", "--parity-checks", CHECKS[0])
    done = without_mlx(repository, *command)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(INSTALL) >= 1 and "2 skipped" in done.stdout


def test_a_port_has_its_number_of_checks_to_run_only_where_one_of_its_backends_is(repository: Path) -> None:
    # Whoever leaves MLX out asks for nothing of the ports to it; --require and --min-checks do.
    done = without_mlx(repository, "harness.cli", "check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 checks run" in done.stdout and "checks ran" not in done.stderr
    done = without_mlx(repository, "harness.cli", "check", "--checks", CHECKS[0], "--min-checks", "1")
    assert done.returncode == 1
    assert "parity: port 'apple': 0 checks ran, 1 were asked for" in done.stderr


def test_planting_bugs_where_no_check_could_notice_says_so(repository: Path) -> None:
    done = without_mlx(repository, "harness.cli", "selftest", "--family", "apples")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == f"left out: the planted bugs of port 'apple': {INSTALL}\n"


def test_what_there_is_names_what_is_missing(repository: Path) -> None:
    done = without_mlx(repository, "harness.cli", "list", "--json")
    document = json.loads(done.stdout)
    assert {document["backends"][name] for name in ("mlx-cpu", "mlx-gpu")} == {INSTALL}
    assert "apples" in document["families"]
