# SPDX-License-Identifier: Apache-2.0
"""What-if runs of an original: the same module, with some of its parameters changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from harness.localise.relations import orders_of_heads, orders_of_thirds

Edit = tuple[str, dict[str, torch.Tensor]]
"""A sentence, and the parameters by name that make it so."""


def edits(module: torch.nn.Module, *, others: Mapping[str, torch.Tensor]) -> Iterator[Edit]:
    """Simple mistakes with a module's parameters, the likeliest first.

    others: parameters of the whole model by name, one of which may have been taken instead.
    """
    own = {name: parameter.detach() for name, parameter in module.named_parameters()}
    for name, tensor in own.items():
        called = name if "." in name else f"its {name}"
        yield f"as if {called} were zero", {name: torch.zeros_like(tensor)}
        if tensor.ndim == 1:
            yield f"as if {called} were one", {name: torch.ones_like(tensor)}
        if tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1] > 1:
            yield f"as if {called} were transposed", {name: tensor.T.contiguous()}
    biases = {name: torch.zeros_like(tensor) for name, tensor in own.items() if name.endswith("bias")}
    if len(biases) > 1:
        yield "as if all its biases were zero", biases
    square = {n: t.T.contiguous() for n, t in own.items() if t.ndim == 2 and t.shape[0] == t.shape[1] > 1}
    if len(square) > 1:
        yield "as if all its square matrices were transposed", square
    yield from _swapped(own)
    yield from _reordered(own)
    yield from _reordered_together(own)
    yield from _taken_from_elsewhere(own, others)
    for name, tensor in own.items():
        for other, stranger in others.items():
            if stranger.shape == tensor.shape and not torch.equal(stranger, tensor):
                called = name if "." in name else f"its {name}"
                yield f"as if {other} stood in the place of {called}", {name: stranger}


def _swapped(own: Mapping[str, torch.Tensor]) -> Iterator[Edit]:
    names = list(own)
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            if own[first].shape == own[second].shape:
                yield f"as if {first} and {second} were exchanged", {first: own[second], second: own[first]}

    stems = _stems(own)
    listed = list(stems)
    for index, stem in enumerate(listed):
        for other in listed[index + 1 :]:
            shapes = {name: tensor.shape for name, tensor in stems[stem].items()}
            if len(shapes) > 1 and shapes == {name: tensor.shape for name, tensor in stems[other].items()}:
                changed = {f"{stem}.{name}": own[f"{other}.{name}"] for name in shapes}
                changed |= {f"{other}.{name}": own[f"{stem}.{name}"] for name in shapes}
                yield f"as if {stem} and {other} were exchanged", changed


def _reordered_together(own: Mapping[str, torch.Tensor]) -> Iterator[Edit]:
    """Projections of one shape whose channels are dealt to heads alike: all of them, or all but one."""
    alike: dict[torch.Size, list[str]] = {}
    for name, tensor in own.items():
        if tensor.ndim == 2:
            alike.setdefault(tensor.shape, []).append(name.rpartition(".")[0])
    for shape, stems in alike.items():
        for left_out in (*reversed(stems), None) if len(stems) > 1 else ():
            chosen = [stem for stem in stems if stem != left_out]
            parts = {n: t for n, t in own.items() if n.rpartition(".")[0] in chosen and t.shape[0] == shape[0]}
            for words, order in orders_of_heads(shape[0]):
                yield f"it has {words}, in {' and '.join(chosen)}", {n: t[order] for n, t in parts.items()}


def _stems(named: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Parameters by the path of their module, then by their own name."""
    stems: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in named.items():
        stem, _, last = name.rpartition(".")
        stems.setdefault(stem, {})[last] = tensor
    return stems


def _taken_from_elsewhere(own: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> Iterator[Edit]:
    """All parameters of another module of the same shapes, in the place of a module's own."""
    if any("." in name for name in own) or len(own) < 2:
        return
    shapes = {name: tensor.shape for name, tensor in own.items()}
    for stem, rivals in _stems(others).items():
        same = shapes == {name: tensor.shape for name, tensor in rivals.items()}
        if same and not all(torch.equal(own[name], rivals[name]) for name in own):
            yield f"as if it had the parameters of {stem}", rivals


def _reordered(own: Mapping[str, torch.Tensor]) -> Iterator[Edit]:
    for stem, parts in _stems(own).items():
        where = f", in {stem}" if stem else ""
        rows = {f"{stem}.{name}" if stem else name: tensor for name, tensor in parts.items()}
        matrix = next((tensor for tensor in rows.values() if tensor.ndim == 2), None)
        if matrix is None:
            continue
        if matrix.shape[0] == matrix.shape[1] and stem:
            alike = {name: torch.zeros_like(tensor) for name, tensor in rows.items()}
            alike |= {name: torch.eye(len(t), dtype=t.dtype) for name, t in rows.items() if t.ndim == 2}
            yield f"as if {stem} were left out", alike
        outputs = {name: tensor for name, tensor in rows.items() if tensor.shape[0] == matrix.shape[0]}
        for words, order in (*orders_of_thirds(matrix.shape[0]), *orders_of_heads(matrix.shape[0])):
            yield f"it has {words}{where}", {name: tensor[order] for name, tensor in outputs.items()}
        for shift in (1, -1):
            words = "late" if shift == 1 else "early"
            shifted = {name: tensor.roll(shift, 0) for name, tensor in outputs.items()}
            yield f"it has the rows one too {words}{where}", shifted
        inputs = {name: tensor for name, tensor in rows.items() if tensor.ndim == 2}
        for words, order in orders_of_heads(matrix.shape[1]):
            yield f"it has {words}, on the way into {stem or 'it'}", {n: t[:, order] for n, t in inputs.items()}
