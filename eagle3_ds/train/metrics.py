"""metrics.jsonl: one line per optimizer step, written by rank 0."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from eagle3_ds.checkpoint.format import sync_file, write_durably


class MetricsFile:
    """Appends lines; a resumed run drops the lines of steps it is about to repeat, so each step stands once.

    Raises:
        ValueError: an earlier line is not one of ours.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        self.path = path
        lines = path.read_text().split("\n") if path.exists() else [""]
        # The part after the last line break is empty, or a line that a crash has cut short: its step is
        # repeated.
        kept = [line for number, line in enumerate(lines[:-1], 1) if self._step(line, number) <= first_step]
        write_durably(path, "".join(f"{line}\n" for line in kept))

    def _step(self, line: str, number: int) -> int:
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path}, line {number} is no step's metrics: {line[:80]!r}. Remove it."
            ) from error

    def write(self, record: dict[str, Any], durably: bool) -> None:
        """`durably` before a checkpoint, which must not outlive the metrics of its steps."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if durably:
            sync_file(self.path)


def peak_memory_bytes(device: torch.device) -> list[int]:
    """Peak bytes of every rank: allocated device memory, or the resident set of the process on a CPU.
    Collective.
    """
    if device.type == "cpu":
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    else:
        own = getattr(torch, device.type).max_memory_allocated(device)
    if not dist.is_initialized():
        return [own]
    peaks = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    peaks[dist.get_rank()] = own
    dist.all_reduce(peaks)
    return peaks.tolist()
