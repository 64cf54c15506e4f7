# SPDX-License-Identifier: Apache-2.0
"""The generator behind every door: which checks are asked, on which cases, and what becomes of each."""

from __future__ import annotations

import dataclasses
import logging
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import Port, check_parity
from harness.backends import pytorch
from harness.checks import CATALOGUE, Check
from harness.errors import DescriptionError
from harness.families import register_family
from harness.isolation import gate
from harness.ports import family_of
from harness.results import Result, checks_run
from harness.runner import (
    COMMAND_EXAMPLES,
    HARNESS,
    PROGRAM_EXAMPLES,
    Options,
    exit_code,
    plan,
    quiet,
    run_item,
    run_ports,
    session,
    too_few,
)

CAUSAL: dict[str, Any] = {"checks": ["forward.causal"], "backends": ["torch-cpu"]}
TANH = "for block in self.transformer.h:\n    block.mlp.gelu.approximate = 'tanh'"

PlainPort = Callable[..., Port]


@pytest.fixture(autouse=True)
def _own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


def made(status: Any, port: str = "plain") -> Result:
    where = {"route": "direct", "backend": "torch-cpu", "dtype": "float64"}
    return Result(port=port, family="nanogpt", check="forward.causal", status=status, reason="because", **where)


# The plan


def test_a_plan_has_every_route_backend_and_dtype_of_a_check(tmp_path: Path, plain_port: PlainPort) -> None:
    items = plan([plain_port(tmp_path)], Options(checks=["forward.logits", "precision.logits", "config.fields"]))
    asked = {(item.check.id, item.backend, item.route, item.dtype) for item in items}
    assert {(c, b) for c, b, _, _ in asked} == {("config.fields", "torch-cpu")} | {
        (check, backend)
        for check in ("forward.logits", "precision.logits")
        for backend in ("torch-cpu", "torch-cuda", "torch-mps")
    }
    on_cpu = {
        (route, dtype) for check, backend, route, dtype in asked if (check, backend) == ("forward.logits", "torch-cpu")
    }
    assert on_cpu == {(route, "float64") for route in ("direct", "pretrained", "remote_code", "hub")}
    halves = {dtype for check, backend, _, dtype in asked if (check, backend) == ("precision.logits", "torch-cpu")}
    assert halves == {"float32", "bfloat16", "float16", "autocast"}
    # A device is asked for one route, and in float32 where it has no float64.
    assert ("forward.logits", "torch-cuda", "direct", "float64") in asked
    assert ("forward.logits", "torch-mps", "direct", "float32") in asked
    assert {route for _, backend, route, _ in asked if backend != "torch-cpu"} == {"direct"}
    assert len(asked) == len(items)


def test_the_main_route_is_the_way_a_port_loads(tmp_path: Path, plain_port: PlainPort) -> None:
    ways = {
        "state_dict": "direct",
        "checkpoint:Port.read": "checkpoint",
        "pretrained": "pretrained",
        "command:convert {checkpoint} {out}": "checkpoint",
    }
    for load, route in ways.items():
        items = plan([plain_port(tmp_path, load=load)], Options(checks=["forward.logits"], backends=["torch-cpu"]))
        assert items[0].route == route
        assert sorted(item.route for item in items) == sorted({route, "direct", "pretrained", "remote_code", "hub"})


def test_a_plan_follows_the_catalogue_port_by_port(tmp_path: Path, plain_port: PlainPort) -> None:
    ports = [plain_port(tmp_path, name) for name in ("second", "first")]
    items = plan(ports, Options())
    names = [(item.port.name, item.check.id) for item in items]
    assert list(dict.fromkeys(names)) == [(port.name, check.id) for port in ports for check in CATALOGUE]


def test_options_narrow_a_plan(tmp_path: Path, plain_port: PlainPort) -> None:
    ports = [plain_port(tmp_path)]
    chosen = plan(ports, Options(checks=["masks.*", "loss.val*"], backends=["torch-cuda"]))
    assert {item.check.id.partition(".")[0] for item in chosen} == {"masks", "loss"}
    assert {item.backend for item in chosen} == {"torch-cuda"}
    assert {item.dtype for item in plan(ports, Options(dtypes=["bfloat16", "autocast"]))} == {"bfloat16", "autocast"}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"backends": ["torch-cup"]}, "no backend 'torch-cup'; did you mean 'torch-cpu'"),
        ({"dtypes": ["float64", "flaot32"]}, "no dtype 'flaot32'; did you mean 'float32'"),
        ({"profile": "nighty"}, "no profile 'nighty'; did you mean 'nightly'"),
        ({"require": ["mlx", "torch-mpx"]}, "no backend 'torch-mpx'; did you mean 'torch-mps'"),
        ({"checks": ["forward.*", "foward.*"]}, "no check matches 'foward.*'"),
    ],
)
def test_an_option_that_does_not_exist_names_the_nearest(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(DescriptionError) as caught:
        Options(**wrong)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# The cases


RECORDING = "with open('{file}', 'a') as file: file.write(repr((tuple(input_ids.shape), input_ids.tolist())) + chr(10))"


def drawn(directory: Path, plain_port: PlainPort, *, check: str = "forward.causal", **options: Any) -> list[str]:
    """What a port was asked: the shape and the tokens of every call, in order."""
    file = directory / "calls"
    file.unlink(missing_ok=True)
    port = plain_port(directory, forward=RECORDING.format(file=file))
    (result,) = check_parity(port, checks=[check], backends=["torch-cpu"], **options)
    assert result.status == "passed"
    return file.read_text().splitlines()


def test_the_gate_asks_the_same_on_every_run_and_another_seed_asks_others(
    tmp_path: Path, plain_port: PlainPort
) -> None:
    first = drawn(tmp_path, plain_port)
    assert drawn(tmp_path, plain_port) == first
    other = drawn(tmp_path, plain_port, seed=1)
    assert other != first
    assert drawn(tmp_path, plain_port, seed=1) == other


def test_a_thorough_run_draws_more(tmp_path: Path, plain_port: PlainPort) -> None:
    port = plain_port(tmp_path)
    gate, thorough = (check_parity(port, **CAUSAL, profile=name)[0].examples for name in ("gate", "thorough"))
    assert gate == next(check.examples for check in CATALOGUE if check.id == "forward.causal")
    assert thorough > 3 * gate


def test_two_checks_draw_different_cases(tmp_path: Path, plain_port: PlainPort) -> None:
    causal, blocks = (drawn(tmp_path, plain_port, check=check) for check in ("forward.causal", "forward.blocks"))
    assert not set(causal[4:]) & set(blocks[4:])  # all but the plainest case, with which every check begins


# What becomes of a check


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"forward": "raise KeyError('gone')"}, "raised KeyError: 'gone' (plain.py:"),
        ({"forward": "raise RuntimeError('one\\ntwo')"}, "raised RuntimeError: one ("),
        ({"forward": "return self.forward(input_ids)"}, "raised RecursionError"),
        ({"forward": "return None"}, "without logits"),
        ({"forward": "raise SystemExit(3)"}, "SystemExit: 3"),
        ({"forward": "import os\nos._exit(0)"}, "the port ended the process: SystemExit: os._exit(0)"),
        ({"forward": "class Odd(BaseException): pass\nraise Odd('end')"}, "the port raised Odd: end"),
        ({"more": "class Odd(BaseException): pass\nraise Odd('end')"}, "cannot be imported: Odd: end"),
        ({"forward": "input_ids.zero_()"}, "forward writes into its argument 'input_ids'"),
        ({"forward": "self.nothing_like_it"}, "has no attribute 'nothing_like_it'"),
        (
            {"forward": "raise self.Shy", "more": "class Shy(Exception):\n    def __str__(self): raise self"},
            "raised Shy: Shy (",
        ),
        ({"more": "def __init__(self, config): raise ValueError('no model')"}, "raised ValueError: no model"),
        ({"more": "def __getattr__(self, name): raise RuntimeError('nothing here')"}, "nothing here"),
    ],
)
def test_whatever_a_port_does_is_a_failed_result_with_one_line_and_a_case(
    tmp_path: Path, plain_port: PlainPort, body: dict[str, str], words: str
) -> None:
    (result,) = check_parity(plain_port(tmp_path, **body), **CAUSAL)
    assert result.status == "failed"
    assert words in result.reason
    assert "\n" not in result.reason
    assert result.config is not None
    assert (result.config["n_layer"], result.config["n_head"]) == (1, 1)


def test_what_a_port_of_this_kind_has_and_this_one_lacks_is_named(tmp_path: Path, plain_port: PlainPort) -> None:
    (result,) = check_parity(plain_port(tmp_path), checks=["forward.inputs_embeds"], backends=["torch-cpu"])
    assert result.status == "failed"
    assert result.reason.startswith("Port has no get_input_embeddings; a port has what models of its library have")


@pytest.mark.parametrize(
    "change",
    [
        "torch.set_default_dtype(torch.float16)",
        "torch.set_default_device('meta')",
        "torch.set_grad_enabled(False)",
        "torch.use_deterministic_algorithms(True)",
        "torch.set_num_threads(2)",
    ],
)
@pytest.mark.parametrize("where", ["more", "forward"])
def test_what_a_port_sets_for_the_whole_process_is_set_back(
    tmp_path: Path, plain_port: PlainPort, where: str, change: str
) -> None:
    before = pytorch.settings()
    ports = [plain_port(tmp_path, "rude", **{where: change}), plain_port(tmp_path, "polite")]
    results = run_ports(ports, Options(**CAUSAL))
    assert results[1].status == "passed", results[1].reason
    assert pytorch.settings() == before


@pytest.mark.parametrize(("option", "examples"), [("", PROGRAM_EXAMPLES), ("-O ", COMMAND_EXAMPLES)])
def test_a_converter_is_started_once_for_the_same_weights(
    tmp_path: Path, plain_port: PlainPort, option: str, examples: int
) -> None:
    # With an option for its interpreter it cannot be forked: a start costs seconds.
    (tmp_path / "convert.py").write_text(
        "import shutil, sys\nfrom pathlib import Path\nopen('starts', 'a').write('.')\n"
        "Path(sys.argv[2]).mkdir()\nshutil.copy(sys.argv[1], sys.argv[2])\n"
    )
    port = plain_port(
        tmp_path,
        load=f"command:{sys.executable} {option}convert.py {{checkpoint}} {{out}}",
        more="""
@classmethod
def from_pretrained(cls, directory):
    from reference_models.nanogpt.family import read_checkpoint
    fields, state = read_checkpoint(str(next(directory.iterdir())))
    model = cls(Config(**fields))
    model.load_state_dict(state)
    return model.eval()
""",
    )
    checks = ["forward.lengths", "forward.causal", "forward.rows_independent", "forward.blocks"]
    results = check_parity(port, checks=checks, backends=["torch-cpu"])
    assert {result.status for result in results} == {"passed"}, [result.reason for result in results]
    assert [result.examples for result in results] == [examples] * 4
    assert len((tmp_path / "starts").read_text()) == examples
    # The check that tries most models tries more of a program that starts quickly too.
    (result,) = check_parity(port, checks=["forward.logits"], backends=["torch-cpu"], dtypes=["float64"])[:1]
    assert result.examples == (COMMAND_EXAMPLES if option else 2 * PROGRAM_EXAMPLES)


def test_a_port_that_cannot_be_shown_is_checked_all_the_same(tmp_path: Path, plain_port: PlainPort) -> None:
    shy = "def __repr__(self): raise RuntimeError('shy')\n__str__ = __repr__"
    (right,) = check_parity(plain_port(tmp_path, "right", more=shy), **CAUSAL)
    assert right.status == "passed"
    wrong = plain_port(tmp_path, "wrong", more=shy, forward=f"{TANH}\nraise TypeError(self)")
    (result,) = check_parity(wrong, **CAUSAL, report=tmp_path / "report")
    assert (result.status, result.reason.partition(" (")[0]) == ("failed", "raised TypeError: TypeError")
    assert Path(result.bundle or "").is_dir()


def test_a_failed_result_has_numbers_a_place_and_no_more_than_its_seconds_to_shrink(
    tmp_path: Path, plain_port: PlainPort
) -> None:
    port = plain_port(tmp_path, forward="if self.config.n_layer > 1:\n" + textwrap.indent(TANH, "    "))
    (result,) = check_parity(port, checks=["forward.lengths"], backends=["torch-cpu"])
    assert result.status == "failed"
    assert result.metrics["error"] > result.metrics["bound"]
    assert result.first_divergence == "block.0.mlp"
    assert result.config is not None
    assert (result.config["n_layer"], result.config["n_head"]) == (2, 1)
    (unshrunk,) = check_parity(port, checks=["forward.lengths"], backends=["torch-cpu"], shrink_seconds=0)
    assert unshrunk.examples < result.examples


def test_a_case_that_fails_once_and_passes_once_is_a_failure(tmp_path: Path, plain_port: PlainPort) -> None:
    forward = "Port.calls = getattr(Port, 'calls', 0) + 1\nif Port.calls == 3: raise ValueError('sometimes\\nor not')"
    (result,) = check_parity(plain_port(tmp_path, forward=forward), **CAUSAL)
    assert result.status == "failed"
    assert "failed once and passed once" in result.reason
    assert "sometimes" in result.reason
    assert "\n" not in result.reason


def test_what_is_skipped_says_why(tmp_path: Path, plain_port: PlainPort) -> None:
    port = plain_port(tmp_path, lacks={"forward.causal": "it looks ahead"})
    family = family_of(port)
    small = register_family(
        dataclasses.replace(family, name="small-nanogpt", features=family.features - {"learned_positions"})
    )
    results = check_parity(
        dataclasses.replace(port, family=small.name), checks=["forward.causal", "forward.beyond_maximum"]
    )
    assert {result.status for result in results} == {"skipped"}
    assert {result.reason for result in results} == {
        "the port lacks it: it looks ahead",
        "family 'small-nanogpt' has no learned positions",
    }
    assert all(result.examples == 0 for result in results)


def test_a_port_that_lacks_the_check_of_a_route_lacks_the_route(tmp_path: Path, plain_port: PlainPort) -> None:
    port = plain_port(tmp_path, lacks={"roundtrip.*": "a plain module", "remote_code.*": "a plain module"})
    results = check_parity(port, checks=["forward.logits"], backends=["torch-cpu"])
    assert {result.route: result.status for result in results} == {
        "direct": "passed",
        "pretrained": "skipped",
        "remote_code": "skipped",
        "hub": "skipped",
    }


def test_a_port_may_translate_names_when_it_loads(tmp_path: Path, plain_port: PlainPort) -> None:
    renaming = """
def __init__(self, config):
    super().__init__(config)
    self.body = self.transformer
    del self.transformer
    self._register_load_state_dict_pre_hook(self.rename)

@staticmethod
def rename(state, *_):
    for name in list(state):
        state[name.replace("transformer.", "body.")] = state.pop(name)

@property
def transformer(self):
    return self.body
"""
    port = plain_port(tmp_path, more=renaming)
    results = check_parity(port, checks=["forward.lengths", "training.gradients"], backends=["torch-cpu"])
    assert results[0].status == "passed", results[0].reason


def test_an_expected_failure_gives_both_reasons_and_an_unexpected_pass_is_bad(
    tmp_path: Path, plain_port: PlainPort
) -> None:
    port = plain_port(tmp_path, forward=TANH, xfail={"forward.*": "issue 12"})
    failing, passing = check_parity(port, checks=["forward.blocks", "forward.causal"], backends=["torch-cpu"])
    assert failing.status == "xfailed"
    assert "issue 12" in failing.reason
    assert "relative error" in failing.reason
    assert passing.status == "xpassed"
    assert passing.reason == "holds, so remove its xfail entry, which says: issue 12"
    assert exit_code([failing], []) == 0
    assert exit_code([passing], []) == 1


@pytest.mark.parametrize("status", ["skipped", "failed", "error"])
def test_a_result_without_a_reason_cannot_be_made(status: Any) -> None:
    with pytest.raises(ValueError, match="has to say why"):
        dataclasses.replace(made(status), reason="")


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        (["passed", "skipped", "xfailed"], 0),
        (["passed", "failed"], 1),
        (["error"], 1),
        (["xpassed"], 1),
        ([], 0),
    ],
)
def test_the_exit_code_is_that_of_the_worst(statuses: list[Any], code: int) -> None:
    assert exit_code([made(status) for status in statuses], []) == code
    assert exit_code([made(status) for status in statuses], ["too few"]) == 1


def test_a_harness_that_fails_itself_says_so(
    tmp_path: Path, plain_port: PlainPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: dict[str, Any] = {}
    text = compile("def own(*_): raise IndexError('off by one')", str(HARNESS / "checks" / "forward.py"), "exec")
    exec(text, names)
    monkeypatch.setattr("harness.checks.forward.causal", names["own"])
    (result,) = check_parity(plain_port(tmp_path), **CAUSAL)
    assert result.status == "error"
    assert result.reason.startswith("the harness itself raised IndexError: off by one")


# Sums, sessions, silence


def test_too_few_checks_are_counted_for_each_port(tmp_path: Path, plain_port: PlainPort) -> None:
    one, two = plain_port(tmp_path, "one", min_checks=2), plain_port(tmp_path, "two")
    results = [made("passed", "one"), made("skipped", "one"), made("failed", "two")]
    assert checks_run(results) == 2
    assert too_few([one, two], results, Options()) == ["port 'one': 1 checks ran, 2 were asked for"]
    assert too_few([one, two], results, Options(min_checks=1)) == ["port 'one': 1 checks ran, 2 were asked for"]
    assert len(too_few([one, two], results, Options(min_checks=3))) == 2
    assert too_few([one, two], results, Options(checks=["forward.*"])) == []
    assert too_few([one, two], results, Options(), filtered=True) == []
    assert len(too_few([one, two], results, Options(dtypes=["float64"], min_checks=2))) == 2


def test_a_run_tells_of_each_result_as_it_comes(tmp_path: Path, plain_port: PlainPort) -> None:
    told: list[Result] = []
    options = Options(checks=["forward.causal", "forward.lengths"], backends=["torch-cpu"])
    assert run_ports([plain_port(tmp_path)], options, on_result=told.append) == told
    assert [result.check for result in told] == ["forward.lengths", "forward.causal"]
    assert all(result.seconds > 0 for result in told)


def test_a_session_leaves_nothing_behind_and_an_item_nothing_in_it(
    tmp_path: Path, plain_port: PlainPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    options = Options(**CAUSAL)
    (item,) = plan([plain_port(tmp_path, forward="raise ValueError")], options)
    with session() as shared:
        before = set(shared.root.iterdir())
        assert run_item(item, options, shared).status == "failed"
        assert set(shared.root.iterdir()) == before
        assert shared.root.parent == scratch.resolve()
    assert list(scratch.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), session():
        raise KeyboardInterrupt
    assert list(scratch.iterdir()) == []


def test_after_a_quiet_run_everything_may_speak_again(capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("after")
    logger.addHandler(handler := logging.StreamHandler(sys.stdout))
    with pytest.raises(KeyError), quiet():
        print("silent")
        raise KeyError
    print("spoken")
    logger.warning("logged")
    logger.removeHandler(handler)
    with pytest.warns(UserWarning, match="warned"):
        warnings.warn("warned", stacklevel=1)
    assert capfd.readouterr().out == "spoken\nlogged\n"


def test_a_replay_of_a_check_that_is_gone_names_the_nearest(tmp_path: Path, plain_port: PlainPort) -> None:
    from harness.cases import Case

    recorded = {"check": "forward.casual", "route": "direct", "backend": "torch-cpu", "dtype": "float64"}
    wrong = pytest.raises(DescriptionError, match=r"'forward\.casual'; did you mean 'forward\.causal'")
    with gate() as opened, wrong:
        opened.replay(plain_port(tmp_path), Case(fields={}, rows=1, tokens=1, seed=0), recorded, tmp_path)


def test_every_check_of_the_catalogue_is_one_function_with_a_reason() -> None:
    from harness.checks import function_of

    ids = [check.id for check in CATALOGUE]
    assert len(set(ids)) == len(ids)
    for check in CATALOGUE:
        assert isinstance(check, Check)
        assert "caught" in (function_of(check).__doc__ or ""), check.id
