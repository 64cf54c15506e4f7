# SPDX-License-Identifier: Apache-2.0
"""What is an id and what a path, and what the real client makes of ids at a real Hub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.hub import HubServer, User
from reference_models.mlx_bert.hub import HubError, NotFoundError, _is_hub_model_id, resolve

ROOT = Path(__file__).parents[2]

# Each call's answer: what was returned or raised. A process of its own, for the client reads its settings at import.
CALLS = """
import json, os, pathlib, sys
from reference_models.mlx_bert.hub import resolve

def answer(call):
    try:
        directory = resolve(**call)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return {str(p.relative_to(directory)): p.read_text() for p in sorted(directory.rglob("*")) if p.is_file()}

pathlib.Path(sys.argv[1]).write_text(json.dumps([answer(call) for call in json.loads(sys.argv[2])]))
"""
MAKE = """
from huggingface_hub import CommitOperationAdd, HfApi

api = HfApi()

def make(repository, files, **options):
    api.create_repo(repository, exist_ok=True, **options)
    operations = [CommitOperationAdd(path, text.encode()) for path, text in files.items()]
    return api.create_commit(repository, operations, commit_message="made").oid

first = make("org/bert", {"config.json": "old", "model.safetensors": "old", "pytorch_model.bin": "old"})
api.create_branch("org/bert", branch="v1.0")
api.create_branch("org/bert", branch="a/b")
make("org/bert", {"config.json": "new", "model.safetensors": "new", "vocab.txt": "v", "README.md": "r", "m.onnx": "o"})
make("org/bert", {"head/config.json": "head"})
make("org/torch", {"config.json": "{}", "pytorch_model.bin": "torch", "training_args.bin": "other"})
make("org/npz", {"config.json": "{}", "weights.npz": "npz", "model.bin": "torch"})
make("org/nothing", {"README.md": "r"})
make("org/private", {"config.json": "mine"}, private=True)
make("org/gated", {"config.json": "gated"})
api.update_repo_settings("org/gated", gated="manual")
print(first)
"""


def _run(hub: HubServer, source: str, *arguments: str, token: str | None, home: Path, **environment: str) -> str:
    variables = {**os.environ, **hub.env(token=token, home=home), "PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, "-c", source, *arguments]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def hub_of_berts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubServer, str]]:
    """A Hub with a model of each kind, and the first commit of the one that has two."""
    users = [User(name="org", token="hf_org"), User(name="bob", token="hf_bob")]
    home = tmp_path_factory.mktemp("home")
    with HubServer(tmp_path_factory.mktemp("hub"), users=users) as hub:
        yield hub, _run(hub, MAKE, token="hf_org", home=home).strip()


@pytest.fixture
def calls(hub_of_berts: tuple[HubServer, str], tmp_path: Path) -> Callable[..., list[Any]]:
    """Makes calls of `resolve` in one fresh process with a cache of the test, and returns the answer of each."""

    def run(*calls: dict[str, Any], token: str | None = None, **environment: str) -> list[Any]:
        home = tmp_path / "home"
        home.mkdir(exist_ok=True)
        answers = tmp_path / "answers.json"
        _run(hub_of_berts[0], CALLS, str(answers), json.dumps(calls), token=token, home=home, **environment)
        return list(json.loads(answers.read_text()))

    return run


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mlx-community/bert-base-uncased", True),
        ("a/b@main", True),
        ("a/b@refs/pr/1", False),
        ("models/bert", True),
        ("bert-base-uncased", False),
        ("a/b/c", False),
        ("./x", False),
        ("./local_model", False),
        ("../x", False),
        ("/a/b", False),
        ("~/x/y", False),
        ("a/b.c", True),
        ("A1/B-2_3.4", True),
        ("https://h/x", False),
        ("s3://a/b", False),
        ("C:/x", False),
        ("org/name\n", False),
        ("org/name@v1\n", False),
        ("-a/b", False),
        ("a/_b", False),
        ("a/b@", False),
        ("a b/c", False),
        ("\u00e9a/b", False),
        ("a/b@v\u0661", False),
        ("", False),
        ("/", False),
    ],
)
def test_what_is_the_id_of_a_model_on_the_hub(
    text: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _is_hub_model_id(text) is expected


def test_a_path_that_is_there_wins_over_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "bert").mkdir(parents=True)
    assert not _is_hub_model_id("models/bert")
    assert resolve("models/bert") == Path("models/bert")
    (tmp_path / "models" / "gone").symlink_to("nowhere")
    assert not _is_hub_model_id("models/gone")
    with pytest.raises(NotFoundError, match="'models/gone' is a symbolic link to nothing"):
        resolve("models/gone")


@pytest.mark.parametrize("text", ["bert-base-uncased", "./x", "a/b/c", "a/b@refs/pr/1", "org/name\n", Path("org/name")])
def test_what_is_neither_is_told_what_an_id_looks_like(
    text: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HubError, match="organisation/name@revision") as raised:
        resolve(text)
    assert isinstance(raised.value, FileNotFoundError) and repr(str(text)) in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_a_revision_is_never_dropped(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names a revision and revision='v2' another"):
        resolve("org/bert@v1", revision="v2")
    with pytest.raises(ValueError, match="is a path here and has no revision 'v2'"):
        resolve(tmp_path, revision="v2")
    with pytest.raises(ValueError, match="revision of 'org/bert' is empty"):
        resolve("org/bert", revision="")


def test_without_the_client_an_id_says_what_to_install_and_a_path_works(tmp_path: Path) -> None:
    source = """
import sys
sys.modules["huggingface_hub"] = None
from reference_models.mlx_bert.hub import resolve
print(resolve("."))
try:
    resolve("org/bert")
except ImportError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", source], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        ".",
        "org/bert is on the Hub and huggingface_hub cannot be imported; run: pip install huggingface_hub",
    ]


@pytest.mark.hub
def test_the_files_of_a_model_are_downloaded_to_the_cache_asked_for(calls: Callable[..., Any], tmp_path: Path) -> None:
    (bert,) = calls({"id_or_path": "org/bert", "cache_dir": "mine"})
    assert bert == {"config.json": "new", "head/config.json": "head", "model.safetensors": "new", "vocab.txt": "v"}
    home = tmp_path / "home"
    assert {path.relative_to(home).parts[0] for path in home.rglob("models--org--bert")} == {"mine"}


@pytest.mark.hub
def test_the_revision_is_the_one_asked_for(hub_of_berts: tuple[HubServer, str], calls: Callable[..., Any]) -> None:
    answers = calls(
        {"id_or_path": "org/bert@v1.0"},
        {"id_or_path": "org/bert", "revision": "v1.0"},
        {"id_or_path": "org/bert@v1.0", "revision": "v1.0"},
        {"id_or_path": "org/bert", "revision": hub_of_berts[1]},
        {"id_or_path": f"org/bert@{hub_of_berts[1]}"},
        {"id_or_path": "org/bert", "revision": "a/b"},
        {"id_or_path": "org/bert@main"},
        {"id_or_path": "org/bert"},
    )
    assert [answer["config.json"] for answer in answers] == ["old"] * 6 + ["new"] * 2


@pytest.mark.hub
def test_torchs_files_come_only_where_there_are_no_others(calls: Callable[..., Any]) -> None:
    torch, npz = calls({"id_or_path": "org/torch"}, {"id_or_path": "org/npz"})
    assert sorted(torch) == ["config.json", "pytorch_model.bin", "training_args.bin"]
    assert sorted(npz) == ["config.json", "weights.npz"]


@pytest.mark.hub
def test_a_token_opens_what_is_private(calls: Callable[..., Any]) -> None:
    closed, bobs, opened = calls(
        {"id_or_path": "org/private"},
        {"id_or_path": "org/private", "token": "hf_bob"},
        {"id_or_path": "org/private", "token": "hf_org"},
    )
    fault = "org/private: is not on the Hub, or is private and the token given does not open it"
    assert closed == bobs == ["HubError", fault]
    assert opened == {"config.json": "mine"}
    assert calls({"id_or_path": "org/private", "cache_dir": "other"}, token="hf_org") == [opened]
    # A token of the environment is not sent where the caller says so.
    (unsent,) = calls({"id_or_path": "org/private", "token": False, "cache_dir": "third"}, token="hf_org")
    assert unsent == closed


@pytest.mark.hub
def test_what_is_not_there_or_may_not_be_read_is_said_in_one_line(calls: Callable[..., Any]) -> None:
    answers = calls(
        {"id_or_path": "org/never"},
        {"id_or_path": "org/bert@never"},
        {"id_or_path": "org/gated"},
        {"id_or_path": "org/nothing"},
        {"id_or_path": "org/a..b"},
        token="hf_bob",
    )
    assert [kind for kind, _ in answers] == ["HubError"] * 5
    assert [text for _, text in answers][:4] == [
        "org/never: is not on the Hub, or is private and the token given does not open it",
        "org/bert@never: has no revision 'never'; expected a branch, a tag or a commit of it",
        "org/gated: is gated; accept its conditions on its page, and give a token of who did",
        "org/nothing: has none of the files of a model; expected config.json and model.safetensors, or other weights",
    ]
    assert answers[4][1].startswith("org/a..b: is no id that the Hub has: ")
    assert all(len(text.splitlines()) == 1 for _, text in answers)


@pytest.mark.hub
def test_what_the_cache_has_needs_no_hub(calls: Callable[..., Any]) -> None:
    wanted = [{"id_or_path": "org/bert@v1.0"}, {"id_or_path": "org/torch"}, {"id_or_path": "org/npz"}]
    before = calls(*wanted[:2])
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # the port that discards, where nobody listens
    for environment in ({"HF_HUB_OFFLINE": "1"}, nowhere):
        again = calls(*wanted, **environment)
        assert again[:2] == before
        kind, text = again[2]
        assert kind == "HubError" and text.startswith("org/npz: is not in the cache and the ")
        assert ("is offline" in text) == ("HF_HUB_OFFLINE" in environment)
        assert len(text.splitlines()) == 1


@pytest.mark.hub
def test_a_hub_that_breaks_off_is_an_error_of_the_hub(
    hub_of_berts: tuple[HubServer, str], calls: Callable[..., Any]
) -> None:
    from harness.hub import Fault

    hub, _ = hub_of_berts
    hub.inject(Fault(match=r"^GET .*/resolve/", status=403))
    try:
        ((kind, text),) = calls({"id_or_path": "org/npz"})
    finally:
        hub.clear_faults()
    assert kind == "HubError" and text.startswith("org/npz: ") and len(text.splitlines()) == 1
