"""The folder `output_dir/logs`, through which the processes of a run communicate. All hosts must share it.

`rank_N.log` has the output of rank N, `rank_N.end.json` how it ended. Every supervisor reads the file
`control` every half second, in large worlds every few: a failure so reaches all hosts within seconds, even if
their ranks wait in a collective. The file is made before the run and opened again for each read, because NFS
shows changes of a file when it is opened, but a new file in a folder much later.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

How = Literal["finished", "raised", "killed", "silent", "hung", "ended"]
"""How a rank ended: without an error; by an exception; by a signal; alive but without heartbeats; in a
collective that did not end; or because another rank failed.
"""

# How often all supervisors together open the control file, which lies on shared storage.
LOOKS_A_SECOND = 200

# Progress bars of transformers and datasets redraw their line, and would fill a log file.
NO_BARS = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


def seconds_between_looks(world_size: int) -> float:
    """How long a supervisor waits before it reads the control file again: at most 5 s, whatever it costs the
    storage.
    """
    return min(max(0.5, world_size / LOOKS_A_SECOND), 5.0)


@dataclass(frozen=True)
class Status:
    """A rank's heartbeat.

    Attributes:
        phase: what the rank is doing, in a word.
        step: optimizer steps done.
        collective: description of the collective that it waits for, or else of the last one; empty when there
            was none, or torch records none.
        waiting: whether the rank waits for that collective.
        mark: when that collective was issued, so a different number for every collective.
    """

    phase: str = "starting"
    step: int = 0
    collective: str = ""
    waiting: bool = False
    mark: int = 0


@dataclass(frozen=True)
class RankEnd:
    """How a rank ended.

    Attributes:
        reason: why, in one line.
        traceback: the exception's traceback, or the last lines of the log when there was no exception.
        follows: whether the error says that a peer has gone, and so is a consequence of another failure.
        time: seconds since the epoch, by the clock of the rank's host.
    """

    rank: int
    host: str
    how: How
    reason: str
    phase: str
    step: int
    collective: str
    traceback: str
    follows: bool
    time: float

    @property
    def precedence(self) -> tuple[int, float]:
        """A sort key that puts causes before consequences: when a rank has gone, its peers fail in a
        collective or wait in it without end.
        """
        order = {
            "killed": 0,
            "silent": 0,
            "raised": 1 if self.follows else 0,
            "hung": 2,
            "ended": 3,
            "finished": 4,
        }
        return order[self.how], self.time


@dataclass(frozen=True)
class Logs:
    """The folder of a run's logs, and the files in it."""

    folder: Path

    @property
    def control(self) -> Path:
        return self.folder / "control"

    def output(self, rank: int) -> Path:
        return self.folder / f"rank_{rank}.log"

    def end(self, rank: int) -> Path:
        return self.folder / f"rank_{rank}.end.json"

    def prepare(self) -> None:
        """Prepare the folder before any process of a run starts. The logs of earlier runs are kept."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob("rank_*.end.json"):
            path.unlink()
        self.control.write_text("")

    def order(self, line: str) -> None:
        """Send an order to all supervisors: `signal NAME` sends a signal to each rank, `end REASON` ends the
        ranks, and `kill REASON` ends them at once, even those that are ending by themselves.
        """
        with self.control.open("a") as file:
            file.write(f"{line}\n")

    def orders(self) -> list[str]:
        """All orders so far. A line that is still being written is left out."""
        text = self.control.read_text()
        return text[: text.rfind("\n") + 1].splitlines()

    def write_end(self, end: RankEnd) -> None:
        aside = self.folder / f".rank_{end.rank}.end.json"
        aside.write_text(json.dumps(asdict(end), indent=2) + "\n")
        os.replace(aside, self.end(end.rank))

    def ends(self, world_size: int) -> dict[int, RankEnd]:
        """{rank: how it ended}, without the ranks whose end was not written."""
        found = {}
        for rank in range(world_size):
            # Who only looks on may look while `prepare` removes it.
            with suppress(FileNotFoundError):
                found[rank] = RankEnd(**json.loads(self.end(rank).read_text()))
        return found
