# SPDX-License-Identifier: Apache-2.0
"""What-if runs of an original: the same module, with one of its operations done another way."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Rule = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""(function, args, kwargs) -> what stands in for the function's result."""

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "the exact GELU": functional.gelu,
    "GELU's tanh approximation": lambda x: functional.gelu(x, approximate="tanh"),
    "ReLU": functional.relu,
    "SiLU": functional.silu,
    "GELU's sigmoid approximation": lambda x: x * torch.sigmoid(1.702 * x),
    "ReLU squared": lambda x: functional.relu(x).square(),
    "no activation at all": lambda x: x,
    "tanh": torch.tanh,
}

EPSILONS = (1e-5, 1e-6, 1e-12, 1e-8, 1e-7, 1e-4, 1e-3, 0.0)
MASKED = -1e3
"""Scores below this are masked out."""


class Rewritten(TorchFunctionMode):
    """Every torch function called inside goes through a rule."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.rule(func, args, kwargs or {})


def name_of(function: Callable[..., Any]) -> str:
    """The bare name of a torch function, the same for `torch.softmax`, `F.softmax` and the method."""
    return str(getattr(function, "__name__", "")).strip("_")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Used:
    """What a module was seen to do: names of operations, its head size, its epsilon, how often it embeds."""

    names: frozenset[str]
    head_size: int | None
    epsilon: float | None
    embeddings: Sequence[torch.Tensor]


def used_by(run: Callable[[], Any]) -> Used:
    """Watches the torch functions of one run."""
    names: set[str] = set()
    inner: list[int] = []
    epsilons: list[float] = []
    tables: list[torch.Tensor] = []

    def look(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = name_of(function)
        if name == "scaled_dot_product_attention":
            inner.append(int(_argument(args, kwargs, 0, "query").shape[-1]))
        elif name in ("matmul", "bmm") and "softmax" not in names:
            inner.append(int(args[0].shape[-1]))
        elif name == "layer_norm":
            epsilons.append(float(_argument(args, kwargs, 4, "eps", 1e-5)))
        elif name == "embedding":
            tables.append(_argument(args, kwargs, 1, "weight"))
        elif name in ("add", "radd") and _small(args):
            epsilons.append(float(args[1]))
        names.add(name)
        return function(*args, **kwargs)

    with Rewritten(look):
        run()
    attends = names & {"softmax", "scaled_dot_product_attention"}
    return Used(
        names=frozenset(names),
        head_size=inner[-1] if inner and attends else None,
        epsilon=epsilons[0] if epsilons else None,
        embeddings=tables,
    )


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, name: str, default: Any = None) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


def _small(args: tuple[Any, ...]) -> bool:
    """Whether the second summand is a number like an epsilon."""
    return len(args) > 1 and isinstance(args[1], float) and 0 < args[1] < 1e-2


def scores_scaled(factor: float) -> Rule:
    """Attention scores times a factor, before the softmax."""

    def rule(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name_of(function) == "scaled_dot_product_attention":
            query = _argument(args, kwargs, 0, "query")
            return function(query * factor, *args[1:], **{k: v for k, v in kwargs.items() if k != "query"})
        if name_of(function) == "softmax":
            scores = args[0]
            return function(torch.where(scores < MASKED, scores, scores * factor), *args[1:], **kwargs)
        return function(*args, **kwargs)

    return rule


def softmax_over_queries() -> Rule:
    """Attention weights that sum to one over the queries of a key instead of the keys of a query."""

    def rule(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name_of(function) == "softmax":
            return function(args[0], dim=-2)
        if name_of(function) == "scaled_dot_product_attention":
            query, key, value = args[:3]
            scores = query @ key.transpose(-1, -2) * (_argument(args, kwargs, 6, "scale") or query.shape[-1] ** -0.5)
            if _argument(args, kwargs, 5, "is_causal", False):
                hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
                scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
            return torch.softmax(scores, dim=-2) @ value
        return function(*args, **kwargs)

    return rule


def causality_shifted(by: int | None) -> Rule:
    """Every position sees `by` positions more (less, when negative); with None, all of them."""

    def rule(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = name_of(function)
        if name == "scaled_dot_product_attention" and _argument(args, kwargs, 5, "is_causal", False):
            query, key, value = args[:3] if len(args) > 2 else (kwargs["query"], kwargs["key"], kwargs["value"])
            mask = None
            if by is not None:
                hidden = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).triu(by + 1)
                # A row that sees nothing sees everything alike, as where masks are the lowest number.
                mask = query.new_zeros(hidden.shape).masked_fill(hidden, torch.finfo(query.dtype).min)
            scale = _argument(args, kwargs, 6, "scale")
            return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        if name == "masked_fill" and float(_argument(args, kwargs, 2, "value", 0.0)) < MASKED:
            return function(args[0], _moved(args[1], by), torch.finfo(args[0].dtype).min)
        return function(*args, **kwargs)

    return rule


def _moved(mask: torch.Tensor, by: int | None) -> torch.Tensor:
    if by is None:
        return torch.zeros_like(mask)
    moved = mask.roll(by, dims=-1)
    (moved[..., :by] if by > 0 else moved[..., by:]).fill_(by < 0)
    return moved


def activation_replaced(stand_in: Callable[[torch.Tensor], torch.Tensor]) -> Rule:
    """Another activation function in the place of GELU, ReLU, SiLU or tanh."""

    def rule(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name_of(function) in ("gelu", "relu", "silu", "tanh"):
            return stand_in(args[0] if args else kwargs["input"])
        return function(*args, **kwargs)

    return rule


def epsilon_replaced(epsilon: float) -> Rule:
    """Another epsilon in norms, whether torch's own or written out as `variance + 1e-5`."""

    def rule(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name_of(function) in ("layer_norm", "rms_norm"):
            place = 4 if name_of(function) == "layer_norm" else 3
            kwargs = {name: value for name, value in kwargs.items() if name != "eps"}
            return function(*args[:place], eps=epsilon, **kwargs)
        if name_of(function) in ("add", "radd") and _small(args):
            return function(args[0], epsilon, *args[2:], **kwargs)
        return function(*args, **kwargs)

    return rule


def norm_rewritten(compute: Callable[..., torch.Tensor]) -> Rule:
    """`compute(x, weight, bias, epsilon)` in the place of torch's layer norm over the last axis."""

    def rule(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name_of(function) != "layer_norm":
            return function(*args, **kwargs)
        names = ("input", "normalized_shape", "weight", "bias", "eps")
        values = {**dict(zip(names, args, strict=False)), **kwargs}
        given = values["input"]
        one, zero = given.new_ones(given.shape[-1]), given.new_zeros(given.shape[-1])
        weight, bias = (
            default if values.get(name) is None else values[name] for name, default in (("weight", one), ("bias", zero))
        )
        return compute(given, weight, bias, values.get("eps", 1e-5))

    return rule


def _normed(x: torch.Tensor, epsilon: float, *, unbiased: bool = False, centred: bool = True) -> torch.Tensor:
    middle = x - x.mean(-1, keepdim=True) if centred else x
    count = x.shape[-1] - int(unbiased)
    return middle / (middle.square().sum(-1, keepdim=True) / max(count, 1) + epsilon).sqrt()


def _epsilon_outside(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float) -> torch.Tensor:
    middle = x - x.mean(-1, keepdim=True)
    return weight * middle / (middle.square().mean(-1, keepdim=True).sqrt() + epsilon) + bias


NORMS: Mapping[str, Callable[..., torch.Tensor]] = {
    "its variance is divided by n - 1 instead of n": lambda x, w, b, e: w * _normed(x, e, unbiased=True) + b,
    "it does not take the mean out, as RMSNorm": lambda x, w, b, e: w * _normed(x, e, centred=False) + b,
    "its gain is 1 + weight instead of weight": lambda x, w, b, e: (1 + w) * _normed(x, e) + b,
    "its epsilon stands outside the root": _epsilon_outside,
    "it multiplies by the bias and adds the weight": lambda x, w, b, e: b * _normed(x, e) + w,
}


def statistics_other_way() -> Rule:
    """Written-out norms with the other divisor of the variance: n - 1 for n, n for n - 1."""

    def rule(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name_of(function) not in ("var", "std"):
            return function(*args, **kwargs)
        unbiased = kwargs.get("unbiased", kwargs.get("correction", 1) == 1)
        others = {name: value for name, value in kwargs.items() if name not in ("unbiased", "correction")}
        return function(*args, correction=int(not unbiased), **others)

    return rule


def embedding_rewritten(place: int, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Rule:
    """The embedding looked up as the `place`-th, by `change(indices, table)`. The rule counts; use it for one run."""
    seen = 0

    def rule(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal seen
        if name_of(function) != "embedding":
            return function(*args, **kwargs)
        seen += 1
        if seen - 1 != place:
            return function(*args, **kwargs)
        return change(_argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight"))

    return rule


EMBEDDINGS: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "is looked up one row too late": lambda ids, table: table[(ids + 1) % len(table)],
    "is looked up one row too early": lambda ids, table: table[(ids - 1) % len(table)],
    "is looked up two rows too late": lambda ids, table: table[(ids + 2) % len(table)],
    "is looked up in row 0 throughout": lambda ids, table: table[torch.zeros_like(ids)],
    "is looked up from the last row backwards": lambda ids, table: table[len(table) - 1 - ids],
}


@contextlib.contextmanager
def module_replaced(module: torch.nn.Module, stand_in: Callable[..., Any]) -> Iterator[None]:
    """Inside, calls of the module give `stand_in(*args)` instead."""
    handle = module.register_forward_hook(lambda _module, args, _output: stand_in(*args))
    try:
        yield
    finally:
        handle.remove()


def solved(
    run: Callable[[float], torch.Tensor | None], target: torch.Tensor, *, starts: Sequence[float]
) -> Iterator[float]:
    """Numbers c > 0 for which run(c) may be the target: the starts, then what Newton's method makes of the best one.

    Works on log c; the caller says which one fits. `run` may return None or another shape where it has no answer.
    """
    best, least = None, float("inf")
    for start in starts:
        yield start
        left = _left(run(start), target) if start > 0 else None
        size = float(left.square().mean()) if left is not None else float("inf")
        if size < least:
            best, least = start, size
    if best is None:
        return
    point = math.log(best)
    for _ in range(12):
        here, there = _left(run(math.exp(point)), target), _left(run(math.exp(point + 1e-6)), target)
        if here is None or there is None:
            return
        slope = (there - here) / 1e-6
        power = float(slope.square().sum())
        step = float((slope * here).sum()) / power if power > 0 else 0.0
        if not math.isfinite(step):
            return
        point -= max(-1.0, min(1.0, step))
        if abs(point) > 60:
            return
        if abs(step) < 1e-13:
            break
    yield math.exp(point)


def _left(output: torch.Tensor | None, target: torch.Tensor) -> torch.Tensor | None:
    if output is None or output.shape != target.shape or not bool(output.isfinite().all()):
        return None
    return (output - target).double().flatten()
