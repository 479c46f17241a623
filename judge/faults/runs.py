"""Real runs of two ranks by the real command, struck by faults and brought back, each compared with one that
was left alone.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

from eagle3_ds.cli.main import main as command_line
from eagle3_ds.config import Recipe
from eagle3_ds.launch.logs import Logs
from judge.faults.catalogue import NUM_RANKS, SAVE_EVERY, STEPS, Injection
from judge.faults.rank import HAPPENED, Fault
from judge.resume_runs import differences, make_recipe

WATCHDOG_SECONDS = 8.0
END_SECONDS = 30.0
DISK_BYTES = 2**24


@dataclass
class Struck:
    """What became of one fault.

    Attributes:
        detected, ended: seconds from the fault to the first report of it, and to the end of the launch.
        lost: steps that had to be done again.
        problems: where this was not as it should be; empty when all is well.
        exact: the run went on exactly; None before that is known.
    """

    name: str
    where: str
    detected: float | None = None
    ended: float | None = None
    lost: int = 0
    problems: list[str] = field(default_factory=list)
    exact: bool | None = None

    def judge_end(self, output: Path, status: int, told: str, expected: str, happened: float) -> None:
        """Note what the end of the launch shows: when, that it failed, and that the first error was told
        last.
        """
        ended = time.time()
        ends = Logs(output / "logs").ends(NUM_RANKS)
        reports = [end.time for end in ends.values() if end.how not in ("ended", "finished")]
        self.detected, self.ended = min(reports, default=ended) - happened, ended - happened
        if status == 0:
            self.problems.append("the launch said that all is well")
        if expected not in told[told.rfind("First error") :]:
            self.problems.append(f"the terminal said last: {told[-300:]}")
        if self.ended > END_SECONDS:
            self.problems.append(f"the run ended after {self.ended:.0f} s")

    def judge_loss(self, done: int, told: str, expected: int) -> None:
        """Note how many of the `done` steps the next launch did again, by what it said it goes on from."""
        match = re.search(r"going on from \S*step-(\d+)", told)
        resumed = int(match[1]) if match else 0
        self.lost = done - resumed
        if resumed != expected:
            self.problems.append(
                f"went on from step {resumed}, but the last intact checkpoint is of step {expected}"
            )


def struck_recipe(inputs: Path, output: Path) -> Recipe:
    """Two Ulysses ranks, ZeRO-2, accumulation over packed documents."""
    recipe = make_recipe(inputs, "zero0", output, steps=STEPS, save_every=SAVE_EVERY, eval_every=SAVE_EVERY)
    faults = recipe.faults.model_copy(
        update={"watchdog_seconds": WATCHDOG_SECONDS, "max_skipped": 0, "check_every": 1}
    )
    changes = {
        "deepspeed": str(recipe.deepspeed).replace("zero0", "zero2"),
        "faults": faults,
        "export": recipe.export.model_copy(update={"formats": ()}),
    }
    return recipe.model_copy(update=changes)


def launch(recipe: Path, *arguments: str) -> tuple[int, str]:
    """Exit status of the command and what it said, which is kept beside the recipe."""
    log = recipe.with_suffix(".log")
    with _speaking_to(log):
        status = command_line(["launch", str(recipe), *arguments])
    return status, log.read_text(errors="replace")


@contextmanager
def _speaking_to(log: Path) -> Iterator[None]:
    """Standard output and error of this process and of all that it starts go to a file."""
    kept = {fd: os.dup(fd) for fd in (1, 2)}
    with log.open("w", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        for fd in kept:
            os.dup2(file.fileno(), fd)
        try:
            yield
        finally:
            for fd, before in kept.items():
                os.dup2(before, fd)
                os.close(before)


def strike(recipe: Path, output: Path, injection: Injection, arguments: Sequence[str]) -> tuple[Struck, str]:
    """One launch with one fault; what was noticed, and what the terminal said."""
    injection.fault.put_into(output)
    status, told = launch(recipe, *arguments)
    struck = Struck(injection.name, injection.where)
    if (output / HAPPENED).is_file():
        struck.judge_end(output, status, told, injection.told, (output / HAPPENED).stat().st_ctime)
    else:
        struck.problems.append(f"the fault did not happen: {told[-500:]}")
    return struck, told


def run_chain(recipe: Path, output: Path, chain: Sequence[Injection], reference: Path) -> list[Struck]:
    """A run struck by each fault in turn, then brought to its end and compared."""
    output.mkdir()
    found: list[Struck] = []
    done = checkpoint = 0
    arguments: tuple[str, ...] = ()
    for injection in chain:
        struck, told = strike(recipe, output, injection, arguments)
        if found:
            found[-1].judge_loss(done, told, checkpoint)
        found.append(struck)
        arguments = ("--resume", "auto")
        if injection.where == "at start":
            # Nothing was done in this launch.
            done = checkpoint
            continue
        done = injection.fault.step - 1
        # Evaluated and saved after the same steps, in this order.
        saved = (done if injection.fault.phase == "training" else done - SAVE_EVERY) // SAVE_EVERY
        checkpoint = max(0, saved - injection.damaged) * SAVE_EVERY
        if injection.afterwards is not None:
            injection.afterwards(output)
    finish(recipe, output, found, done, checkpoint, reference)
    return found


def finish(
    recipe: Path, output: Path, found: Sequence[Struck], done: int, checkpoint: int, reference: Path
) -> None:
    """Bring a run to its end, and note for all that struck it how it compares with one left alone."""
    status, told = launch(recipe, "--resume", "auto")
    found[-1].judge_loss(done, told, checkpoint)
    unlike = differences(output, reference) if status == 0 else [told[-500:]]
    for struck in found:
        struck.exact = not unlike
        struck.problems += unlike


def fill_disk(recipe: Path, output: Path, reference: Path) -> list[Struck]:
    """A disk that fills up before a checkpoint. Nothing where no small disk can be mounted."""
    output.mkdir()
    size = f"size={DISK_BYTES}"
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(output)], check=False, stderr=subprocess.DEVNULL
    ).returncode:
        return []
    try:
        # No file takes a byte, so the rank's own words are on the terminal, and not in the order of other
        # failures.
        injection = Injection(
            "disk full", "the output folder", Fault("fill the disk", step=SAVE_EVERY + 2), ""
        )
        struck, told = strike(recipe, output, injection, ())
        if "CheckpointError" not in told or "bytes" not in told:
            struck.problems.append(f"needed and free bytes were not told: {told[-500:]}")
        (output / "filler").unlink()
        finish(recipe, output, [struck], 2 * SAVE_EVERY, SAVE_EVERY, reference)
    finally:
        subprocess.run(["umount", str(output)], check=True)
    return [struck]


def slow_down(recipe: Path, output: Path, reference: Path) -> list[Struck]:
    """A rank that takes a second longer for each step: nothing but time is lost."""
    output.mkdir()
    Fault("slow down", rank=1, step=3).put_into(output)
    status, told = launch(recipe)
    unlike = differences(output, reference) if status == 0 else [told[-500:]]
    return [Struck("one rank slow", "a rank, in every step", problems=unlike, exact=not unlike)]
