# SPDX-License-Identifier: Apache-2.0
"""A BERT on MLX of another author, described as the document says: green with what it lacks, red with a bug."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'parity-harness[mlx]'")

from harness import check_parity  # noqa: E402
from harness.ports import Port, read_ports  # noqa: E402

pytestmark = pytest.mark.mlx

REPOSITORY = Path(__file__).parents[2]
DOCUMENT = REPOSITORY / "docs" / "mlx_bert.md"
SOURCE = Path(__file__).with_name("plain_bert.py")


@pytest.fixture
def port(tmp_path: Path) -> Port:
    """The port of the document, in a repository of its own."""
    (described,) = re.findall(r"```toml\n(\[\[port\]\].*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.S)
    (tmp_path / "parity.toml").write_text(described)
    shutil.copyfile(SOURCE, tmp_path / SOURCE.name)
    (found,) = read_ports(tmp_path)
    return found


def test_it_is_green_with_what_it_says_that_it_lacks(frameworks: None, port: Port) -> None:
    results = check_parity(port, backends=["mlx-cpu"])
    assert [(result.check, result.reason) for result in results if result.status not in ("passed", "skipped")] == []
    assert sum(result.status == "passed" for result in results) >= 36
    skipped = {result.check: result.reason for result in results if result.status == "skipped"}
    assert "no function quantize" in skipped["precision.quantised"]
    assert "no BertWithHead" in skipped["heads.logits"]


@pytest.mark.parametrize(
    ("find", "replace", "check", "cause"),
    [
        (
            '"gelu": nn.gelu,',
            '"gelu": nn.gelu_approx,',
            "forward.logits",
            "block.0.output (layers.0.down",
        ),
        ("hidden[:, 0]", "hidden[:, -1]", "forward.outputs", "pooler_output"),
        ("== 0\n            mask", "!= 0\n            mask", "masks.right_padding", ""),
        ("self.types(types)", "self.types(mx.zeros_like(types))", "forward.further_inputs", "token_type_ids"),
    ],
)
def test_a_bug_in_it_is_noticed(frameworks: None, port: Port, find: str, replace: str, check: str, cause: str) -> None:
    file = port.root / SOURCE.name
    assert file.read_text().count(find) == 1
    file.write_text(file.read_text().replace(find, replace))
    (result,) = check_parity(port, checks=[check], backends=["mlx-cpu"], dtypes=["float64"])[:1]
    assert result.status == "failed"
    assert cause in result.reason


def test_what_has_no_save_pretrained_is_told_so(frameworks: None, port: Port) -> None:
    results = check_parity(dataclasses.replace(port, lacks={}), checks=["roundtrip.pretrained"], backends=["mlx-cpu"])
    assert [result.reason.partition(";")[0] for result in results] == ["Bert has no save_pretrained"]


def test_a_process_that_has_computed_with_mlx_gates_a_port_too(frameworks: None, port: Port) -> None:
    # A fork of it would wait for threads that only it has.
    mx.eval(mx.ones((2,)) + 1)
    (result,) = check_parity(port, checks=["forward.deterministic"], backends=["mlx-cpu"])
    assert (result.status, result.reason) == ("passed", "")
