# SPDX-License-Identifier: Apache-2.0
"""An MLX model as a torch module: what checks read, change, hook and differentiate is the model's own."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'parity-harness[mlx]'")
import mlx.nn as nn  # noqa: E402
import torch  # noqa: E402
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from harness.backends import mlx_module  # noqa: E402
from harness.backends.mlx import to_array, to_tensor  # noqa: E402
from harness.backends.mlx_module import torch_class, torch_module  # noqa: E402

pytestmark = [pytest.mark.mlx, pytest.mark.usefixtures("one_thread", "on_the_cpu")]

FLOATS = {torch.float64: mx.float64, torch.float32: mx.float32, torch.bfloat16: mx.bfloat16, torch.float16: mx.float16}
WIDTH, DEPTH = 4, 12


@pytest.fixture
def on_the_cpu() -> Iterator[None]:
    """Models are made where float64 is, and torch's seed is the same."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    mx.random.seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    mx.set_default_device(before)


class Stack(nn.Module):
    """An embedding, more than ten layers in a list, and a scale of its own."""

    def __init__(self, vocabulary: int = 7) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, WIDTH)
        self.layers = [nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)]
        self.scale = mx.random.normal((WIDTH,))

    def __call__(self, input_ids: Any, shift: Any = None, *, power: int = 1) -> Any:
        hidden = self.table(input_ids)
        if shift is not None:
            hidden = hidden + shift
        for layer in self.layers:
            hidden = mx.tanh(layer(hidden))
        return (hidden * self.scale) ** power


def stack_in_torch(states: dict[str, torch.Tensor], ids: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
    """What Stack computes, from its tensors by name."""
    hidden = states["table.weight"][ids]
    hidden = hidden if shift is None else hidden + shift
    for number in range(DEPTH):
        hidden = torch.tanh(F.linear(hidden, states[f"layers.{number}.weight"], states[f"layers.{number}.bias"]))
    return hidden * states["scale"]


def double(model: nn.Module) -> Any:
    """The torch module of a model in float64."""
    model.set_dtype(mx.float64)
    return torch_module(model)


def leaves(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the parameters by name, each a leaf of its own."""
    return {name: parameter.detach().clone().requires_grad_() for name, parameter in module.named_parameters()}


IDS = torch.tensor([[1, 2, 6], [0, 3, 3]])


# What there is


def test_parameters_have_the_models_names_in_the_order_of_their_numbers() -> None:
    model = Stack()
    names = [name for name, _ in torch_module(model).named_parameters()]
    assert set(names) == {name for name, _ in tree_flatten(model.parameters())}
    numbers = [int(name.split(".")[1]) for name in names if name.startswith("layers.")]
    assert numbers == [number for number in range(DEPTH) for _ in ("weight", "bias")]
    module = torch_module(model)
    assert isinstance(module.get_submodule("layers"), torch.nn.ModuleList) and len(module.layers) == DEPTH
    assert [name for name, _ in module.layers.named_children()] == [str(number) for number in range(DEPTH)]
    assert module.layers[10] is module.get_submodule("layers.10")


class Mixed(nn.Module):
    """A float of each dtype, and whole numbers and truth values beside them."""

    def __init__(self) -> None:
        super().__init__()
        for name, dtype in (("wide", mx.float64), ("plain", mx.float32), ("brain", mx.bfloat16), ("half", mx.float16)):
            setattr(self, name, mx.array([1.0, -0.1, 1e-3, 3e4]).astype(dtype))
        self.packed = mx.array([[1, 2], [3, 2**31 + 5]], dtype=mx.uint32)
        self.counts = {"seen": [mx.array([3, -4], dtype=mx.int32)]}
        self.kept = mx.array([True, False])

    def __call__(self) -> Any:
        return self.wide, self.plain, self.brain, self.half, self.packed, self.counts["seen"][0], self.kept


def test_dtypes_and_numbers_are_the_models_and_whole_numbers_are_buffers() -> None:
    model = Mixed()
    module = torch_module(model)
    floats, others = dict(module.named_parameters()), dict(module.named_buffers())
    dtypes = {"wide": torch.float64, "plain": torch.float32, "brain": torch.bfloat16, "half": torch.float16}
    assert {name: tensor.dtype for name, tensor in floats.items()} == dtypes
    assert {name: tensor.dtype for name, tensor in others.items()} == {
        "packed": torch.uint32,
        "counts.seen.0": torch.int32,
        "kept": torch.bool,
    }
    for name, array in tree_flatten(model.parameters()):
        assert torch.equal({**floats, **others}[name].detach(), to_tensor(array)), name
    assert others["packed"].tolist() == [[1, 2], [3, 2**31 + 5]]
    # What goes to the model and comes back is the same to the last bit.
    for output, name in zip(
        module(), ("wide", "plain", "brain", "half", "packed", "counts.seen.0", "kept"), strict=True
    ):
        tensor = {**floats, **others}[name].detach()
        assert output.dtype == tensor.dtype and torch.equal(output.detach(), tensor)


def test_names_of_torchs_own_are_names_as_others() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(2, 2)
            self.float = mx.ones((2,))
            self.type = mx.array([1])

        def __call__(self, values: Any) -> Any:
            return self.model(values) * self.float

    module = torch_module(Named())
    assert {name for name, _ in module.named_parameters()} == {"model.weight", "model.bias", "float"}
    assert {name for name, _ in module.named_buffers()} == {"type"}
    assert module.get_submodule("model").weight.shape == (2, 2)
    module(torch.ones(1, 2)).sum().backward()
    assert dict(module.named_parameters())["float"].grad.any() and module.double().state_dict()["float"].tolist() == [
        1,
        1,
    ]


def test_a_module_is_one_of_its_class_and_has_its_configuration_and_signature() -> None:
    class Configured(Stack):
        def __init__(self, config: Any) -> None:
            super().__init__(config["vocab_size"])
            self.config = config

    cls = torch_class(Configured)
    assert issubclass(cls, torch.nn.Module)
    assert (cls.__name__, cls.__module__) == ("Configured", Configured.__module__)
    module = cls({"vocab_size": 5})
    assert module.config == {"vocab_size": 5} and module.table.weight.shape == (5, WIDTH)
    assert inspect.signature(module.forward) == inspect.signature(Configured.__call__).replace(
        parameters=list(inspect.signature(Configured.__call__).parameters.values())[1:]
    )
    assert not hasattr(torch_module(Stack()), "config")


def test_modes_are_one_on_both_sides() -> None:
    model = Stack().eval()
    module = torch_module(model)
    assert not module.training and not any(part.training for part in module.modules())
    module.train()
    assert model.training and model.layers[11].training and module.layers[11].training
    module.eval()
    assert not model.training and not model.layers[11].training and not module.layers[11].training
    assert torch_module(Stack()).training, "MLX starts in training mode"


def test_a_copy_is_a_model_of_its_own() -> None:
    module = double(Stack())
    before = module(IDS)
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.scale.mul_(2)
    torch.testing.assert_close(other(IDS), 2 * before, rtol=0, atol=0)
    assert torch.equal(module(IDS), before)


def test_a_model_with_a_compiled_function_in_it_is_copied() -> None:
    class Activated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = mx.ones((3,))
            self.activation = nn.gelu  # compiled, and nothing that Python's copy takes

        def __call__(self, values: Any) -> Any:
            return self.activation(values * self.scale)

    module = torch_module(Activated())
    values = torch.tensor([[1.0, 2.0, 3.0]])
    assert torch.equal(copy.deepcopy(module)(values), module(values))


def test_a_model_that_does_not_save_itself_says_so_as_a_torch_module_does() -> None:
    class Plain(nn.Module):
        def __call__(self, values: Any) -> Any:
            return values

    assert not hasattr(torch_module(Plain()), "save_pretrained")


# What changes


def in_place(module: Any) -> None:
    with torch.no_grad():
        module.scale.copy_(torch.full((WIDTH,), 3.0))


def state_dict(module: Any) -> None:
    module.load_state_dict({name: tensor + 1 for name, tensor in module.state_dict().items()})


def new_data(module: Any) -> None:
    module.scale.data = module.scale.data * 2


def step(module: Any) -> None:
    optimiser = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(IDS).square().sum().backward()
    optimiser.step()


def half(module: Any) -> None:
    module.half()


def brain(module: Any) -> None:
    module.to(torch.bfloat16)


@pytest.mark.parametrize("change", [in_place, state_dict, new_data, step, half, brain])
def test_what_torch_changes_reaches_the_model_at_its_next_call(change: Callable[[Any], None]) -> None:
    model = Stack()
    module = torch_module(model)
    before = module(IDS).detach()
    change(module)
    after = module(IDS).detach()
    assert after.dtype != before.dtype or not torch.equal(after, before)
    for name, parameter in module.named_parameters():
        array = dict(tree_flatten(model.parameters()))[name]
        assert torch.equal(to_tensor(array), parameter.detach()) and to_tensor(array).dtype == parameter.dtype, name
    assert after.dtype == module.scale.dtype
    alone = torch_module(Stack())
    alone.to(after.dtype).load_state_dict(module.state_dict())
    assert torch.equal(alone(IDS).detach(), after)


def test_a_model_is_handed_only_what_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch_module(Stack())
    module(IDS)
    handed: list[torch.Tensor] = []
    monkeypatch.setattr(mlx_module, "to_array", lambda tensor: handed.append(tensor) or to_array(tensor))
    in_place(module)
    module(IDS)
    assert [tuple(tensor.shape) for tensor in handed] == [(WIDTH,), tuple(IDS.shape)]


# What goes in and comes out


@dataclasses.dataclass
class Output:
    first: Any
    rest: Any
    count: Any
    absent: Any = None
    said: str = "so"


class Pair(NamedTuple):
    one: Any
    other: Any


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = mx.array([2.0, 3.0])

    def __call__(self, values: Any, more: Any) -> Any:
        scaled = values * self.factor
        rest = (scaled + 1, None, {"third": [more["deep"][0] * 3, "word"]}, Pair(scaled - 1, 7))
        return Output(first=scaled, rest=rest, count=mx.array([2, 5]))


def test_nested_inputs_and_outputs_keep_their_form_and_gradients() -> None:
    values, deep = torch.tensor([1.0, -1.0], requires_grad=True), torch.tensor([4.0], requires_grad=True)
    module = torch_module(Nested())
    output = module(values, more={"deep": (deep, None)})
    assert isinstance(output.rest, tuple) and output.rest[1] is None and output.rest[2]["third"][1] == "word"
    assert isinstance(output.rest[3], Pair) and output.rest[3].other == 7
    assert output.absent is None and output.said == "so"
    for tensor, expected in (
        (output.first, [2.0, -3.0]),
        (output.rest[0], [3.0, -2.0]),
        (output.rest[2]["third"][0], [12.0]),
        (output.rest[3].one, [1.0, -4.0]),
        (output.count, [2, 5]),
    ):
        assert tensor.tolist() == expected
    assert not output.count.requires_grad and output.count.dtype == torch.int32
    third = output.rest[2]["third"][0].sum()
    (output.first.sum() + 10 * output.rest[0].sum() + 100 * output.rest[3].one[0] + third).backward()
    assert values.grad is not None and values.grad.tolist() == [222.0, 33.0]
    assert deep.grad is not None and deep.grad.tolist() == [3.0]
    assert module.factor.grad.tolist() == [111.0, -11.0]


def test_whole_numbers_go_in_as_int32_and_the_rest_as_it_is() -> None:
    seen: list[Any] = []

    class Asking(nn.Module):
        def __call__(self, *values: Any) -> Any:
            seen.extend(value.dtype for value in values)
            return values[0]

    torch_module(Asking())(
        IDS, IDS.int(), IDS > 2, IDS.to(torch.uint8), *(torch.ones(2, dtype=dtype) for dtype in FLOATS)
    )
    assert seen == [mx.int32, mx.int32, mx.bool_, mx.uint8, *FLOATS.values()]


def test_the_caller_keeps_what_it_gave() -> None:
    class Writing(nn.Module):
        def __call__(self, values: Any) -> Any:
            values[0] = 9
            return values

    given = torch.zeros(2)
    assert torch_module(Writing())(given).tolist() == [9.0, 0.0]
    assert given.tolist() == [0.0, 0.0]


# Gradients


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_are_those_of_torch_of_parameters_and_of_floating_inputs(dtype: torch.dtype) -> None:
    model = Stack()
    model.set_dtype(FLOATS[dtype])
    module = torch_module(model)
    shift = torch.randn(2, 3, WIDTH, dtype=dtype, requires_grad=True)
    weights = torch.randn(2, 3, WIDTH, dtype=dtype)
    (module(IDS, shift=shift) * weights).sum().backward()
    states, again = leaves(module), shift.detach().clone().requires_grad_()
    output = stack_in_torch(states, IDS, again)
    torch.testing.assert_close(module(IDS, shift).detach(), output.detach())
    (output * weights).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == dtype, name
        torch.testing.assert_close(parameter.grad, states[name].grad, msg=lambda said, name=name: f"{name}: {said}")
        assert parameter.grad.any(), name
    torch.testing.assert_close(shift.grad, again.grad)


def test_gradients_of_two_calls_add_up() -> None:
    module = double(Stack())
    module(IDS).sum().backward()
    once = module.scale.grad.clone()
    module(IDS).sum().backward()
    torch.testing.assert_close(module.scale.grad, 2 * once, rtol=0, atol=0)


def test_a_call_with_other_weights_afterwards_leaves_the_gradients_of_the_first() -> None:
    module, expected = double(Stack()), None
    output = module(IDS)
    states = leaves(module)
    stack_in_torch(states, IDS, None).square().sum().backward()
    expected = states["scale"].grad
    shift = torch.ones(2, 3, WIDTH, dtype=torch.float64)
    module(IDS, shift)
    output.square().sum().backward()
    torch.testing.assert_close(module.scale.grad, expected)


def test_frozen_parameters_get_none() -> None:
    model = Stack()
    model.layers[10].freeze()
    module = double(model)
    module.table.weight.requires_grad_(False)
    module(IDS).sum().backward()
    without = {name for name, parameter in module.named_parameters() if parameter.grad is None}
    assert without == {"layers.10.weight", "layers.10.bias", "table.weight"}
    assert module.layers[9].weight.grad.any(), "what lies before a frozen part learns"


def test_the_model_is_left_without_traces() -> None:
    model = Stack()
    module = double(model)
    before = {name: to_tensor(array) for name, array in tree_flatten(model.parameters())}
    output = module(IDS)
    output.sum().backward()
    after = dict(tree_flatten(model.parameters()))
    assert all(torch.equal(to_tensor(after[name]), tensor) for name, tensor in before.items())
    assert torch.equal(to_tensor(model(mx.array(IDS.tolist()))), output.detach())


def test_without_gradients_nothing_is_recorded() -> None:
    module = torch_module(Stack())
    with torch.no_grad():
        assert not module(IDS).requires_grad
    assert module(IDS).requires_grad


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.factor = mx.array(1.0)

    def __call__(self, values: Any) -> Any:
        return self.dropout(values * self.factor)


def test_the_second_pass_drops_what_the_first_dropped() -> None:
    module = torch_module(Dropping()).train()
    values = torch.ones(64, requires_grad=True)
    output = module(values)
    module(values)  # a call between draws from MLX's generator
    output.sum().backward()
    assert values.grad is not None and torch.equal(values.grad, output.detach())
    assert 0 < int((output == 0).sum()) < 64
    assert module.factor.grad == output.detach().sum()


def test_torchs_seed_says_what_is_dropped_in_training_alone() -> None:
    module, values = torch_module(Dropping()).train(), torch.ones(64)
    first, second = module(values), module(values)
    torch.manual_seed(0)
    assert torch.equal(module(values), first) and not torch.equal(first, second)
    state = torch.get_rng_state()
    assert torch.equal(module.eval()(values), values)
    assert torch.equal(torch.get_rng_state(), state), "evaluation draws nothing"


# Hooks


class Parted(nn.Module):
    """A part that is called with and without keywords, whose output may be a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.last = nn.Linear(2, 2, bias=False)
        self.last.weight = mx.eye(2)

    def __call__(self, values: Any) -> Any:
        scaled, ids = self.inner(values, mx.array([1, 2]), shift=values * 0)
        return self.last(scaled), ids


class Inner(nn.Module):
    def __call__(self, values: Any, ids: Any, shift: Any = None) -> Any:
        return values * 2 + shift, ids


class TorchInner(torch.nn.Module):
    def forward(self, values: Any, ids: Any, shift: Any = None) -> Any:
        return values * 2 + shift, ids


class TorchParted(torch.nn.Module):
    """The same in torch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TorchInner()
        self.last = torch.nn.Linear(2, 2, bias=False)
        torch.nn.init.eye_(self.last.weight)

    def forward(self, values: Any) -> Any:
        scaled, ids = self.inner(values, torch.tensor([1, 2], dtype=torch.int32), shift=values * 0)
        return self.last(scaled), ids


HOOKS: dict[str, Callable[[Any, list[Any]], Any]] = {
    "sees": lambda inner, seen: inner.register_forward_hook(lambda _, args, output: seen.append((args, output))),
    "sees keywords": lambda inner, seen: inner.register_forward_hook(
        lambda _, args, kwargs, output: seen.append((args, kwargs, output)), with_kwargs=True
    ),
    "sees before": lambda inner, seen: inner.register_forward_pre_hook(lambda _, args: seen.append(args)),
    "sees keywords before": lambda inner, seen: inner.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    ),
    "replaces": lambda inner, seen: inner.register_forward_hook(lambda _, args, output: (output[0] + 5, output[1] * 2)),
    "replaces before": lambda inner, seen: inner.register_forward_pre_hook(lambda _, args: (args[0] + 5, args[1] * 2)),
    "replaces keywords before": lambda inner, seen: inner.register_forward_pre_hook(
        lambda _, args, kwargs: ((args[0] + 5, args[1].long()), {"shift": kwargs["shift"] + 1}), with_kwargs=True
    ),
}


@pytest.mark.parametrize("names", [[name] for name in HOOKS] + [list(HOOKS), list(reversed(HOOKS))], ids=str)
def test_hooks_see_and_replace_as_torchs_do(names: list[str]) -> None:
    values = torch.tensor([[1.0, -2.0]])
    outcomes = []
    for model in (torch_module(Parted()), TorchParted()):
        seen: list[Any] = []
        for name in names:
            HOOKS[name](model.inner, seen)
        with torch.no_grad():
            scaled, ids = model(values)
        assert ids.dtype == torch.int32 or isinstance(model, TorchParted)
        outcomes.append((scaled.tolist(), ids.tolist(), plain(seen)))
    assert outcomes[0] == outcomes[1]


def test_a_hook_may_replace_the_only_input_and_an_output_that_is_no_tuple() -> None:
    values = torch.tensor([[1.0, -2.0]])
    outcomes = []
    for model in (torch_module(Parted()), TorchParted()):
        model.last.register_forward_pre_hook(lambda _, args: args[0] * 3)
        model.last.register_forward_hook(lambda _, args, output: output - args[0] / 3)
        with torch.no_grad():
            outcomes.append(model(values)[0].tolist())
    assert outcomes[0] == outcomes[1] == [[4.0, -8.0]]


def plain(value: Any) -> Any:
    """Lists in place of tensors."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, tuple | list):
        return [plain(entry) for entry in value]
    return {name: plain(entry) for name, entry in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_leave_the_model_as_it_was(register: str) -> None:
    model = Parted()
    module, seen = torch_module(model), []
    handle = getattr(module.inner, register)(lambda *given: seen.append(type(model.inner)) or None)
    module(torch.ones(1, 2))
    assert len(seen) == 1 and seen[0] is not Inner and issubclass(seen[0], Inner)
    assert type(model.inner) is Inner, "between calls too"
    handle.remove()
    module(torch.ones(1, 2))
    assert len(seen) == 1 and type(model.inner) is Inner


def test_a_part_in_two_places_is_left_as_it_was() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = self.other = nn.Linear(2, 2)

        def __call__(self, values: Any) -> Any:
            return self.one(values)

    model = Twice()
    module = torch_module(model)
    for place in (module.one, module.other):
        place.register_forward_hook(lambda *_: None)
    module(torch.ones(1, 2))
    assert type(model.one) is nn.Linear


def test_a_part_that_raises_is_left_as_it_was() -> None:
    model = Parted()
    module = torch_module(model)

    def refuse(*_: Any) -> None:
        raise KeyError("no")

    module.inner.register_forward_hook(refuse)
    with pytest.raises(KeyError, match="no"):
        module(torch.ones(1, 2))
    assert type(model.inner) is Inner


@pytest.mark.parametrize("name", [name for name in HOOKS if name.startswith("replaces")])
def test_no_gradient_is_made_up_where_a_hook_replaced_something(name: str) -> None:
    module = torch_module(Parted())
    for other in HOOKS:
        if other.startswith("sees"):
            HOOKS[other](module.inner, [])
    module(torch.ones(1, 2))[0].sum().backward()
    assert module.last.weight.grad.any(), "hooks that only look do not matter"
    HOOKS[name](module.inner, [])
    output = module(torch.ones(1, 2))[0]
    with pytest.raises(RuntimeError, match="a hook replaced what 'inner' takes or gives") as caught:
        output.sum().backward()
    assert "\n" not in str(caught.value)


# Files


class Saved(Stack):
    """A Stack with files of its own."""

    def __init__(self, config: dict[str, int]) -> None:
        super().__init__(config["vocabulary"])
        self.config = config

    def save_pretrained(self, directory: str, *, name: str = "weights.safetensors") -> None:
        (Path(directory) / "config.json").write_text(json.dumps(self.config))
        mx.save_safetensors(str(Path(directory) / name), dict(tree_flatten(self.parameters())))

    @classmethod
    def from_pretrained(cls, directory: str, *, dtype: Any = None, deep: bool = False) -> Saved:
        model = cls(json.loads((Path(directory) / "config.json").read_text()))
        model.update(tree_unflatten(list(mx.load(str(Path(directory) / "weights.safetensors")).items())))
        if dtype is not None:
            assert isinstance(dtype, mx.Dtype)
            model.set_dtype(dtype)
        return model.eval()


def test_what_torch_has_now_is_saved(tmp_path: Path) -> None:
    module = torch_class(Saved)({"vocabulary": 5})
    in_place(module)
    module.save_pretrained(str(tmp_path), name="weights.safetensors")
    assert mx.load(str(tmp_path / "weights.safetensors"))["scale"].tolist() == [3.0] * WIDTH
    again = torch_class(Saved).from_pretrained(str(tmp_path))
    assert isinstance(again, torch.nn.Module) and type(again).__name__ == "Saved" and not again.training
    assert again.config == {"vocabulary": 5}
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in module.state_dict().items())


def test_loading_takes_torchs_dtypes_and_auto_and_tells_of_nothing_missing(tmp_path: Path) -> None:
    cls = torch_class(Saved)
    cls({"vocabulary": 5}).to(torch.float16).save_pretrained(str(tmp_path))
    for given, expected in (
        ({}, torch.float16),
        ({"dtype": "auto"}, torch.float16),
        *(({"dtype": dtype}, dtype) for dtype in FLOATS if dtype != torch.float64),
    ):
        module = cls.from_pretrained(str(tmp_path), **given)
        assert {parameter.dtype for parameter in module.parameters()} == {expected}, given
    module, said = cls.from_pretrained(str(tmp_path), dtype=torch.bfloat16, output_loading_info=True)
    assert isinstance(module, cls.__base__) and not any(said.values())
    assert module.scale.dtype == torch.bfloat16


# Parts in float32


class Activated(nn.Module):
    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function
        self.layer = nn.Linear(8, 8)

    def __call__(self, values: Any) -> Any:
        return self.function(self.layer(values))


@pytest.mark.parametrize(
    ("function", "narrow"),
    [
        (lambda values: values * mx.tanh(values), False),
        (lambda values: values * (1 + values / (1 + values * values)), False),
        (lambda values: values * mx.erf(values), True),
        (nn.gelu, True),
        (lambda values: mx.tanh(values.astype(mx.float32)).astype(mx.float64), True),
        (lambda values: values + mx.softmax(values.astype(mx.float32), axis=-1).astype(mx.float64), True),
    ],
    ids=["tanh", "fraction", "erf", "gelu", "tanh in float32", "softmax in float32"],
)
@pytest.mark.parametrize("seed", range(4))
def test_a_part_that_is_as_accurate_as_float32_is_recognised(
    function: Callable[[Any], Any], narrow: bool, seed: int
) -> None:
    mx.random.seed(seed)
    module = double(Activated(function))
    values = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert mlx_module.float32_inside(module, lambda: module(values)) is narrow
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items())
    assert torch.equal(module(values), module(values))
