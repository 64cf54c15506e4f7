# SPDX-License-Identifier: Apache-2.0
"""Which of a repository's classes are proposed as ports, of which family, and why."""

from __future__ import annotations

import ast
import dataclasses
import fnmatch
import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from harness.checks import CATALOGUE
from harness.errors import DescriptionError
from harness.families import Family, family_names, find_family, nearest
from harness.init import findings
from harness.init.matching import ENOUGH, Match, best, config_of, foreign_class, match_families
from harness.init.sources import (
    Definition,
    Repository,
    find,
    is_test,
    lineage,
    method,
    source,
    travelling,
)
from harness.ports import Port

WITHOUT = {
    "attention_mask": "masks",
    "inputs_embeds": "forward.inputs_embeds",
    "position_ids": "forward.position_ids",
    "output_hidden_states": "api.hidden_states",
    "output_attentions": "api.attentions",
    "logits_to_keep": "api.logits_to_keep",
    "num_items_in_batch": "training.micro_batches",
}
"""Argument of a forward -> the feature, or the check, that a port without it lacks."""


PLAIN_BASES = {"PreTrainedModel", "GenerationMixin", "Module"}
"""Ancestors that bring no model of their own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proposal:
    """A port as its table would describe it.

    values: the table's keys in their order. reasons: key -> what was seen. lacking: check pattern -> what is not there,
    for the maintainer to confirm.
    """

    values: Mapping[str, Any]
    reasons: Mapping[str, str]
    lacking: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Looked:
    """What a look at a repository gave: proposals, and sentences about what was seen and not proposed."""

    proposals: Sequence[Proposal]
    remarks: Sequence[str]


def installed_families() -> tuple[dict[str, Family], list[str]]:
    """The families that can be imported, by name, and a sentence for each that cannot."""
    families, broken = {}, []
    for name in family_names():
        try:
            families[name] = find_family(name)
        except DescriptionError as error:
            broken.append(str(error))
    return families, broken


def propose(
    repository: Repository, *, family: str | None = None, model: str | None = None, described: Sequence[Port] = ()
) -> Looked:
    """The ports of a repository, those left out that are described already.

    `family` and `model` (`file.py:Class`) fix what else is guessed. Raises DescriptionError when they name nothing.
    """
    families, remarks = installed_families()
    taken = [port.name for port in described]
    known = {as_file(port.model) for port in described}
    if family is not None and family not in families:
        if family not in findings.registered_families(repository):
            raise DescriptionError(f"there is no family '{family}'{nearest(family, list(families))}")
        remarks.append(f"family '{family}' is this repository's own: its conftest.py has to register it")
    heads = findings.heads(repository)
    if model is not None:
        every = {cls.spec: cls for cls in findings.classes(repository)}
        if model not in every:
            raise DescriptionError(f"--model {model}: there is no such class{nearest(model, list(every))}")
        heads = [every[model]]
    heads = [head for head in heads if model is not None or not is_test(head.source.path)]
    originals = [head for head in heads if model is None and is_original(repository, head, families)]
    proposals: list[Proposal] = []
    for head in _likeliest(repository, [head for head in heads if head not in originals], families):
        if head.spec in known:
            continue
        config, outside = config_of(repository, head, families)
        matches = match_families(repository, head, config, outside, families)
        chosen = next((m for m in matches if m.family == family), None) if family else best(matches)
        if chosen is None and family is not None:
            chosen = Match(family=family, share=0, named=True, config_map={}, guessed=(), said="as --family says")
        where = config.spec if config else outside
        if where is None or chosen is None:
            if where is not None or findings.is_hugging_face(repository, head):
                remarks.append(_passed_over(head, where, matches))
            continue
        names = [*taken, *(str(proposal.values["name"]) for proposal in proposals)]
        truth = nearest_original(originals, head)
        port = describe(
            repository, head, spec=where, config=config, match=chosen, families=families, original=truth, taken=names
        )
        proposals.append(port)
    if not proposals and model is None:
        stock = stock_ports(repository, families, family, taken)
        proposals += [proposal for proposal in stock if as_file(str(proposal.values["model"])) not in known]
    if originals and not proposals and not described:
        remarks += [f"{each.spec} looks like a copy of the original; a port of it was not found" for each in originals]
    return Looked(proposals=proposals, remarks=remarks)


def as_file(spec: str) -> str:
    """A spec by module as the spec by file that means the same below the same directory."""
    place, _, name = spec.rpartition(":")
    return spec if place.endswith(".py") else f"{place.replace('.', '/')}.py:{name}"


def _passed_over(head: Definition, config: str | None, matches: Sequence[Match]) -> str:
    if config is None:
        return f"{head.spec} looks like a port, but no configuration class was found for it"
    close = max(matches, key=lambda match: match.share, default=None)
    if close is None:
        return f"{head.spec} looks like a port, but no family is installed"
    if close.share >= ENOUGH:
        several = " or ".join(sorted(match.family for match in matches if match.share == close.share))
        return f"{head.spec} may be a port of {several}: say which with --family"
    return (
        f"{head.spec} is not proposed: {config} has {round(close.share * 100)} % of the fields of {close.family},"
        " the nearest family; if it is a port of it, say so with --family and --model"
    )


def _likeliest(repository: Repository, heads: Sequence[Definition], families: Mapping[str, Family]) -> list[Definition]:
    """Of several classes in one file those that a family's ports are loaded as, or else generate or take labels."""
    auto_classes = {family.port_auto_class for family in families.values()}

    def rank(head: Definition) -> int:
        forward = method(repository, head, "forward")
        generates = "GenerationMixin" in lineage(repository, head)[1] or forward is None
        labelled = forward is not None and bool({"labels", "targets"} & set(findings.parameters(forward.node)))
        registered = findings.auto_class(head)
        named = any(head.name.endswith(each.removeprefix("AutoModel")) for each in auto_classes)
        fits = registered in auto_classes or (registered is None and named)
        return 8 * findings.is_hugging_face(repository, head) + 4 * fits + 2 * generates + labelled

    ranks = [(rank(head), head) for head in heads]
    highest = {path: max(r for r, h in ranks if h.source.path == path) for path in {h.source.path for h in heads}}
    # Beside Hugging Face models a plain module is a part, or the original.
    plainest = 8 if any(r >= 8 for r, _ in ranks) else 0
    return [head for r, head in ranks if r == highest[head.source.path] and r >= plainest]


# Originals


def is_original(repository: Repository, head: Definition, families: Mapping[str, Family]) -> bool:
    """Whether a class is a copy of a family's original: its name, its first input, and no Hugging Face model."""
    if findings.is_hugging_face(repository, head):
        return False
    forward = method(repository, head, "forward")
    for family in families.values():
        module, _, name = family.original.partition(":")
        theirs = original_forward(module, name)
        if head.name == name and forward is not None and theirs and findings.parameters(forward.node)[:1] == theirs[:1]:
            return True
    return False


def original_forward(module: str, name: str) -> list[str]:
    """Names of the arguments of a built-in original's forward, from its source."""
    package, *rest = module.split(".")
    try:
        # Of the top package alone: looking for a module within it would import the package.
        found = importlib.util.find_spec(package)
        origin = Path(found.origin) if found and found.origin else Path()
        content = (origin.parent.joinpath(*rest).with_suffix(".py") if rest else origin).read_bytes()
        cls = source(PurePosixPath("original.py"), content).defined.get(name)
    except (ImportError, ValueError, OSError, SyntaxError):
        return []
    for node in cls.body if cls else ():
        if isinstance(node, ast.FunctionDef) and node.name == "forward":
            return findings.parameters(node)
    return []


def nearest_original(originals: Sequence[Definition], head: Definition) -> Definition | None:
    """The copy of the original that stands nearest to a port."""

    def shared(original: Definition) -> int:
        pairs = zip(original.source.path.parts, head.source.path.parts, strict=False)
        return sum(mine == theirs for mine, theirs in pairs)

    return max(originals, key=shared, default=None)


# One port


def describe(
    repository: Repository,
    head: Definition,
    *,
    spec: str,
    config: Definition | None,
    match: Match,
    families: Mapping[str, Family],
    original: Definition | None,
    taken: Sequence[str],
) -> Proposal:
    """The table of one port. `spec` names its configuration, `config` is that where it is the repository's own."""
    kind = findings.model_type(repository, config) if config else None
    values: dict[str, Any] = {
        "name": unique(kind or head.name, taken),
        "family": match.family,
        "model": head.spec,
        "config": spec,
    }
    reasons = {"family": match.said}
    load, reasons["load"] = load_of(repository, head)
    if load != "state_dict":
        values["load"] = load
    files = [head.source.path, *([config.source.path] if config else [])]
    code = travelling(repository, files)
    if len(code) > len(set(files)):
        values["code"] = [str(path) for path in code]
        reasons["code"] = "what the model's file imports beside it travels with a checkpoint"
    if match.config_map:
        values["config_map"] = dict(match.config_map)
        by_name = f"; guessed by name: {', '.join(match.guessed)}" if match.guessed else ""
        reasons["config_map"] = "fields that go by another name" + by_name
    if original is not None:
        values["original"] = original.spec
        reasons["original"] = "this repository's copy of the original is the truth"
    loss = findings.loss_convention(repository, head)
    if loss is not None:
        reasons["labels"] = loss.why
        if loss.labels != "hf":
            values["labels"] = loss.labels
        if loss.ignore_index is not None:
            values["ignore_index"] = loss.ignore_index
    elif match.family in families and "loss" in families[match.family].features:
        reasons["labels"] = "no loss was seen in forward; set labels if it is not Hugging Face's"
    lacking = lacking_of(repository, head, families[match.family]) if match.family in families else {}
    return Proposal(values=values, reasons=reasons, lacking=lacking)


def unique(name: str, taken: Sequence[str]) -> str:
    """A name for reports: lower case with hyphens, numbered when it is taken."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name)
    plain = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") or "port"
    plain = re.sub(r"-(lm-head-model|for-causal-lm|for-masked-lm)$", "", plain)
    numbered = (plain, *(f"{plain}-{number}" for number in range(2, len(taken) + 3)))
    return next(each for each in numbered if each not in taken)


def load_of(repository: Repository, head: Definition) -> tuple[str, str]:
    """How the original's weights get in, and what was seen."""
    found = findings.converters(repository, head)
    if found:
        others = f"; there are also {', '.join(found[1:4])}" if found[1:] else ""
        return f"checkpoint:{found[0]}", f"{found[0]} reads a file and builds the model{others}"
    for script in findings.scripts(repository):
        if re.search(rf"\b{head.name}\b", script.text):
            command = findings.command_line(script)
            if command is not None:
                return f"command:{command}", f"{script.path} is a program that converts a file"
    if findings.overrides_from_pretrained(repository, head):
        return "pretrained", f"{head.name} has a from_pretrained of its own"
    return "state_dict", "no converter was found: the port has to take the original's tensors by their names"


def lacking_of(repository: Repository, head: Definition, family: Family) -> dict[str, str]:
    """Check patterns of what the family has and the class does not seem to have."""
    ids = [check.id for check in CATALOGUE if set(check.needs) <= family.features]
    found: dict[str, str] = {}

    def note(pattern: str, why: str) -> None:
        covered = {each for known in found for each in fnmatch.filter(ids, known)}
        if set(fnmatch.filter(ids, pattern)) - covered:
            found[pattern] = why

    def note_feature(feature: str, why: str) -> None:
        if feature in family.features:
            for pattern in patterns_of(feature):
                note(pattern, why)

    forward = method(repository, head, "forward")
    if not findings.is_hugging_face(repository, head):
        for pattern in ("api.*", "roundtrip.*", "remote_code.*", "config.json_round_trip", "config.common_names"):
            note(pattern, "it is no Hugging Face model")
    own, elsewhere = lineage(repository, head)
    if not findings.is_set(own, "supports_gradient_checkpointing") and set(elsewhere) <= PLAIN_BASES:
        note("training.gradient_checkpointing", "supports_gradient_checkpointing is not set")
    if forward is None:
        return found
    if "GenerationMixin" not in elsewhere and method(repository, head, "generate") is None:
        note_feature("generation", "it does not generate")
    for argument, what in WITHOUT.items():
        if not findings.takes(forward, argument):
            why = f"forward takes no {argument}"
            if "." in what:
                note(what, why)
            else:
                note_feature(what, why)
    return found


def patterns_of(feature: str) -> list[str]:
    """Patterns of the checks that need a feature; one for a group of which all do."""
    needing = [check.id for check in CATALOGUE if feature in check.needs]
    patterns = []
    for each in needing:
        group = each.partition(".")[0]
        whole = [check.id for check in CATALOGUE if check.id.startswith(f"{group}.")]
        patterns.append(f"{group}.*" if set(whole) <= set(needing) else each)
    return list(dict.fromkeys(patterns))


def stock_ports(
    repository: Repository, families: Mapping[str, Family], family: str | None, taken: Sequence[str]
) -> list[Proposal]:
    """Ports to a class of an installed package, known by a converter program that builds and saves one."""
    proposals: list[Proposal] = []
    for script in findings.scripts(repository):
        outside = [
            name for name in sorted(script.calls) if name in script.imports and not find(repository, script, name)
        ]
        model = next((name for name in outside if name.endswith(("LMHeadModel", "ForCausalLM", "ForMaskedLM"))), None)
        config = next((name for name in outside if name.endswith("Config")), None)
        command = findings.command_line(script)
        if model is None or config is None or command is None:
            continue
        specs = [_installed_spec(script.imports[name][0], name) for name in (model, config)]
        if None in specs:
            continue
        original_config = f"{script.imports[config][0]}:{config}"
        matches = match_families(repository, None, None, original_config, families)
        match = next((m for m in matches if m.family == family), None) if family else best(matches)
        if match is None:
            continue
        values: dict[str, Any] = {
            "name": unique(model, [*taken, *(str(p.values["name"]) for p in proposals)]),
            "family": match.family,
            "model": specs[0],
            "config": specs[1],
            "load": f"command:{command}",
        }
        if match.config_map:
            values["config_map"] = dict(match.config_map)
        reasons = {"family": match.said, "load": f"{script.path} is a program that converts a file to a {model}"}
        proposals.append(Proposal(values=values, reasons=reasons, lacking={}))
    return proposals


def _installed_spec(module: str, name: str) -> str | None:
    cls = foreign_class(module, name)
    return None if cls is None else f"{'.'.join(cls.source.path.with_suffix('').parts)}:{name}"
