"""Fixtures of the tests that need several ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from judge.ranks import RankPools


@pytest.fixture(scope="session")
def run_ranks() -> Iterator[RankPools]:
    """`run_ranks(world_size, fn, *args)`: results by rank, from gloo ranks that all tests of the session
    share.
    """
    pools = RankPools()
    yield pools
    pools.close()
