# SPDX-License-Identifier: Apache-2.0
"""An MLX model as a torch module: checks find parameters, hooks and gradients where they look for them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn
import torch
from mlx.utils import tree_flatten, tree_unflatten

from harness.backends.mlx import to_array, to_tensor
from harness.errors import Mismatch, Skip
from harness.ports import first_line

WIDTHS = {torch.float64: mx.float64, torch.float32: mx.float32, torch.float16: mx.float16, torch.bfloat16: mx.bfloat16}


def torch_class(cls: type) -> type[MlxModule]:
    """The class of torch modules that stands for a class of MLX models: built, saved and loaded in its ways."""
    return type(cls.__name__, (MlxModule,), {"source": cls, "__module__": cls.__module__})


def torch_module(model: mlx.nn.Module) -> MlxModule:
    """The torch module that stands for an MLX model."""
    found = object.__new__(torch_class(type(model)))
    found.adopt(model)
    return found


class MlxModule(torch.nn.Module):
    """A torch module whose parameters are copies of an MLX model's, and whose forward pass is the model's.

    Tensors lie on the CPU and have the dtypes of the arrays; what torch does to a parameter, such as a cast or a step
    of an optimiser, reaches the model at its next call; what is written in place through `.data`, which torch does not
    follow either, does not. Submodules have the model's paths; their hooks are run, and take and give tensors without
    gradients. Whole numbers go in as int32, as MLX has them. Gradients run the model once more, without hooks:
    `mlx.core.vjp` begins with a forward.
    device: `cpu` or `gpu`, where MLX computes.
    """

    source: type
    device: str = "cpu"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.adopt(self.source(*args, **kwargs))

    def adopt(self, model: mlx.nn.Module) -> None:
        """Makes this the module of a model."""
        super().__init__()
        self.mlx_model = model  # many a model has a part `model`
        self.pushed: dict[str, tuple[Any, ...]] = {}
        self.graphs: dict[str, tuple[Any, list[Any]]] | None = None
        trained = {name for name, _ in tree_flatten(model.trainable_parameters())}
        for path in sorted((path for path, _ in model.named_modules()), key=_numbered):
            _part(self, path)
        for name, array in tree_flatten(model.parameters()):
            path, _, own = name.rpartition(".")
            tensor = to_tensor(array).clone()
            if tensor.is_floating_point():
                parameter = torch.nn.Parameter(tensor, requires_grad=name in trained)
                _part(self, path)._parameters[own] = parameter  # a name may be that of a method, such as `half`
            else:
                _part(self, path)._buffers[own] = tensor
        if hasattr(model, "config"):
            self.config = model.config
        self.training = bool(model.training)
        for part in self.modules():
            part.training = self.training
        self.forward = functools.partial(self._forward)
        self.forward.__signature__ = inspect.signature(model)  # type: ignore[attr-defined]

    def train(self, mode: bool = True) -> MlxModule:
        """As torch's; the model is set alike."""
        super().train(mode)
        self.mlx_model.train(mode)
        return self

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """What the model's own `from_pretrained` loads; it raises for what does not fit."""
        if options.get("dtype") == "auto":  # as it is in the file, which is how MLX has it
            del options["dtype"]
        elif "dtype" in options:
            options["dtype"] = WIDTHS[options["dtype"]]
        source: Any = cls.source
        loaded = torch_module(source.from_pretrained(*args, **options))
        return (loaded, {}) if output_loading_info else loaded

    def __getattr__(self, name: str) -> Any:
        """`save_pretrained` where the model has it: saves in its way, with the numbers that the parameters have now."""
        if name != "save_pretrained" or not hasattr(self.source, name):
            return super().__getattr__(name)
        self._push()
        return getattr(self.mlx_model, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> MlxModule:
        """A copy with tensors of its own; what a model keeps beside arrays, such as compiled functions, is shared."""
        self._push()
        found = torch_module(_copied(self.mlx_model))
        found.device = self.device
        for name, parameter in found.named_parameters():
            parameter.requires_grad_(self.get_parameter(name).requires_grad)
        return found.train(self.training)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {**dict(self.named_parameters(remove_duplicate=False)), **dict(self.named_buffers())}

    def _push(self) -> None:
        """Hands the model the numbers of every tensor that has changed since it was handed over."""
        changed = []
        for name, tensor in self._tensors().items():
            mark = (tensor.data_ptr(), tensor._version, tensor.dtype)
            if self.pushed.get(name) != mark:
                changed.append((name, to_array(tensor)))
                self.pushed[name] = mark
        if changed:
            self.mlx_model.update(tree_unflatten(changed))

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        self._push()
        given: list[torch.Tensor] = []
        inputs = _mapped((args, kwargs), torch.Tensor, functools.partial(_placed, given))
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        seed = int(torch.randint(2**31, ())) if self.training else None
        shape: list[Any] = []

        def run(parameters: Mapping[str, mx.array] | None, arrays: Sequence[mx.array]) -> list[mx.array]:
            """The arrays among what the model returns, for these inputs and, where given, parameters."""
            if parameters is not None:
                self.mlx_model.update(tree_unflatten(list(parameters.items())))
            if seed is not None:
                mx.random.seed(seed)  # so that the second pass, for gradients, drops what the first dropped
            call_args, call_kwargs = _mapped(inputs, _Place, lambda place: arrays[place.index])
            found: list[mx.array] = []
            output = self.mlx_model(*call_args, **call_kwargs)
            shape[:] = [_mapped(output, mx.array, functools.partial(_placed, found))]
            return found

        if self.graphs is not None:
            run, shape = self._compiled(repr(inputs), run, shape)
        tensors = _Through.apply(  # type: ignore[no-untyped-call]
            self, run, list(trained), len(given), *given, *trained.values()
        )
        return _mapped(shape[0], _Place, lambda place: tensors[place.index])

    def _compiled(self, call: str, run: Any, shape: list[Any]) -> tuple[Any, list[Any]]:
        """What runs a call of this kind by the graph of the first one, and the shape of what that returned."""
        assert self.graphs is not None
        graph, shape = self.graphs.setdefault(call, (mx.compile(lambda *arrays: run(None, arrays)), shape))
        return (lambda parameters, arrays: graph(*arrays)), shape


@contextlib.contextmanager
def compiled(module: MlxModule) -> Iterator[MlxModule]:
    """The module with its calls compiled by MLX, one graph for each kind of call; for inference with the same weights.

    Raises Mismatch where a value decides what is computed, and Skip where MLX compiles nothing, for want of a compiler.
    """
    if not _compiles():
        raise Skip("mlx.core.compile does nothing here; on Linux it needs a C++ compiler on the path")
    module.graphs = {}
    try:
        yield module
    except ValueError as error:
        if "function transformations" not in str(error):
            raise
        raise Mismatch(f"mlx.core.compile fails: {first_line(error)}") from None
    finally:
        module.graphs = None


def _compiles() -> bool:
    try:
        mx.eval(mx.compile(lambda array: array * float(array))(mx.ones(())))
    except ValueError:
        return True
    return False


class _Through(torch.autograd.Function):
    """A call of an MLX model: arrays of the given tensors in, tensors of its arrays out, gradients by its vjp."""

    @staticmethod
    def forward(ctx: Any, module: MlxModule, run: Any, names: list[str], count: int, *tensors: torch.Tensor) -> Any:
        arrays = [_narrow(to_array(tensor)) for tensor in tensors[:count]]
        with mx.stream(_device(module)), _hooked(module) as replaced:
            found = run(None, arrays)
            mx.eval(found)
        ctx.replaced = replaced
        ctx.module, ctx.run, ctx.names, ctx.arrays = module, run, names, arrays
        ctx.save_for_backward(*tensors[count:])
        ctx.floats = [place for place, array in enumerate(found) if mx.issubdtype(array.dtype, mx.floating)]
        outputs = tuple(to_tensor(array) for array in found)
        ctx.mark_non_differentiable(*(tensor for tensor in outputs if not tensor.is_floating_point()))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        names, module = ctx.names, ctx.module
        if ctx.replaced:
            raise RuntimeError(
                f"a hook replaced what '{ctx.replaced[0]}' takes or gives, and MLX passes no gradient through that;"
                " remove the hook, or return nothing from it"
            )
        wanted = [place for place, a in enumerate(ctx.arrays) if mx.issubdtype(a.dtype, mx.floating)]

        def outputs(*primals: mx.array) -> list[mx.array]:
            arrays = list(ctx.arrays)
            for place, array in zip(wanted, primals, strict=False):
                arrays[place] = array
            found = ctx.run(dict(zip(names, primals[len(wanted) :], strict=True)), arrays)
            return [found[place] for place in ctx.floats]

        with mx.stream(_device(module)):
            values = [to_array(tensor) for tensor in ctx.saved_tensors]
            primals = [ctx.arrays[place] for place in wanted] + values
            cotangents = [to_array(gradients[place]) for place in ctx.floats]
            _, found = mx.vjp(outputs, primals, cotangents)
            mx.eval(found)
            module.mlx_model.update(tree_unflatten(list(zip(names, values, strict=True))))  # no traces stay behind
        given: list[Any] = [None] * len(ctx.arrays)
        for place, array in zip(wanted, found, strict=False):
            given[place] = to_tensor(array)
        return None, None, None, None, *given, *(to_tensor(array) for array in found[len(wanted) :])


def quantised(
    module: MlxModule, quantize: Callable[..., Any], options: Mapping[str, Any]
) -> tuple[MlxModule, dict[str, torch.Tensor]]:
    """The module after `quantize(model, **options)`, and the numbers of its parameters made whole again."""
    module._push()
    found = torch_module(quantize(module.mlx_model, **options))
    found.device = module.device
    stored = {name: tensor.detach() for name, tensor in found.named_parameters()}
    model: Any = found.mlx_model
    layers = {path: part for path, part in model.named_modules() if "scales" in part}
    if not layers:
        raise Mismatch(f"quantize({', '.join(f'{name}={value}' for name, value in options.items())}) changes no layer")
    for path, layer in layers.items():
        place = {"group_size": layer.group_size, "bits": layer.bits}
        stored[f"{path}.weight"] = to_tensor(mx.dequantize(layer.weight, layer.scales, layer.biases, **place))
    return found, stored


NUDGE, STEP = 1e-6, 1e-11


def float32_inside(module: MlxModule, run: Callable[[], torch.Tensor]) -> bool:
    """Whether a part of a float64 computation is as accurate as float32 alone, as `mlx.core.erf` is on the CPU.

    Seen in the numbers: with weights nudged by a millionth, twice and three times that, what float64 computes follows a
    parabola, a wrong formula too; what float32 computes goes in steps of its own.
    """
    tensors = [parameter for parameter in module.parameters() if parameter.dtype == torch.float64]
    before = [tensor.detach().clone() for tensor in tensors]
    outputs = []
    with torch.no_grad():
        for times in range(4):
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value * (1 + times * NUDGE))
            outputs.append(run())
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
    off = (outputs[3] - 3 * outputs[2] + 3 * outputs[1] - outputs[0]).abs().max()
    return bool(off > STEP * outputs[0].abs().max())


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tensor stood in what a call takes or returns."""

    index: int


def _placed(kept: list[Any], value: Any) -> _Place:
    kept.append(value)
    return _Place(len(kept) - 1)


def _mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """What a call takes or returns, with each thing of a kind in it changed."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, tuple | list):
        entries = [_mapped(entry, kind, change) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    if isinstance(value, dict):
        return {name: _mapped(entry, kind, change) for name, entry in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type | _Place):
        return types.SimpleNamespace(
            **{field.name: _mapped(getattr(value, field.name), kind, change) for field in dataclasses.fields(value)}
        )
    if isinstance(value, types.SimpleNamespace):
        return types.SimpleNamespace(**{name: _mapped(entry, kind, change) for name, entry in vars(value).items()})
    return value


def _copied(value: Any) -> Any:
    """A model with parts of its own, of the same arrays, which nothing can change."""
    if isinstance(value, mlx.nn.Module):
        found: Any = dict.__new__(type(value))
        found.__dict__.update({name: _copied(entry) for name, entry in value.__dict__.items()})
        for name, entry in value.items():
            dict.__setitem__(found, name, _copied(entry))
        return found
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return {name: _copied(entry) for name, entry in value.items()} if type(value) is dict else value


def _numbered(path: str) -> list[tuple[int, str]]:
    """A key that puts the tenth part of a list behind its second."""
    return [(len(name), name) for name in path.split(".")]


def _part(module: torch.nn.Module, path: str) -> torch.nn.Module:
    """The submodule of that path, made where there is none; what has numbered parts is a ModuleList."""
    names = path.split(".") if path else []
    for name, following in zip(names, [*names[1:], ""], strict=False):
        if name not in module._modules:
            module._modules[name] = torch.nn.ModuleList() if following.isdigit() else torch.nn.Module()
        module = module._modules[name]  # type: ignore[assignment]
    return module


def _narrow(array: mx.array) -> mx.array:
    return array.astype(mx.int32) if array.dtype == mx.int64 else array


def _device(module: MlxModule) -> Any:
    return mx.gpu if module.device == "gpu" else mx.cpu


@contextlib.contextmanager
def _hooked(module: MlxModule) -> Iterator[list[str]]:
    """Calls of parts whose torch module has hooks run these hooks; a part is known by its path.

    Yields the paths of the parts whose hooks have replaced something by now.
    """
    changed = []
    replaced: list[str] = []
    for path, part in module.mlx_model.named_modules():
        place = _part(module, path) if path else None
        if place is not None and (place._forward_pre_hooks or place._forward_hooks):
            changed.append((part, type(part)))
            part.__class__ = _with_hooks(type(part), place, functools.partial(replaced.append, path))
    try:
        yield replaced
    finally:
        for part, cls in reversed(changed):  # one part may stand in two places
            part.__class__ = cls


def _with_hooks(cls: Any, place: torch.nn.Module, replaces: Callable[[], None]) -> Any:
    """The class of a part that runs the hooks of its torch module, in torch's order and by torch's rules."""

    def call(part: Any, *args: Any, **kwargs: Any) -> Any:
        for number, before in place._forward_pre_hooks.items():
            shown = _as_tensors((args, kwargs))
            takes_all = number in place._forward_pre_hooks_with_kwargs
            changed = before(place, *shown) if takes_all else before(place, shown[0])
            if changed is None:
                continue
            replaces()
            if takes_all:
                args, kwargs = _as_arrays(changed)
            else:
                args = _as_arrays(changed if isinstance(changed, tuple) else (changed,))
        output = cls.__call__(part, *args, **kwargs)
        for number, after in place._forward_hooks.items():
            shown = _as_tensors((args, kwargs))
            given = shown if number in place._forward_hooks_with_kwargs else shown[:1]
            changed = after(place, *given, _as_tensors(output))
            if changed is not None:
                replaces()
                output = _as_arrays(changed)
        return output

    return type(cls.__name__, (cls,), {"__call__": call})


def _as_tensors(value: Any) -> Any:
    return _mapped(value, mx.array, to_tensor)


def _as_arrays(value: Any) -> Any:
    return _mapped(value, torch.Tensor, lambda tensor: _narrow(to_array(tensor)))
