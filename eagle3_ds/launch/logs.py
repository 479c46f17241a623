"""What the processes of one run leave for each other, in `output_dir/logs` on storage that all hosts share.

`rank_N.log` is what rank N said. `rank_N.end.json` says how it ended. `control` is one file that every
supervisor reads once a second: by it a failure reaches all hosts within seconds, whatever the ranks are
waiting for. It is made before the run and opened anew for each look, because NFS shows changes of a file at
its opening, but a new file in a folder only much later.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

How = Literal["finished", "raised", "killed", "silent", "hung", "ended"]
"""Well; by an exception; by a signal; alive but mute; waiting in a collective that did not end; because
another rank failed.
"""


# The bars of transformers and datasets would fill a log file with what they write over their line.
NO_BARS = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


@dataclass(frozen=True)
class Status:
    """What a rank says about itself once a second.

    Attributes:
        phase: what it is doing, in a word.
        step: optimizer steps done.
        collective: the one it waits for, else the last one, in words; empty when there was none or torch does
            not record it.
        waiting: that collective has not ended.
        mark: another number with every collective.
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
        reason: one line.
        traceback: of the exception, or the last lines of the log when the rank died without one.
        follows: the error speaks of a peer that has gone, so it is a consequence and not the cause.
        time: seconds since the epoch, by the clock of its host.
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
        """Sorts causes before consequences: of a peer that vanished, the others hear as a broken or an
        endless collective.
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
    """The folder, with a name for everything in it."""

    folder: Path

    @property
    def control(self) -> Path:
        return self.folder / "control"

    def output(self, rank: int) -> Path:
        return self.folder / f"rank_{rank}.log"

    def end(self, rank: int) -> Path:
        return self.folder / f"rank_{rank}.end.json"

    def prepare(self) -> None:
        """Make the folder ready for a run, before any process of it starts. What earlier runs said stays."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob("rank_*.end.json"):
            path.unlink()
        self.control.write_text("")

    def order(self, line: str) -> None:
        """Tell every supervisor: `signal NAME` for a signal that each rank shall get, `end REASON` for its
        end, `kill REASON` for an end at once, whatever the rank is about to do by itself.
        """
        with self.control.open("a") as file:
            file.write(f"{line}\n")

    def orders(self) -> list[str]:
        """All orders so far; a line that is still being written is left for the next look."""
        text = self.control.read_text()
        return text[: text.rfind("\n") + 1].splitlines()

    def write_end(self, end: RankEnd) -> None:
        aside = self.folder / f".rank_{end.rank}.end.json"
        aside.write_text(json.dumps(asdict(end), indent=2) + "\n")
        os.replace(aside, self.end(end.rank))

    def ends(self, world_size: int) -> dict[int, RankEnd]:
        """How the ranks ended, by rank; a rank that could not tell is missing."""
        paths = {rank: self.end(rank) for rank in range(world_size)}
        return {
            rank: RankEnd(**json.loads(path.read_text())) for rank, path in paths.items() if path.is_file()
        }
