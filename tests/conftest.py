# SPDX-License-Identifier: Apache-2.0
"""What the tests of every room share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread for torch: tiny models only lose by a second, whose use depends on who else is on the machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def frameworks() -> None:
    """What checks need is imported here, so that the server of each gate finds it."""
    from harness.isolation import import_all

    import_all()


@pytest.fixture(autouse=True, scope="module")
def _own_families() -> Iterator[None]:
    """Families that a file's tests register are gone after it: `parity init` compares with all that there are."""
    from harness import families

    before = dict(families._registered)
    yield
    families._registered.clear()
    families._registered.update(before)
