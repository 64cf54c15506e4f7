# SPDX-License-Identifier: Apache-2.0
"""Localisation is for families nobody has thought of: attention and norms written out, names and layouts of its own."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.cases import Case
from harness.checks import Check
from harness.families import Family, Tap
from harness.localise import Divergence, locate
from harness.ports import Port
from harness.runner import Session, session
from harness.trial import Trial

pytestmark = pytest.mark.usefixtures("one_thread")

ORIGINAL = """
import math
import torch
from torch import nn


class Config:
    def __init__(self, width=8, heads=2, vocab_size=13, longest=8, layers=2):
        self.width, self.heads, self.vocab_size, self.longest, self.layers = width, heads, vocab_size, longest, layers


class Norm(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.ones(c.width)), nn.Parameter(torch.zeros(c.width))

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return self.gain * centred / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5) + self.bias


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.size = c.heads, c.width // c.heads
        self.q, self.k, self.v, self.o = (nn.Linear(c.width, c.width) for _ in range(4))

    def forward(self, x):
        rows, count, width = x.shape
        q, k, v = (f(x).view(rows, count, self.heads, self.size).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.size)
        later = torch.ones(count, count, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
        mixed = torch.softmax(scores, dim=-1) @ v
        return self.o(mixed.transpose(1, 2).reshape(rows, count, width))


class Feed(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.up, self.down = nn.Linear(c.width, 2 * c.width), nn.Linear(2 * c.width, c.width)

    def forward(self, x):
        return self.down(nn.functional.silu(self.up(x)))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.first, self.attention, self.second, self.feed = Norm(c), Attention(c), Norm(c), Feed(c)

    def forward(self, x):
        x = x + self.attention(self.first(x))
        return x + self.feed(self.second(x))


class Model(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.tokens, self.places = nn.Embedding(c.vocab_size, c.width), nn.Embedding(c.longest, c.width)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.last, self.head = Norm(c), nn.Linear(c.width, c.vocab_size, bias=False)

    def forward(self, input_ids):
        x = self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x))
"""

RENAMED = {
    "attention": "self_attn",
    "first": "input_layernorm",
    "second": "post_attention_layernorm",
    "feed": "mlp",
    "blocks": "layers",
    "places": "embed_positions",
}
CASE = Case(fields={"width": 8, "heads": 2, "vocab_size": 13, "longest": 8, "layers": 2}, rows=2, tokens=6, seed=3)


def build(cls: type, fields: Any) -> torch.nn.Module:
    import sys

    module: torch.nn.Module = cls(sys.modules[cls.__module__].Config(**fields))
    return module.eval()


def run(module: torch.nn.Module, tokens: torch.Tensor, _: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {"logits": module(tokens)}


def taps(fields: Any) -> list[Tap]:
    parts = ("first", "attention", "second", "feed")
    places = [f"blocks.{layer}{part}" for layer in range(fields["layers"]) for part in (*(f".{p}" for p in parts), "")]
    return [Tap(name=place, original=place, port=place) for place in (*places, "last", "head")]


FAMILY = Family(
    name="written-out",
    features=frozenset({"logits", "causal", "taps"}),
    configurations=lambda: pytest.fail("no case is drawn"),
    original="elsewhere:Model",
    build_original=build,
    run_original=run,
    fields={"heads": ("num_attention_heads",), "width": ("hidden_size",)},
    taps=taps,
    maximum_length="longest",
    gains={r"(tokens|places|head)\.weight$": 2.0, r"\.(q|k)\.weight$": 1.7, r"gain$": 1.0},
)


@pytest.fixture(scope="module")
def shared() -> Iterator[Session]:
    with session() as opened:
        yield opened


def located(
    shared: Session, root: Path, *edits: tuple[str, str], renamed: bool = False, spoilt: str = "t"
) -> Divergence | None:
    source, loader = ORIGINAL, "state_dict"
    for find, replace in edits:
        assert find in source
        source = source.replace(find, replace)
    (root / "original.py").write_text(ORIGINAL)
    if renamed:
        for name, other in RENAMED.items():
            source = source.replace(f"self.{name}", f"self.{other}")
        source += LOADER.replace("SPOILT", spoilt)
        loader = "checkpoint:load"
    (root / "port.py").write_text(source)
    port = Port(
        name="toy",
        family="written-out",
        model="port.py:Model",
        config="port.py:Config",
        original="original.py:Model",
        load=loader,
        root=root,
    )
    trial = Trial(
        port=port,
        family=dataclasses.replace(FAMILY, write_checkpoint=write),
        route="checkpoint" if renamed else "direct",
        backend="torch-cpu",
        dtype="float64",
        workdir=root,
        sandbox=shared.sandbox,
        hub=shared.hub,
    )
    return locate(trial, CASE, Check(id="forward.logits"), seconds=30)


def write(module: torch.nn.Module, fields: Any, path: Path) -> None:
    torch.save({"fields": dict(fields), "model": module.state_dict()}, path)


LOADER = f"""

def load(path):
    stored = torch.load(path, weights_only=True)
    model = Model(Config(**stored["fields"]))
    names = {RENAMED!r}
    tensors = {{".".join(names.get(part, part) for part in key.split(".")): t for key, t in stored["model"].items()}}
    tensors = {{key: SPOILT for key, t in tensors.items()}}
    model.load_state_dict(tensors)
    return model.eval()
"""


def test_a_copy_diverges_nowhere(shared: Session, tmp_path: Path) -> None:
    assert located(shared, tmp_path) is None


def test_a_renamed_copy_diverges_nowhere(shared: Session, tmp_path: Path) -> None:
    assert located(shared, tmp_path, renamed=True) is None


MASKED = """dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, float("-inf"))"""
INTERLEAVED = ".view(rows, count, self.size, self.heads).permute(0, 3, 1, 2)"
PROJECTION = "return self.o(mixed.transpose(1, 2).reshape(rows, count, width))"
TRANSPOSED = "return mixed.transpose(1, 2).reshape(rows, count, width) @ self.o.weight + self.o.bias"


@pytest.mark.parametrize("renamed", [False, True], ids=["same-names", "other-names"])
@pytest.mark.parametrize(
    ("find", "replace", "module", "said"),
    [
        (" / math.sqrt(self.size)", "", "attention", "are 2x the original's before the softmax, which is the root of"),
        (".triu(1)", ".triu(2)", "attention", "the causal mask is shifted by one"),
        (MASKED, MASKED.replace("triu(1)", "triu(0)").replace('float("-inf")', "-1e30"), "attention", "sees itself"),
        ("scores = scores.masked_fill(later", "scores.masked_fill(later", "attention", "the causal mask is missing"),
        ("softmax(scores, dim=-1)", "softmax(scores.clamp(min=-1e9), dim=-2)", "attention", "runs over the queries"),
        (".view(rows, count, self.heads, self.size).transpose(1, 2)", INTERLEAVED, "attention", "to 2 heads in turn"),
        ("in (self.q, self.k, self.v))", "in (self.k, self.q, self.v))", "attention", "as if q and k were exchanged"),
        (PROJECTION, TRANSPOSED, "attention", "as if o.weight were transposed"),
        ("+ 1e-5)", "+ 1e-6)", "first", "its epsilon is 1e-06, the original's is 1e-05"),
        ("unbiased=False", "unbiased=True", "first", "its variance has the other divisor"),
        ("return self.gain *", "return (1 + self.gain) *", "first", None),
        ("functional.silu", "functional.gelu", "feed", "its activation is the exact GELU"),
        (
            "self.down(nn.functional.silu(self.up(x)))",
            "self.down(self.up(x))",
            "feed",
            "its activation is no activation",
        ),
        ("return self.down(", "return 2 * self.down(", "feed", "its output is 2x the original's"),
        ("x = x + self.attention", "x = self.attention", "second", "what it is given lacks the input of blocks.0"),
        ("self.attention(self.first(x))", "self.attention(x)", "", "blocks.0"),
        ("self.feed(self.second(x))", "self.feed(self.first(x))", "", "first ran in the place of blocks.0.second"),
        ("+ self.places(", "+ 0 * self.places(", "first", "lacks the output of places"),
        ("self.tokens(input_ids) +", "3 * self.tokens(input_ids) +", "first", "has 3x the output of tokens"),
        ("torch.arange(input_ids.shape[1])", "torch.arange(input_ids.shape[1]) + 1", "first", "one row too late"),
        ("self.head(self.last(x))", "self.head(x)", "", "last"),
        ("return self.head(self.last(x))", "return -self.head(self.last(x))", "logits", "with the opposite sign"),
    ],
)
def test_a_bug_in_a_model_that_is_written_out_is_told(
    find: str, replace: str, module: str, said: str | None, renamed: bool, shared: Session, tmp_path: Path
) -> None:
    found = located(shared, tmp_path, (find, replace), renamed=renamed)
    assert found is not None
    assert found.module.endswith(module), found
    assert (said or "") in found.sentence, found


@pytest.mark.parametrize(
    ("spoilt", "module", "said"),
    [
        ("t * 0.5 if key.endswith('mlp.down.bias') else t", "layers.0.mlp.down.bias", "is 0.5x the original's"),
        ("t.T if key.endswith('o.weight') else t", "blocks.0.attention", "as if o.weight were transposed"),
        ("0 * t if key.endswith('up.bias') else t", "blocks.0.feed.up.bias", "layers.0.mlp.up.bias and 1 more of its"),
        ("t.half().float() if 'embed_pos' in key else t", "embed_positions.weight", "rounded to float16"),
        ("t.roll(1, 0) if 'embed_pos' in key else t", "blocks.0.first", "one row too early"),
        ("tensors[key.replace('layers.1', 'layers.0')]", "layers.1.", "as layers.0.input_layernorm.gain does"),
        (
            "tensors[key.replace('input_', 'x').replace('post_attention_', 'input_').replace('x', 'post_attention_')]",
            "blocks.0.first",
            "as if it had the parameters of blocks.0.second",
        ),
        ("tensors[key.replace('.q.', '.v.')] if '.q.' in key else t", "layers.0.self_attn.", "no number of"),
    ],
)
def test_a_loader_that_spoils_tensors_of_other_names_is_told(
    spoilt: str, module: str, said: str, shared: Session, tmp_path: Path
) -> None:
    found = located(shared, tmp_path, renamed=True, spoilt=spoilt)
    assert found is not None
    assert found.module.startswith(module), found
    assert said in found.sentence, found
