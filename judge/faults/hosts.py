"""Two hosts of one rank each, and what can happen to a host: its ranks die, it dies, the network between them
does.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from eagle3_ds.checkpoint.format import CHECKPOINTS, newest_intact, read_manifest
from judge.faults.catalogue import SAVE_EVERY
from judge.faults.runs import WATCHDOG_SECONDS, Struck
from judge.resume_runs import differences, read_metrics
from judge.two_hosts import TwoHosts, two_hosts

ROOT = Path(__file__).parents[2]
# From the end of the launch to that of the ranks on a host that it cannot reach.
CUT_OFF_SECONDS = WATCHDOG_SECONDS + 10.0


def kill_ranks(hosts: TwoHosts) -> None:
    for pid in hosts.ranks(1):
        os.kill(pid, signal.SIGKILL)


def cut_cable(hosts: TwoHosts) -> None:
    hosts.cable.cut = True


def switch_off(hosts: TwoHosts) -> None:
    """Everything of the run on the second host dies, and the network with it."""
    hosts.cable.cut = True
    for pid in hosts.programs(1):
        os.kill(pid, signal.SIGKILL)


FAULTS: Sequence[tuple[str, str, Callable[[TwoHosts], None], str]] = (
    ("ranks of one host killed", "two hosts", kill_ranks, "signal 9 (SIGKILL)"),
    ("cable cut", "two hosts", cut_cable, "gloo:"),
    ("host switched off", "two hosts", switch_off, "gloo:"),
)


def strike_hosts(recipe: Path, output: Path, reference: Path) -> list[Struck]:
    """One run over two hosts, struck three times and brought back each time; then brought to its end and
    compared.
    """
    found: list[Struck] = []
    done = checkpoint = 0
    log = recipe.with_suffix(".log")
    with two_hosts(output.with_name("two-hosts"), slots=1) as hosts:
        for name, where, harm, told in FAULTS:
            struck = Struck(name, where)
            # A step that no launch before has done: what they have done is on record until this one trains.
            step = max(SAVE_EVERY, done) + 1
            log.unlink(missing_ok=True)
            process = hosts.start(_command(recipe, hosts, resume=bool(found)), ROOT, log)
            while process.poll() is None and _steps_done(output) < step:
                time.sleep(0.02)
            harm(hosts)
            happened = time.time()
            status = process.wait()
            struck.judge_end(output, status, log.read_text(), told, happened)
            if not _ends_soon(hosts):
                struck.problems.append(
                    f"ranks of the second host were still there {CUT_OFF_SECONDS:.0f} s later"
                )
            hosts.cable.cut = False
            if found:
                found[-1].judge_loss(done, log.read_text(), checkpoint)
            found.append(struck)
            done, checkpoint = _steps_done(output), _newest_step(output)
        log.unlink()
        status = hosts.start(_command(recipe, hosts, resume=True), ROOT, log).wait()
        found[-1].judge_loss(done, log.read_text(), checkpoint)
        unlike = differences(output, reference) if status == 0 else [log.read_text()[-500:]]
    for struck in found:
        struck.exact, struck.problems = not unlike, struck.problems + unlike
    return found


def _command(recipe: Path, hosts: TwoHosts, resume: bool) -> list[str]:
    line = [sys.executable, "-m", "eagle3_ds.cli", "launch", str(recipe), "--hostfile", str(hosts.hostfile)]
    return [*line, "--resume", "auto"] if resume else line


def _steps_done(output: Path) -> int:
    return len(read_metrics(output)) if (output / "metrics.jsonl").is_file() else 0


def _newest_step(output: Path) -> int:
    """Of the newest intact checkpoint; 0 when there is none."""
    folder, _ = newest_intact(output / CHECKPOINTS)
    return read_manifest(folder).step if folder else 0


def _ends_soon(hosts: TwoHosts) -> bool:
    """Whether no rank is left on the second host, now or soon: nobody can tell it anything."""
    deadline = time.monotonic() + CUT_OFF_SECONDS
    while hosts.ranks(1) and time.monotonic() < deadline:
        time.sleep(0.2)
    return not hosts.ranks(1)
