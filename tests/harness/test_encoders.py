# SPDX-License-Identifier: Apache-2.0
"""Families that are no causal language models: what one may say of its outputs, inputs, positions and framework."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from harness import Port, check_parity
from harness.backends import NO_FLOAT64, unavailable
from harness.cases import Case, cases, large_cases
from harness.errors import Mismatch
from harness.exploration import explore
from harness.families import Family, first_position_of, longest_of, register_family
from harness.isolation import gate
from harness.ports import family_of, read_ports
from harness.results import Result
from harness.runner import Item, Options, plan, skipped
from harness.trial import Trial, outputs_of

REPOSITORY = Path(__file__).parents[2]

# An encoder with a pooler, token types, and positions that begin at a row of its own. The port is the same with faults.
SOURCE = """
import dataclasses
from typing import Any

import torch
from torch import nn


@dataclasses.dataclass
class Config:
    vocab_size: int = 11
    places: int = 6
    first: int = 0
    types: int = 2
    width: int = 6


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.places, config.width)
        self.kinds = nn.Embedding(config.types, config.width)
        self.inner = nn.Linear(config.width, config.width)
        self.pooler = nn.Linear(config.width, config.width)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, position_ids=None):
        rows, count = input_ids.shape
        longest = self.config.places - self.config.first
        if count > longest:
            raise ValueError(f"{count} tokens, expected at most {longest}")
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        if position_ids is None:
            position_ids = self.places(seen) + self.config.first
        kinds = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        hidden = self.words(input_ids) + self.positions(position_ids) + self.kinds(kinds)
        weights = seen[..., None].to(hidden.dtype)
        mean = (hidden * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=1)
        hidden = torch.tanh(self.inner(hidden + mean))
        pooled = torch.tanh(self.pooler(hidden[:, 0]))
        return {"states": hidden, "pooled": pooled}

    def places(self, seen):
        return torch.arange(seen.shape[1]).expand_as(seen)
"""
BY_THE_MASK = (
    "return torch.arange(seen.shape[1]).expand_as(seen)",
    "return (seen.cumsum(1) - 1).clamp(min=0)",
)


def configurations() -> st.SearchStrategy[dict[str, Any]]:
    # The table of positions is longer than any other, so that it can be told from them.
    return st.fixed_dictionaries(
        {
            "vocab_size": st.integers(7, 9),
            "places": st.integers(10, 13),
            "first": st.integers(1, 2),
            "types": st.sampled_from((2, 3)),
            "width": st.sampled_from((6, 8)),
        }
    )


def build_original(cls: type, fields: Mapping[str, Any]) -> torch.nn.Module:
    import importlib

    configuration = vars(importlib.import_module(cls.__module__))["Config"]
    model: torch.nn.Module = cls(configuration(**fields)).eval()
    return model


def named(outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"logits": outputs["states"], "pooled": outputs["pooled"]}


def draw_types(fields: Mapping[str, Any], tokens: torch.Tensor, seed: int) -> torch.Tensor | None:
    if fields["types"] == 3:  # such a configuration takes none
        return None
    return torch.randint(2, tokens.shape, generator=torch.Generator().manual_seed(seed))


ENCODER = Family(
    name="encoder",
    features=frozenset({"logits", "masks", "learned_positions", "further_outputs", "further_inputs", "initialisation"}),
    configurations=configurations,
    original="original.py:Encoder",
    build_original=build_original,
    run_original=lambda module, tokens, targets: named(module(tokens)),
    run_masked=lambda module, tokens, mask: named(module(tokens, mask)),
    further_inputs={"token_type_ids": draw_types},
    run_further=lambda module, tokens, given: named(module(tokens, token_type_ids=given["token_type_ids"])),
    output="states",
    positions_by_mask=False,
    first_position=lambda fields: fields["first"],
    longest=lambda fields: fields["places"] - fields["first"],
    maximum_length="places",
    backends=("torch-cpu",),
)


@pytest.fixture(scope="module", autouse=True)
def _ready(frameworks: None) -> None:
    """Servers of gates find what checks need."""


def encoder(
    directory: Path, *edits: tuple[str, str], original: tuple[tuple[str, str], ...] = (), **changes: Any
) -> Port:
    """A port with these edits of its source, of a family with these changes."""
    name = str(len(list(directory.iterdir())))
    for file, changed in (("original", original), ("port", edits)):
        text = SOURCE
        for before, after in changed:
            assert before in text, before
            text = text.replace(before, after)
        (directory / f"{file}{name}.py").write_text(text)
    changes = {"original": f"original{name}.py:Encoder", **changes}
    plain = {"roundtrip.*": "a plain module", "remote_code.*": "a plain module"}
    return Port(
        name=name,
        family=register_family(dataclasses.replace(ENCODER, **changes)).name,
        model=f"port{name}.py:Encoder",
        config=f"port{name}.py:Config",
        root=directory,
        lacks=plain,
    )


def items_of(port: Port, *checks: str, route: str | None = None) -> list[Item]:
    return [item for item in plan([port], Options(checks=checks)) if route in (None, item.route)]


def asked(port: Port, *checks: str) -> list[Result]:
    return [result for result in check_parity(port, checks=list(checks), shrink_seconds=0) if result.route == "direct"]


CHECKS = {
    "forward.logits",
    "forward.outputs",
    "forward.further_inputs",
    "forward.outside_vocabulary",
    "forward.lengths",
    "forward.beyond_maximum",
    "forward.position_ids",
    "masks.right_padding",
    "masks.left_padding",
    "masks.interior_padding",
    "masks.original",
    "training.gradients",
}
FAULTS = {
    "a pooler without its activation": (
        ("pooled = torch.tanh(self.pooler(hidden[:, 0]))", "pooled = self.pooler(hidden[:, 0])"),
        {"forward.outputs", "training.gradients"},
        "pooled: relative error",
    ),
    "no pooler": (
        ('{"states": hidden, "pooled": pooled}', '{"states": hidden, "pooled": None}'),
        {"forward.outputs", "training.gradients"},
        "forward gives no pooled, which the original does",
    ),
    "types ignored": (
        ("token_type_ids is None else", "True else"),
        {"forward.further_inputs"},
        "logits with token_type_ids: relative error",
    ),
    "no types": (
        (", token_type_ids=None, position_ids=None):", ", position_ids=None):\n        token_type_ids = None"),
        {"forward.further_inputs"},
        "forward takes no 'token_type_ids'",
    ),
    "ids beyond the vocabulary clamped": (
        ("self.words(input_ids)", "self.words(input_ids.clamp(max=self.config.vocab_size - 1))"),
        {"forward.outside_vocabulary"},
        "is accepted by a model with",
    ),
    "negative ids from the end": (
        ("self.words(input_ids)", "self.words(torch.where(input_ids < 0, 0, input_ids))"),
        {"forward.outside_vocabulary"},
        "token id -1 is accepted by a model with",
    ),
    "positions by the mask": (
        BY_THE_MASK,
        {"masks.left_padding", "masks.interior_padding", "masks.original"},
        "padded",
    ),
    "positions from zero": (
        ("self.places(seen) + self.config.first", "self.places(seen)"),
        CHECKS - {"forward.outside_vocabulary", "forward.beyond_maximum", "forward.position_ids"},
        "logits",
    ),
    "one token too many": (
        ("if count > longest:", "if count > longest + self.config.first:"),
        {"forward.beyond_maximum"},
        "expected a ValueError that names the maximum",
    ),
    "a pooler that does not learn": (
        ("torch.tanh(self.pooler(hidden[:, 0]))", "torch.tanh(self.pooler(hidden[:, 0])).detach()"),
        {"training.gradients"},
        "gradient",
    ),
    "states that do not learn": (
        ('{"states": hidden,', '{"states": hidden.detach(),'),
        {"training.gradients"},
        "gradient",
    ),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str | None, Mapping[str, Result]]:
    """What becomes of the checks that are to notice a fault, and of the logits; without a fault, of all CHECKS."""
    directory = tmp_path_factory.mktemp("encoders")
    options, found = Options(shrink_seconds=0), {}
    items = [(None, item) for item in items_of(encoder(directory), *CHECKS, route="direct")]
    for fault, (edit, checks, _) in FAULTS.items():
        port = encoder(directory, edit)
        items += [(fault, item) for item in items_of(port, "forward.logits", *checks, route="direct")]
    with gate() as opened:
        for fault, item in items:
            found.setdefault(fault, {})[item.check.id] = opened.run(item, options)
    return found


def test_a_right_encoder_holds(answers: Mapping[str | None, Mapping[str, Result]]) -> None:
    found = {name: (result.status, result.reason) for name, result in answers[None].items()}
    assert found == dict.fromkeys(CHECKS, ("passed", ""))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_an_encoder_is_the_finding_of_its_checks(
    fault: str, answers: Mapping[str | None, Mapping[str, Result]]
) -> None:
    _, checks, words = FAULTS[fault]
    failed = {name: result.reason for name, result in answers[fault].items() if result.status != "passed"}
    assert set(failed) == checks, failed
    assert any(words in reason for reason in failed.values()), failed


def test_positions_that_count_kept_tokens_are_asked_for_where_the_family_says_so(tmp_path: Path) -> None:
    checks = ("masks.right_padding", "masks.left_padding", "masks.interior_padding")
    for edits, expected in (([BY_THE_MASK], "passed"), ([], "failed")):
        port = encoder(tmp_path, *edits, original=(BY_THE_MASK,), positions_by_mask=True)
        statuses = {result.check: result.status for result in asked(port, *checks)}
        assert statuses == {
            "masks.right_padding": "passed",
            "masks.left_padding": expected,
            "masks.interior_padding": expected,
        }


def test_a_configuration_without_further_inputs_and_outputs_is_skipped_with_the_reason(tmp_path: Path) -> None:
    port = encoder(
        tmp_path,
        further_inputs={"token_type_ids": lambda fields, tokens, seed: None},
        run_original=lambda module, tokens, targets: {"logits": module(tokens)["states"]},
    )
    reasons = {result.check: result.reason for result in asked(port, "forward.outputs", "forward.further_inputs")}
    assert reasons == {
        "forward.outputs": "the original gives nothing else in this configuration",
        "forward.further_inputs": "this configuration takes tokens alone",
    }


def test_what_a_family_does_not_have_is_not_asked_of_it(tmp_path: Path) -> None:
    port = encoder(tmp_path, features=ENCODER.features - {"further_inputs", "further_outputs"})
    reasons = {result.check: result.reason for result in asked(port, "forward.outputs", "forward.further_inputs")}
    assert reasons == {
        "forward.outputs": "family 'encoder' has no further outputs",
        "forward.further_inputs": "family 'encoder' has no further inputs",
    }


# Positions


@pytest.mark.parametrize(
    ("changes", "first", "longest"),
    [
        ({}, 2, 10),
        ({"first_position": 0, "longest": None}, 0, 12),
        ({"first_position": 3}, 3, 10),
        ({"first_position": lambda fields: fields["places"] // 4, "longest": lambda fields: 7}, 3, 7),
    ],
)
def test_where_positions_begin_and_texts_end(changes: dict[str, Any], first: int, longest: int) -> None:
    family, fields = dataclasses.replace(ENCODER, **changes), {"places": 12, "first": 2}
    assert (first_position_of(family, fields), longest_of(family, fields)) == (first, longest)


def test_cases_are_as_long_as_the_longest_text_and_no_longer() -> None:
    drawn: list[Case] = []
    explore(drawn.append, cases(ENCODER), examples=40, seed=0, database=None, shrink_seconds=0)
    over = [case.tokens - (case.fields["places"] - case.fields["first"]) for case in drawn]
    assert max(over) == 0
    family = dataclasses.replace(ENCODER, large=({"places": 100},))
    ((described, big),) = large_cases(family, drawn[0])
    assert described == "places=100" and big.tokens == 100 - drawn[0].fields["first"]


# Outputs


@dataclasses.dataclass
class Output:
    states: Any
    pooled: Any = None


STATES, POOLED = torch.ones(2, 3, 4), torch.ones(2, 4)


@pytest.fixture
def trial(tmp_path: Path) -> Callable[..., Trial]:
    def make(**changes: Any) -> Trial:
        where: dict[str, Any] = {"route": "direct", "backend": "torch-cpu", "dtype": "float64", "workdir": tmp_path}
        family = dataclasses.replace(ENCODER, **changes)
        return Trial(port=encoder(tmp_path), family=family, sandbox=None, hub=None, **where)  # type: ignore[arg-type]

    return make


@pytest.mark.parametrize(
    "output",
    [
        Output(STATES, POOLED),
        {"states": STATES, "pooled": POOLED},
        (STATES, POOLED),
        (None, torch.tensor(0.5), STATES, STATES + 1),
        STATES,
    ],
    ids=["object", "mapping", "tuple", "tuple with a loss", "tensor"],
)
def test_the_output_that_is_compared_is_the_one_the_family_names(output: Any, trial: Callable[..., Trial]) -> None:
    found = outputs_of(trial(), output)
    assert torch.equal(found["logits"], STATES)
    if isinstance(output, dict | Output):
        assert torch.equal(found["states"], STATES) and torch.equal(found["pooled"], POOLED)
    if isinstance(output, tuple) and len(output) > 2:
        assert float(found["loss"]) == 0.5


def test_another_family_compares_another_output(trial: Callable[..., Trial]) -> None:
    found = outputs_of(trial(output="pooled"), Output(STATES, POOLED + 1))
    assert torch.equal(found["logits"], POOLED + 1)


def test_logits_of_its_own_come_before_the_output_that_a_family_names(trial: Callable[..., Trial]) -> None:
    found = outputs_of(trial(), {"logits": STATES + 1, "states": STATES})
    assert torch.equal(found["logits"], STATES + 1)


@pytest.mark.parametrize(("output", "kind"), [(Output(None), "Output"), ({}, "dict"), ((POOLED,), "tuple"), (3, "int")])
def test_an_output_without_it_names_what_was_expected(output: Any, kind: str, trial: Callable[..., Trial]) -> None:
    with pytest.raises(
        Mismatch, match=f"forward returned {kind} without states; a port returns an output with .states"
    ):
        outputs_of(trial(), output)
    with pytest.raises(Mismatch, match=r"without logits; a port returns an output with \.logits"):
        outputs_of(trial(output="logits"), output)


# Files


def test_files_are_asked_for_in_the_dtypes_that_the_family_names(tmp_path: Path) -> None:
    port = next(port for port in read_ports(REPOSITORY) if port.name == "nanogpt")
    family = family_of(port)
    counted = []
    for dtypes in (("float64", "bfloat16", "float16"), ("float16",)):
        named = register_family(dataclasses.replace(family, name="files", file_dtypes=dtypes))
        (result,) = check_parity(
            dataclasses.replace(port, family=named.name), checks=["weights.dtypes"], backends=["torch-cpu"]
        )
        assert result.status == "passed", result.reason
        counted.append(result.metrics["dtypes"])
    assert counted[0] - counted[1] == 2


# Frameworks


@pytest.fixture
def of_mlx(tmp_path: Path) -> Port:
    port = encoder(tmp_path, name="encoder-of-mlx", framework="mlx", backends=("mlx-cpu", "mlx-gpu"))
    return dataclasses.replace(port, lacks={})


def test_mlx_is_not_asked_for_what_it_does_not_know(of_mlx: Port) -> None:
    asked = {(item.backend, item.dtype) for item in items_of(of_mlx, "precision.logits")}
    assert asked == {
        (backend, dtype) for backend in ("mlx-cpu", "mlx-gpu") for dtype in ("float32", "bfloat16", "float16")
    }
    here = dataclasses.replace(of_mlx, family=register_family(dataclasses.replace(ENCODER, name="encoder")).name)
    assert "autocast" in {item.dtype for item in items_of(here, "precision.logits")}
    # Its GPU has no float64.
    assert {(item.backend, item.dtype) for item in items_of(of_mlx, "forward.outputs")} == {
        ("mlx-cpu", "float64"),
        ("mlx-gpu", "float32"),
    }
    assert "mlx-gpu" in NO_FLOAT64 and "mlx-cpu" not in NO_FLOAT64


def test_a_check_of_the_library_says_that_these_are_models_of_another(of_mlx: Port) -> None:
    reason = "ports of family 'encoder-of-mlx' are models of mlx, not of transformers"
    for item in items_of(of_mlx, "roundtrip.sharded", "api.output_type", "api.embeddings"):
        result = skipped(item)
        assert result is not None and result.reason == reason, item.id
    by_route = {item.route: skipped(item) for item in items_of(of_mlx, "forward.logits") if item.backend == "mlx-cpu"}
    remote = by_route["remote_code"]
    assert remote is not None and remote.reason == reason
    for route in ("direct", "pretrained"):
        result = by_route[route]
        assert result is None or result.reason == unavailable("mlx-cpu"), route
    # What no framework has a say in lacks for the same reason as ever.
    (lacking,) = items_of(of_mlx, "weights.tied")
    result = skipped(lacking)
    assert result is not None and result.reason == "family 'encoder-of-mlx' has no tied embeddings"


def test_a_backend_that_is_not_here_comes_last_of_the_reasons(of_mlx: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.runner.unavailable", lambda backend: f"no {backend}")
    reasons = {
        (item.check.id, item.backend): skipped(item) for item in items_of(of_mlx, "config.fields", "weights.tied")
    }
    assert {key: result.reason for key, result in reasons.items() if result} == {
        ("config.fields", "mlx-cpu"): "no mlx-cpu",
        ("weights.tied", "mlx-cpu"): "family 'encoder-of-mlx' has no tied embeddings",
    }
