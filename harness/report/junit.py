# SPDX-License-Identifier: Apache-2.0
"""The results as JUnit XML, for CI servers: one test suite for each port."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from xml.etree import ElementTree

from harness.report.summary import Header, clean, facts, grouped, reason, replay_command, variant
from harness.results import Result

# JUnit knows three ways not to pass. A strict xfail that holds is a failure; one that fails is none.
_OUTCOMES = {
    "failed": "failure",
    "xpassed": "failure",
    "error": "error",
    "skipped": "skipped",
    "xfailed": "skipped",
}


def render(results: Iterable[Result], *, header: Header) -> bytes:
    """The XML document, UTF-8. Characters XML cannot hold appear as escapes."""
    kept = list(results)
    root = ElementTree.Element("testsuites", {"name": "parity", **_counts(kept)})
    for port, group in grouped(kept, lambda result: result.port).items():
        suite = ElementTree.SubElement(root, "testsuite", {"name": clean(port), **_counts(group)})
        run = {"profile": header.profile, "seed": "" if header.seed is None else str(header.seed)}
        _properties(suite, run | {f"version.{name}": version for name, version in header.versions.items()})
        for result in group:
            _testcase(suite, result)
    ElementTree.indent(root)
    document: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return document + b"\n"


def _testcase(suite: ElementTree.Element, result: Result) -> None:
    case = ElementTree.SubElement(
        suite,
        "testcase",
        {
            "name": variant(result),
            "classname": f"parity.{clean(result.port)}",
            "time": f"{result.seconds:.3f}",
        },
    )
    described = ("check", "family", "route", "backend", "dtype")
    _properties(case, {name: getattr(result, name) for name in described})
    if result.status == "passed":
        return
    message = reason(result)
    if result.status == "xfailed":
        message = f"expected to fail: {message}"
    outcome = ElementTree.SubElement(case, _OUTCOMES[result.status], {"message": message, "type": result.status})
    lines = [f"{label}: {text}" for label, text in facts(result)]
    if result.bundle:
        lines.append(f"replay: {replay_command(result.bundle)}")
    outcome.text = "\n".join([message, *lines])


def _properties(parent: ElementTree.Element, values: dict[str, str]) -> None:
    properties = ElementTree.SubElement(parent, "properties")
    for name, value in values.items():
        ElementTree.SubElement(properties, "property", {"name": clean(name), "value": clean(value)})


def _counts(results: Sequence[Result]) -> dict[str, str]:
    outcomes = [_OUTCOMES.get(result.status) for result in results]
    return {
        "tests": str(len(results)),
        "failures": str(outcomes.count("failure")),
        "errors": str(outcomes.count("error")),
        "skipped": str(outcomes.count("skipped")),
        "time": f"{sum(result.seconds for result in results):.3f}",
    }
