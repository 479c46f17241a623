"""Output folders as runs leave them, for tests of who looks on: four ranks, steps of two seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eagle3_ds.config import RESOLVED, dump_recipe, load_recipe
from eagle3_ds.launch.logs import How, Logs, RankEnd
from eagle3_ds.launch.state import RunState, Steps, write_steps

QUICKSTART = Path(__file__).parents[2] / "recipes/quickstart.yaml"
RANKS, GIB = 4, 2**30
PEAKS = [2 * GIB, 3 * GIB, 4 * GIB, 5 * GIB]


def record(step: int, **more: Any) -> dict[str, Any]:
    """A line of metrics.jsonl: loss 10 - step, 1,000 tokens in two seconds."""
    return {
        "step": step,
        "loss": 10.0 - step,
        "step_accuracy": [step / 10, 0.5],
        "acceptance_length": 1 + step / 10,
        "tokens": 1000,
        "tokens_per_s": 500.0,
        "peak_memory_bytes": PEAKS,
        **more,
    }


class WatchedRun:
    """Writes the files of a run's output folder, each as the run writes it."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder, self.logs = folder, Logs(folder / "logs")
        folder.mkdir()
        given = [f"output_dir={folder}", "parallel.draft_dp=1", "train.warmup_steps=0", *overrides]
        (folder / RESOLVED).write_text(dump_recipe(load_recipe(QUICKSTART, given)))

    def state(self, *arguments: Any, **more: Any) -> None:
        (self.folder / "state.json").write_text(json.dumps(vars(RunState(*arguments, **more))))

    def steps(self, first: int, last: int) -> None:
        write_steps(self.folder, Steps(first, last))

    def metrics(self, *records: dict[str, Any], rest: str = "") -> None:
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write("".join(f"{json.dumps(record)}\n" for record in records) + rest)

    def log(self, rank: int, *lines: str, host: str = "node-0") -> None:
        self.logs.folder.mkdir(exist_ok=True)
        with self.logs.output(rank).open("a") as file:
            file.write(f"--- rank {rank} on {host}, 2026-01-02 03:04:05\n")
            file.writelines(f"{line}\n" for line in lines)

    def end(self, rank: int, how: How, reason: str, step: int, time: float = 0.0) -> None:
        self.logs.write_end(RankEnd(rank, "node-0", how, reason, "training", step, "", "", False, time))


def running(folder: Path) -> WatchedRun:
    """Three of ten steps; rank 0 tells its progress and a message, the others nothing."""
    run = WatchedRun(folder, "train.steps=null", "train.epochs=2")
    run.state("training")
    run.steps(0, 10)
    held = {"loss": 8.5, "acceptance_length": 1.25, "step_accuracy": [0.25]}
    run.metrics(record(1), record(2, heldout=held, acceptance_length_decoded=1.5), record(3))
    run.log(0, "attention kernel cpu", "training:  30%|###  | 3/10 [00:06<00:14, loss=7.0]")
    for rank in range(1, RANKS):
        run.log(rank, host="node-1")
    return run
