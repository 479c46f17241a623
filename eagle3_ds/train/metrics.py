"""metrics.jsonl: one line per optimizer step, written by rank 0."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class MetricsFile:
    """Appends lines; a resumed run drops the lines of steps it is about to repeat, so each step stands once."""

    def __init__(self, path: Path, first_step: int) -> None:
        self.path = path
        kept = []
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= first_step]
        path.write_text("".join(f"{line}\n" for line in kept))

    def write(self, record: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def peak_memory_bytes(device: torch.device) -> list[int]:
    """Peak bytes of every rank: allocated device memory, or the resident set of the process on a CPU. Collective."""
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
