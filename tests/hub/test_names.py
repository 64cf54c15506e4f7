# SPDX-License-Identifier: Apache-2.0
"""Names of repositories, paths, branches and tags: what is let through, and that the client and git think the same."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.hub.names import check_path, check_ref, is_commit, is_commit_prefix, repository_parts
from harness.hub.refusals import Refusal

derandomized = settings(derandomize=True, database=None, deadline=None)

GOOD_PATHS = [
    "a",
    "README.md",
    ".gitattributes",
    ".github/workflows/x.yml",
    "...",
    "a b/c d.txt",
    " a ",
    "a#b?c%2Fd&e=f+g",
    'it\'s "quoted" `so`',
    "dé/文件夹/🤗.bin",
    "e\u0301",
    "~user",
    "-x",
    "a:b",
    "git",
    ".gitx",
    "CON",
    "x" * 255,
    "/".join(["x" * 100] * 10),
    "/".join("d" * 512),
]
BAD_PATHS = [
    ("", "empty"),
    ("/a", "absolute"),
    ("//a", "absolute"),
    ("a/", "slash"),
    ("a//b", "empty segment"),
    (".", "'.'"),
    ("..", "'..'"),
    ("a/../b", "'..'"),
    ("../a", "'..'"),
    ("a/.", "'.'"),
    (".git", "'.git'"),
    (".git/config", "'.git'"),
    ("a/.GiT/b", "'.git'"),
    ("a\0b", "control"),
    ("a\nb", "control"),
    ("a\x7fb", "control"),
    ("a\x9bb", "control"),
    ("a\\b", "backslash"),
    ("..\\a", "backslash"),
    ("\ud800", "UTF-8"),
    ("a/\udcffb", "UTF-8"),
    ("x" * 256, "255"),
    ("é" * 128, "255"),
    ("/".join("d" * 513), "1024"),
]


@pytest.mark.parametrize("path", GOOD_PATHS)
def test_paths_that_are_allowed(path: str) -> None:
    assert check_path(path) == path


@pytest.mark.parametrize(("path", "why"), BAD_PATHS)
def test_paths_that_are_refused(path: str, why: str) -> None:
    with pytest.raises(Refusal) as refused:
        check_path(path)
    assert refused.value.kind == "bad_request"
    assert why in refused.value.message and repr(path) in refused.value.message
    refused.value.message.encode()  # It can be sent.


@pytest.mark.parametrize(
    ("repository", "parts"),
    [
        ("gpt2", ("", "gpt2")),
        ("a/b", ("a", "b")),
        ("Foo-BAR_foo.bar123/x_y.z-1", ("Foo-BAR_foo.bar123", "x_y.z-1")),
        ("_a/_b_", ("_a", "_b_")),
        ("x" * 96 + "/" + "y" * 96, ("x" * 96, "y" * 96)),
    ],
)
def test_repositories_that_are_allowed(repository: str, parts: tuple[str, str]) -> None:
    assert repository_parts(repository) == parts


BAD_REPOSITORIES = [
    *("", "/", "a/", "/a", "a/b/c", "-a", "a-", ".a", "a.", "a/.b", "a/b.", "a/-b", "a--b", "a..b", "a/b--c"),
    *("a/b.git", "a.git/b", "b.git", "a/n.ipynb", "x" * 97, "a/" + "x" * 97, "café", "a b", "a/b\n", "a\0", "\ud800"),
    *("__hub__/x", "__lfs__/x", "datasets/x", "spaces/x", "models/x", "api/x", "api", "../x", "a/..", "a\\b", "a%2Fb"),
]


@pytest.mark.parametrize("repository", BAD_REPOSITORIES)
def test_repositories_that_are_refused(repository: str) -> None:
    with pytest.raises(Refusal) as refused:
        repository_parts(repository)
    assert refused.value.kind == "bad_request"
    assert repr(repository) in refused.value.message


@derandomized
@given(st.one_of(st.text(alphabet="aZ0-._/é\n", max_size=12), st.from_regex(r"[\w.-]{1,6}/[\w.-]{1,6}(\.git)?\Z")))
def test_the_client_takes_every_repository_that_the_hub_takes(repository: str) -> None:
    validators = pytest.importorskip("huggingface_hub.utils")
    try:
        validators.validate_repo_id(repository)
    except validators.HFValidationError:
        with pytest.raises(Refusal):
            repository_parts(repository)
    else:
        # Stricter in these alone: they could be mistaken for something else in a URL; old clients take any letter.
        if repository.isascii() and not any(part.endswith((".git", ".ipynb")) for part in repository.split("/")):
            repository_parts(repository)


GOOD_REFS = ["main", "v1.0", "feat/x", "a/b/c", "a-b_c", "é", "#1", "100%", "deadbeef", "a@b", "refs", "x.locks", "a.b"]
BAD_REFS = [
    *("", "@", "HEAD", "a b", "a..b", "a~", "a^", "a:b", "a?b", "a*b", "a[b", "a\\b", "a@{b", "/a", "a/", "a//b"),
    *(".a", "a/.b", "a.", "a.lock", "a.lock/b", "-a", "a\0b", "a\nb", "a\x7f", "\ud800", "refs/heads/a", "refs/pr/1"),
    *("0" * 40, "A" * 40, "x" * 256),
]


@pytest.mark.parametrize("name", GOOD_REFS)
def test_refs_that_are_allowed(name: str) -> None:
    assert check_ref(name) == name


@pytest.mark.parametrize("name", BAD_REFS)
def test_refs_that_are_refused(name: str) -> None:
    with pytest.raises(Refusal) as refused:
        check_ref(name)
    assert refused.value.kind == "bad_request"
    assert repr(name) in refused.value.message


@pytest.mark.parametrize("name", [*GOOD_REFS, *BAD_REFS])
def test_git_takes_every_ref_that_the_hub_takes(name: str, git: str) -> None:
    if "\0" in name or "\ud800" in name:
        pytest.skip("cannot be said to a program")
    said = subprocess.run([git, "check-ref-format", "--branch", name], capture_output=True)
    # Stricter in these alone: the server's own names, and the lengths of files.
    more = name.startswith("refs/") or len(name) > 255 or name in ("HEAD", "@") or is_commit(name.lower())
    assert (said.returncode == 0) == (name in GOOD_REFS) or more


def test_commits_and_their_beginnings() -> None:
    assert is_commit("0123456789abcdef" * 2 + "01234567")
    assert not is_commit("0" * 39) and not is_commit("A" * 40) and not is_commit("0" * 40 + "\n")
    assert is_commit_prefix("abcdef0") and is_commit_prefix("0" * 40)
    assert not is_commit_prefix("abcdef") and not is_commit_prefix("abcdefg") and not is_commit_prefix("0" * 41)
