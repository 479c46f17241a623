"""The quickstart, made small enough for a test."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle3_ds.cli.main import main

ROOT = Path(__file__).parents[2]
QUICKSTART = "recipes/quickstart.yaml"
STEPS = 4
SMALLER = (
    "target.build.steps=20",
    "target.build.hidden_size=96",
    "draft.vocab_size=512",
    "data.max_conversations=40",
    "train.schedule=constant",
    "train.warmup_steps=1",
    "train.eval_every=2",
    "eval.num_prompts=2",
    "eval.max_new_tokens=16",
)


@dataclass(frozen=True)
class Job:
    """The overrides that put a run of the small quickstart into a folder of its own, and its first run's
    result.
    """

    folder: Path
    overrides: tuple[str, ...]
    output: str = ""
    recipe: str = QUICKSTART

    def launch(self) -> subprocess.CompletedProcess[str]:
        """`./launch.sh RECIPE OVERRIDES`, as a user does it."""
        line = [str(ROOT / "launch.sh"), self.recipe, *self.overrides]
        return subprocess.run(
            line, check=False, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def call(self, command: str, *arguments: str) -> tuple[int, str]:
        """Exit status and output of `eagle3-ds COMMAND RECIPE OVERRIDES ARGUMENTS`, where later overrides
        win, in this process, which has imported everything already; the ranks are processes of their own all
        the same."""
        said = io.StringIO()
        with _working_in(ROOT), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = main([command, self.recipe, *self.overrides, *arguments])
        return status, said.getvalue()

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    """`contextlib.chdir`, which Python 3.10 lacks."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def small_job(shared: Path, folder: Path, *more: str, recipe: str = QUICKSTART) -> Job:
    """Of the quickstart, or of a recipe with the same target and data.

    `shared` holds what a second run uses again: the target, and cached documents and hidden states.
    """
    places = (
        f"target.path={shared / 'target'}",
        f"data.cache_dir={shared / 'cache'}",
        f"output_dir={folder}",
    )
    return Job(folder, (*SMALLER, *places, *more), recipe=recipe)
