# SPDX-License-Identifier: Apache-2.0
"""Reads the Python files of somebody's repository as syntax, importing none, and follows the names in them."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

LARGEST = 1_000_000
"""Bytes; a longer file is generated or data."""

MOST = 20_000
"""Files looked at, so that a directory with a data set in it ends too."""

SKIPPED = frozenset({"__pycache__", "build", "dist", "node_modules", "site-packages", "test", "tests", "testing"})
WORDS = re.compile(rb"torch|transformers|mlx|dataclass|[Cc]onfig|register_family")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One file: its path from the repository's root, its syntax, and where each imported name comes from.

    imports: local name -> (module with its leading dots, name in it or None for the module itself).
    """

    path: PurePosixPath
    tree: ast.Module
    imports: Mapping[str, tuple[str, str | None]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Definition:
    """A class or function at the top level of a file."""

    source: Source
    node: ast.ClassDef | ast.FunctionDef

    @property
    def name(self) -> str:
        """The name it is defined by."""
        return self.node.name

    @property
    def spec(self) -> str:
        """How a description names it: `file.py:Name`."""
        return f"{self.source.path}:{self.node.name}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repository:
    """The files that could be read, and one line for each that could not."""

    root: Path
    sources: Mapping[PurePosixPath, Source]
    unread: Sequence[str]


def read_repository(root: Path) -> Repository:
    """Every Python file below a directory that may hold a model, but hidden ones, tests and environments.

    Links are not followed. A file that is no Python is named in `unread`.
    """
    sources: dict[PurePosixPath, Source] = {}
    unread: list[str] = []
    every: set[PurePosixPath] = set()
    for number, path in enumerate(_files(root)):
        if number == MOST:
            unread.append(f"further files: only the first {MOST} were looked at")
            break
        name = PurePosixPath(path.relative_to(root).as_posix())
        every.add(name)
        _read(root, name, sources, unread, words=WORDS)
    # What a model's file imports beside it matters whatever is in it.
    pending = list(sources.values())
    while pending:
        source = pending.pop()
        for module, original in source.imports.values():
            for name in _possible_files(source, module, original):
                if name in every and name not in sources:
                    every.discard(name)
                    pending += _read(root, name, sources, unread)
    return Repository(root=root, sources=sources, unread=unread)


def _read(
    root: Path,
    name: PurePosixPath,
    sources: dict[PurePosixPath, Source],
    unread: list[str],
    *,
    words: re.Pattern[bytes] | None = None,
) -> list[Source]:
    """Adds a file to `sources`, unless none of the words is in it, or says in `unread` why it cannot be read."""
    try:
        path = root / name
        content = path.read_bytes() if path.stat().st_size <= LARGEST else b""
        if words is None or words.search(content):
            tree = ast.parse(content)
            sources[name] = Source(path=name, tree=tree, imports=_imports(tree))
            return [sources[name]]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        unread.append(f"{name}: {type(error).__name__}")
    except OSError as error:
        unread.append(f"{name}: {error.strerror}")
    return []


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        folders[:] = sorted(name for name in folders if not _is_left_out(here / name))
        for name in sorted(files):
            path = here / name
            # A name that cannot be printed or written into TOML is no module's.
            if name.endswith(".py") and str(path.relative_to(root)).isprintable() and not path.is_symlink():
                yield path


def _is_left_out(folder: Path) -> bool:
    name = folder.name
    return name.startswith(".") or name in SKIPPED or name.endswith(".egg-info") or (folder / "pyvenv.cfg").exists()


def is_test(path: PurePosixPath) -> bool:
    """Whether a file is a test by its name."""
    return path.name.startswith("test_") or path.name.endswith("_test.py") or path.name == "conftest.py"


def _imports(tree: ast.Module) -> dict[str, tuple[str, str | None]]:
    found: dict[str, tuple[str, str | None]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.partition(".")[0]
                found.setdefault(local, (alias.name if alias.asname else local, None))
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                found.setdefault(alias.asname or alias.name, (module, alias.name))
    return found


def definitions(source: Source) -> dict[str, Definition]:
    """Classes and functions of a file's top level, and those under an `if` or `try` there."""
    found: dict[str, Definition] = {}
    pending: list[ast.AST] = list(source.tree.body)
    while pending:
        node = pending.pop(0)
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.setdefault(node.name, Definition(source=source, node=node))
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            pending.extend(ast.iter_child_nodes(node))
    return found


def _possible_files(source: Source, module: str, original: str | None) -> list[PurePosixPath]:
    """The paths that a module of an import statement could have in the repository, relative or absolute."""
    level = len(module) - len(module.lstrip("."))
    parts = [part for part in module.lstrip(".").split(".") if part]
    folder = source.path.parent
    for _ in range(level - 1):
        folder = folder.parent
    places = [folder] if level else [folder, PurePosixPath(), PurePosixPath("src")]
    found = []
    for place in places:
        base = place.joinpath(*parts)
        # `from . import sibling`
        found += [base / f"{original}.py"] if original and not parts else []
        found += [base.with_name(base.name + ".py")] if parts else []
        found.append(base / "__init__.py")
    return found


def module_file(
    repository: Repository, source: Source, module: str, original: str | None = None
) -> PurePosixPath | None:
    """The file of the repository that an import statement means: `from MODULE import ORIGINAL`."""
    return next((path for path in _possible_files(source, module, original) if path in repository.sources), None)


def find(repository: Repository, source: Source, name: str, *, steps: int = 5) -> Definition | None:
    """The definition that a name in a file means, through imports within the repository; None for anything else."""
    own = definitions(source).get(name)
    if own is not None or name not in source.imports or not steps:
        return own
    module, original = source.imports[name]
    if original is None:
        return None
    file = module_file(repository, source, module)
    if file is None:
        return None
    return find(repository, repository.sources[file], original, steps=steps - 1)


def foreign(source: Source, name: str) -> str:
    """`module:Name` of something imported from elsewhere; the name alone when it is not imported."""
    module, original = source.imports.get(name, ("", None))
    return f"{module}:{original}" if module and original else name


def last_name(node: ast.AST) -> str:
    """The last name of a dotted expression or of what a call calls: `nn.Module` is `Module`."""
    if isinstance(node, ast.Call):
        return last_name(node.func)
    if isinstance(node, ast.Subscript):
        return last_name(node.value)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def lineage(repository: Repository, definition: Definition) -> tuple[list[Definition], list[str]]:
    """A class with its ancestors in the repository, nearest first, and the names of those from elsewhere."""
    own, elsewhere, pending = [definition], [], [definition]
    while pending:
        child = pending.pop(0)
        for base in child.node.bases if isinstance(child.node, ast.ClassDef) else ():
            parent = find(repository, child.source, last_name(base))
            if parent is None:
                elsewhere.append(last_name(base))
            elif isinstance(parent.node, ast.ClassDef) and parent not in own:
                own.append(parent)
                pending.append(parent)
    return own, elsewhere


def method(repository: Repository, definition: Definition, name: str) -> Definition | None:
    """A method of a class, its own or inherited within the repository."""
    for cls in lineage(repository, definition)[0]:
        for node in cls.node.body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return Definition(source=cls.source, node=node)
    return None


def travelling(repository: Repository, files: Sequence[PurePosixPath]) -> list[PurePosixPath]:
    """Files, and those they import beside them, directly or not: what must travel with a checkpoint."""
    found, pending = list(dict.fromkeys(files)), list(dict.fromkeys(files))
    while pending:
        source = repository.sources[pending.pop(0)]
        for module, original in source.imports.values():
            file = module_file(repository, source, module, original)
            # A package's __init__ stays: a checkpoint's directory is no package.
            if file is not None and file.name != "__init__.py" and file not in found:
                found.append(file)
                pending.append(file)
    return found


def reached(repository: Repository, start: Definition, *, owner: Definition | None = None) -> list[Definition]:
    """A function and those of the repository it calls, directly or not; `owner` is the class of a method."""
    found, pending = [start], [start]
    while pending:
        function = pending.pop(0)
        for call in (node for node in ast.walk(function.node) if isinstance(node, ast.Call)):
            target: Definition | None = None
            if isinstance(call.func, ast.Name):
                target = find(repository, function.source, call.func.id)
            elif isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name) and owner is not None:
                if call.func.value.id in ("self", "cls", owner.name):
                    target = method(repository, owner, call.func.attr)
            if target is not None and isinstance(target.node, ast.FunctionDef) and target not in found:
                found.append(target)
                pending.append(target)
    return found
