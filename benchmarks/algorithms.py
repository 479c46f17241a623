"""`python -m benchmarks.algorithms --python P`: EAGLE-3, P-EAGLE and DFlash side by side: three drafts of the
quickstart's target, trained by the shipped recipes on the same packs, decoded here and served by P's vLLM.

Each recipe is launched as a user launches it; target, documents and hidden states are made once. Then its
export in vLLM's layout answers the held-out prompts, and what vLLM accepts must be what our decoding accepts.
Tokens a second are those of that vLLM on this machine, one prompt at a time, with the draft and alone, in one
process each. The same command goes on after a stop. Prints a table and writes JSON; the exit status is 1 when
a draft is not served as it was trained.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from eagle3_ds.config import Recipe, load_recipe
from eagle3_ds.plan import predict_memory
from eagle3_ds.run.planning import Machines, plan_recipe
from eagle3_ds.run.serve_check import WITHOUT, Report, check_of_run, run_check, server_python
from judge.result_file import FOLDER, print_table, write_result

ROOT = Path(__file__).parents[1]
RECIPES = {"EAGLE-3": "quickstart", "P-EAGLE": "quickstart_peagle", "DFlash": "quickstart_dflash"}
WARM = 5
"""Steps at the start that are not timed."""
TOLERANCE = 0.001
LAYOUT, BUCKETS = "vllm", "gradient buckets"


def overrides(folder: Path, name: str) -> list[str]:
    """What of a shipped recipe is said anew: where things lie."""
    return [
        f"target.path={folder / 'target'}",
        f"data.cache_dir={folder / 'cache'}",
        f"output_dir={folder / name}",
    ]


def train(folder: Path, name: str, more: Sequence[str]) -> Recipe:
    """Train, evaluate and export by one recipe, or go on with it; what is there stays."""
    path, changes = ROOT / "recipes" / f"{name}.yaml", [*overrides(folder, name), *more]
    if not (folder / name / "eval.json").is_file():
        command = [sys.executable, "-m", "eagle3_ds.cli", "launch", str(path), "--resume", "auto", *changes]
        subprocess.run(command, check=True, cwd=ROOT)
    return load_recipe(path, changes)


def trained(metrics: Path) -> dict[str, Any]:
    """Steps, tokens and the median seconds of a step, by the lines of a run's metrics.jsonl."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    # A step that was taken again after a stop stands there twice.
    steps = {line["step"]: line for line in lines if "tokens_per_s" in line}
    timed = [line["tokens"] / line["tokens_per_s"] for step, line in steps.items() if step > WARM]
    return {
        "steps": len(steps),
        "tokens": sum(line["tokens"] for line in steps.values()),
        "step_seconds": median(timed),
    }


def predicted_bytes(recipe: Recipe) -> int:
    """The peak of a rank's tensors in a step, by the planner, without the buckets in which DeepSpeed sends
    gradients: these have the size that its JSON says, which dwarfs so small a draft.
    """
    mesh = recipe.parallel
    ranks = (mesh.draft_dp or 1) * mesh.ring * mesh.ulysses
    phases = predict_memory(plan_recipe(recipe, Machines(gpus=ranks)).setup).phases
    return max(sum(size for part, size in parts.items() if part != BUCKETS) for parts in phases.values())


def figures(
    evaluation: Mapping[str, Any], step: Mapping[str, Any], step_bytes: int, report: Report
) -> dict[str, Any]:
    """The row of one draft."""
    ways = {way.way: way for way in report.ways}
    alone = ways.pop(WITHOUT)
    served = next(iter(ways.values()))
    theirs, ours = served.acceptance_length or (None, None)
    faster = None
    if served.tokens_per_second is not None and alone.tokens_per_second is not None:
        faster = served.tokens_per_second / alone.tokens_per_second
    return {
        **step,
        "step_bytes": step_bytes,
        "acceptance_length": evaluation["acceptance_length"],
        "interval": evaluation["acceptance_length_interval"],
        "prompts": evaluation["prompts"],
        "vllm": theirs,
        "ours_of_the_export": ours,
        "accepted_by_position": [list(pair) for pair in served.accepted],
        "tokens_per_second": served.tokens_per_second,
        "tokens_per_second_alone": alone.tokens_per_second,
        "faster": faster,
        "failures": report.failures,
    }


def show(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """The table."""

    def cells(name: str, row: Mapping[str, Any]) -> tuple[object, ...]:
        low, high = row["interval"] or (float("nan"), float("nan"))
        served = "not served" if row["vllm"] is None else f"{row['vllm']:.3f}"
        ratio = "" if row["faster"] is None else f"{row['faster']:.2f}"
        return (
            name,
            row["steps"],
            f"{row['tokens']:,}",
            f"{row['step_seconds']:.2f}",
            f"{row['step_bytes'] / 1e6:.0f}",
            f"{row['acceptance_length']:.3f} [{low:.2f}, {high:.2f}]",
            served,
            ratio,
        )

    columns = ("draft", "steps", "tokens", "s a step", "MB of a rank", "acceptance", "vLLM", "times as fast")
    print_table("drafts of one target, side by side", columns, [cells(*item) for item in rows.items()])


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.algorithms", description=__doc__)
    parser.add_argument("--python", help="a Python with vLLM; default: this one")
    parser.add_argument("--work", type=Path, default=Path("output/algorithms"), help="folder of the runs")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the JSON goes")
    parser.add_argument(
        "--set",
        nargs="+",
        default=(),
        metavar="KEY=VALUE",
        help="overrides of all three recipes, for a trial",
    )
    options = parser.parse_args(arguments)
    try:
        python = server_python(options.python)
    except ValueError as error:
        parser.error(str(error))
    work, rows = options.work.resolve(), {}
    for label, name in RECIPES.items():
        recipe = train(work, name, options.set)
        check = check_of_run(recipe)
        one = replace(check, drafts={LAYOUT: check.drafts[LAYOUT]}, recorded=None)
        report = run_check(one, python, TOLERANCE, work / name)
        run = Path(recipe.output_dir)
        evaluation = json.loads((run / "eval.json").read_text(encoding="utf-8"))
        rows[label] = figures(evaluation, trained(run / "metrics.jsonl"), predicted_bytes(recipe), report)
        print(f"{label}: {'; '.join(report.failures) or 'served as trained'}", flush=True)
    show(rows)
    body = {"tolerance": TOLERANCE, "overrides": list(options.set), "drafts": rows}
    print(write_result("algorithms", "python -m benchmarks.algorithms", body, options.folder))
    return int(any(row["failures"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
