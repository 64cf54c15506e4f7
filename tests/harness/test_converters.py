# SPDX-License-Identifier: Apache-2.0
"""What is asked of a converter: it refuses or names what it leaves out, reads every dialect, and hands over a model."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import Port, Result, check_parity

PlainPort = Callable[..., Port]

READ = """
@classmethod
def read(cls, path):
    from reference_models.nanogpt.family import read_checkpoint
    fields, state = read_checkpoint(path)
    model = cls(Config(**fields))
{more}
    model.load_state_dict(state)
    return model.eval()
"""
LEFT = "left = [name for name in state if name not in model.state_dict()]\n"


def converting(directory: Path, plain_port: PlainPort, more: str = "pass") -> Port:
    body = READ.format(more=textwrap.indent(more, "    "))
    return plain_port(directory, more=body, load="checkpoint:Port.read", labels="preshifted")


def asked(port: Port, check: str) -> Result:
    (result,) = check_parity(port, checks=[check], backends=["torch-cpu"])
    return result


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ("pass", "passed"),  # load_state_dict raises
        ("for name in left: del state[name]", "failed"),
        (
            "import warnings\nfor name in left: del state[name]\nwarnings.warn('deprecated', DeprecationWarning)",
            "failed",
        ),
        ("import warnings\nfor name in left: warnings.warn(f'{name} is left'); del state[name]", "passed"),
        (
            "import logging\nfor name in left: logging.getLogger('x').warning('left: %s', name); del state[name]",
            "passed",
        ),
    ],
    ids=["refused", "dropped", "dropped beside another warning", "warned of", "logged"],
)
def test_a_left_over_tensor_is_refused_or_named(tmp_path: Path, plain_port: PlainPort, more: str, status: str) -> None:
    result = asked(converting(tmp_path, plain_port, LEFT + more), "weights.damaged")
    assert result.status == status, result.reason
    if status == "failed":
        assert "says nothing of the tensor" in result.reason


def test_what_only_older_files_have_may_be_refused_but_not_misread(tmp_path: Path, plain_port: PlainPort) -> None:
    refusing = converting(tmp_path, plain_port)
    result = asked(refusing, "weights.older_dialects")
    assert result.status == "skipped"
    assert "refuses a file with causal masks among the weights" in result.reason
    # The masks are still refused, and come first; what is misread comes after them.
    misreading = READ.replace("fields, state = read_checkpoint(path)", "fields, state = cls.guess(path)")
    guess = """
@classmethod
def guess(cls, path):
    import torch
    contents = torch.load(path)
    state, fields = contents["model"], dict(contents["model_args"])
    if "vocab_size" not in fields:
        fields["vocab_size"] = len(state["lm_head.weight"])
        state = {name: tensor * 2 for name, tensor in state.items()}
    return fields, state
"""
    body = guess + misreading.format(more="    pass")
    (tmp_path / "other").mkdir()
    port = plain_port(tmp_path / "other", more=body, load="checkpoint:Port.read", labels="preshifted")
    result = asked(port, "weights.older_dialects")
    assert result.status == "failed"
    assert "a file with no vocab_size in model_args gives another" in result.reason


def test_a_model_in_training_mode_is_not_what_a_converter_returns(tmp_path: Path, plain_port: PlainPort) -> None:
    assert asked(converting(tmp_path, plain_port), "weights.evaluation_mode").status == "passed"
    (tmp_path / "other").mkdir()
    training = READ.replace("model.eval()", "model.train()").format(more="    pass")
    port = plain_port(tmp_path / "other", more=training, load="checkpoint:Port.read")
    assert asked(port, "weights.evaluation_mode").status == "failed"
