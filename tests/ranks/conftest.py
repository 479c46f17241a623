"""Fixtures of the tests that need several ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from judge.ranks import RankPools


@pytest.fixture(scope="package")
def run_ranks() -> Iterator[RankPools]:
    """`run_ranks(world_size, fn, *args)`: results by rank, from gloo ranks that this folder's tests share.

    They end with the folder: every process group keeps a thread that looks for messages a hundred times a
    second, and idle ranks of hundreds of groups take as much as a core from the tests that follow.
    """
    pools = RankPools()
    yield pools
    pools.close()
