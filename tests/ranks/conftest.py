"""Fixtures of the tests that need several ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from judge.ranks import RankPools
from judge.resume_runs import prepare_inputs


@pytest.fixture(scope="package")
def run_ranks() -> Iterator[RankPools]:
    """`run_ranks(world_size, fn, *args)`: results by rank, from gloo ranks that this folder's tests share.

    They end with the folder: every process group keeps a thread that looks for messages a hundred times a
    second, and idle ranks of hundreds of groups take as much as a core from the tests that follow.
    """
    pools = RankPools()
    yield pools
    pools.close()


@pytest.fixture(scope="package")
def resume_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Target, documents and hidden states of the runs that are stopped and resumed; nobody changes them."""
    folder = tmp_path_factory.mktemp("resume-inputs")
    prepare_inputs(folder)
    return folder
