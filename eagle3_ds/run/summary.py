"""What a finished run has made, and its figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle3_ds.config import Recipe
from eagle3_ds.eval import in_process
from eagle3_ds.run.eval_file import FILE, read_eval
from eagle3_ds.run.finish import FOLDERS
from eagle3_ds.run.whole_run import duration
from eagle3_ds.train.tracking import failed_trackers

METRICS, REPORT = "metrics.jsonl", "report.png"


@dataclass(frozen=True)
class Summary:
    """What a run leaves.

    Attributes:
        made: {what: names in the output folder, each with what it is for}; only what is there.
        figures: the main figures in one line.
        failed_trackers: {tracker: after which step and why it stopped}.
    """

    made: Mapping[str, str]
    figures: str
    failed_trackers: Mapping[str, str]


def summary(recipe: Recipe) -> Summary:
    """Of a finished run, from the files of its output folder."""
    folder = Path(recipe.output_dir)
    records = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    evaluation = in_process(read_eval(folder))
    figures = [*_acceptance(evaluation), *_training(records)]
    return Summary(_made(folder, evaluation is not None), "; ".join(figures), failed_trackers(recipe))


def exports(folder: Path) -> dict[str, Path]:
    """{layout: folder} of the exports that are in an output folder."""
    return {layout: folder / name for layout, name in FOLDERS.items() if (folder / name).is_dir()}


def _made(folder: Path, is_evaluated: bool) -> dict[str, str]:
    drafts = [f"{path.name} ({layout} layout)" for layout, path in exports(folder).items()]
    made = {"drafts": ", ".join(drafts)} if drafts else {}
    made |= {"evaluation": FILE} if is_evaluated else {}
    return made | ({"report": REPORT} if (folder / REPORT).is_file() else {})


def _acceptance(evaluation: Mapping[str, Any] | None) -> list[str]:
    """The acceptance length with what it has to be read with; nothing of a run that was not evaluated."""
    if evaluation is None:
        return []
    trained, untrained = (_length(evaluation, suffix) for suffix in ("", "_untrained"))
    told = f"acceptance length {trained} tokens per forward of the target, untrained {untrained}"
    looping = evaluation.get("looping_prompts")
    if looping:
        without = _length(evaluation, "_without_loops")
        told += f", {without} without the {looping} of {evaluation['prompts']} answers that loop"
    return [told, f"lossless: {evaluation['lossless']}"]


def _length(evaluation: Mapping[str, Any], suffix: str) -> str:
    """An acceptance length with its 95% interval, where it has one."""
    length = evaluation[f"acceptance_length{suffix}"]
    if length is None:
        return "none (every answer ended before the draft was asked)"
    interval = evaluation.get(f"acceptance_length{suffix}_interval")
    return f"{length:.2f}" + ("" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]")


def _training(records: list[dict[str, Any]]) -> list[str]:
    first, last = records[0], records[-1]
    # A step without a finite result may have counted no token.
    seconds = sum(record["tokens"] / record["tokens_per_s"] for record in records if record["tokens_per_s"])
    return [
        f"loss {last['loss']:.3f}, {first['loss']:.3f} at the first step",
        f"{len(records)} steps in {duration(seconds)}, {last['tokens_per_s']:,.0f} tokens/s at the last",
        f"peak memory {max(last['peak_memory_bytes']) / 2**30:.2f} GiB per rank",
    ]
