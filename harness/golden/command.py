# SPDX-License-Identifier: Apache-2.0
"""`parity golden verify` and `parity golden record`: arguments in, lines or JSON and an exit code out."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness.errors import EXIT_DESCRIPTION, EXIT_FAILED, EXIT_HOLDS, DescriptionError, ParityError

if TYPE_CHECKING:
    from harness.golden.verification import GoldenResult

GROUPS = ("logits", "loss", "blocks", "grads", "adamw", "other", "float32", "generation")
"""Columns of the table: float64 outputs by kind, all float32 outputs, and generated tokens."""


def add_golden_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `golden` with `verify` and `record` below it; `run_golden` runs what was parsed."""
    golden = subparsers.add_parser("golden", help="stored outputs of originals: verify or record them")
    commands = golden.add_subparsers(dest="golden_command", required=True, metavar="verify|record")

    verify = commands.add_parser("verify", help="run golden files through the originals of their families")
    verify.add_argument("path", metavar="DIR", help="a directory of golden files, or one file")
    verify.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    verify.add_argument(
        "--original", action="append", default=[], metavar="FAMILY=SPEC",
        help="hold this class (file.py:Class or module:Class) against the family's files (repeatable)",
    )  # fmt: skip

    record = commands.add_parser("record", help="make a golden file from anyone's original")
    record.add_argument("--original", required=True, metavar="SPEC", help="file.py:Class or module:Class")
    record.add_argument("--family", required=True, help="the family whose conventions it follows")
    record.add_argument("--config", required=True, metavar="JSON", help="configuration in the original's fields")
    record.add_argument("--out", required=True, metavar="FILE", help="a name that ends in .safetensors")
    record.add_argument("--seed", type=int, default=0, help="draws weights and inputs (default 0)")
    record.add_argument("--batch", type=int, default=2, metavar="N", help="rows (default 2)")
    record.add_argument("--length", type=int, metavar="N", help="tokens a row (default at most 16)")
    record.add_argument("--mode", choices=("eval", "train"), default="eval", help="mode of the original")
    record.add_argument("--generate", type=int, default=0, metavar="N", help="store N generated tokens")
    record.add_argument("--adamw-steps", type=int, default=0, metavar="N", help="store weights after N steps")


def run_golden(arguments: argparse.Namespace) -> int:
    """Runs a parsed `golden` command. Returns 0, 1 when a file fails, 2 for a wrong file or option."""
    try:
        return _verify(arguments) if arguments.golden_command == "verify" else _record(arguments)
    except ParityError as error:
        print(f"parity golden: {error}", file=sys.stderr)
        return error.exit_code


def exit_code(results: Sequence[GoldenResult]) -> int:
    """2 when a file is broken, else 1 when one failed, else 0."""
    statuses = {result.status for result in results}
    return EXIT_DESCRIPTION if "broken" in statuses else EXIT_FAILED if "failed" in statuses else EXIT_HOLDS


def table(results: Sequence[GoldenResult]) -> str:
    """One line per file: status, largest relative error per group of outputs, and what is wrong with it."""
    worst = [_worst(result) for result in results]
    columns = [group for group in GROUPS if any(group in row for row in worst)]
    rows = [["status", "file", *columns, ""]]
    for result, row in zip(results, worst, strict=True):
        reason = result.reason if result.status != "verified" else ""
        rows.append([result.status, result.file, *(row.get(group, "-") for group in columns), reason])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    statuses = [result.status for result in results]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
    return "\n".join([*lines, counts])


def _worst(result: GoldenResult) -> dict[str, str]:
    groups: dict[str, dict[str, float]] = {}
    for name, error in result.errors.items():
        groups.setdefault(_group(name), {})[name] = error
    shown = {}
    for group, errors in groups.items():
        differing = sum(error for name, error in errors.items() if result.bounds[name] == 0.0)
        largest = max((error for name, error in errors.items() if result.bounds[name] > 0.0), default=None)
        if differing:
            shown[group] = f"{differing:.0f} differ"
        else:
            shown[group] = "exact" if largest is None else f"{largest:.1e}" if largest else "0"
    return shown


def _group(name: str) -> str:
    section, _, rest = name.partition("/")
    if rest.startswith("generate."):
        return "generation"
    if section.startswith("adamw") or rest == "adamw_losses":
        return "adamw"
    if section.startswith("grads"):
        return "grads"
    if "_f32" in section:
        return "float32"
    if rest == "logits":
        return "logits"
    if rest.startswith("loss") or rest == "probe_objective":
        return "loss"
    return "blocks" if rest in ("embedding", "final_norm") or rest.startswith("block.") else "other"


def _verify(arguments: argparse.Namespace) -> int:
    from harness.golden.verification import verify

    originals = {}
    for option in arguments.original:
        family, equals, spec = option.partition("=")
        if not (family and equals and spec):
            raise DescriptionError(f"--original is '{option}', expected FAMILY=file.py:Class")
        originals[family] = spec
    # Originals print what they like when they are built; it is not part of the answer.
    with contextlib.redirect_stdout(sys.stderr):
        results = verify(arguments.path, original_override=originals)
    print(json.dumps([_as_json(result) for result in results], indent=1) if arguments.json else table(results))
    return exit_code(results)


def _as_json(result: GoldenResult) -> dict[str, Any]:
    # JSON has no infinity; an error that is not a number is null.
    errors = {name: error if math.isfinite(error) else None for name, error in result.errors.items()}
    return {**dataclasses.asdict(result), "errors": errors}


def _record(arguments: argparse.Namespace) -> int:
    from harness.golden.recording import record

    try:
        fields = json.loads(arguments.config)
    except (ValueError, RecursionError) as error:
        raise DescriptionError(f"--config is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise DescriptionError('--config is not a JSON object, expected {"field": value, ...}')
    with contextlib.redirect_stdout(sys.stderr):
        path = record(
            arguments.original, arguments.out, fields=fields, family=arguments.family, seed=arguments.seed,
            batch=arguments.batch, length=arguments.length, mode=arguments.mode, generate=arguments.generate,
            adamw_steps=arguments.adamw_steps,
        )  # fmt: skip
    print(f"recorded {path}")
    return EXIT_HOLDS
