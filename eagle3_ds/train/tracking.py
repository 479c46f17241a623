"""Rank 0's writing to the trackers of a run. Each has a thread, so that none makes a step wait, and none can
end the training by an error of its own.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from types import TracebackType
from typing import Any

from eagle3_ds.checkpoint.format import write_durably
from eagle3_ds.config import Recipe
from eagle3_ds.train.trackers import QUIET, TRACKERS, Opening, Tracker, numbers_of

logger = logging.getLogger(__name__)
FOLDER = "trackers"
RUNS = "runs.json"
"""In FOLDER: {tracker: {"identity": its run, "step": the last it holds, "failed": why it stopped}}."""
CLOSE_SECONDS = 90.0
"""How long the end of a run waits for its trackers."""
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)


class Tracking:
    """The trackers of a run, of rank 0. As a context, it waits at the end for what they have not yet written,
    `CLOSE_SECONDS` at most.

    The first error of a tracker is told once, and kept in runs.json for the summary; it then gets no more.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, self._folder = recipe, Path(recipe.output_dir) / FOLDER
        self._runs, self._lock = _read(self._folder), Lock()
        self._workers: list[_Worker] = []

    def __enter__(self) -> Tracking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self, kept: list[dict[str, Any]]) -> None:
        """Open the trackers in their threads.

        Args:
            kept: the lines of metrics.jsonl, which each tracker holds afterwards, and no others.
        """
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        done = kept[-1]["step"] if kept else 0
        for name in self._recipe.train.trackers:
            run = self._runs.get(name, {})
            identity = run.get("identity")
            # A process that was killed did not write the step: nobody knows what its tracker still took.
            whole = identity is not None and run.get("step") == done and "failed" not in run
            opening = Opening(self._folder / name, self._recipe, kept, identity, whole)
            self._workers.append(_Worker(name, opening, done, self._write))

    def take(self, record: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        for worker in self._workers:
            worker.log(record)

    def picture(self, name: str, png: Path, step: int) -> None:
        for worker in self._workers:
            worker.give(lambda tracker: tracker.picture(name, png, step))

    def close(self) -> None:
        seconds = min(CLOSE_SECONDS, self._recipe.faults.watchdog_seconds / 2)
        until = time.monotonic() + seconds
        for worker in self._workers:
            worker.give(None)
        for worker in self._workers:
            worker.join(max(0.0, until - time.monotonic()), seconds)
        self._workers = []

    def _write(self, name: str, run: dict[str, Any]) -> None:
        with self._lock:
            self._runs[name] = run
            self._folder.mkdir(parents=True, exist_ok=True)
            write_durably(self._folder / RUNS, json.dumps(self._runs, indent=2) + "\n")


class _Worker:
    """The thread of one tracker."""

    def __init__(
        self, name: str, opening: Opening, done: int, write: Callable[[str, dict[str, Any]], None]
    ) -> None:
        self._name, self._opening, self._last, self._write = name, opening, done, write
        self._tasks: SimpleQueue[Callable[[Tracker], None] | None] = SimpleQueue()
        self._identity, self._failed, self._lock = opening.identity, False, Lock()
        self._thread = Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, record: Mapping[str, Any]) -> None:
        def task(tracker: Tracker) -> None:
            tracker.log(record["step"], numbers_of(record))
            self._last = record["step"]

        self.give(task)

    def give(self, task: Callable[[Tracker], None] | None) -> None:
        """Something to do after all before it; None: close. A tracker that has failed gets nothing."""
        if not self._failed:
            self._tasks.put(task)

    def join(self, seconds: float, of: float) -> None:
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._fail(f"it had not taken everything {of:.0f} s after the end of the run")

    def _work(self) -> None:
        try:
            tracker = TRACKERS[self._name](self._opening)
            self._identity = tracker.identity
            self._write(self._name, {"identity": self._identity})
            while (task := self._tasks.get()) is not None:
                task(tracker)
            tracker.close()
            with self._lock:
                if not self._failed:
                    self._write(self._name, {"identity": self._identity, "step": self._last})
        # Packages of others raise what they like, and none of it is worth a training.
        except Exception as error:
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, why: str) -> None:
        with self._lock:
            if self._failed:
                return
            self._failed = True
            told = f"after step {self._last}: {without_secrets(why, os.environ)}"
            logger.warning(
                "the tracker %s stopped %s. Training goes on without it; metrics.jsonl has every step, and a "
                "resumed run writes them to the tracker anew",
                self._name,
                told,
            )
            try:
                self._write(self._name, {"identity": self._identity, "failed": told})
            except OSError as error:
                logger.warning("the summary will not tell of it: %s", error)


def without_secrets(text: str, environ: Mapping[str, str]) -> str:
    """An error's text without what URLs and the environment hold of passwords and keys."""
    text = re.sub(r"//[^/@\s]+@", "//***@", text)
    for name, value in environ.items():
        if len(value) >= 6 and SECRET.search(name):
            text = text.replace(value, "***")
    return text


def add_report(recipe: Recipe, png: Path) -> None:
    """Give the trackers of a run that has ended the picture of its report."""
    if not recipe.train.trackers:
        return
    lines = (Path(recipe.output_dir) / "metrics.jsonl").read_text().splitlines()
    with Tracking(recipe) as tracking:
        tracking.start([json.loads(line) for line in lines])
        tracking.picture("report", png, json.loads(lines[-1])["step"])


def failed_trackers(recipe: Recipe) -> dict[str, str]:
    """{tracker: after which step and why it stopped}, of the trackers of the recipe."""
    runs = _read(Path(recipe.output_dir) / FOLDER)
    return {
        name: run["failed"] for name, run in runs.items() if "failed" in run and name in recipe.train.trackers
    }


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / RUNS
    return json.loads(path.read_text()) if path.is_file() else {}
