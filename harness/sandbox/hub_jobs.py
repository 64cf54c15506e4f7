# SPDX-License-Identifier: Apache-2.0
"""What fresh processes do with a Hub: push as an author or a user would, and load by name.

Runs inside the child only. Imports the harness only where its tree is not hidden: in the process of an author.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from harness.sandbox.models import describe_model, flatten, forward, load

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

Values = dict[str, Any]


def push(request: Mapping[str, Any], tensors: Tensors) -> tuple[Values, Tensors]:
    """Pushes models, tokenizers and folders to repositories and puts tags there, one after the other.

    Request: `token` (of the one who pushes; null for nobody), `steps`, and what `load` takes. Each step has `kind`
    (model, tokenizer, folder or tag), `to`, and `options` of `push_to_hub` or what else does it (`private`, `revision`
    and `token` of a folder); all but a tag have a `source`. A model is loaded by its `class` (a spec, and `root`), as
    its author has it, or as a user of it would.
    """
    log_in(request)
    for step in request["steps"]:
        with told(f"while pushing the {step['kind']} to {step['to']}"):
            _PUSHES[step["kind"]](step, request)
    return {}, {}


def _push_model(step: Mapping[str, Any], request: Mapping[str, Any]) -> None:
    if "class" in step:
        from pathlib import Path

        from harness.ports import load_object

        cls = load_object(step["class"], root=Path(step["root"]), watch=False)
        model = cls.from_pretrained(step["source"], dtype="auto")
    else:
        model, _ = load(step["source"], request)
    model.push_to_hub(step["to"], **step.get("options", {}))


def _push_tokenizer(step: Mapping[str, Any], request: Mapping[str, Any]) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(step["source"]).push_to_hub(step["to"], **step.get("options", {}))


def _push_folder(step: Mapping[str, Any], request: Mapping[str, Any]) -> None:
    from huggingface_hub import HfApi

    options = {"private": None, "revision": None, "token": None, **step.get("options", {})}
    api = HfApi(token=options["token"])
    api.create_repo(step["to"], exist_ok=True, private=options["private"])
    if options["revision"] is not None:
        api.create_branch(step["to"], branch=options["revision"], exist_ok=True)
    api.upload_folder(repo_id=step["to"], folder_path=step["source"], revision=options["revision"])


def _push_tag(step: Mapping[str, Any], request: Mapping[str, Any]) -> None:
    from huggingface_hub import HfApi

    HfApi().create_tag(step["to"], **step["options"])


_PUSHES = {"model": _push_model, "tokenizer": _push_tokenizer, "folder": _push_folder, "tag": _push_tag}


def pull(request: Mapping[str, Any], tensors: Tensors) -> tuple[Values, Tensors]:
    """Loads models and tokenizers by name in one process, one after the other, and then runs all the models.

    Request: `token`, `steps`, `tied` and what `load` takes. Each step has a `name`, `kind` (model or tokenizer),
    `source`, `load` (further keywords of from_pretrained), and `text` for a tokenizer; with `own_generation` a model is
    given a generation configuration, so that none is looked for; one that is `refused` may be. Answer, under each name:
    what `load_and_run` says of a model, with `code` (the files of the classes and functions that the file of its class
    uses), or why it was `refused`; the `ids` of a tokenizer; tensors `<name>.output.*`.
    """
    from transformers import GenerationConfig

    log_in(request)
    values: Values = {}
    models: dict[str, Any] = {}
    for step in request["steps"]:
        name, options = step["name"], step.get("load", {})
        shown = ", ".join(f"{key}={value!r}" for key, value in options.items() if key != "token")
        with told(f"while loading the {step['kind']} {step['source']}{shown and f' ({shown})'}"):
            if step["kind"] == "tokenizer":
                values[name] = _tokens_of(step)
                continue
            if step.get("own_generation") and "class" not in request:
                options = {**options, "generation_config": GenerationConfig()}
            try:
                models[name], loading = load(step["source"], {**request, "load": options})
            except OSError as error:
                if not step.get("refused"):
                    raise
                values[name] = {"refused": str(error)}
                continue
            values[name] = {"loading": loading, **describe_model(models[name], request.get("tied", ()))}
    answer: Tensors = {}
    # All are loaded before any runs: a load must not change what another one gave.
    for name, model in models.items():
        with told(f"while running the model '{name}'"):
            values[name]["outputs"], outputs = forward(model, request, tensors)
        values[name]["code"] = code_of(model)
        answer |= flatten(f"{name}.output", outputs)
    return values, answer


def _tokens_of(step: Mapping[str, Any]) -> Values:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(step["source"], trust_remote_code=True, **step.get("load", {}))
    return {"class": type(tokenizer).__name__, "ids": tokenizer(step["text"])["input_ids"]}


def code_of(model: Any) -> list[str]:
    """The files of a model's class and configuration, and of the remote code that the file of its class takes from."""
    module = sys.modules.get(type(model).__module__)
    places = {type(model).__module__, type(model.config).__module__}
    places |= {str(getattr(value, "__module__", "")) for value in vars(module).values()} if module else set()
    remote = [sys.modules.get(place) for place in places if place.startswith("transformers_modules.")]
    return sorted({str(module.__file__) for module in remote if module is not None})


def log_in(request: Mapping[str, Any]) -> None:
    """Has the client find a token where it looks for one at every call, as `export HF_TOKEN=...` does; or none."""
    os.environ.pop("HF_TOKEN", None)
    if request.get("token"):
        os.environ["HF_TOKEN"] = request["token"]


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Adds to an exception what was being done."""
    try:
        yield
    except Exception as error:
        error.add_note(what)
        raise
