# SPDX-License-Identifier: Apache-2.0
"""Reads the Python files of somebody's repository as syntax, importing none, and follows the names in them."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

LARGEST = 1_000_000
"""Bytes; a longer file is generated or data."""

MOST = 20_000
"""Files looked at, so that a directory with a data set in it ends too."""

DEEPEST = 150
"""Levels of syntax; following more could end the process."""

SKIPPED = frozenset({"__pycache__", "build", "dist", "node_modules", "site-packages", "test", "tests", "testing"})
WORDS = re.compile(rb"torch|transformers|mlx|dataclass|[Cc]onfig|register_family")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One file: its path from the repository's root, its syntax and text, and what names in it mean.

    imports: local name -> (module with its leading dots, name in it or None for the module itself).
    defined: classes and functions of the top level, those under an `if` or `try` too. calls: by the last name called.
    """

    path: PurePosixPath
    tree: ast.Module
    text: str
    imports: Mapping[str, tuple[str, str | None]]
    defined: Mapping[str, ast.ClassDef | ast.FunctionDef]
    calls: Mapping[str, Sequence[ast.Call]]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Definition:
    """A class, function or method in a file; two are the same when they stand at the same place."""

    source: Source
    node: ast.ClassDef | ast.FunctionDef

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Definition) and other.node is self.node

    def __hash__(self) -> int:
        return id(self.node)

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
        importing = pending.pop()
        for module, original in importing.imports.values():
            for name in _possible_files(importing, module, original):
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
            sources[name] = source(name, content)
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
            # A name that cannot be printed or written into TOML is no module's, and a pipe would be waited for.
            printable = str(path.relative_to(root)).isprintable()
            if name.endswith(".py") and printable and path.is_file() and not path.is_symlink():
                yield path


def _is_left_out(folder: Path) -> bool:
    name = folder.name
    return name.startswith(".") or name in SKIPPED or name.endswith(".egg-info") or (folder / "pyvenv.cfg").exists()


def source(path: PurePosixPath, content: bytes) -> Source:
    """A file's content. Raises SyntaxError, or ValueError for no text or one nested too deeply."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in texts, which is between the file and Python
        tree = ast.parse(content)
    imports: dict[str, tuple[str, str | None]] = {}
    calls: dict[str, list[ast.Call]] = {}
    pending: list[tuple[ast.AST, int]] = [(tree, 0)]
    while pending:
        node, depth = pending.pop()
        if depth > DEEPEST:
            raise ValueError("nested too deeply")
        if isinstance(node, ast.Import | ast.ImportFrom):
            _note_import(node, imports)
        elif isinstance(node, ast.Call):
            calls.setdefault(last_name(node), []).append(node)
        pending.extend((child, depth + 1) for child in reversed(list(ast.iter_child_nodes(node))))
    text = content.decode(errors="replace")
    return Source(path=path, tree=tree, text=text, imports=imports, defined=_defined(tree), calls=calls)


def _note_import(node: ast.Import | ast.ImportFrom, imports: dict[str, tuple[str, str | None]]) -> None:
    for alias in node.names:
        if isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            imports.setdefault(alias.asname or alias.name, (module, alias.name))
        else:
            local = alias.asname or alias.name.partition(".")[0]
            imports.setdefault(local, (alias.name if alias.asname else local, None))


def is_test(path: PurePosixPath) -> bool:
    """Whether a file is a test by its name."""
    return path.name.startswith("test_") or path.name.endswith("_test.py") or path.name == "conftest.py"


def _defined(tree: ast.Module) -> dict[str, ast.ClassDef | ast.FunctionDef]:
    found: dict[str, ast.ClassDef | ast.FunctionDef] = {}
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop(0)
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.setdefault(node.name, node)
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            pending.extend(ast.iter_child_nodes(node))
    return found


def definitions(source: Source) -> list[Definition]:
    """Classes and functions of a file's top level."""
    return [Definition(source=source, node=node) for node in source.defined.values()]


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
    if name in source.defined:
        return Definition(source=source, node=source.defined[name])
    if name not in source.imports or not steps:
        return None
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
        importing = repository.sources[pending.pop(0)]
        for module, original in importing.imports.values():
            file = module_file(repository, importing, module, original)
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
            elif owner is not None and ast.unparse(call.func).partition(".")[0] in ("self", "cls", owner.name):
                target = method(repository, owner, last_name(call))
            if target is not None and isinstance(target.node, ast.FunctionDef) and target not in found:
                found.append(target)
                pending.append(target)
    return found
