# SPDX-License-Identifier: Apache-2.0
"""Reading what submodules return during one call of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from harness.errors import Mismatch

if TYPE_CHECKING:
    import torch

Output = TypeVar("Output")


def capture(
    module: torch.nn.Module,
    places: Mapping[str, str],
    call: Callable[[], Output],
    *,
    pick: Mapping[str, Callable[[Any], torch.Tensor]] | None = None,
    in_parts: bool = False,
) -> tuple[Output, dict[str, torch.Tensor]]:
    """Runs `call` once: what it returns, and by name what the submodules at `places` (name -> path) returned.

    A submodule that returns a tuple gives its first element, unless `pick[name]` takes another. in_parts: one that does
    not run itself, but whose parts do, is left out.
    Raises Mismatch when a submodule does not exist, did not run, or returned no tensor.
    """
    seen: dict[str, torch.Tensor] = {}
    parted: set[str] = set()
    with contextlib.ExitStack() as hooks:
        for name, path in places.items():
            taken = (pick or {}).get(name, lambda value: value[0] if isinstance(value, tuple) else value)

            def keep(
                _module: Any, _inputs: Any, value: Any, name: str = name, path: str = path, taken: Any = taken
            ) -> None:
                output = taken(value)
                if not hasattr(output, "clone"):
                    raise Mismatch(f"submodule '{path}' returns {type(output).__name__}, expected a tensor first")
                seen[name] = output.clone()  # a later sum in place would change it

            try:
                place = module.get_submodule(path)
            except AttributeError:
                raise Mismatch(f"{type(module).__name__} has no submodule '{path}', for '{name}'") from None
            hooks.callback(place.register_forward_hook(keep).remove)
            for part in list(place.modules())[1:] if in_parts else ():
                hooks.callback(part.register_forward_hook(lambda *_, name=name: parted.add(name)).remove)
        outputs = call()
    if silent := set(places) - set(seen) - parted:
        raise Mismatch(f"{type(module).__name__} did not run the submodules of {', '.join(sorted(silent))}")
    return outputs, seen
