# SPDX-License-Identifier: Apache-2.0
"""The store against a plain model of what it should hold: dicts of repositories, refs, commits and whole trees."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from harness.hub.attributes import ATTRIBUTES
from harness.hub.fsck import fsck
from harness.hub.records import AddFile, AddLfs, DeleteFile, DeleteFolder, Operation, Repository
from harness.hub.refusals import Refusal
from harness.hub.store import Store

NOON = datetime(2024, 2, 29, 12, tzinfo=UTC)
"""Always: then the ids of commits, which choose what is done next, are the same in every run."""

Files = dict[str, tuple[bytes, bool]]
"""Path -> content, and whether it is an LFS file."""

OWNERS, NAMES = st.sampled_from(["alice", "bob"]), st.sampled_from(["m", "n"])
REFS = st.sampled_from(["main", "x", "y", "y/z"])
PATHS = st.sampled_from(["a", "b", "a.b", "d/x", "d/y", "d/e/z", "d e/é", "a/b"])
CONTENTS = st.sampled_from([b"", b"1", b"2", b"three" * 100])
PLACES = st.integers(0, 30)
"""Which of the commits or refs there are, counted round."""
CHANGES = st.tuples(st.sampled_from(["add", "add", "lfs", "file", "folder"]), PATHS, CONTENTS, PLACES)
PLANS = st.fixed_dictionaries(
    {
        "place": PLACES,
        "changes": st.lists(CHANGES, max_size=4),
        "parent": st.sampled_from([None, None, "last", "short", "first"]),
        "propose": st.sampled_from([False, False, False, True]),
    }
)


@dataclasses.dataclass(eq=False)
class Model:
    """A repository."""

    type: str
    owner: str
    name: str
    settings: dict[str, Any]
    heads: dict[str, str]
    tags: dict[str, str] = dataclasses.field(default_factory=dict)
    proposals: dict[str, str] = dataclasses.field(default_factory=dict)
    parents: dict[str, str | None] = dataclasses.field(default_factory=dict)
    trees: dict[str, Files] = dataclasses.field(default_factory=dict)
    contents: set[bytes] = dataclasses.field(default_factory=set)

    @property
    def id(self) -> str:
        return f"{self.owner}/{self.name}"

    def refs(self) -> dict[str, str]:
        named = {f"refs/heads/{name}": oid for name, oid in self.heads.items()}
        named |= {f"refs/tags/{name}": oid for name, oid in self.tags.items()}
        return named | self.proposals


class No(Exception):
    """The model refuses; its argument is the kind."""


def inside(files: Files, folder: str) -> list[str]:
    return [path for path in files if path.startswith(f"{folder}/")]


def after(files: Files, operations: list[Operation], by_sha256: dict[str, bytes]) -> Files:
    """A tree after operations, on whole paths."""
    files = dict(files)
    for operation in operations:
        path = operation.path
        if isinstance(operation, AddFile | AddLfs):
            parts = path.split("/")
            if any("/".join(parts[:n]) in files for n in range(1, len(parts))) or inside(files, path):
                raise No("bad_request")
            files[path] = (by_sha256[operation.sha256], isinstance(operation, AddLfs))
        elif isinstance(operation, DeleteFile):
            if path not in files:
                raise No("no_entry")
            del files[path]
        else:
            if not inside(files, path):
                raise No("no_entry")
            for below in inside(files, path):
                del files[below]
    return files


class StoreMachine(RuleBasedStateMachine):
    """Does the same to a store and to the model, and reads everything back."""

    made = Bundle("repositories")

    @initialize(target=made)
    def open(self) -> Any:
        self.directory = Path(tempfile.mkdtemp(prefix="hub-model-"))
        self.store = Store(self.directory / "root", clock=lambda: NOON)
        self.models: dict[int, Model] = {}  # By key, in the order of creation.
        self.moves: dict[tuple[str, str], Model] = {}
        self.by_sha256: dict[str, bytes] = {hashlib.sha256(ATTRIBUTES).hexdigest(): ATTRIBUTES}
        self.keys: dict[int, Repository] = {}
        self.done = 0
        return self.create("model", "alice", "m", False)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.read_everything()
            assert fsck(self.store) == []
            self.store.close()
            shutil.rmtree(self.directory)

    def same(self, model: Callable[[], Any], run: Callable[[], Any]) -> Any:
        """What the store gives where the model agrees to do it too; None where both refuse, for the same reason."""
        self.done += 1
        try:
            model()
        except No as no:
            with pytest.raises(Refusal) as refused:
                run()
            assert (refused.value.kind,) == no.args  # noqa: PT017
            return None
        return run()

    def free(self, type: str, id: str) -> None:
        if any((model.type, model.id) == (type, id) for model in self.models.values()):
            raise No("exists")

    @staticmethod
    def target(model: Model, place: int) -> tuple[str, str]:
        """A revision that can be asked for, and the commit it is."""
        named = {**model.refs(), **{oid: oid for oid in model.parents}, **{oid[:12]: oid for oid in model.parents}}
        named = {**named, **model.tags, **model.heads}
        revisions = sorted(named)
        revision = revisions[place % len(revisions)]
        return revision, named[revision]

    # Repositories

    @rule(target=made, type=st.sampled_from(["model", "dataset"]), owner=OWNERS, name=NAMES, private=st.booleans())
    def create(self, type: str, owner: str, name: str, private: bool) -> Any:
        repository = self.same(
            lambda: self.free(type, f"{owner}/{name}"),
            lambda: self.store.create_repository(type, owner, name, private=private, author=owner),
        )
        if repository is None:
            return multiple()
        assert repository.key not in self.keys
        oid = self.store.resolve(repository, "main")
        self.models[repository.key] = Model(
            type=type,
            owner=owner,
            name=name,
            settings={"private": private, "gated": False, "disabled": False},
            heads={"main": oid},
            parents={oid: None},
            trees={oid: {".gitattributes": (ATTRIBUTES, False)}},
            contents={ATTRIBUTES},
        )
        self.keys[repository.key] = repository
        self.moves.pop((type, f"{owner}/{name}"), None)
        return repository.key

    @rule(key=made, owner=OWNERS, name=NAMES)
    def move(self, key: int, owner: str, name: str) -> None:

        model = self.models[key]
        if self.same(
            lambda: self.free(model.type, f"{owner}/{name}"),
            lambda: self.store.move_repository(self.keys[key], owner=owner, name=name),
        ):
            self.moves[model.type, model.id] = model
            model.owner, model.name = owner, name
            self.moves.pop((model.type, model.id), None)

    @rule(key=consumes(made))
    def delete(self, key: int) -> None:
        self.store.delete_repository(self.keys[key])
        model = self.models.pop(key)
        self.moves = {old: to for old, to in self.moves.items() if to is not model}

    @rule(
        key=made,
        private=st.none() | st.booleans(),
        gated=st.sampled_from([None, False, "auto", "manual"]),
        disabled=st.none() | st.booleans(),
    )
    def change(self, key: int, **changes: Any) -> None:
        self.store.set_repository(self.keys[key], **changes)
        self.models[key].settings.update({name: to for name, to in changes.items() if to is not None})

    # Commits

    @rule(key=made, content=CONTENTS)
    def upload(self, key: int, content: bytes) -> None:
        sha256 = self.add(content)
        self.store.note_upload(self.keys[key], sha256)
        self.models[key].contents.add(content)

    def add(self, content: bytes) -> str:
        sha256 = self.store.blobs.add([content]).sha256
        self.by_sha256[sha256] = content
        return sha256

    @rule(key=made, plans=st.lists(PLANS, min_size=1, max_size=4))
    def commits(self, key: int, plans: list[dict[str, Any]]) -> None:
        for plan in plans:
            self.commit(key, **plan)

    def commit(
        self, key: int, place: int, changes: list[tuple[str, str, bytes, int]], parent: str | None, propose: bool
    ) -> None:
        model, repository = self.models[key], self.keys[key]
        refs = [*(f"refs/heads/{name}" for name in model.heads), *model.proposals]
        ref = refs[place % len(refs)] if place < 28 else ["refs/heads/nope", "refs/tags/x"][place % 2]
        revision, base = self.target(model, place)
        last = base if propose else model.refs().get(ref, "0" * 40)
        first = next(oid for oid, before in model.parents.items() if before is None)
        expected = {None: None, "last": last, "short": last[:7], "first": first}[parent]
        operations: list[Operation] = []
        for kind, path, content, number in changes:
            files = sorted(model.trees.get(last, ()))
            known = files[number % len(files)] if files and number < 25 else path  # Mostly what can be deleted.
            if kind == "file":
                operations.append(DeleteFile(known))
            elif kind == "folder":
                operations.append(DeleteFolder(known.rpartition("/")[0] or known))
            elif kind == "add":
                operations.append(AddFile(path, self.add(content)))
            else:
                if number < 25:
                    self.upload(key, content)
                operations.append(AddLfs(path, self.add(content), len(content) if number % 2 else None))

        def check() -> None:
            added = [operation.path for operation in operations if isinstance(operation, AddFile | AddLfs)]
            if len(set(added)) < len(added):
                raise No("bad_request")
            if any(kind == "lfs" and content not in model.contents for kind, _, content, _ in changes):
                raise No("bad_request")
            if not propose and (ref not in model.refs() or ref.startswith("refs/tags/")):
                raise No("no_revision")
            if expected is not None and not last.startswith(expected):
                raise No("stale_parent")
            after(model.trees[last], operations, self.by_sha256)

        said = {"title": f"{place}", "message": "", "author": "alice", "parent": expected}
        if not propose:
            name = ref.removeprefix("refs/heads/") if place % 3 else ref
            done = self.same(check, lambda: self.store.commit(repository, name, operations, **said))
        else:
            made = self.same(check, lambda: self.store.propose(repository, revision, operations, **said))
            number, done = made or (0, None)
            assert number == (len(model.proposals) + 1 if made else 0)
            ref = f"refs/pr/{number}"
        if done is None:
            return
        assert done.parent == last and done.title == f"{place}"
        model.trees[done.oid] = after(model.trees[last], operations, self.by_sha256)
        model.parents[done.oid] = last
        model.contents |= {content for kind, _, content, _ in changes if kind in ("add", "lfs")}
        if ref.startswith("refs/pr/"):
            model.proposals[ref] = done.oid
        else:
            model.heads[ref.removeprefix("refs/heads/")] = done.oid

    # Refs

    @rule(key=made, name=REFS, place=PLACES, tag=st.booleans())
    def create_ref(self, key: int, name: str, place: int, tag: bool) -> None:
        model, repository = self.models[key], self.keys[key]
        named = model.tags if tag else model.heads
        revision, oid = self.target(model, place)

        def check() -> None:
            for other in named:
                if other == name or other.startswith(f"{name}/") or name.startswith(f"{other}/"):
                    raise No("exists")

        def run() -> bool:
            if tag:
                self.store.create_tag(repository, name, at=revision)
            else:
                self.store.create_branch(repository, name, at=revision, author="bob")
            return True

        if self.same(check, run):
            named[name] = oid

    @rule(key=made, name=REFS, tag=st.booleans())
    def delete_ref(self, key: int, name: str, tag: bool) -> None:
        model, repository = self.models[key], self.keys[key]
        named = model.tags if tag else model.heads

        def check() -> None:
            if name == "main" and not tag:
                raise No("forbidden")
            if name not in named:
                raise No("no_revision")

        def run() -> bool:
            (self.store.delete_tag if tag else self.store.delete_branch)(repository, name)
            return True

        if self.same(check, run):
            del named[name]

    @rule(key=made, place=PLACES)
    def create_pull_request(self, key: int, place: int) -> None:
        model = self.models[key]
        revision, oid = self.target(model, place)
        number = self.store.create_pull_request(self.keys[key], base=revision, title="t", author="bob")
        assert number == len(model.proposals) + 1
        model.proposals[f"refs/pr/{number}"] = oid

    # Reading

    @precondition(lambda self: self.done > 10)  # It waits for the disk.
    @rule()
    def reopen(self) -> None:
        self.done = 0
        self.store.close()
        self.store = Store(self.directory / "root", clock=lambda: NOON)

    @rule()
    def read_everything(self) -> None:
        for key, model in self.models.items():
            self.read_repository(key, model)

    def read_repository(self, key: int, model: Model) -> None:
        repository = self.store.find_repository(model.type, model.id)
        assert repository is not None and repository.key == key
        found = {name: getattr(repository, name) for name in ("private", "gated", "disabled")}
        assert found == model.settings
        assert {ref.full: ref.oid for ref in self.store.refs(repository)} == model.refs()
        for oid, before in model.parents.items():
            line = [oid]
            while (older := model.parents[line[-1]]) is not None:
                line.append(older)
            assert [commit.oid for commit in self.store.commits(repository, oid, count=1000)] == line
            assert self.store.commit_of(repository, oid).parent == before
            self.read_tree(repository, oid, model.trees[oid])
        for place in range(5):
            revision, oid = self.target(model, place * 7)
            assert self.store.resolve(repository, revision) == oid
        for content in self.by_sha256.values():
            has = self.store.has_content(repository, hashlib.sha256(content).hexdigest())
            assert has == (content in model.contents)

    def read_tree(self, repository: Repository, oid: str, files: Files) -> None:
        folders = {"/".join(path.split("/")[:n]) for path in files for n in range(1, path.count("/") + 1)}
        entries = self.store.entries(repository, oid, recursive=True)
        assert [entry.path for entry in entries] == sorted({*files, *folders})
        paged = []
        while page := self.store.entries(
            repository, oid, recursive=True, after=paged[-1].path if paged else None, count=3
        ):
            assert not paged or page[0].path > paged[-1].path
            paged += page
        assert paged == entries
        for entry in entries:
            assert entry.directory == (entry.path in folders)
            if not entry.directory:
                content, lfs = files[entry.path]
                assert (entry.sha256, entry.size, entry.lfs) == (
                    hashlib.sha256(content).hexdigest(),
                    len(content),
                    lfs,
                )
                assert self.store.blobs.path(str(entry.sha256)).read_bytes() == content
            assert self.store.entry(repository, oid, entry.path) == entry

    @invariant()
    def names_are_right(self) -> None:
        if not hasattr(self, "store"):
            return
        for type in ("model", "dataset"):
            ids = [model.id for model in reversed(self.models.values()) if model.type == type]
            found = [repository.id for repository in self.store.repositories(type)]
            assert sorted(found) == sorted(ids)
            for id in ("alice/m", "alice/n", "bob/m", "bob/n"):
                assert (self.store.find_repository(type, id) is not None) == (id in ids)
                to = self.moves.get((type, id))
                assert self.store.moved_to(type, id) == (to.id if to else None)


StoreMachine.TestCase.settings = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=150,
    stateful_step_count=30,
    suppress_health_check=list(HealthCheck),
)
TestStore = StoreMachine.TestCase
