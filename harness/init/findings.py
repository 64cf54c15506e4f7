# SPDX-License-Identifier: Apache-2.0
"""What the classes and functions of a repository look like: models, configurations, converters, losses."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
from collections.abc import Iterator, Sequence

from harness.init.sources import (
    Definition,
    Repository,
    Source,
    definitions,
    find,
    foreign,
    is_test,
    last_name,
    lineage,
    method,
    reached,
)

PRETRAINED_CONFIG = ("PretrainedConfig", "PreTrainedConfig")
PATH_WORDS = {"path", "ckpt", "checkpoint", "file", "filename"}
IN_WORDS = {"ckpt", "checkpoint", "in", "input", "source", "src", "path", "file", "from"}
OUT_WORDS = {"out", "output", "dest", "destination", "save", "dir", "to", "target", "dump"}
READERS = {"safe_open", "load_file", "load_checkpoint", "torch_load"}
LOSSES = {"cross_entropy", "CrossEntropyLoss", "nll_loss", "NLLLoss"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    """The convention of a forward's labels, as far as it can be seen, and by what."""

    labels: str
    ignore_index: int | None
    why: str


def classes(repository: Repository) -> list[Definition]:
    """Every class of the repository's own code."""
    found = []
    for path, source in repository.sources.items():
        if not is_test(path):
            found += [each for each in definitions(source) if isinstance(each.node, ast.ClassDef)]
    return found


def is_config(repository: Repository, cls: Definition) -> bool:
    """Whether something defined is a Hugging Face configuration or a dataclass."""
    if not isinstance(cls.node, ast.ClassDef):
        return False
    own, elsewhere = lineage(repository, cls)
    if any(name in PRETRAINED_CONFIG or name.endswith("Config") for name in elsewhere):
        return True
    return any(last_name(mark) == "dataclass" for each in own for mark in _class(each).decorator_list)


def is_hugging_face(repository: Repository, cls: Definition) -> bool:
    """Whether a model inherits from a Hugging Face one."""
    endings = ("PreTrainedModel", "LMHeadModel", "ForCausalLM", "ForMaskedLM")
    return any(name.endswith(endings) for name in lineage(repository, cls)[1])


def is_model(repository: Repository, cls: Definition) -> bool:
    """Whether a class is a module that can be built from a configuration alone."""
    if not is_hugging_face(repository, cls) and "Module" not in lineage(repository, cls)[1]:
        return False
    constructor = method(repository, cls, "__init__")
    if constructor is None:
        return is_hugging_face(repository, cls)
    names = parameters(constructor.node, required=True)
    call = "__call__" if framework(cls) == "mlx" else "forward"
    return len(names) == 1 and (method(repository, cls, call) is not None or is_hugging_face(repository, cls))


def framework(model: Definition) -> str:
    """What a model is written in, as families have it: `mlx` where its file imports that."""
    packages = {module.partition(".")[0] for module, _ in model.source.imports.values()}
    return "mlx" if "mlx" in packages else "transformers"


def heads(repository: Repository) -> list[Definition]:
    """The models of a repository that are neither a part of another nor the base of another."""
    models = [cls for cls in classes(repository) if is_model(repository, cls)]
    inner: set[Definition] = set()
    for cls in classes(repository):
        inner.update(lineage(repository, cls)[0][1:])
        constructor = method(repository, cls, "__init__")
        outer = is_hugging_face(repository, cls)
        if constructor is None or not (outer or "Module" in lineage(repository, cls)[1]):
            continue
        for call in (node for node in ast.walk(constructor.node) if isinstance(node, ast.Call)):
            part = find(repository, constructor.source, last_name(call))
            # A Hugging Face model inside a plain module is a port with a wrapper around it.
            if part is not None and part != cls and (outer or not is_hugging_face(repository, part)):
                inner.add(part)
    return [model for model in models if model not in inner]


def auto_class(model: Definition) -> str | None:
    """The Auto class that a model's file registers it for."""
    for call in model.source.calls.get("register_for_auto_class", ()):
        if isinstance(call.func, ast.Attribute) and last_name(call.func.value) == model.name and call.args:
            return _text(call.args[0]) or None
    for call in model.source.calls.get("register", ()):
        if isinstance(call.func, ast.Attribute) and call.args and last_name(call.args[-1]) == model.name:
            return last_name(call.func.value) or None
    return None


def parameters(function: ast.AST, *, required: bool = False) -> list[str]:
    """Names of a function's parameters, `self` and `cls` left out; the positional ones without default on request."""
    if not isinstance(function, ast.FunctionDef):
        return []
    positional = [*function.args.posonlyargs, *function.args.args]
    if positional and positional[0].arg in ("self", "cls"):
        positional = positional[1:]
    if required:
        positional = positional[: len(positional) - min(len(function.args.defaults), len(positional))]
        return [argument.arg for argument in positional]
    return [argument.arg for argument in (*positional, *function.args.kwonlyargs)]


def takes(function: Definition, name: str) -> bool:
    """Whether a forward takes an argument: by name, or because it passes its further keywords on."""
    node = function.node
    if name in parameters(node):
        return True
    rest = node.args.kwarg.arg if isinstance(node, ast.FunctionDef) and node.args.kwarg else None
    return rest is not None and any(isinstance(each, ast.Name) and each.id == rest for each in ast.walk(node))


def declared_fields(repository: Repository, cls: Definition) -> list[str]:
    """What a configuration class takes: constructor's parameters, annotated fields and keys of its attribute_map."""
    found: list[str] = []
    for each in lineage(repository, cls)[0]:
        for node in _class(each).body:
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                found += parameters(node)
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
                names = [target.id for target in targets if isinstance(target, ast.Name)]
                if "attribute_map" in names and isinstance(node.value, ast.Dict):
                    found += [text for key in node.value.keys if (text := _text(key))]
                elif isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.dump(node.annotation):
                    found += names
    return [name for name in dict.fromkeys(found) if not name.startswith("_")]


def named_config(repository: Repository, model: Definition) -> tuple[Definition | None, str | None]:
    """The configuration class that a model names: its definition here, or else its spec elsewhere.

    Looks at `config_class`, at the annotation of the constructor's parameter, and at `cls(Config(...))`.
    """
    for each in lineage(repository, model)[0]:
        for node in _class(each).body:
            if isinstance(node, ast.AnnAssign | ast.Assign):
                targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
                name = last_name(node.value) if node.value is not None else ""
                if name and any(isinstance(target, ast.Name) and target.id == "config_class" for target in targets):
                    found = find(repository, each.source, name)
                    return found, None if found else foreign(each.source, name)
    constructor = method(repository, model, "__init__")
    if constructor is not None and isinstance(constructor.node, ast.FunctionDef):
        for argument in constructor.node.args.args:
            found = find(repository, constructor.source, last_name(argument.annotation or ast.Name(id="")))
            if found is not None and is_config(repository, found):
                return found, None
    for call in (*model.source.calls.get("cls", ()), *model.source.calls.get(model.name, ())):
        if len(call.args) == 1 and isinstance(call.args[0], ast.Call):
            found = find(repository, model.source, last_name(call.args[0]))
            if found is not None and is_config(repository, found):
                return found, None
    return None, None


def translated_fields(repository: Repository, config_name: str, fields: Sequence[str]) -> dict[str, str]:
    """Field of the original -> keyword that the repository's own code gives it by: `Config(width=a["n_embd"])`."""
    found: dict[str, str] = {}
    for source in repository.sources.values():
        for call in source.calls.get(config_name, ()):
            for keyword in call.keywords:
                named = {field for field in fields if field in _words(keyword.value)}
                if keyword.arg and len(named) == 1:
                    found.setdefault(named.pop(), keyword.arg)
    return found


def _words(expression: ast.AST) -> set[str]:
    """Texts and attributes that an expression reads."""
    nodes = list(ast.walk(expression))
    texts = {text for node in nodes if (text := _text(node))}
    return texts | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


# Converters


def reads_files(repository: Repository, function: Definition, owner: Definition | None = None) -> bool:
    """Whether a function loads tensors from a file, itself or by another of the repository."""
    for each in reached(repository, function, owner=owner):
        for call in (node for node in ast.walk(each.node) if isinstance(node, ast.Call)):
            is_load = isinstance(call.func, ast.Attribute) and ast.unparse(call.func) in ("torch.load", "mx.load")
            if is_load or last_name(call) in READERS:
                return True
    return False


def takes_a_path(function: ast.FunctionDef) -> bool:
    """Whether the one thing a function needs is the path of a file."""
    needed = parameters(function, required=True)
    if len(needed) != 1 or any(default is None for default in function.args.kw_defaults):
        return False
    every = [*function.args.posonlyargs, *function.args.args]
    annotation = next((a.annotation for a in every if a.arg == needed[0]), None)
    named = {"path", "pathlike"} & set(re.split(r"\W+", ast.unparse(annotation).lower())) if annotation else set()
    return bool(named or PATH_WORDS & set(needed[0].lower().split("_")))


def converters(repository: Repository, model: Definition) -> list[str]:
    """What may stand after `checkpoint:` for a model, the likeliest first: its classmethods, then functions."""
    methods: list[str] = []
    near: list[str] = []
    far: list[str] = []
    for cls in lineage(repository, model)[0]:
        for node in _class(cls).body:
            if not isinstance(node, ast.FunctionDef) or node.name == "from_pretrained" or not takes_a_path(node):
                continue
            bound = {last_name(mark) for mark in node.decorator_list} & {"classmethod", "staticmethod"}
            if bound and reads_files(repository, Definition(source=cls.source, node=node), model):
                methods.append(f"{model.name}.{node.name}")
    for path, source in repository.sources.items():
        for function in definitions(source) if not is_test(path) else ():
            if not isinstance(function.node, ast.FunctionDef) or not takes_a_path(function.node):
                continue
            if model in _built(repository, function) and reads_files(repository, function):
                same = path == model.source.path
                (near if same else far).append(function.name if same else function.spec)
    return [*methods, *near, *far]


def _built(repository: Repository, function: Definition) -> Iterator[Definition]:
    """Classes of the repository that a function calls, or calls a method of."""
    for each in reached(repository, function):
        for call in (node for node in ast.walk(each.node) if isinstance(node, ast.Call)):
            owner = call.func.value if isinstance(call.func, ast.Attribute) else call.func
            found = find(repository, each.source, owner.id) if isinstance(owner, ast.Name) else None
            if found is not None:
                yield found


def overrides_from_pretrained(repository: Repository, model: Definition) -> bool:
    """Whether a model has a `from_pretrained` of its own."""
    return method(repository, model, "from_pretrained") is not None


def scripts(repository: Repository) -> list[Source]:
    """Programs that read a file of tensors, take arguments, and save a Hugging Face directory."""
    found = []
    for path, source in repository.sources.items():
        text = source.text
        is_program = "sys.argv" in text or "ArgumentParser" in text
        reads = "torch.load" in text or any(f"{reader}(" in text for reader in READERS)
        if is_program and reads and ".save_pretrained(" in text and not is_test(path):
            found.append(source)
    return found


def command_line(script: Source) -> str | None:
    """How a converter program is called, with {checkpoint} and {out}; None when its arguments say something else."""
    positional: list[str] = []
    options: list[tuple[str, str]] = []
    for call in script.calls.get("add_argument", ()):
        names = [text for argument in call.args if (text := _text(argument))]
        if not names:
            continue
        name = next((name for name in names if name.startswith("--")), names[0])
        words = set(re.split(r"[-_]+", name.lower().strip("-")))
        place = "{out}" if words & OUT_WORDS else "{checkpoint}" if words & IN_WORDS else ""
        if not name.startswith("-"):
            positional.append(place)
        elif place:
            options.append((name, place))
        elif any(k.arg == "required" and isinstance(k.value, ast.Constant) and k.value.value for k in call.keywords):
            return None
    if "add_argument" not in script.calls or positional == ["", ""]:
        positional = ["{checkpoint}", "{out}"]
    parts = [*positional, *(part for option in options for part in option)]
    if sorted(part for part in parts if part.startswith("{")) != ["{checkpoint}", "{out}"] or "" in positional:
        return None
    return " ".join(["python", shlex.quote(str(script.path)), *parts])


# Losses


def loss_convention(repository: Repository, model: Definition) -> Loss | None:
    """How a model takes its labels, from the code of its forward; None when no loss is seen there."""
    forward = method(repository, model, "forward")
    if forward is None:
        return Loss(labels="hf", ignore_index=None, why="forward is inherited from transformers")
    functions = reached(repository, forward, owner=model)
    nodes = [node for function in functions for node in ast.walk(function.node)]
    if any(isinstance(node, ast.Attribute) and node.attr == "loss_function" for node in nodes):
        return Loss(labels="hf", ignore_index=None, why="forward calls transformers' loss_function")
    calls = [node for node in nodes if isinstance(node, ast.Call) and not isinstance(node.func, ast.Call)]
    losses = [call for call in calls if last_name(call) in LOSSES]
    if not losses:
        return None
    ignored = {_ignored(repository, call, functions) for call in losses}
    index = ignored.pop() if len(ignored) == 1 else None
    if any(isinstance(node, ast.Subscript) and _is_shift(node) for node in nodes):
        return Loss(labels="hf", ignore_index=None if index == -100 else index, why="forward shifts the labels")
    return Loss(labels="preshifted", ignore_index=None if index == -1 else index, why="forward does not shift labels")


def _is_shift(node: ast.Subscript) -> bool:
    """`labels[:, 1:]`, or `logits[:, :-1]`."""
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    of = ast.unparse(node.value).lower()
    for part in parts:
        if isinstance(part, ast.Slice) and part.step is None:
            low, high = (None if end is None else ast.unparse(end) for end in (part.lower, part.upper))
            if (low == "1" and high is None and ("label" in of or "target" in of)) or (
                low is None and high == "-1" and "logit" in of
            ):
                return True
    return False


def _ignored(repository: Repository, call: ast.Call, functions: Sequence[Definition]) -> int | None:
    """The label that a cross-entropy leaves out; None when it is not a constant."""
    given = next((keyword.value for keyword in call.keywords if keyword.arg == "ignore_index"), None)
    if given is None:
        return -100
    for function in functions:
        if call in ast.walk(function.node):
            return _constant(given, function)
    return None


def _constant(value: ast.AST, function: Definition, *, steps: int = 3) -> int | None:
    """A whole number, written out or behind the name of a parameter's default or of a constant of the file."""
    if isinstance(value, ast.Name) and isinstance(function.node, ast.FunctionDef) and steps:
        arguments = function.node.args
        positional = [*arguments.posonlyargs, *arguments.args]
        named = dict(zip(reversed([a.arg for a in positional]), reversed(arguments.defaults), strict=False))
        named |= {a.arg: d for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is not None}
        for node in function.source.tree.body:
            for target in node.targets if isinstance(node, ast.Assign) else ():
                if isinstance(target, ast.Name) and isinstance(node, ast.Assign):
                    named.setdefault(target.id, node.value)
        return _constant(named[value.id], function, steps=steps - 1) if value.id in named else None
    try:
        number = ast.literal_eval(value)
    except (ValueError, TypeError):
        return None
    return number if isinstance(number, int) and not isinstance(number, bool) else None


def registered_families(repository: Repository) -> list[str]:
    """Names in `Family(name="...")` calls of files that call register_family or define a family."""
    found: dict[str, None] = {}
    for source in repository.sources.values():
        for call in source.calls.get("Family", ()):
            found |= {text: None for k in call.keywords if k.arg == "name" and (text := _text(k.value))}
    return list(found)


def model_type(repository: Repository, cls: Definition) -> str | None:
    """The `model_type` of a configuration class."""
    for node in _class(cls).body:
        if isinstance(node, ast.AnnAssign | ast.Assign):
            targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
            if any(isinstance(target, ast.Name) and target.id == "model_type" for target in targets):
                return _text(node.value) or None
    return None


def is_set(lineage_of: Sequence[Definition], name: str) -> bool:
    """Whether a class or an ancestor sets an attribute to true."""
    for cls in lineage_of:
        for node in _class(cls).body:
            if isinstance(node, ast.Assign) and name in [last_name(target) for target in node.targets]:
                return isinstance(node.value, ast.Constant) and bool(node.value.value)
    return False


def _class(definition: Definition) -> ast.ClassDef:
    assert isinstance(definition.node, ast.ClassDef)
    return definition.node


def _text(node: ast.AST | None) -> str:
    """A text that is written out, or nothing."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
