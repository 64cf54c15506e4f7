# SPDX-License-Identifier: Apache-2.0
"""Ports that start fast: nanoGPT's own model under the signature of a port, without transformers."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import Port

SOURCE = """
import torch
from reference_models.nanogpt.original import GPT, GPTConfig as Config

class Port(GPT):
    def forward(self, input_ids, attention_mask=None, labels=None):
{forward}
        logits, _ = super().forward(input_ids, input_ids)
        return {{"logits": logits}}

{more}
"""

PlainPort = Callable[..., Port]
Describe = Callable[..., None]


@pytest.fixture(scope="session")
def plain_port(frameworks: None) -> PlainPort:
    """Writes `<name>.py` with a port that is right, and gives its description.

    `forward` are lines that run before the model does, `more` are lines of the class after its forward; further
    keywords are fields of Port.
    """

    def write(directory: Path, name: str = "plain", *, forward: str = "pass", more: str = "", **fields: Any) -> Port:
        text = SOURCE.format(forward=textwrap.indent(forward, " " * 8), more=textwrap.indent(more, " " * 4))
        (directory / f"{name}.py").write_text(text)
        values = {"model": f"{name}.py:Port", "config": f"{name}.py:Config", **fields}
        return Port(name=name, family="nanogpt", root=directory, **values)

    return write


@pytest.fixture(scope="session")
def describe() -> Describe:
    """Writes a parity.toml that describes ports; paths in it are relative to the directory of the first."""

    def write(*ports: Port) -> None:
        text = ""
        for port in ports:
            text += "[[port]]\n"
            for key in ("name", "family", "model", "config", "load", "original", "min_checks"):
                if getattr(port, key) is not None:
                    text += f"{key} = {json.dumps(getattr(port, key))}\n"
            for key in ("lacks", "xfail"):
                entries = ", ".join(f'"{name}" = "{reason}"' for name, reason in getattr(port, key).items())
                text += f"{key} = {{ {entries} }}\n"
        (ports[0].root / "parity.toml").write_text(text)

    return write
