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
        yield f"as if {name} were zero", {name: torch.zeros_like(tensor)}
        if tensor.ndim == 1:
            yield f"as if {name} were one", {name: torch.ones_like(tensor)}
        if tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1] > 1:
            yield f"as if {name} were transposed", {name: tensor.T.contiguous()}
    biases = {name: torch.zeros_like(tensor) for name, tensor in own.items() if name.endswith("bias")}
    if len(biases) > 1:
        yield "as if all its biases were zero", biases
    square = {n: t.T.contiguous() for n, t in own.items() if t.ndim == 2 and t.shape[0] == t.shape[1] > 1}
    if len(square) > 1:
        yield "as if all its square matrices were transposed", square
    yield from _swapped(own)
    yield from _reordered(own)
    for name, tensor in own.items():
        for other, stranger in others.items():
            if stranger.shape == tensor.shape and not torch.equal(stranger, tensor):
                yield f"as if {other} stood in the place of {name}", {name: stranger}


def _swapped(own: Mapping[str, torch.Tensor]) -> Iterator[Edit]:
    names = list(own)
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            if own[first].shape == own[second].shape:
                yield f"as if {first} and {second} were exchanged", {first: own[second], second: own[first]}


def _reordered(own: Mapping[str, torch.Tensor]) -> Iterator[Edit]:
    stems = dict.fromkeys(name.rpartition(".")[0] for name, tensor in own.items() if tensor.ndim == 2)
    for stem in stems:
        where = f", in {stem}" if stem else ""
        rows = {name: tensor for name, tensor in own.items() if name.rpartition(".")[0] == stem}
        matrix = next(tensor for tensor in rows.values() if tensor.ndim == 2)
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
