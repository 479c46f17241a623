"""Where a benchmark's JSON goes and what it says about its origin; tables; and the matmul rate of the
machine.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from eagle3_ds.device.found import detect_accelerator, device_count, device_module
from eagle3_ds.device.kinds import CPU
from eagle3_ds.device.runtime import synchronize

FOLDER = Path(__file__).parents[1] / "benchmarks" / "results"
VERSIONED = ("torch", "deepspeed", "transformers", "numpy")
PICTURES = Path(__file__).parents[1] / "docs" / "pictures"


def write_result(
    name: str, command: str, body: Mapping[str, Any], folder: Path = FOLDER, threads: int | None = None
) -> Path:
    """Write `body` with command, date, versions and machine to `folder`/`name`.json, whole: nobody reads half
    of it.

    Args:
        body: what was measured; it may not take the names `command`, `date`, `versions` and `machine`.
        threads: torch threads of each process that measured, where they matter.
    """
    origin = {
        "command": command,
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version(), **{n: version(n) for n in VERSIONED}},
        "machine": {**describe_machine(), **({} if threads is None else {"torch_threads": threads})},
    }
    taken = sorted(origin.keys() & body.keys())
    assert not taken, f"the body overwrites {taken}"
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({**origin, **body}, indent=1) + "\n")
    unfinished.replace(path)
    return path


def describe_machine() -> dict[str, Any]:
    """CPU model, cores that this process may use, and the name and memory (bytes) of each accelerator."""
    kind = detect_accelerator()
    gpus = [device_module(kind).get_device_properties(index) for index in range(device_count(kind))]
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
        "cuda": torch.version.cuda,
    }


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Floating-point operations per second of a square matrix product: the best of a few, after a first one.

    `size` rows and columns; by default one that takes some ten milliseconds on two cores, or on a GPU.
    """
    size = size or (2048 if device.type == CPU else 8192)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        started = now(device)
        a @ b
        seconds.append(now(device) - started)
    return 2 * size**3 / min(seconds[1:])


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done all it was asked to."""
    synchronize(device)
    return time.perf_counter()


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under their columns; None is shown as a dash, the first column is aligned left."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*("-" if value is None else str(value) for value in row))
    Console(width=None if os.isatty(1) else 160).print(table)


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
