# SPDX-License-Identifier: Apache-2.0
"""Which family a configuration class belongs to, by the names of its fields."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from harness.families import Family, dropouts_of
from harness.init import findings
from harness.init.sources import Definition, Repository, definitions, find, foreign, lineage, source

ENOUGH = 0.6
"""The share of a family's fields that a configuration has to have to count as one of its ports."""

FILLERS = {"n", "num", "number", "of", "size", "dim", "p", "prob", "rate", "use", "with", "has", "len", "length", "max"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Match:
    """How a configuration fits a family: the share of its fields, and those that go by a name it does not know.

    named: the family's name is part of the port's; of two families that fit alike, that one.
    """

    family: str
    share: float
    named: bool
    config_map: Mapping[str, str]
    guessed: Sequence[str]
    said: str


def fields_of(family: Family) -> list[str]:
    """The original's fields, as far as the family names them."""
    named = [*(family.defaults or ()), *family.fields, family.maximum_length, family.vocabulary, *dropouts_of(family)]
    return list(dict.fromkeys(named))


def match_families(
    repository: Repository,
    head: Definition | None,
    config: Definition | None,
    outside: str | None,
    families: Mapping[str, Family],
) -> list[Match]:
    """How well a configuration fits each family; one from elsewhere is looked up in its package's source."""
    declared = findings.declared_fields(repository, config) if config else foreign_fields(outside or "")
    for spec in _foreign_ancestors(repository, config) if config else ():
        declared = [*declared, *foreign_fields(spec)]
    name = config.name if config else (outside or "").rpartition(":")[2]
    text = " ".join([str(head.source.path), head.name, name] if head else [name]).lower()
    found = []
    for family in families.values():
        if head is not None and findings.framework(head) != family.framework:
            continue
        fields = fields_of(family)
        seen = findings.translated_fields(repository, name, fields)
        known, mapped, guessed = _matched(family, declared, seen)
        count = len(known) + len(mapped)
        match = Match(
            family=family.name,
            share=count / len(fields),
            named=family.name.lower() in text,
            config_map=mapped,
            guessed=guessed,
            said=f"{name} has {count} of its {len(fields)} fields",
        )
        found.append(match)
    return found


def _matched(
    family: Family, declared: Sequence[str], seen: Mapping[str, str]
) -> tuple[list[str], dict[str, str], list[str]]:
    """Fields declared by a name the family knows; other names, by field; and which of these are guessed from meaning.

    `seen` are the names that converters give the fields by.
    """
    names = {field: (field, *family.fields.get(field, ())) for field in fields_of(family)}
    known = [field for field in names if set(names[field]) & set(declared)]
    mapped = {field: seen[field] for field in names if field not in known and seen.get(field) in declared}
    guessed = []
    for field in names:
        if field in known or field in mapped:
            continue
        likely = [each for each in declared if each not in mapped.values() and _alike(each, names[field])]
        if len(likely) == 1:
            mapped[field] = likely[0]
            guessed.append(field)
    return known, mapped, guessed


def best(matches: Sequence[Match]) -> Match | None:
    """The family that fits best; None when none fits well or two fit alike."""
    ranked = sorted(((match.share, match.named) for match in matches), reverse=True)
    if not ranked or ranked[0][0] < ENOUGH or ranked[0] in ranked[1:]:
        return None
    return next(match for match in matches if (match.share, match.named) == ranked[0])


def _alike(name: str, known: Sequence[str]) -> bool:
    """Whether a field's name means the same as a known one: `with_bias` and `bias`, `layers` and `n_layer`."""
    mine = _meaning(name)
    return bool(mine) and any(
        mine == _meaning(other) or (len(mine) == 4 and _meaning(other).startswith(mine)) for other in known
    )


def _meaning(name: str) -> str:
    words = [word.rstrip("s") or word for word in name.lower().split("_")]
    return " ".join(word for word in words if word and word not in FILLERS)


def foreign_fields(spec: str) -> list[str]:
    """Fields of a configuration class of an installed package, from its source, without importing the package."""
    module, _, name = spec.partition(":")
    cls = foreign_class(module, name)
    if cls is None:
        return []
    return findings.declared_fields(Repository(root=Path(), sources={}, unread=()), cls)


def foreign_class(module: str, name: str) -> Definition | None:
    """A class of an installed package, found in the files of the package that an import names."""
    package = module.partition(".")[0]
    if not name.isidentifier() or not package or package in ("torch", "typing", "dataclasses"):
        return None
    try:
        package_spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    pattern = re.compile(rf"^class {name}\b".encode(), flags=re.MULTILINE)
    for folder in (package_spec.submodule_search_locations or ()) if package_spec else ():
        for file in sorted(Path(folder).glob("models/*/*.py" if package == "transformers" else "**/*.py")):
            try:
                content = file.read_bytes()
                if pattern.search(content):
                    found = source(PurePosixPath(package, *file.relative_to(folder).parts), content)
                    return find(Repository(root=Path(), sources={}, unread=()), found, name)
            except (OSError, SyntaxError, ValueError):
                continue
    return None


def _foreign_ancestors(repository: Repository, config: Definition) -> list[str]:
    """Specs of a configuration's ancestors in installed packages, the common one of all left out."""
    own, elsewhere = lineage(repository, config)
    return [
        foreign(cls.source, name)
        for cls in own
        for name in elsewhere
        if name in cls.source.imports and name not in findings.PRETRAINED_CONFIG
    ]


def config_of(
    repository: Repository, head: Definition, families: Mapping[str, Family]
) -> tuple[Definition | None, str | None]:
    """A model's configuration class: the one it names, else the best of its file, of what the file imports, or near."""
    config, outside = findings.named_config(repository, head)
    if config is not None or outside is not None:
        return config, outside
    beside = [each for path, each in repository.sources.items() if path.parent == head.source.path.parent]
    imported = [found for name in head.source.imports if (found := find(repository, head.source, name))]
    for near in (definitions(head.source), imported, [cls for each in beside for cls in definitions(each)]):
        near = [cls for cls in near if findings.is_config(repository, cls)]
        shares = {
            cls.spec: max((m.share for m in match_families(repository, head, cls, None, families)), default=0)
            for cls in near
        }
        if shares and max(shares.values()) > 0:
            return next(cls for cls in near if shares[cls.spec] == max(shares.values())), None
    return None, None
