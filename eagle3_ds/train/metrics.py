"""metrics.jsonl: one line per optimizer step, written by rank 0."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from eagle3_ds.checkpoint.format import sync_file, write_durably
from eagle3_ds.device.runtime import peak_allocated
from eagle3_ds.train.tracking import Tracking


class MetricsFile:
    """Appends to metrics.jsonl. Opening it drops the lines after `first_step`: a resumed run takes those
    steps again, and each step is to have one line. The trackers get the same lines, and each further one.

    Raises:
        ValueError: a line is not the metrics of a step.
    """

    def __init__(self, path: Path, first_step: int, tracking: Tracking | None = None) -> None:
        self.path, self._tracking = path, tracking
        lines = path.read_text().split("\n") if path.exists() else [""]
        # What follows the last line break is empty, or a line that a crash cut short; a resumed run takes
        # its step again.
        kept = [line for number, line in enumerate(lines[:-1], 1) if self._step(line, number) <= first_step]
        write_durably(path, "".join(f"{line}\n" for line in kept))
        if tracking is not None:
            tracking.start([json.loads(line) for line in kept])

    def _step(self, line: str, number: int) -> int:
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path}, line {number} is no step's metrics: {line[:80]!r}. Remove it."
            ) from error

    def write(self, record: dict[str, Any], durably: bool) -> None:
        """Append one line. `durably` syncs it to disk: used before a checkpoint, so that no power cut leaves
        the checkpoint without the metrics of its steps.
        """
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if durably:
            sync_file(self.path)
        if self._tracking is not None:
            self._tracking.take(record)


def peak_memory_bytes(device: torch.device) -> list[int]:
    """Peak memory of each rank in bytes: allocated device memory, or on a CPU the resident set of the
    process. Collective over the world.
    """
    if device.type == "cpu":
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    else:
        own = peak_allocated(device)
    if not dist.is_initialized():
        return [own]
    peaks = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    peaks[dist.get_rank()] = own
    dist.all_reduce(peaks)
    return peaks.tolist()
