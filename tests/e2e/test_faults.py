"""A fault in a rank of a real run: how soon the run ends, what the terminal says last, and that it can go on
by itself.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from eagle3_ds.config import dump_recipe
from eagle3_ds.launch import command
from judge.faults.catalogue import Injection
from judge.faults.rank import Fault
from judge.faults.runs import launch, strike, struck_recipe
from judge.resume_runs import prepare_inputs, read_metrics

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    prepare_inputs(folder)
    return folder


@pytest.fixture
def recipe(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a recipe whose ranks run `judge.faults.rank`; its output folder lies beside it."""
    monkeypatch.setattr(command.plan_launch, "__defaults__", ("judge.faults.rank",))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    path, output = tmp_path / "run.yaml", tmp_path / "run"
    path.write_text(dump_recipe(struck_recipe(inputs, output)))
    output.mkdir()
    return path


def test_a_rank_that_raises_is_told_and_the_run_restarted(recipe: Path) -> None:
    output = recipe.with_suffix("")
    Fault("raise in backward", rank=1, step=4).put_into(output)
    status, told = launch(recipe, "--max-restarts", "1", "train.steps=5")
    assert status == 0, told
    failed, _, restarted = told.partition("restart 1 of at most 1")
    last = failed.rstrip().splitlines()
    assert last[-1].startswith("First error, of rank 1 on ") and last[-1].endswith(
        "RuntimeError: a fault was injected"
    )
    assert "while training, after 3 steps" in last[-1]
    assert "in raise_an_error" in "\n".join(last[-6:])
    assert "going on from" in restarted and "step-000002" in restarted
    assert [record["step"] for record in read_metrics(output)] == [1, 2, 3, 4, 5]
    # What was said before the restart is kept.
    assert "injecting: Fault(deed='raise in backward', rank=1" in (output / "logs" / "rank_1.log").read_text()


def test_a_shortage_of_memory_is_followed_by_what_would_help(recipe: Path) -> None:
    Fault("device memory", rank=1, step=2).put_into(recipe.with_suffix(""))
    status, told = launch(recipe, "train.activation=keep")
    assert status != 0
    _, _, advice = told.partition("First error, of rank 1 on ")
    assert "CUDA out of memory" in advice and "per rank are needed at the peak" in advice
    assert len(advice.partition("What would help most, each alone:\n")[2].rstrip().splitlines()) == 3


def test_skipped_steps_in_a_row_are_counted_over_a_restart(recipe: Path) -> None:
    """Steps 3 to 6 are not finite, and three in a row are let pass; the checkpoint of step 4 knows of two."""
    limit = "faults.max_skipped=3"
    for first, arguments in ((3, ()), (5, ("--resume", "auto"))):
        Fault("spoil every step", step=first).put_into(recipe.with_suffix(""))
        status, told = launch(recipe, limit, *arguments)
        assert status != 0
        last = told.rstrip().splitlines()[-1]
        assert "the loss of step 6 is not finite" in last and "It is the 4. in a row" in last
    assert "going on from" in told and "step-000004" in told


def test_a_rank_that_stops_is_found_by_the_watchdog(recipe: Path) -> None:
    injection = Injection("SIGSTOP", "a rank", Fault("SIGSTOP", rank=1, step=2), "its state is T (stopped)")
    struck, told = strike(recipe, recipe.with_suffix(""), injection, ())
    assert not struck.problems
    # The other rank tells which collective it waited in.
    assert "First error, of rank 1 on" in told and "last collective gloo:" in told
