# SPDX-License-Identifier: Apache-2.0
"""Checks of the Hub: what a port pushes is all that a stranger needs who loads it by name, at every revision.

Each has an empty Hub of its own, and the client is the real one, in fresh processes: see `harness.routes.hub`.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness.cases import Case
from harness.checks.remote_code import code_files, negate_logits, require_port
from harness.checks.roundtrip import write_bin
from harness.errors import Mismatch
from harness.routes.hub import (
    AUTHOR,
    NAME,
    READER,
    by_name,
    folder_of,
    model_of,
    pull,
    push,
    push_on,
    refused_to,
    served,
    tag_of,
    tokenizer_by_name,
    tokenizer_of,
)
from harness.routes.pretrained import load
from harness.routes.remote_code import directory, logits_of
from harness.trial import Trial, config_class, draw, original_model, port_class, require_semantics, run_original, worst

if TYPE_CHECKING:
    from harness.hub import HubServer
    from harness.hub.records import Repository
    from harness.sandbox import Answer

TEXT = "a b c a"

SHARD_BYTES = 512
"""Less than the weights of the smallest configuration that is drawn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """A saved port, and the original's logits for the tokens of the case."""

    directory: Path
    logits: torch.Tensor


def files(trial: Trial, case: Case) -> dict[str, float]:
    """After push_to_hub every code file is in the repository, byte for byte, and auto_map says where the classes are.

    Would have caught: a push_to_hub of one's own that uploads weights and configuration only, a helper that is left
    out, auto_map with the name of another class.
    """
    with served(trial) as hub:
        push(trial, model_of(trial, _saved(trial, case).directory))
        return _require_code(trial, hub, NAME)


def outputs(trial: Trial, case: Case) -> dict[str, float]:
    """Loaded by name in another process, the port has its class, its ties and the original's logits.

    Would have caught: a push that leaves something behind which a saved directory has.
    """
    saved = _saved(trial, case)
    with served(trial):
        push(trial, model_of(trial, saved.directory))
        return _same(trial, pull(trial, case, by_name(NAME)), {NAME: saved.logits})


def repushed(trial: Trial, case: Case) -> dict[str, float]:
    """A user who loaded it by name pushes it to a repository of his own, which needs the first no more.

    Would have caught: code that is not saved again because it is on the Hub already, auto_map that still leads to the
    repository of the author.
    """
    saved, mine = _saved(trial, case), f"{READER.name}/model"
    with served(trial) as hub:
        push(trial, model_of(trial, saved.directory))
        push_on(trial, NAME, to=mine)
        hub.store.delete_repository(_repository(hub))
        _require_code(trial, hub, mine)
        answer = pull(trial, case, by_name(mine, source=mine))
        return _same(trial, answer, {mine: saved.logits})


def revisions(trial: Trial, case: Case) -> dict[str, float]:
    """Branch, tag, and commit in full and in short: each load in one process gets the weights of its revision.

    Would have caught: from_pretrained of one's own that drops `revision`, push_to_hub that drops it and overwrites
    main, weights kept by the name they were loaded by.
    """
    tagged, branched, newest = (_saved(trial, case, number=number) for number in range(3))
    with served(trial) as hub:
        push(
            trial,
            model_of(trial, tagged.directory),
            tag_of("v1"),
            model_of(trial, branched.directory, revision="experiment"),
            model_of(trial, newest.directory),
        )
        branches = [ref.name for ref in hub.store.refs(_repository(hub))]
        if "experiment" not in branches:
            raise Mismatch(
                f"push_to_hub(revision='experiment') makes no branch of that name, only {', '.join(branches)}; a port"
                " hands its options on"
            )
        commit = _commit(hub, "v1")
        steps = {"main": newest, "v1": tagged, "experiment": branched, commit: tagged, commit[:10]: tagged}
        loads = [by_name(f"{NAME} at {name}", revision=name) for name in steps]
        expected = {f"{NAME} at {name}": saved.logits for name, saved in steps.items()}
        if trial.family.revised_name:
            named = trial.family.revised_name.format(name=NAME, revision="v1")
            loads.append(by_name(named, source=named))
            expected[named] = tagged.logits
        answer = pull(trial, case, *loads)
    return _same(trial, answer, expected)


def cache_dir(trial: Trial, case: Case) -> dict[str, float]:
    """With cache_dir= the files lie there, and none in the client's own cache.

    Would have caught: from_pretrained that drops cache_dir, a file that is fetched without it.
    """
    saved = _saved(trial, case)
    asked, own = trial.workdir / "asked", trial.workdir / "own"
    with served(trial):
        push(trial, model_of(trial, saved.directory))
        answer = pull(trial, case, by_name(NAME, cache_dir=str(asked)), cache=own)
    numbers = _same(trial, answer, {NAME: saved.logits})
    strays = [file for file in own.rglob("snapshots/**/*") if file.is_file()]
    if strays:
        raise Mismatch(f"{strays[0].name} is in the client's own cache after from_pretrained(cache_dir=...)")
    kept = {file.name for file in asked.rglob("snapshots/**/*") if file.is_file()}
    if "config.json" not in kept:
        found = ", ".join(sorted(kept)) or "nothing"
        raise Mismatch(f"config.json is not below cache_dir after from_pretrained, only {found}")
    return {**numbers, "files": float(len(kept))}


def code_revision(trial: Trial, case: Case) -> dict[str, float]:
    """Code of one revision runs the weights of another, in either direction, where code_revision asks for that.

    The code of main is the port's with its logits negated. Would have caught: a port that takes its code from the
    revision of the weights.
    """
    old, new = _saved(trial, case), _saved(trial, case, number=1)
    old_code, new_code = (f"{NAME} with code_revision='{name}'" for name in ("v1", "main"))
    with served(trial):
        _push_two_revisions(trial, old, new)
        answer = pull(
            trial,
            case,
            by_name(old_code, revision="main", code_revision="v1"),
            by_name(new_code, revision="v1", code_revision="main"),
        )
    expected = {old_code: new.logits, new_code: -old.logits}
    return _same(trial, answer, expected)


def pinned_code(trial: Trial, case: Case) -> dict[str, float]:
    """Newer code, loaded in the same process, does not change an older revision that is pinned by its commit.

    Neither a model that is there already nor one that is loaded later; every helper is of its own revision. Would have
    caught: a class that registers itself, a helper kept under a name that all revisions share.
    """
    old, new = _saved(trial, case), _saved(trial, case, number=1)
    with served(trial) as hub:
        _push_two_revisions(trial, old, new)
        commit = _commit(hub, "v1")
        pinned, newest = f"{NAME} at the pinned commit", f"{NAME} at main"
        answer = pull(
            trial,
            case,
            by_name(pinned, revision=commit),
            by_name(newest, revision="main"),
            by_name(f"{pinned}, loaded again,", revision=commit),
        )
    for name, values in answer.values.items():
        places = {Path(file).parent for file in values["code"]}
        if len(places) > 1:
            files = sorted(f"{Path(file).name} of {Path(file).parent.name[:7]}" for file in values["code"])
            raise Mismatch(
                f"{name} runs code of several revisions in a process that loaded another: {', '.join(files)}; a port"
                " imports its helpers relatively (from .file import name) and keeps nothing between revisions"
            )
    expected = {pinned: old.logits, newest: -new.logits, f"{pinned}, loaded again,": old.logits}
    return _same(trial, answer, expected)


def private(trial: Trial, case: Case) -> dict[str, float]:
    """What push_to_hub(private=True) makes loads with `token=`, and for nobody without one.

    Would have caught: options of push_to_hub that are dropped, so that the weights are public; from_pretrained that
    does not pass `token` on.
    """
    saved = _saved(trial, case)
    with served(trial) as hub:
        push(trial, model_of(trial, saved.directory, private=True, token=AUTHOR.token), token=None)
        answer = pull(trial, case, refused_to("a stranger"), by_name(NAME, token=AUTHOR.token))
        if "refused" not in answer.values["a stranger"] or not _repository(hub).private:
            raise Mismatch("push_to_hub(private=True) makes a public repository; a port hands its options on")
    return _same(trial, answer, {NAME: saved.logits})


def gated(trial: Trial, case: Case) -> dict[str, float]:
    """A gated repository, which everybody sees and whose files are for some, loads for a user who was given access.

    The token is where a user who logged in has it. Would have caught: code that asks for a file without the token.
    """
    saved = _saved(trial, case)
    with served(trial) as hub:
        push(trial, model_of(trial, saved.directory))
        hub.store.set_repository(_repository(hub), gated="manual")
        hub.accounts.set_access(_repository(hub), READER.name, "accepted")
        answer = pull(trial, case, by_name(NAME), token=READER.token)
    return _same(trial, answer, {NAME: saved.logits})


def warm_cache(trial: Trial, case: Case) -> dict[str, float]:
    """Loaded before, the port loads again by its commit, for which nobody has to be asked, while the Hub is down.

    Would have caught: code that asks the Hub for something at every start.
    """
    saved, cache = _saved(trial, case), trial.workdir / "cache"
    with served(trial) as hub:
        push(trial, model_of(trial, saved.directory))
        pull(trial, case, by_name(NAME), cache=cache)
        commit = _commit(hub, "main")
    # transformers 4.57 would wait half a minute for each file whose commit it does not know, or that is not there.
    answer = pull(trial, case, by_name(NAME, revision=commit, own_generation=True), cache=cache)
    return _same(trial, answer, {NAME: saved.logits})


def offline(trial: Trial, case: Case) -> dict[str, float]:
    """Loaded before, the port loads again with HF_HUB_OFFLINE=1, as on a cluster without a network.

    Would have caught: code that looks at that variable and wants a directory instead of a name.
    """
    saved, cache = _saved(trial, case), trial.workdir / "cache"
    with served(trial):
        push(trial, model_of(trial, saved.directory))
        pull(trial, case, by_name(NAME), cache=cache)
    answer = pull(trial, case, by_name(NAME), cache=cache, offline=True)
    return _same(trial, answer, {NAME: saved.logits})


def bin(trial: Trial, case: Case) -> dict[str, float]:
    """A repository with `pytorch_model.bin` instead of safetensors loads by name.

    Would have caught: from_pretrained that fetches one file by its name.
    """
    saved = _saved(trial, case)
    write_bin(saved.directory, load(trial, saved.directory))
    with served(trial):
        push(trial, folder_of(saved.directory))
        return _same(trial, pull(trial, case, by_name(NAME)), {NAME: saved.logits})


def sharded(trial: Trial, case: Case) -> dict[str, float]:
    """push_to_hub(max_shard_size=...) uploads shards no larger, with their index, and they load by name.

    Would have caught: push_to_hub that drops the size, or uploads model.safetensors alone.
    """
    saved = _saved(trial, case)
    with served(trial) as hub:
        push(trial, model_of(trial, saved.directory, max_shard_size=SHARD_BYTES))
        shards = {name: len(content) for name, content in _content(hub, NAME).items() if name.endswith(".safetensors")}
        if len(shards) < 2:
            raise Mismatch(
                f"push_to_hub(max_shard_size={SHARD_BYTES}) uploads {sum(shards.values())} bytes of weights as"
                f" {', '.join(shards) or 'no file'}; a port hands its options on"
            )
        answer = pull(trial, case, by_name(NAME))
    return {**_same(trial, answer, {NAME: saved.logits}), "shards": float(len(shards))}


def tokenizer(trial: Trial, case: Case) -> dict[str, float]:
    """A tokenizer stays beside the model, whichever of the two is pushed first, and AutoTokenizer finds it.

    Would have caught: push_to_hub that replaces the repository by its own files, a configuration that AutoTokenizer
    cannot read.
    """
    saved = _saved(trial, case)
    words, expected = _write_tokenizer(trial, case)
    before, after = f"{AUTHOR.name}/tokenizer-first", f"{AUTHOR.name}/model-first"
    with served(trial) as hub:
        push(
            trial,
            tokenizer_of(words, to=before),
            model_of(trial, saved.directory, to=before),
            model_of(trial, saved.directory, to=after),
            tokenizer_of(words, to=after),
        )
        if left := {file.name for file in words.iterdir()} - set(_content(hub, before)):
            raise Mismatch(
                f"{', '.join(sorted(left))} of the tokenizer went from {before} when the model was pushed there; a push"
                " adds files and leaves others alone"
            )
        answer = pull(
            trial,
            case,
            *(step for name in (before, after) for step in (tokenizer_by_name(name, TEXT), by_name(name, source=name))),
        )
    for name in (before, after):
        found = answer.values[f"tokenizer of {name}"]["ids"]
        if found != expected:
            raise Mismatch(f"the tokenizer beside the model in {name} makes {found} of {TEXT!r}, expected {expected}")
    return _same(trial, answer, {before: saved.logits, after: saved.logits})


def _saved(trial: Trial, case: Case, *, number: int = 0) -> Saved:
    """The port saved with other weights for every number."""
    here = dataclasses.replace(trial, workdir=Path(tempfile.mkdtemp(dir=trial.workdir)))
    other = dataclasses.replace(case, seed=case.seed + number)
    original = original_model(trial, other)
    tokens = draw(trial, case).tokens
    return Saved(
        directory=directory(here, other, original), logits=run_original(trial, original, tokens, tokens)["logits"]
    )


def _same(trial: Trial, answer: Answer, expected: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The numbers of the models of an answer compared by name. Raises Mismatch for one that is not the port."""
    numbers = []
    for name, logits in expected.items():
        require_port(trial, answer.values[name])
        what = f"logits of {name} loaded by name"
        numbers.append(require_semantics(trial, what, logits_of(answer, f"{name}.output."), logits))
    return worst(*numbers)


def _push_two_revisions(trial: Trial, old: Saved, new: Saved) -> None:
    """Pushes a port and tags it v1; then, as main, other weights with code that negates the logits."""
    negate_logits(trial, new.directory)
    push(trial, model_of(trial, old.directory), tag_of("v1"), folder_of(new.directory))


def _repository(hub: HubServer, name: str = NAME) -> Repository:
    """The repository that was pushed to. Raises Mismatch where there is none."""
    found = hub.store.find_repository("model", name)
    if found is None:
        raise Mismatch(f"push_to_hub({name!r}) makes no repository of that name")
    return found


def _commit(hub: HubServer, revision: str) -> str:
    return hub.store.resolve(_repository(hub), revision)


def _content(hub: HubServer, name: str) -> dict[str, bytes]:
    """The files of a repository's main branch."""
    repository = _repository(hub, name)
    entries = hub.store.entries(repository, hub.store.resolve(repository, "main"), recursive=True)
    return {
        entry.path: hub.store.blobs.path(entry.sha256).read_bytes() for entry in entries if entry.sha256 is not None
    }


def _require_code(trial: Trial, hub: HubServer, name: str) -> dict[str, float]:
    """Raises Mismatch unless a repository has the port's code, and its config.json names the classes in it."""
    content, wanted = _content(hub, name), code_files(trial)
    for file in wanted:
        if file.name not in content:
            raise Mismatch(f"{file.name} is not in {name} after push_to_hub; the code of a port goes with its weights")
        if content[file.name] != file.read_bytes():
            raise Mismatch(f"{file.name} in {name} is not the repository's file after push_to_hub")
    if "config.json" not in content:
        raise Mismatch(f"config.json is not in {name} after push_to_hub")
    auto_map = json.loads(content["config.json"]).get("auto_map") or {}
    for auto, cls in (("AutoConfig", config_class(trial)), (trial.family.port_auto_class, port_class(trial))):
        _require_named(name, auto, auto_map.get(auto), cls, content)
    return {"files": float(len(wanted))}


def _require_named(name: str, auto: str, place: Any, cls: type, content: Mapping[str, bytes]) -> None:
    """Raises Mismatch unless an entry of auto_map leads to a class in a file of the same repository."""
    module, _, found = str(place).rpartition(".")
    if place is None:
        raise Mismatch(f"auto_map in config.json of {name} has no {auto}; register_for_auto_class puts it there")
    if "--" in str(place):
        raise Mismatch(f"auto_map in config.json of {name} sends {auto} to another repository: {place}")
    if found != cls.__name__ or f"{module}.py" not in content:
        raise Mismatch(
            f"auto_map in config.json of {name} sends {auto} to {place}, expected the class {cls.__name__} in a file of"
            " the repository"
        )


def _write_tokenizer(trial: Trial, case: Case) -> tuple[Path, list[int]]:
    """A directory with a tokenizer of four words, and the ids that it makes of `TEXT`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["[UNK]", "a", "b", "c"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    made.save_pretrained(trial.workdir / "tokenizer")
    return trial.workdir / "tokenizer", made(TEXT)["input_ids"]
