"""Supervisors: every way for a rank to end, seen from outside, told to the others and to the terminal.

The ranks are `fake_rank.py`, which has a rank's words and none of its work.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Timer

import pytest

from eagle3_ds.launch.announced import announcement
from eagle3_ds.launch.command import LaunchPlan
from eagle3_ds.launch.logs import How, Logs, RankEnd, Status, seconds_between_looks
from eagle3_ds.launch.ranks import describe_failure, run_ranks, run_with_restarts
from eagle3_ds.launch.supervisor import START_SECONDS, Rank, Supervisor
from eagle3_ds.say import telling

FAKES = Path(__file__).parent
LIMIT = 3.0


def supervisor(logs: Logs, rank: int, deed: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "eagle3_ds.launch.supervisor",
        f"--log_folder={logs.folder}",
        f"--limit={LIMIT}",
        "fake_rank",
        deed,
    ]


@pytest.fixture(autouse=True)
def told() -> Iterator[None]:
    """What the launch says is shown, as by a command."""
    with telling("info"):
        yield


@contextmanager
def ranks(logs: Logs, *deeds: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A supervised rank for each deed; none is left behind."""
    logs.prepare()
    paths = os.pathsep.join([str(FAKES), *sys.path])
    processes = []
    for rank, deed in enumerate(deeds):
        environment = {**os.environ, "RANK": str(rank), "PYTHONPATH": paths}
        processes.append(
            subprocess.Popen(supervisor(logs, rank, deed), env=environment, stdout=subprocess.PIPE)
        )
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def ended(tmp_path: Path, *deeds: str) -> tuple[list[int], list[RankEnd]]:
    """Exit codes and ends of ranks that do these deeds."""
    logs = Logs(tmp_path / "logs")
    with ranks(logs, *deeds) as processes:
        codes = [process.wait(20) for process in processes]
    ends = logs.ends(len(deeds))
    return codes, [ends[rank] for rank in range(len(deeds))]


def test_all_finish(tmp_path: Path) -> None:
    codes, ends = ended(tmp_path, "finishes", "finishes")
    assert codes == [0, 0]
    assert [(end.how, end.step) for end in ends] == [("finished", 7)] * 2
    assert Logs(tmp_path / "logs").orders() == []
    assert "rank 1 starts to: finishes" in Logs(tmp_path / "logs").output(1).read_text()


FAILURES = {
    "raises": ("raised", "ValueError: a bad row"),
    "stays": ("raised", "ValueError: a bad row"),
    "exits": ("raised", "exit code 3"),
    "SIGKILL": ("killed", "signal 9 (SIGKILL)"),
    "SIGSTOP": ("silent", "T (stopped)"),
    "waits": ("hung", "s in gloo:all_reduce number 9 of group 0 on 4"),
}


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[int], list[RankEnd]]]:
    """For each deed, a run of two ranks in which rank 1 does it; all runs at once, because most of it is
    waiting.
    """
    with ThreadPoolExecutor(len(FAILURES)) as pool:
        runs = {deed: pool.submit(ended, tmp_path_factory.mktemp("run"), "sleeps", deed) for deed in FAILURES}
        return {deed: run.result() for deed, run in runs.items()}


@pytest.mark.parametrize("deed", FAILURES)
def test_a_rank_that_fails_ends_the_others(
    deed: str, failed: dict[str, tuple[list[int], list[RankEnd]]]
) -> None:
    codes, (other, end) = failed[deed]
    how, words = FAILURES[deed]
    assert codes[0] == 1 and codes[1] > 0
    assert (end.how, end.phase, end.step) == (how, "training", 7)
    assert words in end.reason
    assert (other.how, other.collective) == ("ended", "gloo:all_reduce number 9 of group 0 on 4")
    assert "rank 1 on" in other.reason
    if deed == "exits":
        assert "terminate called" in end.traceback


def test_a_mute_rank_is_the_cause_whoever_loses_patience_first(tmp_path: Path) -> None:
    _, (mute, waiting) = ended(tmp_path, "SIGSTOP", "waits")
    assert mute.how == "silent" and waiting.how in ("hung", "ended")
    assert mute.precedence < waiting.precedence


def wait_until_it_says(logs: Logs, words: str) -> None:
    """Until rank 0 has."""
    while not (logs.output(0).is_file() and words in logs.output(0).read_text()):
        time.sleep(0.01)


def test_a_dying_rank_is_the_cause_though_a_peer_hears_of_it_first(tmp_path: Path) -> None:
    """The peer's supervisor has asked for the end of all before the system is done with the dead one."""
    logs = Logs(tmp_path / "logs")
    with ranks(logs, "dies slowly") as (process,):
        wait_until_it_says(logs, "dies slowly")
        logs.order("end rank 1 on host failed")
        assert process.wait(10) == 1
    assert (logs.ends(1)[0].how, logs.ends(1)[0].reason.partition(":")[0]) == ("killed", "signal 9 (SIGKILL)")


def test_a_second_sigint_does_not_wait_for_the_first(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """This rank would end by itself in half a second, as one that is about to save does."""
    logs = Logs(tmp_path / "logs")
    with ranks(logs, "dies slowly") as (process,):
        wait_until_it_says(logs, "dies slowly")
        logs.order("kill a second SIGINT came")
        assert process.wait(10) == 1
    assert (logs.ends(1)[0].how, logs.ends(1)[0].reason) == ("ended", "a second SIGINT came")


def test_a_full_disk_does_not_silence_a_failure(tmp_path: Path) -> None:
    """/dev/full takes no byte: the log and the end of the rank cannot be written."""
    logs = Logs(tmp_path / "logs")
    logs.prepare()
    for path in (logs.output(0), logs.folder / ".rank_0.end.json"):
        path.symlink_to("/dev/full")
    environment = {**os.environ, "RANK": "0", "PYTHONPATH": os.pathsep.join([str(FAKES), *sys.path])}
    done = subprocess.run(
        supervisor(logs, 0, "raises"),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    assert done.returncode == 1
    assert "rank 0 starts to: raises" in done.stdout
    assert "rank 0: ValueError: a bad row" in done.stderr and "No space left" in done.stderr


def test_signals_go_to_the_ranks(tmp_path: Path) -> None:
    logs = Logs(tmp_path / "logs")
    with ranks(logs, "obeys", "obeys") as processes:
        while not all(
            logs.output(rank).is_file() and "obeys" in logs.output(rank).read_text() for rank in range(2)
        ):
            time.sleep(0.05)
        processes[0].send_signal(signal.SIGUSR1)
        assert processes[0].wait(10) == 0
        logs.order("signal SIGUSR1")
        assert processes[1].wait(10) == 0


def test_a_half_written_order_waits(tmp_path: Path) -> None:
    logs = Logs(tmp_path / "logs")
    logs.prepare()
    logs.control.write_text("signal SIGUSR1\nend rank")
    assert logs.orders() == ["signal SIGUSR1"]


def test_only_the_first_rank_speaks_on_the_terminal(tmp_path: Path) -> None:
    with ranks(Logs(tmp_path / "logs"), "finishes", "finishes") as processes:
        said = [process.communicate(timeout=20)[0].decode() for process in processes]
    assert "rank 0 starts" in said[0] and said[1] == ""


def test_a_rank_is_given_time_to_start_and_none_to_be_silent() -> None:
    state = Rank(started=100.0)
    assert state.trouble(100.0 + START_SECONDS, 10.0) is None
    assert state.trouble(111.0 + START_SECONDS, 10.0) == ("silent", 11.0)
    state.hear(Status("training", 1, "all_reduce", True, 1), 500.0)
    assert state.trouble(509.0, 10.0) is None
    assert state.trouble(511.0, 10.0) == ("silent", 11.0)
    for now in (505.0, 510.0, 515.0):
        state.hear(Status("training", 1, "all_reduce", True, 1), now)
    assert state.trouble(515.0, 10.0) == ("hung", 15.0)
    # Long computing is no fault, and neither is a collective after the other.
    state.hear(Status("training", 1, "all_reduce", True, 2), 516.0)
    assert state.trouble(517.0, 10.0) is None
    state.hear(Status("training", 1, "all_reduce", False, 2), 517.0)
    state.hear(Status("training", 1, "all_reduce", False, 2), 900.0)
    assert state.trouble(901.0, 10.0) is None


def test_announcement() -> None:
    assert announcement({"RANK": "3", "SLURM_PROCID": "1"}) == {}
    slurm = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0"}
    assert announcement(slurm) == {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}
    assert announcement({**slurm, "SLURM_STEP_NUM_TASKS": "1"}) == {}


# The launcher's side


def plan(tmp_path: Path, *deeds: str, status: int = 1) -> LaunchPlan:
    """A launcher that starts a supervised rank for each deed and waits for them, whatever happens."""
    logs = Logs(tmp_path / "logs")
    lines = [f"RANK={rank} {' '.join(supervisor(logs, rank, deed))} &" for rank, deed in enumerate(deeds)]
    command = ("sh", "-c", "\n".join([*lines, "wait", f"exit {status}"]))
    environment = {"PYTHONPATH": os.pathsep.join([str(FAKES), *sys.path])}
    return LaunchPlan({"localhost": tuple(range(len(deeds)))}, command, logs.folder, environment, None)


def test_the_first_error_is_the_last_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_ranks(plan(tmp_path, "sleeps", "raises", "sleeps", status=7)).status == 7
    told = capfd.readouterr().err.rstrip().splitlines()
    assert told[-1].startswith("First error, of rank 1 on ")
    assert told[-1].endswith("while training, after 7 steps: ValueError: a bad row")
    assert told[-4:-2] == ["Traceback", "ValueError: a bad row"]
    for rank in range(3):
        assert any(f"rank {rank} on" in line and "gloo:all_reduce number 9" in line for line in told), told


def test_a_launcher_that_says_all_is_well_is_not_believed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """DeepSpeed's runner exits with 0 when the process that it waits for was killed."""
    assert run_ranks(plan(tmp_path, "finishes", "SIGKILL", status=0)).status == 1
    assert "signal 9 (SIGKILL)" in capfd.readouterr().err.splitlines()[-1]
    assert run_ranks(replace(plan(tmp_path, "finishes"), command=("true",))).status == 1
    assert "No rank said why" in capfd.readouterr().err
    assert run_ranks(plan(tmp_path, "finishes", "finishes", status=0)) == (0, False, "")
    assert capfd.readouterr().err == ""


def test_ranks_that_have_lost_their_launcher_are_ended(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A restart must not find them training. The launcher leaves its supervisor behind, which has init for
    its parent.
    """
    logs = Logs(tmp_path / "logs")
    orphan = f"(RANK=0 setsid {' '.join(supervisor(logs, 0, 'sleeps'))} >/dev/null &); sleep 1; exit 1"
    lost = replace(plan(tmp_path, "sleeps"), command=("sh", "-c", orphan))
    assert run_ranks(lost).status == 1
    ends = logs.ends(1)
    # Whatever became of it, the test leaves no process behind.
    logs.order("kill the test is over")
    assert "the launcher that started this rank is gone" in capfd.readouterr().err.splitlines()[-1]
    assert ends[0].how == "ended"


def test_a_failed_run_is_started_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    failing, well = plan(tmp_path, "raises"), plan(tmp_path, "finishes", status=0)
    coming = [failing, well, failing]
    assert run_with_restarts(failing, lambda: coming.pop(0), 5).status == 0
    assert coming == [failing]
    assert [line for line in capfd.readouterr().out.splitlines() if "restart" in line] == [
        f"restart {n} of at most 5" for n in (1, 2)
    ]
    assert run_with_restarts(failing, lambda: failing, 1).status == 1
    assert run_with_restarts(well, failing_is_not_asked_for, 1).status == 0


def failing_is_not_asked_for() -> LaunchPlan:
    raise AssertionError("a run that is well is not started again")


def test_a_run_that_was_asked_to_stop_is_not_started_again(tmp_path: Path) -> None:
    """This rank does not heed SIGUSR1, so that it ends as a failure."""
    stopper = Timer(2.0, os.kill, (os.getpid(), signal.SIGUSR1))
    stopper.start()
    assert run_with_restarts(plan(tmp_path, "sleeps"), failing_is_not_asked_for, 3) == (
        1,
        True,
        "signal 10 (SIGUSR1)",
    )
    (told,) = Logs(tmp_path / "logs").ends(1).values()
    assert (told.how, told.reason) == ("killed", "signal 10 (SIGUSR1)")


def end(rank: int, how: How, time: float, follows: bool = False) -> RankEnd:
    return RankEnd(
        rank, f"host-{rank}", how, f"reason {rank}", "training", rank, "", f"trace {rank}", follows, time
    )


@pytest.mark.parametrize(
    ("ends", "first"),
    [
        ((end(0, "raised", 2.0), end(1, "raised", 1.0)), 1),
        ((end(0, "raised", 1.0, follows=True), end(1, "killed", 2.0)), 1),
        ((end(0, "hung", 1.0), end(1, "silent", 2.0), end(2, "ended", 0.5)), 1),
        ((end(0, "hung", 2.0), end(1, "raised", 3.0, follows=True)), 1),
        ((end(0, "ended", 1.0), end(1, "finished", 0.0)), 0),
    ],
)
def test_causes_come_before_what_follows_from_them(
    ends: tuple[RankEnd, ...], first: int, tmp_path: Path
) -> None:
    told = describe_failure({end.rank: end for end in ends}, 4, 1, Logs(tmp_path))
    assert f"First error, of rank {first} on host-{first}" in told.splitlines()[-1]
    assert "rank 3: no word" in told


def test_large_worlds_look_for_orders_less_often(tmp_path: Path) -> None:
    """1,024 supervisors that each open a file of the shared storage twice a second are felt by others."""
    assert [seconds_between_looks(world) for world in (1, 100, 400, 4096)] == [0.5, 0.5, 2.0, 5.0]
    logs = Logs(tmp_path / "logs")
    logs.prepare()
    watching = Supervisor(logs, 0, 400, LIMIT, [sys.executable, "-c", "pass"])
    try:
        assert watching._new_orders(100.0) == []
        logs.order("signal SIGUSR1")
        assert watching._new_orders(101.9) == []
        assert watching._new_orders(102.1) == ["signal SIGUSR1"]
    finally:
        watching.child.kill()
        watching.child.communicate()
