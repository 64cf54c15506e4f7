# SPDX-License-Identifier: Apache-2.0
"""Checks of remote code: a saved directory is all that another process needs, and it carries its code on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness.cases import Case
from harness.checks.api import base_model as base_of
from harness.checks.generation import greedy_tokens
from harness.errors import Mismatch, Skip
from harness.families import longest_of
from harness.ports import source_file
from harness.routes.pretrained import require_clean
from harness.routes.remote_code import directory, load, logits_of, request_for, tied_groups
from harness.trial import (
    Trial,
    call_port,
    draw,
    field_known_by,
    original_model,
    place,
    port_class,
    port_logits,
    prepare,
    require_semantics,
    run_original,
    worst,
)

if TYPE_CHECKING:
    from harness.sandbox import Answer


def files(trial: Trial, case: Case) -> dict[str, float]:
    """Every code file of the port is in the saved directory, byte for byte, and config.json says where to find it.

    Would have caught: helpers imported absolutely, which are saved without their file and fail only at load.
    """
    saved = directory(trial, case, original_model(trial, case, dtype="float32"))
    wanted = code_files(trial)
    for file in wanted:
        if not (saved / file.name).is_file():
            raise Mismatch(f"{file.name} does not travel with a saved checkpoint")
        if (saved / file.name).read_bytes() != file.read_bytes():
            raise Mismatch(f"{file.name} in a saved checkpoint is not the repository's file")
    auto_map = _auto_map(saved)
    for name in ("AutoConfig", trial.family.port_auto_class):
        if name not in auto_map:
            raise Mismatch(f"auto_map of config.json has no {name}: {sorted(auto_map) or 'it is empty'}")
    return {"files": float(len(wanted))}


def outputs(trial: Trial, case: Case) -> dict[str, float]:
    """A fresh process loads the directory by trust_remote_code: the port's class, the ties, the original's logits.

    It has another working directory, an empty module cache, no network, and cannot read the port's repository. Would
    have caught: imports of the training package, a class registered under somebody else's model type.
    """
    original, batch = original_model(trial, case), draw(trial, case)
    expected = run_original(trial, original, batch.tokens, batch.targets)["logits"]
    return _same(trial, _load(trial, case, original, batch.tokens), expected)


def poisoned_memory(trial: Trial, case: Case) -> dict[str, float]:
    """The same with fresh memory filled with NaN: nothing is left as the allocator gave it.

    Would have caught: non-persistent buffers that are garbage after loading, finite and wrong without a word.
    """
    original, batch = original_model(trial, case), draw(trial, case)
    expected = run_original(trial, original, batch.tokens, batch.targets)["logits"]
    return _same(trial, _load(trial, case, original, batch.tokens, poisoned_memory=True), expected)


def resaved(trial: Trial, case: Case) -> dict[str, float]:
    """Saved again from a process that loaded it as remote code, the directory still carries the code and the weights.

    Would have caught: code that travels once, so that a fine-tuned checkpoint cannot be loaded by anyone.
    """
    original, batch = original_model(trial, case), draw(trial, case)
    again = trial.workdir / "resaved"
    _load(trial, case, original, batch.tokens, resave=str(again))
    for file in code_files(trial):
        if not (again / file.name).is_file():
            raise Mismatch(f"{file.name} does not travel when a model loaded as remote code is saved again")
    expected = run_original(trial, original, batch.tokens, batch.targets)["logits"]
    return _same(trial, load(trial, again, {"input_ids": batch.tokens}, tied=tied_groups(trial, case)), expected)


def two_models(trial: Trial, case: Case) -> dict[str, float]:
    """Two checkpoints whose code files have the same names, one with other code, do not disturb each other.

    The second one's code is the port's with its logits negated. Would have caught: a class registered on import as
    remote code, so that the second checkpoint silently runs the first one's code.
    """
    original, batch = original_model(trial, case), draw(trial, case)
    trials = [dataclasses.replace(trial, workdir=_below(trial, name)) for name in ("one", "two")]
    first, second = (directory(each, case, original) for each in trials)
    negate_logits(trial, second)
    answer = trial.sandbox.run(
        "load_two",
        request_for(trial, directories=[str(first), str(second)], both_orders=True),
        tensors={"input_ids": batch.tokens},
        hidden_paths=[trial.port.root],
    )
    expected = run_original(trial, original, batch.tokens, batch.targets)["logits"]
    numbers = []
    for order in ("", "reversed."):
        for name, sign in (("first", 1), ("second", -1)):
            actual = sign * logits_of(answer, f"{order}{name}.output.")
            what = f"logits of the {name} of two models in one process"
            numbers.append(require_semantics(trial, what, actual, expected))
    return worst(*numbers)


def base_model(trial: Trial, case: Case) -> dict[str, float]:
    """Where a port offers AutoModel, a fresh process loads its base model by it, and gets the last hidden state.

    Asked of the saved port if its auto_map names AutoModel, and of the base model saved alone. Would have caught: a
    base model whose code stays behind when it is saved without the head, AutoModel that gives logits.
    """
    original, tokens = original_model(trial, case), draw(trial, case).tokens
    saved = directory(trial, case, original)
    base = base_of(port_class(trial).from_pretrained(saved))  # type: ignore[attr-defined]
    if base is None:
        raise Skip("the port has no base model of its own")
    wanted, named = type(base).__name__, _auto_map(saved).get("AutoModel")
    registered = type(base)._auto_class == "AutoModel"
    if named is None and not registered:
        raise Skip(f"the port does not offer AutoModel: auto_map does not name it, {wanted} is not registered for it")
    if not registered and str(named).rpartition(".")[2] == port_class(trial).__name__:
        raise Skip(f"the port gives AutoModel {port_class(trial).__name__}, the model with its head")
    output = _last_hidden_state_here(trial, base, tokens)
    numbers: list[dict[str, float]] = []
    if named is not None:
        numbers.append(_base_elsewhere(trial, "the saved port", saved, wanted, tokens, output))
    alone = trial.workdir / "base"
    base.save_pretrained(alone)
    numbers.append(_base_elsewhere(trial, "the base model saved alone", alone, wanted, tokens, output))
    return worst(*numbers)


def _last_hidden_state_here(trial: Trial, base: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = call_port(trial, place(trial, base), tokens)
    state = getattr(output, "last_hidden_state", None)
    if state is None:
        raise Mismatch(f"{type(base).__name__} returns {type(output).__name__} without last_hidden_state")
    return torch.as_tensor(state).cpu()


def _base_elsewhere(
    trial: Trial, what: str, saved: Path, wanted: str, tokens: torch.Tensor, expected: torch.Tensor
) -> dict[str, float]:
    """The numbers of a comparison of the base model in a fresh process with its last hidden state in this one."""
    answer = trial.sandbox.run(
        "load_and_run",
        request_for(trial, directory=str(saved), auto_class="AutoModel"),
        tensors={"input_ids": tokens},
        hidden_paths=[trial.port.root],
    )
    if answer.values["class"] != wanted:
        raise Mismatch(f"AutoModel loads {what} as {answer.values['class']} in a fresh process, expected {wanted}")
    # A head in the file is left over here, and has to be.
    require_clean({**answer.values["loading"], "unexpected_keys": []})
    state = answer.tensors.get("output.last_hidden_state")
    if state is None:
        raise Mismatch(f"AutoModel on {what} returns no last_hidden_state in a fresh process")
    return require_semantics(trial, f"last_hidden_state of {what} in a fresh process", state, expected)


def tokenizer(trial: Trial, case: Case) -> dict[str, float]:
    """The tokenizer beside a converted model loads in a fresh process and fits it; what it gives, the model takes.

    It has special tokens, none without a row in the model, the model's padding token and its longest text. Would have
    caught: a model_max_length of another model, a tokenizer that one line of transformers cannot read,
    token_type_ids that forward does not take.
    """
    if trial.port.loader != "command":
        raise Skip("nothing but a converter program puts a tokenizer beside the model")
    saved = directory(trial, case, original_model(trial, case))
    request = {"directory": str(saved), "text": "two words"}
    answer = trial.sandbox.run("load_tokenizer", request, hidden_paths=[trial.port.root])
    values = answer.values
    if values["missing"]:
        raise Mismatch(f"the tokenizer has no {values['missing'][0]}")
    rows, longest = case.fields[trial.family.vocabulary], longest_of(trial.family, case.fields)
    if values["largest"] >= rows:
        raise Mismatch(f"the tokenizer has a token {values['largest']}, the model {rows} rows")
    if values["longest"] != longest:
        raise Mismatch(f"the tokenizer's longest text is {values['longest']} tokens, the model's {longest}")
    pad = field_known_by(trial, case.fields, "pad_token_id")
    if pad is not None and values["pad_token_id"] != case.fields[pad]:
        raise Mismatch(f"the tokenizer pads with {values['pad_token_id']}, the model with {case.fields[pad]}")
    encoded = {name.removeprefix("encoded."): tensor[:, :longest] for name, tensor in answer.tensors.items()}
    extra = {name: tensor for name, tensor in encoded.items() if name != "input_ids"}
    pair = prepare(trial, case)
    actual = port_logits(trial, pair.port, encoded["input_ids"], **extra)
    expected = run_original(trial, pair.original, encoded["input_ids"], encoded["input_ids"])["logits"]
    return require_semantics(trial, "logits of an encoded text", actual, expected)


def generation(trial: Trial, case: Case) -> dict[str, float]:
    """generate() in a fresh process gives the original's greedy tokens.

    Would have caught: generation settings that are not saved, code that generates only where it was written.
    """
    original = original_model(trial, case)
    maximum = longest_of(trial.family, case.fields)
    prompt = draw(trial, case).tokens[:, : max(1, maximum - 2)]
    count = maximum - prompt.shape[1]
    options = {"max_new_tokens": count, "do_sample": False}
    answer = load(trial, directory(trial, case, original), {"input_ids": prompt}, generate=options)
    actual = next((t for name, t in answer.tensors.items() if name.startswith("generated.sequences")), None)
    if actual is None or not torch.equal(actual, greedy_tokens(trial, original, prompt, count)):
        raise Mismatch("greedy tokens of a fresh process are not the original's")
    return {}


def cold(trial: Trial, case: Case) -> dict[str, float]:
    """The same once in a truly cold interpreter, which imports everything itself; keeps the short cut honest.

    Would have caught: code that works only where transformers was imported in a certain order.
    """
    original, batch = original_model(trial, case), draw(trial, case)
    expected = run_original(trial, original, batch.tokens, batch.targets)["logits"]
    return _same(trial, _load(trial, case, original, batch.tokens, cold=True), expected)


def code_files(trial: Trial) -> list[Path]:
    """The files that must travel: the port's `code`, or those of its model and configuration."""
    port = trial.port
    if port.code:
        return [(port.root / file).resolve() for file in port.code]
    return sorted({source_file(spec, root=port.root) for spec in (port.model, port.config)})


def _load(trial: Trial, case: Case, original: torch.nn.Module, tokens: torch.Tensor, **options: Any) -> Answer:
    saved = directory(trial, case, original)
    return load(trial, saved, {"input_ids": tokens}, tied=tied_groups(trial, case), **options)


def _same(trial: Trial, answer: Answer, expected: torch.Tensor) -> dict[str, float]:
    require_port(trial, answer.values)
    return require_semantics(trial, "logits of a fresh process", logits_of(answer), expected)


def require_port(trial: Trial, described: Mapping[str, Any]) -> None:
    """Raises Mismatch unless what a fresh process loaded is the port, with the original's ties."""
    if described["class"] != port_class(trial).__name__:
        raise Mismatch(f"a fresh process loads {described['class']}, expected {port_class(trial).__name__}")
    for group in described["tied"]:
        if not group["missing"] and not group["same_tensor"]:
            raise Mismatch(f"{' and '.join(group['names'])} are two tensors in a fresh process; the original has one")


def _auto_map(saved: Path) -> dict[str, Any]:
    auto_map: dict[str, Any] = json.loads((saved / "config.json").read_text(encoding="utf-8")).get("auto_map") or {}
    return auto_map


def _below(trial: Trial, name: str) -> Path:
    folder = trial.workdir / name
    folder.mkdir()
    return folder


def negate_logits(trial: Trial, saved: Path) -> None:
    """Changes the code of a saved port, as another author's files of the same names would differ.

    Every file changes: transformers 5.23 takes the first checkpoint's model class for any second one whose
    configuration file is the same to the letter, which no port can help.
    """
    for each in saved.glob("*.py"):
        each.write_text(each.read_text(encoding="utf-8") + "\n# Another author's.\n", encoding="utf-8")
    file = saved / source_file(trial.port.model, root=trial.port.root).name
    name = port_class(trial).__name__
    file.write_text(
        file.read_text(encoding="utf-8")
        + f"""

def _negated(forward):
    def call(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = -output.logits
        return output
    return call


{name}.forward = _negated({name}.forward)
""",
        encoding="utf-8",
    )
