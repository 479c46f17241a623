"""metrics.jsonl of a run that may still write it: every read takes the lines that are new."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LAST_STEPS = 20
"""Speed and time left are those of so many last steps."""
CURVES: dict[str, tuple[str | int, ...]] = {
    "loss": ("loss",),
    "held-out loss": ("heldout", "loss"),
    "acceptance length": ("acceptance_length",),
    "held-out acceptance": ("heldout", "acceptance_length"),
    "decoded acceptance": ("acceptance_length_decoded",),
    "accuracy": ("step_accuracy", 0),
    "held-out accuracy": ("heldout", "step_accuracy", 0),
}
"""What is drawn, by its place in a line of metrics.jsonl. Accuracies are those of the first guess."""


@dataclass
class Metrics:
    """The lines so far.

    Attributes:
        step: of the last line; 0 before the first.
        tokens: sum over all lines, padding not counted.
        skipped: steps that were not finite, and so not taken.
        speeds: (tokens, seconds) of the last steps, oldest first.
        curves: by name the (step, value) of all finite values.
        peaks: peak memory of each rank in bytes, by the last line.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    speeds: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=LAST_STEPS))
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=lambda: {name: [] for name in CURVES})
    peaks: Sequence[int] = ()

    def add(self, record: dict[str, Any]) -> None:
        self.step = int(record["step"])
        tokens, speed = int(record["tokens"]), float(record["tokens_per_s"])
        self.tokens += tokens
        self.skipped += bool(record.get("skipped"))
        self.peaks = record["peak_memory_bytes"]
        if speed > 0:
            self.speeds.append((tokens, tokens / speed))
        for name, place in CURVES.items():
            value = _at(record, place)
            if value is not None:
                self.curves[name].append((self.step, value))


class MetricsReader:
    """Reads `path` again and again. A resumed run replaces the file: then it is read from its start."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begin(None)

    def read(self) -> Metrics:
        """All lines that are whole by now; a last one that is still being written waits for the next read.

        Raises:
            ValueError: a line is not the metrics of a step.
        """
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            self._begin(None)
            return self._metrics
        with file:
            found = os.fstat(file.fileno())
            if found.st_ino != self._inode or found.st_size < self._offset:
                self._begin(found.st_ino)
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        for line in whole.splitlines():
            self._lines += 1
            self._take(line.decode(errors="replace"))
        self._offset += len(whole)
        return self._metrics

    def _begin(self, inode: int | None) -> None:
        self._inode, self._offset, self._lines, self._metrics = inode, 0, 0, Metrics()

    def _take(self, line: str) -> None:
        try:
            self._metrics.add(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self._path}, line {self._lines} is no step's metrics: {line[:80]!r}. Remove it."
            ) from error


def _at(record: Any, place: tuple[str | int, ...]) -> float | None:
    """The finite number at this place of a line; None where there is none."""
    for key in place:
        try:
            record = record[key]
        except (KeyError, IndexError):
            return None
    return float(record) if record is not None and math.isfinite(record) else None
