# SPDX-License-Identifier: Apache-2.0
"""The door for a test file: one parametrised test for every check of the given ports."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from harness.ports import Port
from harness.runner import Item, Options, plan

Test = TypeVar("Test", bound=Callable[..., object])


@dataclasses.dataclass(frozen=True)
class BoundCheck:
    """A check of a port that a test is parametrised with; the plugin makes it callable when the test runs."""

    item: Item
    options: Options


def parametrize_with_checks(ports: Sequence[Port], **options: Any) -> Callable[[Test], Test]:
    """A decorator that gives a test one check of one port at a time; the test calls it.

    The test takes `check`, and `port` where it wants it::

        @parametrize_with_checks([Port(...)])
        def test_port(check):
            check()

    The call returns the Result, or fails or skips the test. Keyword options are the fields of
    `harness.runner.Options`. Raises DescriptionError for a wrong description.
    """
    import pytest

    chosen = Options(**options)
    items = plan(ports, chosen)
    names = [f"{item.port.name}-{item.id}" for item in items]

    def decorate(test: Test) -> Test:
        checks = [BoundCheck(item, chosen) for item in items]
        if "port" in inspect.signature(test).parameters:
            pairs = [(item.port, check) for item, check in zip(items, checks, strict=True)]
            return cast(Test, pytest.mark.parametrize(("port", "check"), pairs, ids=names)(test))
        return cast(Test, pytest.mark.parametrize("check", checks, ids=names)(test))

    return decorate
