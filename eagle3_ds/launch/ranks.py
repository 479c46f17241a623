"""Running the ranks of a stage: start the launcher, pass signals on, end it when a rank has failed, and log
the first error last.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple

from eagle3_ds.launch.command import LaunchPlan
from eagle3_ds.launch.logs import Logs, RankEnd, seconds_between_looks

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
# After a failure the supervisors end their ranks within seconds. A launcher that runs longer than this waits
# for a host that is lost.
END_SECONDS = 15.0
# How long the file with a rank's end may take to appear on a shared file system once it is written.
LATE_SECONDS = 3.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Outcome(NamedTuple):
    """How the ranks of a stage ended.

    Attributes:
        status: 0 when every rank has finished; else the launcher's exit status, or 1 if that was 0.
        signalled: whether the run was asked to stop.
        reason: the first error; empty without one.
    """

    status: int
    signalled: bool
    reason: str = ""


def run_ranks(plan: LaunchPlan, what: str = "training") -> Outcome:
    """Run the launcher to its end. When a rank fails, the first error is the last message that is logged."""
    logger.info("%s on %d ranks; what each says: %s/rank_N.log", what, plan.world_size, plan.logs)
    logs = Logs(plan.logs)
    logs.prepare()
    # The launcher gets its own session, so that a terminal's SIGINT reaches only this process, which passes
    # it on to the ranks of all hosts. DeepSpeed's launcher would kill its ranks 30 s after the signal.
    process = subprocess.Popen(plan.command, env={**os.environ, **plan.environment}, start_new_session=True)
    with _signals_passed_on(logs) as received:
        _wait(process, logs)
    ends = _ends(logs, plan.world_size)
    if (
        process.returncode == 0
        and len(ends) == plan.world_size
        and all(end.how == "finished" for end in ends.values())
    ):
        return Outcome(0, bool(received))
    logger.error(describe_failure(ends, plan.world_size, process.returncode, logs, what))
    first = first_error(ends)
    return Outcome(
        process.returncode if process.returncode > 0 else 1, bool(received), first.reason if first else ""
    )


def run_with_restarts(plan: LaunchPlan, again: Callable[[], LaunchPlan], most: int) -> Outcome:
    """Run the launcher, and after a failure run it again, up to `most` times. A run that was asked to stop is
    not restarted.

    Args:
        again: makes the plan of each restart.

    Returns:
        How the last run ended.
    """
    outcome = run_ranks(plan)
    for restart in range(1, most + 1):
        if outcome.status == 0 or outcome.signalled:
            break
        logger.info("restart %d of at most %d", restart, most)
        outcome = run_ranks(again())
    return outcome


def _wait(process: subprocess.Popen[bytes], logs: Logs) -> None:
    deadline = None
    while process.poll() is None:
        try:
            process.wait(LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            if deadline is None and any(order.startswith(("end", "kill")) for order in logs.orders()):
                deadline = time.monotonic() + END_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def _signals_passed_on(logs: Logs) -> Iterator[list[int]]:
    """During the block, pass SIGINT, SIGTERM and SIGUSR1 on to every rank; a second SIGINT ends the ranks at
    once. Yields the list of the signals that have come.
    """
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGINT and number in received
        received.append(number)
        logs.order("kill a second SIGINT came" if again else f"signal {signal.Signals(number).name}")

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ends(logs: Logs, world_size: int) -> Mapping[int, RankEnd]:
    """How the ranks ended. Ends that are missing are waited for, because those of other hosts appear late on
    a shared file system.

    Ranks that have lost their launcher are ended: they must not train on beside those of a restart.
    """
    deadline = time.monotonic() + LATE_SECONDS + seconds_between_looks(world_size)
    ends = logs.ends(world_size)
    if len(ends) < world_size:
        logs.order("end the launcher that started this rank is gone")
    while len(ends) < world_size and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
        ends = logs.ends(world_size)
    return ends


def first_error(ends: Mapping[int, RankEnd]) -> RankEnd | None:
    """The end that caused the others; None when no rank has reported an error."""
    return min(
        (end for end in ends.values() if end.how != "finished"), key=lambda end: end.precedence, default=None
    )


def describe_failure(
    ends: Mapping[int, RankEnd], world_size: int, status: int, logs: Logs, what: str = "training"
) -> str:
    """Describe where every rank was and how it ended; the first error comes last."""
    lines = [f"{what} failed, the launcher's exit status is {status}; the ranks:"]
    lines += [_line(rank, ends.get(rank)) for rank in range(world_size)]
    first = first_error(ends)
    if first is None:
        return "\n".join([*lines, "", f"No rank said why. What each wrote is in {logs.folder}."])
    return "\n".join(
        [
            *lines,
            "",
            first.traceback.rstrip(),
            "",
            (
                f"First error, of rank {first.rank} on {first.host} while {first.phase}, after {first.step} "
                f"steps: {first.reason}"
            ),
        ]
    )


def _line(rank: int, end: RankEnd | None) -> str:
    if end is None:
        return f"  rank {rank}: no word; its host or its supervisor has gone"
    collective = f", last collective {end.collective}" if end.collective else ""
    reason = end.reason.partition("\n")[0]
    return f"  rank {rank} on {end.host}: {end.phase}, {end.step} steps done{collective}: {end.how}, {reason}"
