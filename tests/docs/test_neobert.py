# SPDX-License-Identifier: Apache-2.0
"""What docs/neobert.md, and README.md of NeoBERT, show is done as it stands there, block by block."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from reference_models.neobert import model as port
from reference_models.neobert import validate
from reference_models.neobert.configuration_neobert import NeoBERTConfig
from tests.docs.blocks import ROOT, Reader, blocks, dead_links, every_fence_is_of_a_block, texts

DOCUMENT = ROOT / "docs/neobert.md"
README = ROOT / "README.md"
PORT = ROOT / "reference_models/neobert"
# The environment that README makes cannot be made without a network; another Python stands in for its own.
MADE_BEFORE = (
    "python3.11 -m venv /tmp/elsewhere",
    "/tmp/elsewhere/bin/python -m pip install -c constraints.txt torch transformers",
)
WITHOUT_THIS_PROJECT = "import sys; sys.modules.update(reference_models=None, harness=None); exec(sys.stdin.read())"


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Iterator[Reader]:
    # Other tests import copies of the port, which register themselves in its place.
    AutoConfig.register(NeoBERTConfig.model_type, NeoBERTConfig, exist_ok=True)
    AutoModel.register(NeoBERTConfig, port.NeoBERT, exist_ok=True)
    AutoModelForMaskedLM.register(NeoBERTConfig, port.NeoBERTLMHead, exist_ok=True)
    AutoModelForSequenceClassification.register(NeoBERTConfig, port.NeoBERTForSequenceClassification, exist_ok=True)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    reader = Reader(DOCUMENT, PORT, tmp_path)
    yield reader
    reader.leave()


def test_the_document_from_top_to_bottom(reader: Reader) -> None:
    for block in blocks(DOCUMENT):
        reader.follow(block)


def test_the_readme_as_it_is_typed(reader: Reader) -> None:
    typed = "".join(texts(README, "console", section="NeoBERT"))
    for line in MADE_BEFORE:
        assert f"{line}\n" in typed
        typed = typed.replace(f"{line}\n", "")
    python = reader.top / "elsewhere/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\ntest "$*" = "-I -" && exec {sys.executable} -I -c "{WITHOUT_THIS_PROJECT}"\n')
    python.chmod(0o755)
    script = typed.replace("/tmp/", f"{reader.top}/").replace(".venv/bin/python", sys.executable)
    said = reader.run(["bash", "-euc", script], cwd=ROOT, env=reader.environment())
    lines = [line for text in texts(README, "text", section="NeoBERT") for line in text.splitlines()]
    for line in lines:
        # Numbers depend on the processor, and the path is another.
        words = re.split(r"[\d.]+", line.replace("/tmp/", f"{reader.top}/"))
        assert re.search(r"[\d.]+".join(map(re.escape, words)), said), f"{line}\n{said}"
    assert len(lines) > 4


@pytest.mark.parametrize("document", [DOCUMENT, README])
def test_links_and_fences(document: Path) -> None:
    assert dead_links(document) == []
    assert every_fence_is_of_a_block(document)


def test_every_row_of_the_validator_is_explained() -> None:
    table = DOCUMENT.read_text(encoding="utf-8").partition("| row | asks |")[2].partition("\n\n")[0]
    rows = [row.split(" | ")[0] for row in table.splitlines()[2:]]
    assert [name for row in rows for name in re.findall(r"`([^`]+)`", row)] == list(validate.NAMES)


def test_every_defect_of_existing_exporters_has_its_row() -> None:
    rows = re.findall(r"^\| (B[^|]*) \|", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    names = {name for row in rows for name in row.split(", ")}
    assert names == {f"B{number}" for number in range(1, 29)} | {"B1b", "B13b", "B13c"}


def test_the_document_is_short() -> None:
    assert len(DOCUMENT.read_text(encoding="utf-8").splitlines()) <= 300
