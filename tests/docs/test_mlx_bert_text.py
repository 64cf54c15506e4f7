# SPDX-License-Identifier: Apache-2.0
"""The links and tables of docs/mlx_bert.md say what the code has; nothing here needs MLX."""

from __future__ import annotations

import re

import pytest

from reference_models.mlx_bert import config, quantisation
from tests.docs.blocks import ROOT, blocks, dead_links, every_fence_is_of_a_block, quoted, rows

DOCUMENT = ROOT / "docs/mlx_bert.md"
OF_THE_EARLIER_PORT = ("pooler_hidden_size", "pooler_dropout", "pooler_activation", "compute_additional_pooling")
TEXT = DOCUMENT.read_text(encoding="utf-8")


def test_links_and_fences() -> None:
    assert dead_links(DOCUMENT) == []
    assert every_fence_is_of_a_block(DOCUMENT)
    # The one in TOML is the description of a port, which tests/mlx_bert/test_plain_port.py gates.
    assert sorted({block.language for block in blocks(DOCUMENT)}) == ["python", "toml"]


def test_every_defect_of_the_earlier_port_has_its_row() -> None:
    names = [name for row in re.findall(r"^\| (M\d[^|]*) \|", TEXT, flags=re.MULTILINE) for name in row.split(", ")]
    assert sorted(names, key=lambda name: int(name[1:])) == [f"M{number}" for number in range(1, 31)]


def test_the_fields_are_those_of_the_configuration() -> None:
    named = set()
    for keys, distilbert, fields in rows(DOCUMENT, "config.json of BERT"):
        names = quoted(keys)  # the last row is of no certain keys
        for key, field in zip(names, quoted(fields) or names, strict=True) if names else ():
            named.add(field)
            assert getattr(config.from_hf_config({key: _other(field)}), field) == _other(field)
            if not distilbert.startswith("none"):
                theirs = (quoted(distilbert) or [key])[0]
                read = config.from_hf_config({"model_type": "distilbert", theirs: _other(field)})
                assert getattr(read, field) == _other(field)
    known = set(config.BertConfig.__dataclass_fields__) - {"model_type", "extra", *OF_THE_EARLIER_PORT}
    assert named == known
    assert all(f"`{name}`" in TEXT for name in OF_THE_EARLIER_PORT)


@pytest.mark.parametrize(
    ("begin", "end", "expected"),
    [
        ("Activations are ", ", each by", list(config.ACTIVATIONS)),
        ("multiple of the group size: ", ". Biases", [*map(str, (*quantisation.BITS, *quantisation.GROUP_SIZES))]),
    ],
)
def test_what_is_listed(begin: str, end: str, expected: list[str]) -> None:
    listed = TEXT.partition(begin)[2].partition(end)[0]
    assert (quoted(listed) or re.findall(r"\d+", listed)) == expected


def _other(field: str) -> object:
    """A value of a field that is not its default, and that goes with the defaults of the others."""
    values = {"hidden_act": "relu", "hidden_size": 96, "num_attention_heads": 6, "layer_norm_eps": 1e-3}
    values |= {"quantization": {"bits": 4, "group_size": 64}, "initializer_range": 0.5}
    return values.get(field, 0.25 if "dropout" in field else 7)
