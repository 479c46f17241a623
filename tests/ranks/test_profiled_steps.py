"""`train.profile_steps` on ranks: a trace that loads, with the parts of a step in it, and a table that adds
up.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from eagle3_ds.parts import (
    ATTENTION,
    BACKWARD,
    DATA,
    EXCHANGE,
    FORWARD,
    INPUTS,
    LOSS,
    OPTIMIZER,
    PREFIX,
    REPORT,
)
from judge.resume_runs import SHAPES, differences, make_recipe, read_metrics, run, start_output

pytestmark = pytest.mark.ranks
PARTS = {ATTENTION, BACKWARD, DATA, EXCHANGE, FORWARD, INPUTS, LOSS, OPTIMIZER, REPORT}
WORLD = SHAPES["zero0"].world_size


@pytest.fixture(scope="module")
def runs(resume_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same run without and with a profile of steps 2 and 3, on both of its ranks."""
    root = tmp_path_factory.mktemp("profiled")
    for name, keys in (("without", {}), ("with", {"profile_steps": (2, 3), "profile_ranks": "all"})):
        start_output(resume_inputs, root / name)
        run(make_recipe(resume_inputs, "zero0", root / name, **keys), WORLD)
    return root / "without", root / "with"


def trace(output: Path, rank: int) -> list[dict[str, Any]]:
    """The complete events of a rank's trace: those with a duration."""
    content = json.loads((output / "profile" / f"rank-{rank:05}.trace.json").read_text())
    return [event for event in content["traceEvents"] if event.get("ph") == "X"]


def parts(output: Path, rank: int) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / "profile" / f"rank-{rank:05}.parts.json").read_text())
    return content


def spans(events: list[dict[str, Any]], beginning: str) -> list[dict[str, Any]]:
    return [event for event in events if event["name"].startswith(beginning)]


def lies_in(event: dict[str, Any], step: dict[str, Any]) -> bool:
    """Microseconds; a rounding of one is allowed for."""
    begins, ends = event["ts"] - step["ts"], event["ts"] + event["dur"] - step["ts"] - step["dur"]
    return bool(event["tid"] == step["tid"] and begins >= -1 and ends <= 1)


def test_each_rank_has_a_trace_of_the_steps_asked_for_with_every_part(runs: tuple[Path, Path]) -> None:
    assert not (runs[0] / "profile").exists()
    for rank in range(WORLD):
        events = trace(runs[1], rank)
        steps = spans(events, "optimizer step ")
        assert sorted({step["name"] for step in steps}) == ["optimizer step 2", "optimizer step 3"]
        # An evaluation between the steps has parts too, which belong to none.
        own = [event for event in spans(events, PREFIX) if any(lies_in(event, step) for step in steps)]
        found = Counter(event["name"].removeprefix(PREFIX) for event in own)
        assert set(found) == PARTS
        # Two steps of four micro-batches, of two TTT steps forward and backward each.
        assert found[FORWARD] == found[BACKWARD] == 2 * 4 and found[ATTENTION] == 2 * 4 * 2 * 2


def test_the_parts_add_up_to_the_steps(runs: tuple[Path, Path]) -> None:
    for rank in range(WORLD):
        told = parts(runs[1], rank)
        assert told["steps"] == [2, 3] and told["device"] == "cpu"
        assert set(told["parts"]) == PARTS | {"other"}
        steps = {step["name"]: step["dur"] for step in spans(trace(runs[1], rank), "optimizer step ")}
        whole = sum(steps.values())
        assert sum(one["seconds"] for one in told["parts"].values()) == pytest.approx(whole / 1e6, rel=0.02)
        assert sum(one["share"] for one in told["parts"].values()) == pytest.approx(1)
        for one in told["parts"].values():
            if one["of_matmul"] is not None:
                rate = one["flops"] / one["seconds"]
                assert one["of_matmul"] == pytest.approx(rate / told["matmul_flops_per_s"])
        for name in (FORWARD, BACKWARD, LOSS, ATTENTION):
            assert told["parts"][name]["flops"] > 0
        assert told["parts"][EXCHANGE]["flops"] == 0


def test_a_profile_leaves_the_training_as_it_is(runs: tuple[Path, Path]) -> None:
    assert differences(runs[1], runs[0]) == []
    assert [record["loss"] for record in read_metrics(runs[1])] == [
        record["loss"] for record in read_metrics(runs[0])
    ]
