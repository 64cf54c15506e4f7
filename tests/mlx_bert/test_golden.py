# SPDX-License-Identifier: Apache-2.0
"""BERT on MLX against the golden files of the true originals: outputs, every hidden state, gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest

from harness.golden import Golden, read_golden
from reference_models.mlx_bert import golden as golden_files

mlx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'parity-harness[mlx]'")

from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402

from reference_models.mlx_bert.config import BertConfig  # noqa: E402
from reference_models.mlx_bert.core import BertCore, BertOutput  # noqa: E402

pytestmark = [pytest.mark.mlx, pytest.mark.usefixtures("mlx_on_the_cpu")]

FILES = sorted((Path(__file__).parents[2] / "fixtures" / "golden" / "mlx_bert").glob("*.safetensors"))

# The erf of MLX's CPU is as accurate as float32 in float64 too, and every file's activation is the exact GELU.
WITH_ERF = 2e-6


def bound_of(golden: Golden, dtype: str, section: str) -> float:
    """What rounding allows: in float32 twice the original's own distance from its float64, and a little."""
    if dtype == "float64" or section != "outputs_f64":
        return WITH_ERF if dtype == "float64" else 1e-5
    narrow = {name.replace("_f32/", "_f64/"): v for name, v in golden.stored.items() if name.startswith("outputs_f32/")}
    assert narrow
    errors = golden_files.differences(golden, {name: value.numpy() for name, value in narrow.items()})
    return 2 * max(errors[name] for name in narrow) + 1e-6


def core_of(golden: Golden, dtype: str) -> BertCore:
    core = BertCore(BertConfig.from_dict(dict(golden_files.fields(golden))))
    weights = {
        name: mlx.array(value, dtype=getattr(mlx, dtype)) for name, value in golden_files.weights(golden).items()
    }
    core.load_weights(list(weights.items()), strict=True)
    return core


def inputs_of(golden: Golden) -> dict[str, Any]:
    return {name: mlx.array(value, dtype=mlx.int32) for name, value in golden_files.inputs(golden).items()}


def objective_of(golden: Golden, output: BertOutput) -> Any:
    """What the file's gradients are of: the outputs weighed by its probes."""
    probes = {
        name: golden.inputs[f"{golden_files.PROBES}{name}"]
        for name in ("last_hidden_state", "pooler_output")
        if f"{golden_files.PROBES}{name}" in golden.inputs
    }
    weighed = [
        (getattr(output, name) * mlx.array(probe.numpy(), dtype=getattr(output, name).dtype)).sum()
        for name, probe in probes.items()
    ]
    return sum(weighed[1:], start=weighed[0])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_golden_files_are_reproduced(path: Path, dtype: str) -> None:
    golden = read_golden(path)
    core, inputs = core_of(golden, dtype), inputs_of(golden)
    output = core(**inputs, output_hidden_states=True)
    gradients = None
    if "grads_f64" in golden.sections:

        def probed(parameters: Any) -> Any:
            core.update(parameters)
            return objective_of(golden, core(**inputs))

        parameters = core.trainable_parameters()
        found = mlx.grad(probed)(parameters)
        gradients = {name: numpy.array(value) for name, value in tree_flatten(found)}
    produced = golden_files.named(
        golden,
        hidden_states=[numpy.array(state) for state in output.hidden_states],
        pooler_output=None if output.pooler_output is None else numpy.array(output.pooler_output),
        gradients=gradients,
    )
    errors = golden_files.differences(golden, produced)
    assert {name.partition("/")[0] for name in errors} >= {"outputs_f64"}
    for name, error in errors.items():
        assert error <= bound_of(golden, dtype, name.partition("/")[0]), name


def test_a_golden_file_tells_a_bert_with_another_activation() -> None:
    golden = read_golden(FILES[0])
    config = {**golden_files.fields(golden), "hidden_act": "gelu_new"}
    core = BertCore(BertConfig.from_dict(config))
    core.update(tree_unflatten([(name, mlx.array(value)) for name, value in golden_files.weights(golden).items()]))
    output = core(**inputs_of(golden), output_hidden_states=True)
    produced = golden_files.named(
        golden,
        hidden_states=[numpy.array(state) for state in output.hidden_states],
        pooler_output=numpy.array(output.pooler_output),
    )
    assert max(golden_files.differences(golden, produced).values()) > 1e-5
