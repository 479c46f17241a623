"""Two small files of an output folder that tell who looks on how far a run is.

`state.json` is written by the command that runs the stages: what it does, or how it ended. `steps.json` is
written by rank 0 when training begins: where it begins and ends. The ranks' own ends are in `logs`.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

logger = logging.getLogger(__name__)

STATE, STEPS = "state.json", "steps.json"
Phase = Literal["preparing", "capturing", "training", "finishing", "ended"]
"""`capturing`: hidden states by all ranks. `finishing`: export, evaluation and report after training."""
# EX_TEMPFAIL of sysexits.h: not done, and worth trying again.
STOPPED = 75


@dataclass(frozen=True)
class RunState:
    """What the command of a run does, or how it ended.

    Attributes:
        status: its exit status; None before its end, and when an exception ended it.
        message: the exception or the first error; empty without one.
        host, pid: the process that runs the stages, which is not a rank.
        time: when this state began, in seconds since 1970.
    """

    phase: Phase
    status: int | None = None
    message: str = ""
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    time: float = field(default_factory=time.time)

    @property
    def is_process_gone(self) -> bool:
        """Whether this machine knows that the process ended without a word; False on any other machine."""
        if self.phase == "ended" or self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False


@dataclass(frozen=True)
class Steps:
    """Optimizer steps done before training began (of a new run 0), and those of the whole run."""

    first: int
    last: int


class Notes:
    """Writes `state.json` of an output folder. Where that fails, the run goes on with a warning."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def at(self, phase: Phase) -> None:
        """From now on the run does this."""
        self._write(RunState(phase))

    def ended(self, status: int | None, message: str = "") -> None:
        self._write(RunState("ended", status, message))

    def _write(self, state: RunState) -> None:
        try:
            _write(self._folder / STATE, asdict(state))
        except OSError as error:
            logger.warning("%s: not written (%s), so `eagle3-ds watch` shows an older state", STATE, error)


@contextmanager
def noted(folder: Path) -> Iterator[Notes]:
    """Note in `folder` what the block does. An exception that leaves it is noted as the end of the run."""
    notes = Notes(folder)
    try:
        yield notes
    except BaseException as error:
        notes.ended(None, "".join(traceback.format_exception_only(error)).strip())
        raise


def write_steps(folder: Path, steps: Steps) -> None:
    _write(folder / STEPS, asdict(steps))


def read_state(folder: Path) -> RunState | None:
    """What `state.json` says; None without one.

    Raises:
        ValueError: the file is damaged.
    """
    content = _read(folder / STATE, RunState)
    return None if content is None else RunState(**content)


def read_steps(folder: Path) -> Steps | None:
    """What `steps.json` says; None before training has begun.

    Raises:
        ValueError: the file is damaged.
    """
    content = _read(folder / STEPS, Steps)
    return None if content is None else Steps(**content)


def _write(path: Path, content: dict[str, Any]) -> None:
    aside = path.with_name(f".{path.name}")
    aside.write_text(json.dumps(content) + "\n")
    os.replace(aside, path)


def _read(path: Path, kind: type[RunState] | type[Steps]) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Remove it.") from error
    keys = set(kind.__dataclass_fields__)
    if not isinstance(content, dict) or set(content) != keys:
        raise ValueError(f"{path} is damaged: it must hold {', '.join(sorted(keys))}. Remove it.")
    return content
