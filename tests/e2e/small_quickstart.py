"""The quickstart, made small enough for a test."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
QUICKSTART = "recipes/quickstart.yaml"
STEPS = 4
SMALLER = (
    "target.build.steps=20",
    "target.build.num_layers=7",
    "target.build.hidden_size=96",
    "target.build.vocab_size=2048",
    "draft.vocab_size=1024",
    "data.max_conversations=40",
    "train.schedule=constant",
    "train.warmup_steps=1",
    "train.eval_every=2",
    "eval.num_prompts=2",
    "eval.max_new_tokens=16",
)


@dataclass(frozen=True)
class Job:
    """The overrides that put a run of the small quickstart into a folder of its own, and its first run's result."""

    folder: Path
    overrides: tuple[str, ...]
    output: str = ""

    def launch(self, *arguments: str, command: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """`./launch.sh [COMMAND] RECIPE OVERRIDES ARGUMENTS`, where later overrides win."""
        line = [str(ROOT / "launch.sh"), *command, QUICKSTART, *self.overrides, *arguments]
        return subprocess.run(line, check=False, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


def small_job(shared: Path, folder: Path, *more: str) -> Job:
    """`shared` holds what a second run uses again: the target, and the cache of documents and hidden states."""
    places = (f"target.path={shared / 'target'}", f"data.cache_dir={shared / 'cache'}", f"output_dir={folder}")
    return Job(folder, (*SMALLER, *places, *more))
