"""The faults that `python -m benchmarks.faults` injects: what, where, how often, and what the run has to say
to each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from eagle3_ds.checkpoint.format import CHECKPOINTS, LATEST, MANIFEST, rank_file, step_folders
from judge.faults.rank import Fault

NUM_RANKS = 2
STEPS = 8
SAVE_EVERY = 2


@dataclass(frozen=True)
class Injection:
    """One fault of one run.

    Attributes:
        told: words of the first error.
        afterwards: what else is done to the output folder once the run has ended.
        damaged: checkpoints that `afterwards` damages, the newest first: the run goes on from the one before.
    """

    name: str
    where: str
    fault: Fault
    told: str
    afterwards: Callable[[Path], None] | None = None
    damaged: int = 0

    def at(self, step: int, rank: int) -> Injection:
        return replace(self, fault=replace(self.fault, step=step, rank=rank))


def catalogue() -> list[tuple[Injection, int]]:
    """Every injection that ends a run, and how often it is tried: at other steps and ranks each time."""
    return [*_deaths(), *_hangs(), *_errors(), *_silent_harm(), *_at_start(), *_damaged_checkpoints()]


def _in_training(name: str, told: str, deed: str | None = None) -> Injection:
    return Injection(name, "a rank, in a step", Fault(deed or name), told)


def _deaths() -> list[tuple[Injection, int]]:
    return [
        (_in_training("SIGKILL", "signal 9 (SIGKILL)"), 5),
        (_in_training("SIGSEGV", "signal 11 (SIGSEGV)"), 2),
        (_in_training("SIGABRT", "signal 6 (SIGABRT)"), 2),
        (_in_training("exit code 7", "exit code 7", "exit"), 2),
        (_in_training("all ranks killed", "signal 9 (SIGKILL)", "kill all ranks"), 2),
        (Injection("supervisor killed", "beside a rank", Fault("kill the supervisor"), ""), 2),
        (
            Injection(
                "launcher killed",
                "on the host",
                Fault("kill the launcher"),
                "the launcher that started this rank is gone",
            ),
            2,
        ),
    ]


def _hangs() -> list[tuple[Injection, int]]:
    return [
        (_in_training("SIGSTOP", "T (stopped)"), 3),
        (_in_training("endless sleep", "gloo:", "hang"), 2),
        (_in_training("stuck in C with Python's lock", "has not stirred", "hold the lock"), 2),
    ]


def _errors() -> list[tuple[Injection, int]]:
    injected = "RuntimeError: a fault was injected"
    return [
        (_in_training("exception", injected, "raise"), 3),
        (_in_training("exception in backward", injected, "raise in backward"), 2),
        (Injection("exception", "a rank, in evaluation", Fault("raise", phase="evaluating"), injected), 1),
        (Injection("exception", "a rank, before saving", Fault("raise", phase="saving"), injected), 1),
        (
            Injection(
                "SIGKILL", "a rank, before saving", Fault("SIGKILL", phase="saving"), "signal 9 (SIGKILL)"
            ),
            2,
        ),
        (_in_training("host memory exhausted", "can't allocate memory", "host memory"), 2),
        (_in_training("device memory exhausted (raised)", "CUDA out of memory", "device memory"), 1),
    ]


def _silent_harm() -> list[tuple[Injection, int]]:
    return [
        (_in_training("hidden states NaN", "FloatingPointError: the loss of step", "spoil a step"), 2),
        (
            _in_training(
                "gradient infinite on one rank",
                "FloatingPointError: the gradient of step",
                "spoil a gradient",
            ),
            2,
        ),
        (_in_training("bit of a weight flipped", "do not hold the same weights", "flip a bit"), 2),
        (
            _in_training(
                "bit of the target flipped", "do not hold the same frozen tensors", "flip a bit of the target"
            ),
            1,
        ),
        (_in_training("random state drifted", "do not hold the same random state", "draw a number"), 1),
        (_in_training("place in the data lost", "do not hold the same next packs", "lose the place"), 1),
    ]


def _at_start() -> list[tuple[Injection, int]]:
    told = {"package": "torch: ", "code": "code of eagle3_ds: ", "data": "data: ", "recipe": "recipe: "}
    return [
        (Injection(f"other {what} on one rank", "at start", Fault(f"other {what}"), words), 1)
        for what, words in told.items()
    ]


def _damaged_checkpoints() -> list[tuple[Injection, int]]:
    """After a death, the newest checkpoint is no longer what it was; `--resume auto` takes the one before."""

    def after(name: str, harm: Callable[[Path], None], damaged: int = 1) -> Injection:
        return Injection(
            name,
            "the newest checkpoint",
            Fault("SIGKILL"),
            "signal 9",
            lambda folder: harm(folder / CHECKPOINTS),
            damaged,
        )

    return [
        (after("file cut short", lambda root: _cut(newest(root) / rank_file(0))), 1),
        (after("file altered", lambda root: _alter(newest(root) / rank_file(1))), 1),
        (after("file missing", lambda root: (newest(root) / rank_file(1)).unlink()), 1),
        (after("manifest altered", lambda root: _alter(newest(root) / MANIFEST)), 1),
        (after("latest.json missing", lambda root: (root / LATEST).unlink(), damaged=0), 1),
    ]


def newest(root: Path) -> Path:
    return step_folders(root)[0]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def chains() -> list[list[Injection]]:
    """The catalogue dealt out to runs of STEPS steps, each fault at a later step than the one before it.

    A run that is struck again and again shows more than one that is struck once: what an earlier fault left
    must not matter.
    """
    dealt: list[list[Injection]] = []
    waiting = [injection for injection, times in catalogue() for _ in range(times)]
    turn = 0
    while waiting:
        chain: list[Injection] = []
        step = 2
        while waiting and step <= STEPS:
            chosen = next((one for one in waiting if _possible(one, step)), None)
            if chosen is None:
                step += 1
                continue
            waiting.remove(chosen)
            chain.append(chosen.at(step, turn % NUM_RANKS))
            turn += 1
            step += 1
        dealt.append(chain)
    return dealt


def _possible(injection: Injection, step: int) -> bool:
    """A fault in saving or evaluating hits the step after one that is saved, and a damaged checkpoint leaves
    one before it.
    """
    if injection.fault.phase != "training":
        return step > 1 and (step - 1) % SAVE_EVERY == 0
    if injection.afterwards is not None:
        return step > 2 * SAVE_EVERY + 1
    return True
