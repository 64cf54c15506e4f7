# SPDX-License-Identifier: Apache-2.0
"""Where each number of the original's weights ends up in a port: names, splits, joins, transposes, permutations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from harness.routes import carry, main_route
from harness.trial import Trial, initial_original

if TYPE_CHECKING:
    from harness.cases import Case

DISTINCT = 1 << 22
"""How many different numbers from 1 up to 2 mark weights: exact in float32, and none is a multiple of another."""

ODD = 2654435761
"""Neighbours get marks far apart; multiplication by an odd number loses none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """For every parameter of a port, from which place each of its numbers comes.

    sources: the original's parameters, one after the other, by name and shape. places: port's parameter -> int64
    tensor of its shape, indices into the concatenation of the flattened sources; each index stands there once, and the
    index behind the last one wherever the port fills up with zeros, as in a padded vocabulary.
    added: the port's parameters that hold nothing of the original's.
    """

    sources: Mapping[str, torch.Size]
    places: Mapping[str, torch.Tensor]
    added: Sequence[str]

    def arrange(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of the original's parameters (any leading axes), as the port's parameters would hold them."""
        pieces = [
            tensors[name].reshape(*tensors[name].shape[: tensors[name].ndim - len(shape)], -1)
            for name, shape in self.sources.items()
        ]
        flat = torch.cat([*pieces, torch.zeros_like(pieces[0][..., :1])], dim=-1)
        return {name: flat[..., places] for name, places in self.places.items()}

    def known(self, name: str) -> torch.Tensor:
        """Which numbers of a port's parameter come from the original: bool, of its shape."""
        return self.places[name] < sum(shape.numel() for shape in self.sources.values())

    def is_plain(self, trial: Trial) -> bool:
        """Whether every parameter is one of the original's, under the name that the family knows, number by number."""
        start = 0
        for name, shape in self.sources.items():
            places = self.places.get(trial.family.port_key(name))
            if places is None or places.shape != shape:
                return False
            if not torch.equal(places.flatten(), torch.arange(start, start + shape.numel())):
                return False
            start += shape.numel()
        return True


def layout_of(trial: Trial, case: Case) -> Layout | None:
    """The layout, found by carrying weights that are all different by the port's own loader.

    None when that fails, or when a number is lost, doubled or changed on the way.
    """
    original = initial_original(trial, case.fields)
    sources = {name: parameter.shape for name, parameter in original.named_parameters()}
    count = sum(shape.numel() for shape in sources.values())
    if count > DISTINCT:
        return None
    marks = 1 + (torch.arange(count) * ODD % DISTINCT).double() / DISTINCT
    with torch.no_grad():
        pieces = marks.split([shape.numel() for shape in sources.values()])
        for parameter, piece in zip(original.parameters(), pieces, strict=True):
            parameter.copy_(piece.view_as(parameter))
    try:
        port = carry(dataclasses.replace(trial, route=main_route(trial.port)), case, original)
    except Exception:  # a loader that fails is what other checks report
        return None
    ordered, order = marks.sort()
    places: dict[str, torch.Tensor] = {}
    added: list[str] = []
    for name, parameter in port.named_parameters():
        numbers = parameter.detach().double().contiguous()
        found = torch.searchsorted(ordered, numbers).clamp(max=count - 1)
        known = ordered[found] == numbers
        if not known.any():
            added.append(name)
        elif bool((known | (numbers == 0)).all()):
            places[name] = torch.where(known, order[found], count)
        else:
            return None
    every = torch.cat([indices[indices < count] for indices in places.values()]) if places else torch.empty(0)
    if every.numel() != count or every.unique().numel() != count:
        return None
    return Layout(sources=sources, places=places, added=added)
