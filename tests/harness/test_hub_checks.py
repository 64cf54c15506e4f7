# SPDX-License-Identifier: Apache-2.0
"""The route hub and its checks: green on a port that is right, and a red one names the file and what to do."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness import bundles
from harness.checks import CATALOGUE
from harness.hub import HubServer
from harness.hub.wire import reserved_port
from harness.isolation import Gate, gate
from harness.mutants import Mutant, mutants_of, plant
from harness.ports import Port, family_of, read_ports
from harness.results import Result
from harness.runner import Item, Options, plan, skipped
from tests.harness.conftest import PlainPort

pytestmark = pytest.mark.hub

REPOSITORY = Path(__file__).parents[2]
PORT = next(port for port in read_ports(REPOSITORY) if port.name == "nanogpt")
MUTANTS = {mutant.id: mutant for mutant in mutants_of(family_of(PORT))}
OPTIONS = Options(checks=("hub.*", "forward.logits"), backends=("torch-cpu",), shrink_seconds=0.0)
GROUP = [check.id for check in CATALOGUE if check.id.startswith("hub.")]

Find = Callable[..., Result]


def item_of(port: Port, check: str) -> Item:
    """A check of the group, or forward.logits on the route."""
    found = [item for item in plan([port], OPTIONS) if item.check.id == check]
    return next(item for item in found if check.startswith("hub.") or item.route == "hub")


@pytest.fixture(scope="module")
def opened(frameworks: None) -> Iterator[Gate]:
    """One gate, with its fresh processes, for all tests here."""
    with gate(plan([PORT], OPTIONS)) as found:
        yield found


@pytest.fixture
def of_bug(opened: Gate, tmp_path: Path) -> Find:
    """What a check says of a copy of the port with a planted bug."""

    def run(bug: Mutant | str, check: str, options: Options = OPTIONS) -> Result:
        planted = plant(MUTANTS[bug] if isinstance(bug, str) else bug, PORT, tmp_path / "planted")
        return opened.run(item_of(planted, check), options)

    return run


@pytest.mark.parametrize("check", [*GROUP, "forward.logits"])
def test_a_port_that_is_right_is_green(opened: Gate, check: str) -> None:
    result = opened.run(item_of(PORT, check), OPTIONS)
    assert (result.status, result.reason) == ("passed", "")
    assert result.metrics


@pytest.mark.parametrize(
    ("bug", "check", "words"),
    [
        ("push-leaves-code", "hub.files", "modeling_nanogpt.py is not in alice/model after push_to_hub"),
        ("push-leaves-code", "forward.logits", "alice/model does not appear to have a file named"),
        ("push-forgets-helper", "hub.files", "checkpoint.py is not in alice/model after push_to_hub"),
        ("push-forgets-helper", "hub.outputs", "while loading the model alice/model"),
        ("push-names-base-class", "hub.files", "sends AutoModelForCausalLM to modeling_nanogpt.NanoGPTModel, expected"),
        ("push-names-base-class", "hub.outputs", "a fresh process loads NanoGPTModel, expected NanoGPTLMHeadModel"),
        ("push-rounds", "hub.outputs", "logits of alice/model loaded by name: relative error"),
        ("code-of-first-repository", "hub.repushed", "config.json of bob/model sends AutoConfig to another repository"),
        ("revision-dropped", "hub.revisions", "logits of alice/model at v1 loaded by name"),
        ("push-drops-revision", "hub.revisions", "push_to_hub(revision='experiment') makes no branch of that name"),
        ("code-of-weights-revision", "hub.code_revision", "alice/model with code_revision='v1'"),
        ("helper-shared-by-revisions", "hub.pinned_code", "alice/model at main runs code of several revisions"),
        ("push-is-public", "hub.private", "push_to_hub(private=True) makes a public repository"),
        ("push-drops-token", "hub.private", "a push_to_hub of the port's own hands its options on, token= among them"),
        ("token-dropped", "hub.private", "a from_pretrained of the port's own hands token= on"),
        ("looks-without-token", "hub.gated", "a from_pretrained of the port's own hands token= on"),
        ("asks-at-every-start", "hub.warm_cache", "a port asks the Hub for nothing more"),
        ("offline-wants-directory", "hub.offline", "takes a name offline"),
        ("safetensors-only-by-name", "hub.bin", "use_safetensors=True rules pytorch_model.bin out"),
        ("push-drops-shard-size", "hub.sharded", "bytes of weights as model.safetensors; a port hands its options on"),
        ("tokenizer-left-behind", "hub.tokenizer", "tokenizer.json, tokenizer_config.json of the tokenizer went from"),
    ],
)  # fmt: skip
def test_a_bug_is_named_with_its_file_and_what_to_do(of_bug: Find, bug: str, check: str, words: str) -> None:
    result = of_bug(bug, check)
    assert result.status == "failed"
    assert words in result.reason
    assert "\n" not in result.reason


def test_a_push_that_ends_its_process_is_told_and_the_next_check_goes_on(opened: Gate, of_bug: Find) -> None:
    exits = dataclasses.replace(MUTANTS["push-rounds"], replace=replaced("self.to(torch.bfloat16)", "os._exit(3)"))
    assert "pushing it to the Hub in a fresh process exited with status 3" in of_bug(exits, "hub.files").reason
    assert opened.run(item_of(PORT, "hub.files"), OPTIONS).status == "passed"


def test_what_a_port_prints_or_asks_elsewhere_while_it_is_loaded_by_name_is_contained(of_bug: Find) -> None:
    leaves = 'import socket; socket.create_connection(("192.0.2.1", 80), 1)'
    elsewhere = dataclasses.replace(MUTANTS["push-rounds"], replace=replaced("self.to(torch.bfloat16)", leaves))
    assert "network access to '192.0.2.1' refused" in of_bug(elsewhere, "hub.files").reason


def replaced(old: str, new: str) -> str:
    """The planted text of push-rounds with another line in it."""
    text = MUTANTS["push-rounds"].replace
    assert old in text
    return text.replace(old, new)


def test_a_failure_is_replayed_from_its_bundle(opened: Gate, of_bug: Find, tmp_path: Path) -> None:
    first = of_bug("push-rounds", "hub.outputs", dataclasses.replace(OPTIONS, report=tmp_path / "report"))
    assert first.bundle is not None
    port, case, recorded = bundles.read(Path(first.bundle))
    again = opened.replay(port, case, recorded, Path(first.bundle))
    assert (again.status, again.reason, again.metrics) == ("failed", first.reason, first.metrics)
    repaired = opened.replay(dataclasses.replace(port, root=REPOSITORY), case, recorded, Path(first.bundle))
    assert repaired.status == "passed"


@pytest.mark.parametrize("lacked", ["hub.outputs", "remote_code.*"])
def test_a_port_that_cannot_be_loaded_as_remote_code_is_not_asked(
    tmp_path: Path, plain_port: PlainPort, lacked: str
) -> None:
    port = plain_port(tmp_path, lacks={lacked: "its code does not travel"})
    told = {check: skipped(item_of(port, check)) for check in ("forward.logits", "hub.outputs", "hub.files")}
    reasons = {check: result and result.reason for check, result in told.items()}
    reason = "the port lacks it: its code does not travel"
    assert reasons == {
        "forward.logits": reason,
        "hub.outputs": reason,
        "hub.files": reason if lacked == "remote_code.*" else None,
    }


def test_an_expected_failure_is_one(opened: Gate, tmp_path: Path) -> None:
    planted = plant(MUTANTS["push-is-public"], PORT, tmp_path / "planted")
    expecting = dataclasses.replace(planted, xfail={"hub.private": "issue 5"})
    assert opened.run(item_of(expecting, "hub.private"), OPTIONS).status == "xfailed"


def test_a_reserved_port_refuses_until_a_hub_shares_it_and_again_afterwards(tmp_path: Path) -> None:
    def refused(port: int) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) != 0

    with reserved_port() as keeper:
        port = keeper.getsockname()[1]
        assert refused(port)
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", port))
        with HubServer(tmp_path / "hub", port=port, share_port=True) as hub:
            assert hub.port == port
            assert not refused(port)
        assert refused(port)
        child = os.fork()  # as the process of a port is forked from the one that reserved it
        if child == 0:
            try:
                with HubServer(tmp_path / "other", port=port, share_port=True):
                    os._exit(int(refused(port)))
            finally:
                os._exit(70)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert refused(port)
