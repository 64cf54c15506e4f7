# SPDX-License-Identifier: Apache-2.0
"""Checks of what a port does to the process it lives in: nothing that another model, or its original, could feel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from harness.cases import Case
from harness.checks.loss import at_least_two_tokens, port_labels, training_loss
from harness.errors import Mismatch
from harness.ports import changed_by_import
from harness.surroundings import reseeded, watched
from harness.trial import Pair, Trial, is_asked, port_logits, prepare


def settings(trial: Trial, case: Case) -> dict[str, float]:
    """Importing, loading, running, training and saving the port leaves torch's settings and functions as they were.

    The original would compute with them too. Would have caught: a default dtype or TF32 set at import, gradients
    switched off for good, torch.nn.functional.gelu replaced by one's own.
    """
    changed = {"importing it": changed_by_import(trial.port)}
    with watched(changed.setdefault("loading it", [])):
        pair = _pair(trial, case)
    for name, use in _uses(trial, pair).items():
        with watched(changed.setdefault(name, [])):
            use()
    for name, found in changed.items():
        if found:
            raise Mismatch(f"{name} changes the whole process: {found[0]}; a port leaves everything around it alone")
    return {"uses": float(len(changed))}


def random_numbers(trial: Trial, case: Case) -> dict[str, float]:
    """Neither loading the port nor running it sets the state of the random generators of torch, Python, numpy or MLX.

    They may be drawn from. Would have caught: manual_seed(1337) of a training script left in a converter, after which
    every sample and every dropout mask of the program is the same.
    """
    uses: Mapping[str, Callable[[], object]] = {
        "loading it": lambda: _pair(trial, case),
        **_uses(trial, _pair(trial, case)),
    }
    for name, use in uses.items():
        for generator in reseeded(use):
            raise Mismatch(f"{name} seeds the generator of {generator} anew; seeds are the caller's to set")
    return {"uses": float(len(uses))}


def _pair(trial: Trial, case: Case) -> Pair:
    return prepare(trial, at_least_two_tokens(case))


def _uses(trial: Trial, pair: Pair) -> dict[str, Callable[[], object]]:
    """What people do with a loaded port, as far as it is asked of this one."""
    tokens, model = pair.batch.tokens, pair.port
    uses: dict[str, Callable[[], object]] = {"a forward pass": lambda: port_logits(trial, model, tokens)}
    if is_asked(trial, "loss", "loss.value"):
        labels = port_labels(trial, tokens, pair.batch.targets)
        uses["a training step"] = lambda: training_loss(trial, model.train(), tokens, labels).backward()
    if is_asked(trial, "generation", "generation.greedy") and hasattr(model, "generate"):
        prompt = tokens[:, :1].to(next(model.parameters()).device)
        generate: Any = model.generate
        uses["generate()"] = lambda: generate(prompt, max_new_tokens=2, do_sample=False)
    if is_asked(trial, "logits", "roundtrip.pretrained") and hasattr(model, "save_pretrained"):
        save: Any = model.save_pretrained
        uses["save_pretrained"] = lambda: save(trial.workdir / "saved")
    return uses
