# SPDX-License-Identifier: Apache-2.0
"""Route `hub`: the port is pushed to a Hub on this machine from one fresh process and loaded by name in another."""

from __future__ import annotations

import contextlib
import tempfile
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.hub import HubServer, User
from harness.routes import pretrained
from harness.routes.remote_code import directory, hidden, logits_of, request_for, tied_groups
from harness.trial import Trial, draw

if TYPE_CHECKING:
    import torch

    from harness.cases import Case
    from harness.sandbox import Answer

AUTHOR, READER = User(name="alice", token="hf_alice"), User(name="bob", token="hf_bob")
NAME = "alice/model"

Step = Mapping[str, Any]
"""See `harness.sandbox.hub_jobs`."""


def logits(trial: Trial, case: Case, original: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The port's logits for token ids (rows, tokens), as a process computes them that knows the port by its name."""
    with served(trial):
        push(trial, model_of(trial, directory(trial, case, original)))
        return logits_of(pull(trial, case, by_name(NAME)), f"{NAME}.output.")


@contextlib.contextmanager
def served(trial: Trial) -> Iterator[HubServer]:
    """An empty Hub at the address that the fresh processes of `trial.hub` know; gone afterwards."""
    root = Path(tempfile.mkdtemp(prefix="hub-", dir=trial.workdir))
    port = urllib.parse.urlsplit(trial.hub.endpoint or "").port
    assert port is not None  # a session gives it
    with HubServer(root, users=(AUTHOR, READER), port=port, share_port=True) as hub:
        yield hub


def model_of(trial: Trial, saved: Path, *, to: str = NAME, **options: Any) -> Step:
    """The step of an author who pushes a saved directory as the class of the repository; options of push_to_hub.

    What is no model of transformers has no push_to_hub, and its author uploads the directory.
    """
    if trial.family.framework != "transformers":
        return folder_of(saved, to=to, **options)
    author = {"class": trial.port.model, "root": str(trial.port.root)}
    return {"kind": "model", "source": str(saved), "to": to, "options": options, **author}


def folder_of(saved: Path, *, to: str = NAME, **options: Any) -> Step:
    """The step of somebody who uploads a directory as it is; options `revision`, `private` and `token`."""
    return {"kind": "folder", "source": str(saved), "to": to, "options": options}


def tag_of(name: str) -> Step:
    """The step of an author who gives what is main now the name of a tag."""
    return {"kind": "tag", "to": NAME, "options": {"tag": name, "revision": "main"}}


def by_name(name: str, *, source: str = NAME, own_generation: bool = False, **options: Any) -> Step:
    """The step of a user who loads a repository; what it answers goes by `name`.

    own_generation: with a generation configuration, so that transformers looks for no file about generation.
    """
    return {"name": name, "kind": "model", "source": source, "load": options, "own_generation": own_generation}


def refused_to(name: str, *, source: str = NAME) -> Step:
    """The step of somebody who asks for a repository without a token and has to be refused."""
    return {**by_name(name, source=source, token=False), "refused": True}


def tokenizer_of(saved: Path, *, to: str = NAME) -> Step:
    """The step of an author who pushes the tokenizer of a directory."""
    return {"kind": "tokenizer", "source": str(saved), "to": to, "options": {}}


def tokenizer_by_name(source: str, text: str) -> Step:
    """The step of a user who loads the tokenizer of a repository and encodes a text."""
    return {"name": f"tokenizer of {source}", "kind": "tokenizer", "source": source, "text": text}


def push(trial: Trial, *steps: Step, token: str | None = AUTHOR.token) -> None:
    """Takes the steps in one fresh process that sees the port's repository. Raises SandboxFailure when one fails."""
    trial.hub.run("push", request_for(trial, steps=steps, token=token))


def push_on(trial: Trial, source: str, *, to: str) -> None:
    """Has a user load a repository as remote code and push it to one of his own, from one fresh process."""
    step = {"kind": "model", "source": source, "to": to, "options": {}}
    trial.hub.run("push", request_for(trial, steps=[step], token=READER.token), hidden_paths=[trial.port.root])


def pull(
    trial: Trial,
    case: Case,
    *steps: Step,
    token: str | None = None,
    cache: Path | None = None,
    offline: bool = False,
) -> Answer:
    """Takes the steps in one fresh process that a user of the port could have, then runs the models on its batch.

    cache: where the client keeps its files from one process to another; without it each begins with none.
    Raises Mismatch (as SandboxFailure) when a step fails, and for tensors that were missing or left over.
    """
    answer = (trial.sandbox if offline else trial.hub).run(
        "pull",
        request_for(trial, steps=steps, token=token, tied=tied_groups(trial, case)),
        tensors={"input_ids": draw(trial, case).tokens},
        hidden_paths=hidden(trial),
        cache=cache,
    )
    for values in answer.values.values():
        pretrained.require_clean(values.get("loading", {}))
    return answer
