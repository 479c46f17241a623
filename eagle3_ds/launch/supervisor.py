"""The supervisor of one rank:
`python -m eagle3_ds.launch.supervisor --log_folder DIR --limit SECONDS MODULE ARGUMENTS`.

It starts `python -m MODULE ARGUMENTS` as the rank and writes the rank's output to a log. It notices when the
rank dies, sends no heartbeats or waits too long in a collective. As a process of its own it can do so even
when the rank is stopped, or hangs while it holds the GIL. The first supervisor that notices a failure tells
the others through the control file, and all of them end their ranks.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from eagle3_ds.launch.announced import announcement
from eagle3_ds.launch.logs import NO_BARS, How, Logs, RankEnd, Status, seconds_between_looks

TICK_SECONDS = 0.5
# How long a rank may take to exit after it has reported an exception. It may hang there while it destroys a
# broken process group.
EXIT_SECONDS = 5.0
# How long a dying rank may take to end. Its peers notice at once that it has gone, but the system takes long
# to free much memory.
DYING_SECONDS = 1.0
# How long a rank may take to its first heartbeat. It imports its packages before, which takes minutes on a
# busy file system.
START_SECONDS = 300.0
# More than two heartbeats: when another rank fails, a rank that has been silent for so long counts as mute.
SUSPECT_SECONDS = 2.5
TAIL_LINES = 30
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# How many collectives torch's flight recorder keeps. Once a second all are copied to read the newest, so few.
RECORDED = {"TORCH_FR_BUFFER_SIZE": "32"}


@dataclass
class Rank:
    """What the supervisor knows about its rank. Times are of the monotonic clock.

    Attributes:
        heard: when the last heartbeat came; None before the first one.
        moved: when phase, step or collective last changed.
    """

    started: float
    heard: float | None = None
    moved: float = 0.0
    status: Status = field(default_factory=Status)

    def hear(self, status: Status, now: float) -> None:
        if status != self.status:
            self.moved = now
        self.status, self.heard = status, now

    def trouble(self, now: float, limit: float) -> tuple[How, float] | None:
        """(how, seconds) when the rank has been silent, or in one collective, for longer than `limit`
        seconds; else None.
        """
        silent = now - self.heard if self.heard is not None else now - self.started - START_SECONDS
        if silent > limit:
            return "silent", silent
        if self.status.waiting and now - self.moved > limit:
            return "hung", now - self.moved
        return None


class Supervisor:
    """Runs one rank of `world_size` to its end and writes how it ended."""

    def __init__(self, logs: Logs, rank: int, world_size: int, limit: float, command: Sequence[str]) -> None:
        self.logs, self.rank, self.limit = logs, rank, limit
        self.between_looks, self.looked = seconds_between_looks(world_size), -math.inf
        self.parent = os.getppid()
        self.selector = selectors.DefaultSelector()
        log = logs.output(rank).open("ab")
        log.write(
            f"--- rank {rank} on {socket.gethostname()}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode()
        )
        self.streams: list[BinaryIO] = [log]
        if rank == 0:
            self.streams.append(sys.stdout.buffer)
        self.end: RankEnd | None = None
        self.concluded = 0.0
        self.obeyed = 0
        said, saying = os.pipe()
        self.child = subprocess.Popen(
            [*command, f"--status_fd={saying}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[saying],
            # With its own session, the rank and all processes that it started can be killed together.
            start_new_session=True,
            env={**RECORDED, **NO_BARS, **os.environ, **announcement(os.environ)},
        )
        os.close(saying)
        self.state = Rank(started=time.monotonic())
        self._rest = b""
        assert self.child.stdout is not None
        for fd, reader in ((self.child.stdout.fileno(), self._keep), (said, self._listen)):
            os.set_blocking(fd, False)
            self.selector.register(fd, selectors.EVENT_READ, reader)

    def run(self) -> int:
        """Run the rank to its end. Returns its exit status, or 1 when a signal ended it."""
        for number in FORWARDED:
            signal.signal(number, self._forward)
        while self.child.poll() is None:
            self._read(TICK_SECONDS)
            self._look()
        self._read(0.0)
        code = self.child.returncode
        if self.end is None:
            self._conclude(*_outcome(code))
        assert self.end is not None
        if self.end.how == "finished":
            return 0
        return code if code > 0 else 1

    def _read(self, timeout: float) -> None:
        for key, _ in self.selector.select(timeout):
            key.data(key.fd)

    def _look(self) -> None:
        """Check the rank, and follow the orders of the other supervisors and of the launcher."""
        now = time.monotonic()
        if self.end is not None:
            if now - self.concluded > EXIT_SECONDS:
                self._kill()
            return
        orders = self._new_orders(now)
        if self.child.poll() is not None:
            # The rank died before it was told to end, so its death may be the reason for the order.
            return
        for order in orders:
            word, _, rest = order.partition(" ")
            if word == "signal":
                self._forward(signal.Signals[rest], None)
            else:
                if word == "kill" or not self._is_dying():
                    self._stop(*self._why_ended(now, rest))
                return
        self.obeyed += len(orders)
        trouble = self.state.trouble(now, self.limit)
        if trouble is not None:
            how, seconds = trouble
            self._stop(how, self._describe(how, seconds))
        elif os.getppid() != self.parent:
            self._stop("killed", "the launcher that started this rank is gone")

    def _new_orders(self, now: float) -> list[str]:
        """Orders that are not obeyed yet. A rank that writes much does not make its supervisor look more
        often.
        """
        if now - self.looked < self.between_looks:
            return []
        self.looked = now
        return self.logs.orders()[self.obeyed :]

    def _is_dying(self) -> bool:
        """Whether the rank ends by itself within `DYING_SECONDS`, so that its death may be the reason for the
        order to end.
        """
        try:
            self.child.wait(DYING_SECONDS)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _why_ended(self, now: float, order: str) -> tuple[How, str]:
        """Why this rank is ended on another supervisor's order: because of the order, unless this rank was
        mute already.

        Ranks that wait for a mute rank in a collective may reach their limit first, but are not the cause.
        """
        trouble = self.state.trouble(now, SUSPECT_SECONDS)
        if trouble is not None and trouble[0] == "silent":
            return "silent", self._describe(*trouble)
        return "ended", order

    def _describe(self, how: How, seconds: float) -> str:
        if how == "silent":
            state = _process_state(self.child.pid)
            return f"process {self.child.pid} has not stirred for {seconds:.0f} s{state}"
        return f"waited {seconds:.0f} s in {self.state.status.collective}"

    def _stop(self, how: How, reason: str) -> None:
        """End the rank, after it was made to write the stacks of its threads to its log."""
        if how != "ended":
            self.child.send_signal(signal.SIGUSR2)
            time.sleep(TICK_SECONDS)
            self._read(0.0)
        self._conclude(how, reason)
        self._kill()

    def _conclude(self, how: How, reason: str, traceback: str = "", follows: bool = False) -> None:
        """Write how the rank ended. If it failed by itself, tell the other supervisors."""
        status = self.state.status
        if how in ("killed", "silent", "hung", "raised") and not traceback:
            traceback = self._tail()
        place = (status.phase, status.step, status.collective)
        self.end = RankEnd(
            self.rank, socket.gethostname(), how, reason, *place, traceback, follows, time.time()
        )
        self.concluded = time.monotonic()
        try:
            self.logs.write_end(self.end)
            if how not in ("finished", "ended"):
                self.logs.order(f"end rank {self.rank} on {self.end.host} failed")
        except OSError as error:
            # The disk is full, so print to the terminal. The launcher ends the other ranks once this one has
            # gone.
            print(f"rank {self.rank}: {reason}\n{traceback}\n{error}", file=sys.stderr, flush=True)

    def _keep(self, fd: int) -> None:
        chunk = self._take(fd)
        for stream in list(self.streams):
            try:
                stream.write(chunk)
                stream.flush()
            except OSError:
                # The terminal has gone, or the disk is full. The rank need not fail for lost output.
                self.streams.remove(stream)

    def _listen(self, fd: int) -> None:
        *lines, self._rest = (self._rest + self._take(fd)).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "error" in message:
                self._conclude("raised", **message["error"])
            else:
                self.state.hear(Status(**message), time.monotonic())

    def _take(self, fd: int) -> bytes:
        """Read all that is available; a stream that has ended is watched no longer."""
        chunks = []
        while True:
            try:
                chunk = os.read(fd, 2**16)
            except BlockingIOError:
                break
            if not chunk:
                self.selector.unregister(fd)
                break
            chunks.append(chunk)
        return b"".join(chunks)

    def _tail(self) -> str:
        with self.logs.output(self.rank).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2**14))
            text = file.read().decode(errors="replace")
        # A progress bar overwrites its line: keep only what it showed last.
        lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
        return "\n".join(lines[-TAIL_LINES:])

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if self.child.poll() is None:
            self.child.send_signal(number)

    def _kill(self) -> None:
        try:
            os.killpg(self.child.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def _outcome(code: int) -> tuple[How, str]:
    """How a rank ended that reported nothing itself, from its exit code."""
    if code == 0:
        return "finished", "exit code 0"
    if code > 0:
        return "raised", f"exit code {code}"
    name = signal.Signals(-code).name
    hint = (
        ": by hand, by the scheduler, or by the kernel because the host's memory was full"
        if name == "SIGKILL"
        else ""
    )
    return "killed", f"signal {-code} ({name}){hint}"


def _process_state(pid: int) -> str:
    """The state of a process in Linux, worded to be appended to a sentence."""
    path = Path(f"/proc/{pid}/status")
    if not path.is_file():
        return ""
    state = next((line for line in path.read_text().splitlines() if line.startswith("State:")), "")
    return f", its state is {state.partition(':')[2].strip()}" if state else ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log_folder", required=True, type=Path, help="output_dir/logs")
    parser.add_argument(
        "--limit",
        required=True,
        type=float,
        help="seconds of silence, or in one collective, that are a fault",
    )
    parser.add_argument("module", help="the module that is the rank")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args(arguments)
    environment = {**os.environ, **announcement(os.environ)}
    rank, world_size = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    command = [sys.executable, "-u", "-m", options.module, *options.arguments]
    return Supervisor(Logs(options.log_folder), rank, world_size, options.limit, command).run()


if __name__ == "__main__":
    sys.exit(main())
