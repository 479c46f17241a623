"""Process groups give up after the watchdog, not before it: torch's 10 minutes are void."""

from __future__ import annotations

import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from eagle3_ds.topology import maybe_setup_distributed, outlast_watchdog, patience
from judge.ranks import run_ranks

pytestmark = pytest.mark.ranks


def waited() -> dict[tuple[str, float], bool]:
    """On a rank: for each group and limit, whether it waited for a rank that was 2 seconds late."""
    topology = maybe_setup_distributed(ulysses=2)
    groups = {"world": dist.group.WORLD, "ulysses": topology.ulysses_group, "later": dist.new_group([0, 1])}
    found = {}
    for limit in (60.0, 0.5):
        with mock.patch.object(patience, "GRACE_SECONDS", 0.0):
            outlast_watchdog(limit)
        for name, group in groups.items():
            if dist.get_rank():
                time.sleep(2.0)
            try:
                dist.all_reduce(torch.ones(1), group=group)
                found[name, limit] = True
            except RuntimeError:
                found[name, limit] = False
    return found


def test_a_limit_reaches_every_group() -> None:
    # In processes of their own: a group that has given up once is of no use to a later test.
    first, _ = run_ranks(2, waited)
    groups = ("world", "ulysses", "later")
    assert first == {(name, limit): limit > 2 for limit in (60.0, 0.5) for name in groups}


def test_the_limit_is_beyond_the_watchdogs() -> None:
    assert patience.GRACE_SECONDS >= 60
