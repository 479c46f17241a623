"""The catalogue of faults: every deed is known, every fault dealt out, and its table says what happened."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from benchmarks.faults import COLUMNS, summarise
from eagle3_ds.launch.logs import Logs, RankEnd
from judge.faults.catalogue import NUM_RANKS, SAVE_EVERY, STEPS, catalogue, chains
from judge.faults.rank import AT_START, DEEDS
from judge.faults.runs import Struck


def test_every_fault_is_dealt_out_at_steps_that_can_be_struck() -> None:
    dealt = [injection for chain in chains() for injection in chain]
    assert len(dealt) >= 40
    assert Counter((one.name, one.where) for one in dealt) == {
        (one.name, one.where): times for one, times in catalogue()
    }
    for chain in chains():
        steps = [injection.fault.step for injection in chain]
        assert steps == sorted(set(steps)) and steps[0] >= 2 and steps[-1] <= STEPS
        for injection in chain:
            assert injection.fault.deed in DEEDS or injection.fault.deed in AT_START
            assert 0 <= injection.fault.rank < NUM_RANKS
            assert injection.fault.phase == "training" or (injection.fault.step - 1) % SAVE_EVERY == 0


def test_the_end_of_a_launch_is_judged(tmp_path: Path) -> None:
    logs = Logs(tmp_path / "logs")
    logs.prepare()
    happened = time.time() - 5.0
    logs.write_end(RankEnd(0, "host", "ended", "", "training", 3, "", "", False, happened + 1))
    logs.write_end(RankEnd(1, "host", "killed", "signal 9", "training", 3, "", "", False, happened + 2))
    well = Struck("SIGKILL", "a rank")
    well.judge_end(tmp_path, 1, "...\nFirst error, of rank 1: signal 9", "signal 9", happened)
    assert not well.problems and well.detected is not None and well.ended is not None
    assert 1.9 < well.detected < 2.1 and well.ended >= 5.0
    missed = Struck("SIGKILL", "a rank")
    missed.judge_end(
        tmp_path, 0, "signal 9\nFirst error, of rank 1: exit code 1", "signal 9", happened - 60.0
    )
    assert len(missed.problems) == 3


def test_the_loss_is_told_from_where_the_next_launch_goes_on() -> None:
    struck = Struck("SIGKILL", "a rank")
    struck.judge_loss(5, "note: going on from /x/checkpoints/step-000004", 4)
    assert (struck.lost, struck.problems) == (1, [])
    struck.judge_loss(5, "there is no checkpoint yet", 4)
    assert struck.lost == 5 and len(struck.problems) == 1


def test_the_table_has_a_row_for_each_kind() -> None:
    found = [
        Struck("SIGKILL", "a rank", 0.5, 3.0, 1, [], True),
        Struck("SIGKILL", "a rank", 0.7, 2.0, 0, ["x"], False),
        Struck("slow", "a rank", exact=True),
    ]
    first, second = summarise(found)
    assert dict(zip(COLUMNS, first, strict=True)) == {
        "fault": "SIGKILL", "where": "a rank", "tried": 2, "detected in (s)": "0.7",
        "run ended in (s)": "3.0", "steps lost": 1, "went on exactly": "no", "failures": 1,
    }  # fmt: skip
    assert second[3:] == (None, None, 0, "yes", 0)
