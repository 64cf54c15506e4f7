# SPDX-License-Identifier: Apache-2.0
"""Checks of the weights: nothing lost, nothing made up, tied tensors one tensor, and the way back."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from harness.cases import Case
from harness.errors import Mismatch, Skip
from harness.numerics import require_close
from harness.routes import carry
from harness.routes.pretrained import load, save
from harness.trial import Trial, copied, original_model, port_class, port_config, port_logits, prepare


def coverage(trial: Trial, case: Case) -> dict[str, float]:
    """Every number of the original is in the port exactly once, and the port holds nothing else but zeros and ones.

    Compared by content, whatever the tensors are called, however they are transposed, split or joined; tied tensors
    count once. Would have caught: a converter whose filter `endswith(".bias")` drops every bias; a head left at its
    random initialisation; a tensor loaded into two places.
    """
    original = original_model(trial, case, dtype="float32")
    port = carry(trial, case, original)
    source, target = _numbers(original), _numbers(port)
    lost = _beyond(source, target)
    made_up = _beyond(target, source)
    made_up = made_up[(made_up != 0) & (made_up != 1)]
    if len(lost):
        raise Mismatch(f"{len(lost)} numbers of the original are not in the port{_owner(lost, original)}")
    if len(made_up):
        raise Mismatch(f"the port holds {len(made_up)} numbers that are not the original's{_owner(made_up, port)}")
    return {"numbers": float(len(source))}


def values(trial: Trial, case: Case) -> dict[str, float]:
    """Every loaded tensor equals the original's of the same name, bit for bit.

    Would have caught: a square matrix loaded without its transpose (no shape complains), q, k and v in another order,
    a tensor written twice, layers shifted by one.
    """
    original = original_model(trial, case, dtype="float32")
    target = carry(trial, case, original).state_dict()
    for key, tensor in original.state_dict().items():
        name = trial.family.port_key(key)
        if name not in target:
            raise Skip("the port's tensors have names of their own; weights.coverage compares them by content")
        if target[name].shape != tensor.shape:
            raise Mismatch(f"{name} has shape {tuple(target[name].shape)}, {tuple(tensor.shape)} in the original")
        if not torch.equal(target[name].float(), tensor):
            raise Mismatch(f"{name} is not the original's {key}", tensors={"actual": target[name], "expected": tensor})
    return {}


def tied(trial: Trial, case: Case) -> dict[str, float]:
    """Tied weights are one tensor: after construction, after loading, and after save and load.

    Would have caught: `_tied_weights_keys` missing on transformers 5, where head and embedding become two parameters
    with equal values that drift apart in training.
    """
    original = original_model(trial, case, dtype="float32")
    _require_tied(port_class(trial)(port_config(trial, case.fields)), "after construction")
    _require_tied(carry(trial, case, original), "after loading")
    _require_tied(load(trial, save(trial, case, original)), "after save_pretrained and from_pretrained")
    return {}


def tied_after_resize(trial: Trial, case: Case) -> dict[str, float]:
    """Growing and shrinking the vocabulary keeps the tie, the rows that stay, and their logits.

    Would have caught: a resized head that is drawn anew, or is no longer the embedding.
    """
    pair = prepare(trial, case)
    vocabulary = case.fields[trial.family.vocabulary]
    expected = port_logits(trial, pair.port, pair.batch.tokens)
    errors = []
    for size in (vocabulary + 3, vocabulary):
        pair.port.resize_token_embeddings(size, mean_resizing=False)  # type: ignore[operator]
        _require_tied(pair.port, f"after resize_token_embeddings({size})")
        logits = port_logits(trial, pair.port, pair.batch.tokens)
        if logits.shape[-1] != size:
            raise Mismatch(f"logits have {logits.shape[-1]} columns after resize_token_embeddings({size})")
        kept = logits[..., :vocabulary]
        errors.append(require_close(f"logits after a resize to {size}", kept, expected, bound=1e-12))
    return {"error": max(errors)}


def back_to_original(trial: Trial, case: Case) -> dict[str, float]:
    """The port's weights in the original's format load strictly into the original and are equal bit for bit.

    A converter named `from_...` has its way back in the model's method `to_...`, which writes the original's own file.
    Would have caught: a head that is missing from the file, mask buffers written among the weights.
    """
    if trial.family.read_checkpoint is None:
        raise Skip(f"family '{trial.family.name}' declares no way to read its checkpoint")
    original = original_model(trial, case, dtype="float32")
    port: Any = carry(trial, case, original)
    name = trial.port.load.rpartition(".")[2].rpartition(":")[2]
    back = getattr(port, "to_" + name.removeprefix("from_"), None) if name.startswith("from_") else None
    if back is None:
        raise Skip("the port declares no way back: a method to_... beside its converter from_...")
    path = trial.workdir / ("back-" + trial.family.checkpoint_name)
    back(str(path))
    again = copied(original)
    for parameter in again.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    fields, state = trial.family.read_checkpoint(str(path))
    for field, value in case.fields.items():
        if fields.get(field) != value:
            raise Mismatch(f"the file written back says {field}={fields.get(field)!r}, the original had {value!r}")
    try:
        again.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise Mismatch(f"the original does not load the file: {' '.join(str(error).split())[:300]}") from None
    for key, tensor in original.state_dict().items():
        if not torch.equal(again.state_dict()[key], tensor):
            raise Mismatch(f"{key} is not what it was after original -> port -> original")
    return {}


def _numbers(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().cpu().float().flatten() for parameter in module.parameters()]).sort().values


def _beyond(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Numbers that occur more often in one sorted vector than in another."""
    there = Counter(right.tolist())
    return torch.tensor(list((Counter(left.tolist()) - there).elements()))


def _owner(numbers: torch.Tensor, module: torch.nn.Module) -> str:
    shares = {
        name: float(torch.isin(parameter.detach().cpu().float().flatten(), numbers).float().mean())
        for name, parameter in module.named_parameters()
    }
    name = max(shares, key=lambda key: shares[key])
    return f", most of them in {name}"


def _require_tied(model: Any, when: str) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None:
        raise Mismatch("get_input_embeddings and get_output_embeddings must give the embedding and the head")
    if head.weight is not embedding.weight:
        raise Mismatch(f"head and embedding are two tensors {when}; the original has one")
