# SPDX-License-Identifier: Apache-2.0
"""Drawing cases with Hypothesis until one fails, and shrinking that one within a time limit."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import seed as with_seed
from hypothesis.database import ExampleDatabase
from hypothesis.errors import FlakyFailure
from hypothesis.strategies import SearchStrategy

from harness.cases import Case
from harness.errors import Mismatch, OutOfTime
from harness.ports import first_line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """The smallest case found to fail, its error, and how many failing cases were tried on the way."""

    case: Case
    error: Exception
    attempts: int


def explore(
    attempt: Callable[[Case], None],
    strategy: SearchStrategy[Case],
    *,
    examples: int,
    seed: int | None,
    database: str | None,
    shrink_seconds: float,
) -> Failure | None:
    """Calls `attempt` on drawn cases until one raises; then on smaller ones for at most `shrink_seconds`.

    Gives the smallest failing case, or None. With a seed the draws are the same on every run; without one they differ,
    on CI too. database: the name under which failing cases are kept, and tried first the next time; None keeps none.
    A case that fails once and passes when it is tried again is a failure of its own: a check of one case must always
    say the same.
    """
    failures: dict[str, tuple[Case, Exception]] = {}
    latest: list[str] = []
    passed: set[str] = set()
    deadline: list[float] = []

    def run(case: Case) -> None:
        key = json.dumps(case.as_dict(), sort_keys=True)
        if deadline and time.monotonic() > deadline[0]:
            if key in failures:
                latest.append(key)
                raise failures[key][1]
            return  # out of time: what is not known to fail counts as passing, which ends the shrinking
        try:
            attempt(case)
        except Exception as error:
            seconds = 0.0 if isinstance(error, OutOfTime) else shrink_seconds
            deadline[:] = deadline or [time.monotonic() + seconds]
            failures[key] = (case, error)
            latest.append(key)
            raise
        passed.add(key)

    if database is not None:
        run._hypothesis_internal_add_digest = database.encode()  # type: ignore[attr-defined]
    test = given(strategy)(run)
    if seed is not None:
        test = with_seed(seed)(test)
    test = settings(
        max_examples=examples,
        # Named one by one: Hypothesis's own profile for CI derandomises and has no database.
        derandomize=False,
        database=_example_database() if database is not None else None,
        deadline=None,
        phases=[Phase.reuse, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=Verbosity.quiet,
    )(test)
    try:
        with _no_constants_of_the_project():
            test()
    except FlakyFailure:
        case, error = failures[latest[-1]]
        if latest[-1] not in passed:  # it failed every time, but not with the same kind of error
            return Failure(case=case, error=error, attempts=len(latest))
        flaky = Mismatch(f"the same case failed once and passed once; the failure was: {first_line(error)}")
        return Failure(case=case, error=flaky, attempts=len(latest))
    except Exception:
        if not latest:
            raise
        case, error = failures[latest[-1]]
        return Failure(case=case, error=error, attempts=len(latest))
    return None


def _example_database() -> ExampleDatabase | None:
    """The database of the Hypothesis profile in force; on CI that has none, and the default profile's is used."""
    profiles = [settings.default, settings.get_profile("default")]
    return next((profile.database for profile in profiles if profile and profile.database is not None), None)


@contextlib.contextmanager
def _no_constants_of_the_project() -> Iterator[None]:
    """Keeps numbers that Hypothesis finds in imported modules out of its draws.

    They would make the cases of a seed depend on which modules an earlier check, a door or a project happens to import.
    """
    try:
        providers: Any = importlib.import_module("hypothesis.internal.conjecture.providers")
        provider, nothing = providers.HypothesisProvider, providers.Constants()
        forget = providers.CONSTANTS_CACHE.cache.clear
        own = vars(provider)["_local_constants"]
    except (ImportError, AttributeError, KeyError, TypeError):
        yield  # a release that does not do this, or does it elsewhere
        return
    try:
        provider._local_constants = property(lambda self: nothing)
        forget()
        yield
    finally:
        provider._local_constants = own
        forget()
