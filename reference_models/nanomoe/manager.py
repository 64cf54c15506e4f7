# SPDX-License-Identifier: Apache-2.0
"""Collects the auxiliary losses of one forward pass, and of no other.

Upstream (`manager.py` of wolfecameron/nanoMoE at 661fbcf and askerlee/nanoMoE at 07e6c16, MIT) keeps one list per loss
in a global that only some calls empty, so that losses leak into later calls and other models. Here a collection lives
as long as one call, and `MANAGER`, the name that scripts import, is whichever belongs to the call in progress.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

AUXILIARY_LOSSES = ("aux_loss", "router_z_loss", "router_ortho_loss", "experts_ortho_loss", "gate_output_loss")


class MOEManager:
    """Losses by name, each a list of scalars with one entry for each time it was added.

    Upstream's spelled-out methods exist for every name: `add_aux_loss(loss)` is `add("aux_loss", loss)`, and likewise
    `aggregate_router_z_loss()` and `reset_gate_output_loss()`.
    """

    def __init__(self) -> None:
        self._losses: dict[str, list[Any]] = {}

    def add(self, name: str, loss: Any) -> None:
        """Remember a scalar, a 0-d tensor or a number, under a name."""
        self._losses.setdefault(name, []).append(loss)

    def aggregate(self, name: str) -> Any:
        """Return the sum of what was added under a name; 0.0 if there is nothing."""
        return sum(self._losses.get(name, ()), start=0.0)

    def reset(self, name: str | None = None) -> None:
        """Forget what was added under a name, or under all of them."""
        if name is None:
            self._losses.clear()
        else:
            self._losses.pop(name, None)

    def __getattr__(self, attribute: str) -> Callable[..., Any]:
        action, _, name = attribute.partition("_")
        if action not in ("add", "aggregate", "reset") or name not in AUXILIARY_LOSSES:
            raise AttributeError(f"{type(self).__name__} has no {attribute}; the losses are {AUXILIARY_LOSSES}")
        method = getattr(self, action)
        return lambda *losses: method(name, *losses)


# Each thread has its own value, and so has each asynchronous task.
_CALL_IN_PROGRESS: ContextVar[MOEManager | None] = ContextVar("nanomoe_call_in_progress", default=None)


class _CurrentManager(MOEManager):
    """The manager of the call in progress. Outside a call it is empty, and what is added is forgotten at once."""

    @property
    def _losses(self) -> dict[str, list[Any]]:
        manager = _CALL_IN_PROGRESS.get()
        return {} if manager is None else manager._losses

    @_losses.setter
    def _losses(self, losses: dict[str, list[Any]]) -> None:
        pass  # it has none of its own


MANAGER = _CurrentManager()


@contextmanager
def manager_of_this_call() -> Iterator[MOEManager]:
    """Make an empty manager, which `MANAGER` stands for until the block is left."""
    manager = MOEManager()
    token = _CALL_IN_PROGRESS.set(manager)
    try:
        yield manager
    finally:
        _CALL_IN_PROGRESS.reset(token)
