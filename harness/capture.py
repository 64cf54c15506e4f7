# SPDX-License-Identifier: Apache-2.0
"""Reading what submodules are given and return during one call of a model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from harness.errors import Mismatch

if TYPE_CHECKING:
    import torch

    from harness.families import Tap

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


def capture_both(
    taps: Sequence[Tap],
    original: tuple[torch.nn.Module, Callable[[], object]],
    port: tuple[torch.nn.Module, Callable[[], object]],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What port and original, each a model and a call of it, return at the taps whose module the port has, by name."""
    names = {name for name, _ in port[0].named_modules()}
    present = [tap for tap in taps if tap.port in names]
    _, theirs = capture(original[0], {tap.name: tap.original for tap in present}, original[1])
    _, ours = capture(port[0], {tap.name: tap.port for tap in present}, port[1], in_parts=True)
    # Rows and tokens may stand in one axis, as experts take them.
    return {name: like(tensor, theirs[name]) for name, tensor in ours.items()}, theirs


def like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The tensor in the shape of another that has as many numbers and the same last axis; else as it is."""
    fits = tensor.numel() == other.numel() and tensor.shape[-1:] == other.shape[-1:]
    return tensor.reshape(other.shape) if fits else tensor


@dataclasses.dataclass(kw_only=True)
class Call:
    """One call of a submodule: its path, what it was given, the floating tensors among that, and what it returned.

    output is the first tensor returned (the first element of a tuple), None when there was none.
    """

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[torch.Tensor]
    output: torch.Tensor | None = None


def watch(module: torch.nn.Module, call: Callable[[], Output]) -> tuple[Output, list[Call]]:
    """Runs `call` once: what it returns, and every call of a submodule in it, in the order in which they began."""
    calls: list[Call] = []
    running: dict[str, list[Call]] = {}

    def begin(path: str, args: Any, kwargs: Any) -> None:
        # Copies, because a later sum in place would change what was seen.
        given = tuple(_copied(value) for value in args)
        named = {name: _copied(value) for name, value in kwargs.items()}
        floats = [value for value in (*given, *named.values()) if _is_tensor(value) and value.is_floating_point()]
        calls.append(Call(path=path, args=given, kwargs=named, inputs=floats))
        running.setdefault(path, []).append(calls[-1])

    def end(path: str, value: Any) -> None:
        first = value[0] if isinstance(value, tuple) and value else value
        running[path].pop().output = first.detach().clone() if _is_tensor(first) else None

    with contextlib.ExitStack() as hooks:
        for path, place in module.named_modules():
            if not path:
                continue
            before = place.register_forward_pre_hook(
                lambda _, args, kwargs, path=path: begin(path, args, kwargs), with_kwargs=True
            )
            after = place.register_forward_hook(lambda _module, _args, value, path=path: end(path, value))
            hooks.callback(before.remove)
            hooks.callback(after.remove)
        outputs = call()
    return outputs, calls


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "is_floating_point") and hasattr(value, "clone")


def _copied(value: Any) -> Any:
    return value.detach().clone() if _is_tensor(value) else value
