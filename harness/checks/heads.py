# SPDX-License-Identifier: Apache-2.0
"""Checks of the further classes beside a port's model: each computes what the original with such a head computes."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness.backends import frameworks, pytorch
from harness.cases import Case
from harness.cases.weights import sensitising_state
from harness.checks.api import require_original_only_refused
from harness.checks.forward import embedded
from harness.errors import Mismatch, Skip
from harness.families import Fields, Head, dropouts_of
from harness.narrowing import WORTH_A_LOOK
from harness.numerics import FLOAT32_INSIDE_BOUND, require_close
from harness.ports import beside
from harness.routes.direct import fill
from harness.routes.remote_code import directory, hidden, request_for
from harness.trial import (
    Trial,
    content_tokens,
    draw,
    load_class,
    original_model,
    place,
    port_class,
    port_config,
    prepare,
    require_semantics,
    takes,
    worst,
)

if TYPE_CHECKING:
    from harness.sandbox import Answer

PROBABILITY, DRAWS = 0.3, 3000
SPREAD = 1.25
"""How far from each other two variances of that many draws may be; a head in evaluation, or a dropout less, is more."""


def logits(trial: Trial, case: Case) -> dict[str, float]:
    """Logits of each head equal the original's, without a mask and with one that leaves the end of rows out.

    Would have caught: a head on the mean of all tokens where the original takes the first, another activation, a bias
    left out, a mask that the head does not pass on, or embeddings, token types, positions, the wish for hidden states
    or attentions; keywords that end at the head without a word.
    """
    tokens = draw(trial, case).tokens
    masks = {"": torch.ones(tokens.shape, dtype=torch.bool)}
    if tokens.shape[1] > 1:
        ends = torch.randint(
            1, tokens.shape[1] + 1, (len(tokens), 1), generator=torch.Generator().manual_seed(case.seed)
        )
        masks[" with padding"] = torch.arange(tokens.shape[1]) < ends
    numbers = []
    for head, options in _each(trial):
        original, port = _pair(trial, case, head, options)
        for what, mask in masks.items():
            with torch.no_grad():
                expected = head.run_original(original, tokens, mask)
            given = {} if not what else {"attention_mask": mask.long()}
            actual = _call(trial, port, tokens, **given).logits.cpu()
            if actual.shape != expected.shape:
                raise Mismatch(f"{head.port}: logits of shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
            compared = f"logits of {head.port}{_said(options)}{what}"
            numbers.append(_same(trial, port, tokens, compared, actual, expected))
        numbers.append(_passes_on(trial, case, head, original, port, tokens))
        require_original_only_refused(trial, port, tokens)
    return worst(*numbers)


def _same(
    trial: Trial, port: Any, tokens: torch.Tensor, what: str, actual: torch.Tensor, expected: torch.Tensor
) -> dict[str, float]:
    """Compares logits; where the head itself has a part in float32, which the model below has not, by that bound."""
    try:
        return require_semantics(trial, what, actual, expected)
    except Mismatch as error:
        worth_a_look = error.metrics.get("error", 1.0) <= WORTH_A_LOOK and not trial.float32_inside
        if not worth_a_look or not frameworks.float32_inside(port, lambda: _call(trial, port, tokens).logits):
            raise
        softer = dataclasses.replace(trial, float32_inside=True)
        return {**require_semantics(softer, what, actual, expected), "float32_inside": 1.0}


def _passes_on(
    trial: Trial, case: Case, head: Head, original: torch.nn.Module, port: Any, tokens: torch.Tensor
) -> dict[str, float]:
    """Every further input, and the wish for hidden states or attentions, reach the model below a head that takes it."""
    content = content_tokens(trial, case, tokens)
    expected = _call(trial, port, content).logits.cpu()
    numbers = []
    embeds = embedded(trial, port, original, content) if takes(port, "inputs_embeds") else None
    if embeds is not None:
        actual = _call(trial, port, None, inputs_embeds=embeds).logits.cpu()
        numbers.append(_same(trial, port, content, f"logits of {head.port} from inputs_embeds", actual, expected))
    given = {name: make(case.fields, content, case.seed) for name, make in trial.family.further_inputs.items()}
    if tokens.shape[1] > 1:
        given["position_ids"] = torch.arange(tokens.shape[1]).flip(0).expand_as(tokens)
    for name, value in given.items():
        if value is None or not bool(value.any()) or not takes(port, name):
            continue  # zeros are what is there without it
        if torch.equal(_call(trial, port, content, **{name: value}).logits.cpu(), expected):
            raise Mismatch(f"{head.port}: {name} change nothing; expected that the model below is given them")
    wishes = {"output_hidden_states": "hidden_states"}
    if "attentions" in trial.family.features:
        wishes["output_attentions"] = "attentions"
    for wish, name in wishes.items():
        if takes(port, wish) and not getattr(_call(trial, port, tokens, **{wish: True}), name, None):
            raise Mismatch(f"{head.port}: {wish}=True gives no {name}")
    return worst(*numbers)


def loss(trial: Trial, case: Case) -> dict[str, float]:
    """The loss of each head for labels of its kind is the closed form on its logits, and comes before them in a tuple.

    One after the other on one model: what kind of labels there were must not stay behind. Would have caught: a kind of
    problem that is written into the configuration by the first batch, classes scored by a mean squared error, also
    where labels alone say what they are; the number of items that Trainer gives left aside; a loss without a gradient.
    """
    tokens = draw(trial, case).tokens
    numbers = []
    for head, options in _each(trial):
        _, port = _pair(trial, case, head, options)
        labels = head.labels(tokens, options, case.seed)
        for _ in range(2):
            output = _call(trial, port, tokens, labels=labels)
            expected = head.loss(output.logits.cpu(), labels, options)
            what = f"loss of {head.port}{_said(options)}"
            numbers.append(require_semantics(trial, what, output.loss.cpu(), expected))
        if options.get("problem_type") and hasattr(port.config, "problem_type"):
            # As most callers have it: the number of labels and their type say what kind of problem it is.
            port.config.problem_type = None
            what = f"loss of {head.port}{_said(options)}, its problem_type left out"
            numbers.append(
                require_semantics(trial, what, _call(trial, port, tokens, labels=labels).loss.cpu(), expected)
            )
        if takes(port, "num_items_in_batch"):
            # What Trainer gives where it gathers several batches for one step: the sum is divided by that instead.
            whole, half = (_call(trial, port, tokens, labels=labels, num_items_in_batch=n).loss.cpu() for n in (3, 6))
            what = f"loss of {head.port}{_said(options)} for twice as many items in the batch"
            numbers.append(require_semantics(trial, what, 2 * half, whole))
        _require_gradient(trial, head, port, tokens, labels)
        plain = _call(trial, port, tokens, labels=labels, return_dict=False)
        if not isinstance(plain, tuple) or plain[0].ndim or not torch.equal(plain[1], output.logits):
            raise Mismatch(f"{head.port} with return_dict=False: the first two entries are not loss and logits")
    return worst(*numbers)


def _require_gradient(trial: Trial, head: Head, port: Any, tokens: torch.Tensor, labels: torch.Tensor) -> None:
    """Raises Mismatch when the loss of a head changes with none of the model's weights, so that it trains nothing."""
    port.zero_grad()
    device = pytorch.device_of(trial.backend)
    output = port(input_ids=tokens.to(device), labels=labels.to(device))
    found = output["loss"] if isinstance(output, dict) else output.loss
    if found.requires_grad:
        found.backward()
    if not any(p.grad is not None and bool(p.grad.any()) for p in port.parameters()):
        raise Mismatch(f"{head.port}: no gradient of the loss reaches a weight")
    port.zero_grad()


def dropout(trial: Trial, case: Case) -> dict[str, float]:
    """In training mode the logits of each head spread as the original's do, by each dropout of the model and the head.

    Would have caught: a head that stays in evaluation, one that leaves the model below it there, a probability of the
    head that is not read.
    """
    tokens = draw(trial, dataclasses.replace(case, rows=1)).tokens.expand(DRAWS, -1)
    ratios = [1.0]
    for head in trial.family.heads:
        options = head.options[0]  # what the labels are does not matter here
        for name in (*dropouts_of(trial.family), *head.dropout):
            fields = {**case.fields, name: PROBABILITY}
            original, port = _pair(trial, dataclasses.replace(case, fields=fields), head, options)
            torch.manual_seed(case.seed)
            with torch.no_grad():
                expected = head.run_original(original.train(), tokens, torch.ones(tokens.shape, dtype=torch.bool))
            actual = _call(trial, port.train(), tokens).logits.cpu()
            theirs, ours = (float(value.double().var(dim=0).mean()) for value in (expected, actual))
            rounding = 1e-20 * float(expected.double().square().mean())
            if max(theirs, ours) <= rounding:
                continue  # this head is without it
            ratios.append(ours / theirs if theirs > rounding else float("inf"))
            if not 1 / SPREAD < ratios[-1] < SPREAD:
                raise Mismatch(
                    f"{head.port}{_said(options)} with {name}={PROBABILITY} in training: the logits' variance is"
                    f" {ratios[-1]:.3g} times the original's",
                    metrics={"spread_ratio": ratios[-1]},
                )
    return {"spread_ratio": max(ratios, key=lambda ratio: abs(math.log(ratio)))}


def saved(trial: Trial, case: Case) -> dict[str, float]:
    """A saved head is loaded by its Auto class in a fresh process, complete, and gives the same logits.

    What the port itself saves, or its converter writes, is loaded by that class too: all but the head comes from there.
    Would have caught: a class that no auto_map names, tensors of the head left at random, a body whose names do not
    fit under a head.
    """
    by_name = [head for head in trial.family.heads if head.write is None]
    body = directory(trial, case, original_model(trial, case)) if by_name else trial.workdir
    for head in by_name:
        answer = _loaded(trial, head, body, draw(trial, case).tokens)
        own = set(_pair(trial, case, head, head.options[0])[1].state_dict())
        own -= set(prepare(trial, case).port.state_dict())
        if not set(answer.values["loading"]["missing_keys"]) <= own:
            missing = sorted(set(answer.values["loading"]["missing_keys"]) - own)
            raise Mismatch(f"{head.auto_class} finds no {missing[0]} in what the port saves")
    tokens = draw(trial, case).tokens
    numbers: list[dict[str, float]] = []
    for head, options in _each(trial):
        _, port = _pair(trial, case, head, options)
        expected = _call(trial, port, tokens).logits.cpu()
        saved_head = trial.workdir / f"{head.name}-{len(numbers)}"
        port.save_pretrained(saved_head)
        answer = _loaded(trial, head, saved_head, tokens)
        loading = answer.values["loading"]
        if problems := [*loading["missing_keys"], *loading["unexpected_keys"]]:
            raise Mismatch(f"{problems[0]} of a saved {head.port} is missing or left over in a fresh process")
        what = f"logits of a saved {head.port}{_said(options)}"
        numbers.append({"error": require_close(what, answer.tensors["output.logits"], expected, bound=_bound(trial))})
    return worst(*numbers)


def _loaded(trial: Trial, head: Head, saved: Path, tokens: torch.Tensor) -> Answer:
    """What a fresh process says of a saved directory that it loads by the class of a head, Auto where there is one."""
    request = request_for(trial, directory=str(saved))
    by = "class" if "class" in request else "auto_class"
    request[by] = _spec(trial, head) if by == "class" else head.auto_class
    answer = trial.sandbox.run("load_and_run", request, tensors={"input_ids": tokens}, hidden_paths=hidden(trial))
    if answer.values["class"] != head.port:
        raise Mismatch(f"{request[by]} loads {answer.values['class']}, expected {head.port}")
    return answer


def _bound(trial: Trial) -> float:
    return FLOAT32_INSIDE_BOUND if trial.float32_inside else 1e-9


def _each(trial: Trial) -> Iterator[tuple[Head, Fields]]:
    for head in trial.family.heads:
        for options in head.options:
            yield head, options


def _said(options: Fields) -> str:
    return f" ({', '.join(f'{name}={value!r}' for name, value in options.items())})" if options else ""


def _pair(trial: Trial, case: Case, head: Head, options: Fields) -> tuple[torch.nn.Module, Any]:
    """The original with this head (float64) and the port's class with the same sensitising weights."""
    original = head.build_original(load_class(head.original, trial.port.root), case.fields, options)
    original.load_state_dict(sensitising_state(original, gains=trial.family.gains, seed=case.seed))
    original = original.double().eval()
    cls: Any = frameworks.torch_class(load_class(_spec(trial, head), trial.port.root))
    if head.write is not None:
        files = Path(tempfile.mkdtemp(dir=trial.workdir))
        head.write(original, case.fields, files)
        return original, place(trial, cls.from_pretrained(files))
    port = cls(port_config(trial, case.fields, **options)).double()
    problem = fill(port, original, head.port_key)
    if problem and trial.port.loader != "state_dict":
        raise Skip(f"the tensors of {head.port} have other names or shapes ({trial.port.load})")
    if problem:
        raise Mismatch(f"{head.port}: {problem}")
    return original, place(trial, port)


def _spec(trial: Trial, head: Head) -> str:
    """Where the class of a head is. Raises Mismatch where there is none, or Skip where it need not have that name."""
    found = beside(trial.port, head.port)
    if found is None and head.write is not None:
        # A class that loads itself may have any name, and which it is nobody said.
        raise Skip(f"there is no {head.port} beside {port_class(trial).__name__}, nor in a file that `code` names")
    if found is None:
        raise Mismatch(f"there is no {head.port} beside {port_class(trial).__name__}; the original has one")
    return found


def _call(trial: Trial, model: Any, tokens: torch.Tensor | None, **options: Any) -> Any:
    device = pytorch.device_of(trial.backend)
    inputs = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    with torch.no_grad():
        output = model(input_ids=None if tokens is None else tokens.to(device), **inputs)
    output = types.SimpleNamespace(**output) if type(output) is dict else output
    if options.get("return_dict") is not False:
        missing = [name for name in ("logits", *(["loss"] if "labels" in options else [])) if not hasattr(output, name)]
        if missing:
            raise Mismatch(f"{type(model).__name__} returns {type(output).__name__} without .{missing[0]}")
    return output
