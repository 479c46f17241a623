"""A fault in a rank of a real run: how soon the run ends, and what the terminal says last."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faulty_rank import Fault
from small_quickstart import Job, small_job

from eagle3_ds import cli_launcher

pytestmark = pytest.mark.e2e
OVERRIDES = (
    "train.steps=3",
    "train.eval_every=0",
    "train.save_every=1",
    "draft.ttt_steps=2",
    "eval.num_prompts=0",
    "export.formats=[]",
    "parallel.ring=1",
    "parallel.ulysses=2",
    "faults.watchdog_seconds=8",
)
END_SECONDS = 30.0


@pytest.fixture
def faulty(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Fault], Job]:
    """A job whose ranks run `faulty_rank`."""
    monkeypatch.setattr(cli_launcher.plan_launch, "__defaults__", ("faulty_rank",))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1] / "faults"), *sys.path]))

    def make(fault: Fault) -> Job:
        job = small_job(shared, tmp_path / "output", *OVERRIDES)
        job.folder.mkdir()
        fault.put_beside(job.folder / "recipe.resolved.yaml")
        return job

    return make


def test_a_rank_that_raises_is_told_and_the_run_restarted(faulty: Callable[[Fault], Job]) -> None:
    job = faulty(Fault("raise in backward", rank=1, step=2))
    status, output = job.call("launch", "--max-restarts", "1")
    assert status == 0, output
    failed, _, restarted = output.partition("restart 1 of at most 1")
    told = failed.rstrip().splitlines()
    assert told[-1].startswith("First error, of rank 1 on ") and told[-1].endswith("RuntimeError: a fault was injected")
    assert "while training, after 1 steps" in told[-1]
    assert "in raise_an_error" in "\n".join(told[-6:])
    assert "going on from" in restarted and "step-000001" in restarted
    assert [record["step"] for record in job.metrics()] == [1, 2, 3]
    # What was said before the restart is kept.
    assert "injecting: Fault(deed='raise in backward', rank=1" in (job.folder / "logs" / "rank_1.log").read_text()


def test_a_rank_that_stops_is_found_by_the_watchdog(faulty: Callable[[Fault], Job]) -> None:
    job = faulty(Fault("SIGSTOP", rank=1, step=2))
    status, output = job.call("launch")
    ended = time.time()
    assert status != 0
    assert ended - (job.folder / "fault.done").stat().st_ctime < END_SECONDS
    last = output.rstrip().splitlines()[-1]
    assert "First error, of rank 1 on" in last and "its state is T (stopped)" in last
    # The other rank tells which collective it waited in.
    assert "rank 0 on" in output and "gloo:" in output
