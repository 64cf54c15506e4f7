# SPDX-License-Identifier: Apache-2.0
"""What a port finds around itself and must leave so: torch's settings, the functions of its libraries, random numbers.

A port that changes them changes the original too, so that both would compute the same wrong thing.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

MODULES = (
    "math",
    "torch",
    "torch._C._nn",
    "torch.autograd",
    "torch.linalg",
    "torch.nn",
    "torch.nn.functional",
    "torch.nn.init",
    "torch.optim",
    "torch.special",
    "torch.utils.checkpoint",
)
"""Modules of which each function and class is compared."""

CLASSES = (
    "torch.optim.AdamW",
    "transformers.cache_utils.DynamicCache",
    "transformers.configuration_utils.PretrainedConfig",
    "transformers.generation.utils.GenerationMixin",
    "transformers.modeling_utils.PreTrainedModel",
)
"""Classes of which each attribute is compared, beside all of torch.nn."""

TABLES = (
    ("transformers.activations", "ACT2FN"),
    ("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS"),
)
"""Tables of the library whose entries models share."""

SEEDS = (5, 6)


def surroundings() -> dict[str, Any]:
    """Settings by name, and functions by where they are found. Imports torch and transformers."""
    return {**settings(), **functions()}


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """In words, what is another one than before; what is there besides does not count."""
    found = []
    for name, value in before.items():
        now = after.get(name)
        if now is value:
            continue
        if callable(value):
            if not _wrapped_by_torch(now, value):
                found.append(f"{name} is replaced")
        elif now != value:
            found.append(f"{name} is {now!r} instead of {value!r}")
    return found


def _wrapped_by_torch(now: Any, before: Any) -> bool:
    """Whether a function is what it was in a wrapper of torch's own, as importing or using its compiler makes them."""
    import torch

    file = getattr(getattr(now, "__code__", None), "co_filename", "")
    by_its_compiler = str(getattr(now, "__module__", "")).startswith("torch._dynamo.")
    return file.startswith(torch.__path__[0]) and (by_its_compiler or inspect.unwrap(now) is inspect.unwrap(before))


def settings() -> dict[str, Any]:
    """torch's settings that change results or how a later program runs, by name."""
    import torch

    from harness.backends import pytorch

    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    probes: dict[str, Callable[[], Any]] = {
        "torch.backends.cuda.matmul.allow_tf32": lambda: cuda.matmul.allow_tf32,
        "torch.backends.cudnn.allow_tf32": lambda: cudnn.allow_tf32,
        "torch.backends.cudnn.benchmark": lambda: cudnn.benchmark,
        "torch.backends.cudnn.deterministic": lambda: cudnn.deterministic,
        "torch.backends.cudnn.enabled": lambda: cudnn.enabled,
        "torch.backends.mkldnn.enabled": lambda: torch.backends.mkldnn.enabled,
        "torch.backends.mha.get_fastpath_enabled()": torch.backends.mha.get_fastpath_enabled,
        "torch.backends.cuda.flash_sdp_enabled()": cuda.flash_sdp_enabled,
        "torch.backends.cuda.mem_efficient_sdp_enabled()": cuda.mem_efficient_sdp_enabled,
        "torch.backends.cuda.math_sdp_enabled()": cuda.math_sdp_enabled,
        "torch.utils.deterministic.fill_uninitialized_memory": lambda: (
            torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        ),
        "torch.is_anomaly_enabled()": torch.is_anomaly_enabled,
        "torch.is_inference_mode_enabled()": torch.is_inference_mode_enabled,
        "torch.is_autocast_enabled('cpu')": lambda: torch.is_autocast_enabled("cpu"),
        "torch.is_autocast_enabled('cuda')": lambda: torch.is_autocast_enabled("cuda"),
        "torch.get_num_interop_threads()": torch.get_num_interop_threads,
        "torch.initial_seed()": torch.initial_seed,
        "torch.set_flush_denormal": lambda: not bool(torch.tensor(1e-40, dtype=torch.float32) * 1),
    }
    found: dict[str, Any] = {f"torch's {name.replace('_', ' ')}": value for name, value in pytorch.settings().items()}
    for name, probe in probes.items():
        with contextlib.suppress(RuntimeError, AttributeError):  # a release that does not have it, or mixes two ways
            found[name] = probe()
    return found


def torch_functions() -> dict[str, Callable[..., Any]]:
    """Functions and classes of torch that models are made of, by their full name; those of torch.nn with methods."""
    import torch

    found: dict[str, Callable[..., Any]] = {}
    for place in MODULES:
        found |= _callables(place, vars(importlib.import_module(place)))
    for name, value in vars(torch.nn).items():
        if isinstance(value, type):
            found |= _callables(f"torch.nn.{name}", vars(value))
    inherited = {name: value for base in reversed(torch.Tensor.__mro__) for name, value in vars(base).items()}
    return found | _callables("torch.Tensor", inherited)


def functions() -> dict[str, Callable[..., Any]]:
    """`torch_functions`, and what of transformers models are made of."""
    found = torch_functions()
    for path in CLASSES:
        module, _, name = path.rpartition(".")
        found |= _callables(path, vars(getattr(importlib.import_module(module), name)))
    for module, name in TABLES:
        table: Any = getattr(importlib.import_module(module), name, {})
        # A dictionary of the library's own may make something new of an entry that is asked for in another way.
        entries = dict.items(table) if isinstance(table, dict) else table.items()
        found |= {f"transformers' {name}[{key!r}]": _of_entry(entry) for key, entry in entries}
    return found


def _callables(place: str, attributes: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
    return {f"{place}.{name}": value for name, value in attributes.items() if callable(value)}


def _of_entry(entry: Any) -> Any:
    return entry[0] if isinstance(entry, tuple) else entry  # a class with its arguments


def reseeded(run: Callable[[], object]) -> list[str]:
    """The random generators that are in one state after `run` whatever state they were in; theirs comes back after."""
    import numpy as np
    import torch

    mlx = sys.modules.get("mlx.core")  # whoever can seed it has imported it
    states: dict[str, list[Any]] = {"torch": [], "random": [], "numpy": []} | ({"mlx": []} if mlx else {})
    python, numpy = random.getstate(), np.random.get_state()
    high, low = mlx.random.state[0].tolist() if mlx else (0, 0)
    try:
        with torch.random.fork_rng(devices=[]):
            for seed in SEEDS:
                torch.manual_seed(seed)
                random.seed(seed)
                np.random.seed(seed)
                if mlx:
                    mlx.random.seed(seed)
                run()
                states["torch"].append(torch.get_rng_state().tolist())
                states["random"].append(random.getstate())
                states["numpy"].append(np.random.get_state()[1].tolist())  # type: ignore[index]
                if mlx:
                    states["mlx"].append(mlx.random.state[0].tolist())
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if mlx:
            mlx.random.seed(high << 32 | low)  # a seed's two halves are the state
    return [name for name, (first, second) in states.items() if first == second]


@contextlib.contextmanager
def watched(found: list[str]) -> Iterator[None]:
    """Adds to `found`, in words, what is changed around by what runs inside."""
    before = surroundings()
    try:
        yield
    finally:
        found.extend(changes(before, surroundings()))
