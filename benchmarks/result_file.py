"""Where a benchmark's JSON goes, and what each says about its origin."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


def write_result(name: str, command: str, body: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Write `body` with the command, the versions and the machine to results/`name`.json; returns the path."""
    origin = {
        "command": command,
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "deepspeed", "numpy")}},
        "machine": {"processor": platform.machine(), "system": platform.system(), "cores": os.cpu_count()},
    }
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**origin, **body}, indent=1) + "\n")
    return path
