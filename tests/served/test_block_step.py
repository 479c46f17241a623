"""`benchmarks.block_step` in small: speculators and SpecForge take the product's steps, and agree."""

from __future__ import annotations

import json

import pytest

from benchmarks import block_step
from benchmarks.block_step import FORMS, PAIRS, TOLERANCE, cases_of
from judge.block_steps import Pair
from judge.ranks import run_ranks
from tests.unit.test_benchmarks_block_step import TINY


@pytest.mark.parametrize("pair", PAIRS, ids=[f"{pair.package}, {pair.algorithm}" for pair in PAIRS])
def test_both_sides_are_measured_and_agree(pair: Pair, served_python: str) -> None:
    cases = cases_of(pair, (96, 64), (16, 8))
    job = (pair, TINY, cases, 2, "recompute", served_python, 1, 80)
    ((rows, record),) = run_ranks(1, block_step.run, *job)
    assert [row.case for row in rows] == cases
    assert record["largest_gradient_difference"] <= TOLERANCE
    assert record["attention"]["chosen"] in FORMS[pair.package]
    assert record["versions"][pair.package]
    for row, written in zip(rows, record["rows"], strict=True):
        assert row.theirs is not None
        assert min(row.ours.seconds, row.theirs.seconds) > 0
        assert min(row.ours.peak_bytes, row.theirs.peak_bytes) > 0
        assert written["faster"] == row.theirs.seconds / row.ours.seconds
        if row.case.drawn:
            assert row.difference is None
            # It draws a part of the guesses, so that its loss is of other pairs.
            assert row.theirs.loss != rows[cases.index(type(row.case)(row.case.length))].theirs.loss
        else:
            assert row.difference is not None and row.difference <= 1e-5
    json.dumps(record)
