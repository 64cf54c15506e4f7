# SPDX-License-Identifier: Apache-2.0
"""What a port is, as data: reading its description, checking it, and finding the classes it names."""

from __future__ import annotations

import ast
import dataclasses
import fnmatch
import hashlib
import importlib
import importlib.util
import shlex
import sys
import tomllib
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from harness.errors import DescriptionError, Mismatch
from harness.families import Family, find_family, nearest

_changed_by_import: dict[tuple[str, Path], list[str]] = {}

LOADERS = ("state_dict", "checkpoint", "pretrained", "command")
LABELS = ("hf", "preshifted")

MEANINGS = {
    "name": "what reports call the port",
    "family": "the model that is ported, one of those that `parity list` names",
    "model": "the port's class",
    "config": "the port's configuration class",
    "load": "how the original's weights get into the port",
    "code": "the files that must travel with a saved checkpoint",
    "config_map": "fields of the original that go by another name in the port's configuration",
    "original": "the class that is the truth instead of the family's own",
    "labels": "who shifts the labels: the model (hf) or the caller (preshifted)",
    "ignore_index": "the label that the port's loss leaves out",
    "lacks": "checks of what the port does without, each with the reason",
    "xfail": "checks that are expected to fail, each with the reason",
    "min_checks": "how many checks have to run at least",
}
"""What each key of a port's table says, for messages about it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Port:
    """One implementation under test, as its repository describes it.

    name, family: how reports call it, and the family it ports.
    model, config: `file.py:Class` (relative to `root`) or `package.module:Class`.
    load: how the original's weights get in: `state_dict`, `checkpoint:CALLABLE` (a function or classmethod given the
        path of the original's own file), `pretrained`, or `command:TEMPLATE` with `{checkpoint}` and `{out}`.
    code: files that must travel with a saved checkpoint; the files of `model` and `config` when empty.
    config_map: field of the original -> field of the port, only what the family does not already know.
    original: gate against this class (`file.py:Class`) instead of the family's built-in original.
    labels, ignore_index: the port's convention, `hf` (shifted inside, -100) or `preshifted` (-1).
    lacks: check pattern -> why the port does not have what its family has; such checks are skipped.
    xfail: check pattern -> why it is expected to fail; one that passes is a failure.
    min_checks: fewer checks run than this is a failure.
    root: the directory paths are relative to.
    """

    name: str
    family: str
    model: str
    config: str
    load: str = "state_dict"
    code: Sequence[str] = ()
    config_map: Mapping[str, str] = dataclasses.field(default_factory=dict)
    original: str | None = None
    labels: Literal["hf", "preshifted"] = "hf"
    ignore_index: int | None = None
    lacks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    xfail: Mapping[str, str] = dataclasses.field(default_factory=dict)
    min_checks: int = 0
    root: Path = dataclasses.field(default_factory=Path.cwd)

    def __post_init__(self) -> None:
        for key in MEANINGS:
            problem = _problem(self, key)
            if problem:
                raise DescriptionError(f"port '{self.name}': {problem} ({key}: {MEANINGS[key]})")

    @property
    def loader(self) -> str:
        """The kind of `load`: the word before its colon."""
        return self.load.partition(":")[0]

    @property
    def ignored_label(self) -> int:
        """The label value the port's loss leaves out."""
        if self.ignore_index is not None:
            return self.ignore_index
        return -100 if self.labels == "hf" else -1


def _problem(port: Port, key: str) -> str | None:
    """What is wrong with the value of a key, and what was expected."""
    value = getattr(port, key)
    if key in ("name", "family", "model", "config", "load") and (not isinstance(value, str) or not value):
        return f"{key} must be a non-empty string, not {value!r}"
    if key in ("model", "config", "original") and value is not None and not _is_spec(value):
        return f"{key} = {value!r} must read 'file.py:Class' or 'package.module:Class'"
    if key == "load":
        return _load_problem(value)
    if key == "labels" and value not in LABELS:
        return f"labels must be 'hf' or 'preshifted', not {value!r}{nearest(str(value), LABELS)}"
    if key in ("lacks", "xfail", "config_map"):
        return _table_problem(key, value)
    if key == "code" and (not isinstance(value, list | tuple) or not all(isinstance(file, str) for file in value)):
        return f"code must be a list of file names, not {value!r}"
    if key == "min_checks" and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        return f"min_checks must be a count of checks, not {value!r}"
    if key == "ignore_index" and value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        return f"ignore_index must be a whole number, not {value!r}"
    return None


def _load_problem(load: str) -> str | None:
    loader, _, rest = load.partition(":")
    if loader not in LOADERS:
        return f"load = {load!r} is not one of {', '.join(LOADERS)}{nearest(loader, LOADERS)}"
    if loader in ("state_dict", "pretrained") and rest:
        return f"load = {load!r}: '{loader}' takes nothing after a colon; to call a converter: 'checkpoint:{rest}'"
    if loader in ("checkpoint", "command") and not rest:
        return f"load = {load!r} needs what to call after the colon, such as '{loader}:...'"
    if loader == "command" and not _is_template(rest):
        return (
            f"load = {load!r} must be a command line with {{checkpoint}} and {{out}} in it,"
            " nothing else in braces, and every quotation mark closed"
        )
    return None


def _table_problem(key: str, table: Any) -> str | None:
    meaning = "a field of the port" if key == "config_map" else "a reason"
    if not isinstance(table, Mapping):
        return f"{key} must be a table, with {meaning} for each entry, not {table!r}"
    for entry, value in table.items():
        if not isinstance(value, str) or not value.strip():
            return f"{key}: '{entry}' needs {meaning}, a non-empty string, not {value!r}"
    return None


def _is_template(text: str) -> bool:
    try:
        text.format(checkpoint="", out="")
        shlex.split(text)
    except (KeyError, IndexError, ValueError, AttributeError):
        return False
    return "{checkpoint}" in text and "{out}" in text


def _is_spec(spec: Any) -> bool:
    if not isinstance(spec, str):
        return False
    place, _, name = spec.rpartition(":")
    is_module = all(part.isidentifier() for part in place.split("."))
    return (place.endswith(".py") or is_module) and all(part.isidentifier() for part in name.split("."))


def parse_ports(table: Mapping[str, Any], *, root: Path, file: str) -> tuple[Port, ...]:
    """The ports of one `[tool.parity]` table. Raises DescriptionError that names the file, the port and the key."""
    if not isinstance(table, Mapping):
        raise DescriptionError(f"{file}: tool.parity must be a table, not {table!r}")
    unknown = sorted(set(table) - {"port"})
    if unknown:
        raise DescriptionError(f"{file}: [tool.parity] has no key '{unknown[0]}'{nearest(unknown[0], ['port'])}")
    entries = table.get("port", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DescriptionError(f"{file}: ports are written as [[tool.parity.port]] tables, one for each port")
    valid = [field.name for field in dataclasses.fields(Port) if field.name != "root"]
    required = ("name", "family", "model", "config")
    ports: list[Port] = []
    for number, entry in enumerate(entries, start=1):
        where = f"{file}: port '{entry['name']}'" if "name" in entry else f"{file}: port number {number}"
        for key in entry:
            if key not in valid:
                raise DescriptionError(f"{where}: there is no key '{key}'{nearest(key, valid)}")
        missing = [key for key in required if key not in entry]
        if missing:
            raise DescriptionError(
                f"{where}: key '{missing[0]}' is missing, {MEANINGS[missing[0]]}; a port needs {', '.join(required)}"
            )
        try:
            port = Port(**entry, root=root)
        except DescriptionError as error:
            raise DescriptionError(f"{file}: {error}") from None
        if any(port.name == other.name for other in ports):
            raise DescriptionError(f"{where}: the name is used twice; every port needs its own")
        ports.append(port)
    return tuple(ports)


def read_ports(directory: Path) -> tuple[Port, ...]:
    """The ports described in `parity.toml`, or else `pyproject.toml`, of a directory; empty when there is neither.

    Raises DescriptionError for a file that is not TOML and for every wrong key or value.
    """
    for name in ("parity.toml", "pyproject.toml"):
        path = directory / name
        if not path.is_file():
            continue
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise DescriptionError(f"{name} is not valid TOML: {error}") from None
        tools = document.get("tool", {})
        table = tools.get("parity") if isinstance(tools, dict) else None
        if table is None and name == "parity.toml":
            table = document
        if table is not None:
            return parse_ports(table, root=directory, file=name)
    return ()


def select_ports(ports: Sequence[Port], names: Sequence[str], *, directory: Path) -> list[Port]:
    """The ports of those names, or all. Raises DescriptionError for a name that is not there, or when there is none."""
    if not ports:
        raise DescriptionError(
            f"{directory} describes no port; write a [[tool.parity.port]] table into its pyproject.toml, or parity.toml"
        )
    known = [port.name for port in ports]
    for name in names:
        if name not in known:
            raise DescriptionError(f"there is no port '{name}'{nearest(name, known)}")
    return [port for port in ports if not names or port.name in names]


def load_object(spec: str, *, root: Path, watch: bool = True) -> Any:
    """The object that `file.py:Name` (relative to root) or `package.module:Name` means; Name may be dotted.

    watch: whether to look what the import changes around it, see `changed_by_import`; it takes a second.

    Raises DescriptionError when the file or the name does not exist, and Mismatch when the code cannot be imported.
    """
    place, _, name = spec.rpartition(":")
    if watch and "torch" in sys.modules and (place, root) not in _changed_by_import:
        from harness.surroundings import watched

        with watched(_changed_by_import.setdefault((place, root), [])):
            module = _import(place, spec, root)
    else:
        module = _import(place, spec, root)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            own = [name for name, value in vars(module).items() if isinstance(value, type)]
            own += [name for name, value in vars(module).items() if isinstance(value, types.FunctionType)]
            if isinstance(found, type):
                own = [name for name in vars(found) if not name.startswith("__")]
                place = f"{place}:{found.__name__}"
            raise DescriptionError(f"'{spec}': there is no '{part}' in {place}{nearest(part, own)}")
        found = getattr(found, part)
    return found


def beside(port: Port, name: str) -> str | None:
    """The spec of a name in the file of a port's model, or in the first other file of its code that has it."""
    model = port.model.rpartition(":")[0]
    if hasattr(_import(model, port.model, port.root), name):
        return f"{model}:{name}"
    return next((f"{file}:{name}" for file in port.code if name in top_level_names(port.root / file)), None)


def changed_by_import(port: Port) -> list[str]:
    """In words, what importing a port's code in this process changed around it, see `harness.surroundings`."""
    specs = (port.model, port.config, converter_spec(port) or port.model)
    places = dict.fromkeys((spec.rpartition(":")[0], port.root) for spec in specs)
    return [change for place in places for change in _changed_by_import.get(place, [])]


def _import(place: str, spec: str, root: Path) -> types.ModuleType:
    return _import_file(root / place, spec) if place.endswith(".py") else _import_module(place, root, spec)


def require_named(port: Port) -> None:
    """Raises DescriptionError when a file that the port's description names, or the class in it, does not exist.

    Reads the files without running them; what is named by module is found when it is imported.
    """
    for key in ("model", "config", "original"):
        place, _, name = (getattr(port, key) or "").rpartition(":")
        if not place.endswith(".py"):
            continue
        path = port.root / place
        if not path.is_file():
            raise DescriptionError(
                f"port '{port.name}': {key} = '{place}:{name}': there is no file {path}{_nearest_file(path)}"
            )
        names = top_level_names(path)
        if names and name.partition(".")[0] not in names:
            classes = [found for found in names if found[:1].isupper()] or names
            raise DescriptionError(
                f"port '{port.name}': {key} = '{place}:{name}': there is no '{name}' in {place}{nearest(name, classes)}"
            )
    for file in port.code:
        if not (port.root / file).is_file():
            path = port.root / file
            raise DescriptionError(
                f"port '{port.name}': code names {file}: there is no file {path}{_nearest_file(path)}"
            )


def _nearest_file(path: Path) -> str:
    """The end of a message about a file that is not there: the nearest name in its directory, or which is missing."""
    if not path.parent.is_dir():
        return f"; there is no directory {path.parent}"
    return nearest(path.name, sorted(each.name for each in path.parent.iterdir() if each.suffix == path.suffix))


def require_fields(port: Port) -> None:
    """Raises DescriptionError when `config_map` names a field that the original does not have, as far as is known."""
    family = family_of(port)
    for field in port.config_map:
        if family.defaults is not None and field not in family.defaults:
            raise DescriptionError(
                f"port '{port.name}': config_map names '{field}', which {family.name} does not have"
                f"{nearest(field, sorted(family.defaults))}"
            )


def require_classes(port: Port) -> None:
    """Raises DescriptionError when what a description names is no class, or its `config` no configuration class.

    Code that cannot be imported is left to the checks, whose finding it is.
    """
    for key in ("model", "config", "original"):
        spec = getattr(port, key)
        if spec is None:
            continue
        found = _described(port, spec, f"{key} =")
        if found is None:
            continue
        if not isinstance(found, type):
            raise DescriptionError(f"port '{port.name}': {key} = '{spec}' is a {type(found).__name__}, not a class")
        if key != "config" and not (hasattr(found, "state_dict") or hasattr(found, "parameters")):
            raise DescriptionError(f"port '{port.name}': {key} = '{spec}' is not a model: it has no parameters()")
        if key == "config" and not (dataclasses.is_dataclass(found) or hasattr(found, "to_dict")):
            raise DescriptionError(
                f"port '{port.name}': config = '{spec}' is not a configuration class: it has no to_dict()"
            )
    spec = converter_spec(port)
    found = None if spec is None else _described(port, spec, f"load = '{port.load}':")
    if found is not None and not callable(found):
        raise DescriptionError(f"port '{port.name}': load = '{port.load}': '{spec}' cannot be called")


def _described(port: Port, spec: str, key: str) -> Any:
    """What a spec of a description names; None where its code cannot be imported."""
    try:
        return load_object(spec, root=port.root)
    except Mismatch:
        return None
    except DescriptionError as error:
        raise DescriptionError(f"port '{port.name}': {key} {error}") from None


def top_level_names(path: Path) -> list[str]:
    """Names that a file's own statements bind, classes first; empty when it may bind others, or is not Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in texts; they come again when the file is imported
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []  # the checks will say so when they import it
    statements = list(_module_level(tree.body))
    imports = [node for node in statements if isinstance(node, ast.Import | ast.ImportFrom)]
    aliases = [alias.asname or alias.name.partition(".")[0] for node in imports for alias in node.names]
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    if "*" in aliases or any("'exec'" in ast.dump(function) or "'globals'" in ast.dump(function) for function in calls):
        return []
    classes = [node.name for node in statements if isinstance(node, ast.ClassDef)]
    functions = [node.name for node in statements if isinstance(node, ast.FunctionDef)]
    assigned = [node.id for node in statements if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    return [*classes, *functions, *assigned, *aliases]


def _module_level(statements: Sequence[ast.stmt]) -> Iterator[ast.AST]:
    """Everything in a file but the bodies of its functions and classes."""
    for statement in statements:
        yield statement
        if not isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for child in ast.iter_child_nodes(statement):
                yield from _module_level([child]) if isinstance(child, ast.stmt) else ast.walk(child)


def places_of_code(port: Mapping[str, Any]) -> list[str]:
    """Where a port's code lies: below its root, and where the packages are that its description names."""
    specs = [str(port[key]) for key in ("model", "config", "original") if port[key]]
    packages = {spec.partition(":")[0].partition(".")[0] for spec in specs if ".py:" not in spec}
    found = [importlib.util.find_spec(name) for name in packages]
    places = [place for spec in found if spec for place in spec.submodule_search_locations or [spec.origin or ""]]
    return [str(port["root"]), *filter(None, places)]


def source_file(spec: str, *, root: Path) -> Path:
    """The file that holds what a spec names."""
    place = spec.rpartition(":")[0]
    if place.endswith(".py"):
        return (root / place).resolve()
    module = _import_module(place, root, spec)
    if module.__file__ is None:
        raise DescriptionError(f"'{spec}': {place} has no source file")
    return Path(module.__file__).resolve()


def _import_module(name: str, root: Path, spec: str) -> types.ModuleType:
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        raise DescriptionError(f"'{spec}': there is no module '{error.name}'") from None
    except Exception as error:  # a parent package that cannot be imported is a finding about it
        raise Mismatch(f"'{spec}' cannot be imported: {type(error).__name__}: {first_line(error)}") from error
    if found is None:
        raise DescriptionError(f"'{spec}': there is no module '{name}' on the Python path or below {root}")
    return _run_import(name, spec)


def _import_file(path: Path, spec: str) -> types.ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise DescriptionError(f"'{spec}': there is no file {path}")
    parts = [path.stem]
    folder = path.parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    if len(parts) > 1:
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
        name = ".".join(parts)
        if _leads_to(name, path):
            return _run_import(name, spec)
    return _import_lone_file(path, spec)


def _leads_to(name: str, path: Path) -> bool:
    """Whether a module's name means a file here: a package of the same name may be imported from elsewhere already."""
    try:
        found = importlib.util.find_spec(name)
    except Exception:  # importing it will say what is wrong
        return True
    return found is None or found.origin is None or Path(found.origin).resolve() == path


def _import_lone_file(path: Path, spec: str) -> types.ModuleType:
    # A package made up around the folder lets `from .sibling import x` work, as it does in a remote-code checkpoint.
    package = "parity_port_" + hashlib.sha256(str(path.parent).encode()).hexdigest()[:12]
    if package not in sys.modules:
        parent = types.ModuleType(package)
        parent.__path__ = [str(path.parent)]
        sys.modules[package] = parent
    return _run_import(f"{package}.{path.stem}", spec)


def _run_import(name: str, spec: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever foreign code does at import is a finding about that code
        raise Mismatch(f"'{spec}' cannot be imported: {type(error).__name__}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type when it has none; a broken `__str__` does not matter."""
    try:
        return shortened(str(error).strip().splitlines()[0])
    except Exception:  # foreign exceptions may raise while they are shown, or be empty
        return type(error).__name__


def shortened(text: str, length: int = 240) -> str:
    """Text no longer than that, cut with three dots."""
    return text if len(text) <= length else text[: length - 3] + "..."


def lacks(port: Port, check: str) -> str | None:
    """Why the port does without what a check asks for, by its description; None when it does not."""
    return next((reason for pattern, reason in port.lacks.items() if fnmatch.fnmatch(check, pattern)), None)


def converter_spec(port: Port) -> str | None:
    """The spec of the callable of `load = "checkpoint:..."`: a name in the model's file, or a spec of its own."""
    kind, _, name = port.load.partition(":")
    if kind != "checkpoint":
        return None
    return name if ":" in name else f"{port.model.rpartition(':')[0]}:{name}"


def check_patterns(ports: Sequence[Port], check_ids: Sequence[str]) -> None:
    """Raises DescriptionError for a `lacks` or `xfail` pattern that matches no check."""
    for port in ports:
        for key in ("lacks", "xfail"):
            for pattern in getattr(port, key):
                if not fnmatch.filter(check_ids, pattern):
                    raise DescriptionError(
                        f"port '{port.name}': {key} names '{pattern}', which matches no check"
                        f"{nearest(pattern, check_ids)}"
                    )


def family_of(port: Port) -> Family:
    """The family of a port. Raises DescriptionError that names the port."""
    try:
        return find_family(port.family)
    except DescriptionError as error:
        raise DescriptionError(f"port '{port.name}': {error}") from None
