"""Runs that are killed at random moments and resumed, and runs that are resumed in another shape, against
uninterrupted ones.

    python -m benchmarks.resume --kills 20

Every ZeRO stage is trained under sequence parallelism with accumulation over packed documents that do not end
with an epoch. It is killed by SIGKILL again and again, all ranks at once or one of them, at moments that the
seed chooses, and each time resumed by new processes from the newest intact checkpoint. Losses and final
weights must be bitwise those of the run that nobody killed. Then every shape goes on from every other shape's
checkpoint. Exit status 1 when anything differs.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eagle3_ds.checkpoint.format import CHECKPOINTS, FINAL_WEIGHTS, folder_name, newest_intact, read_manifest
from judge.ranks import run_ranks
from judge.result_file import FOLDER, print_table, write_result
from judge.resume_runs import (
    SHAPES,
    STEPS,
    Blow,
    continue_from,
    differences,
    make_recipe,
    prepare_inputs,
    read_metrics,
    run,
    run_until_death,
    start_output,
)

# Of losses in fp32 when ranks sum in another order.
TOLERANCE = 1e-5


def uninterrupted(inputs: Path, shape: str, output: Path) -> None:
    """A run of `shape` that keeps a checkpoint of every step."""
    start_output(inputs, output)
    run(make_recipe(inputs, shape, output, keep_checkpoints=None), SHAPES[shape].world_size)


def killed_and_resumed(inputs: Path, shape: str, output: Path, seed: int, most: int) -> int:
    """A run that is killed and resumed up to `most` times, then brought to its end. Returns how often it was
    killed.
    """
    chance, world_size = random.Random(seed), SHAPES[shape].world_size
    start_output(inputs, output)
    # Every second run writes its checkpoints in the background, so that more of it can be hit half written.
    recipe = make_recipe(inputs, shape, output, save_async=seed % 2 == 1)
    kills = 0
    while kills < most and (done := last_step(output)) < STEPS:
        # Before the last step, which may be over too soon, unless only that one is left.
        step = chance.randrange(done, max(done + 1, STEPS - 1))
        blow = Blow(step, chance.random(), chance.choice([None, *range(world_size)]))
        kills += run_until_death(recipe, world_size, blow)
    if not (output / FINAL_WEIGHTS).exists():
        run(recipe, world_size)
    return kills


def last_step(output: Path) -> int:
    """Of the newest intact checkpoint; 0 when there is none."""
    found, _ = newest_intact(output / CHECKPOINTS)
    return read_manifest(found).step if found else 0


def largest_relative_error(records: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> float:
    """Of the losses; infinite when the steps are not the same."""
    if [record["step"] for record in records] != [record["step"] for record in expected]:
        return float("inf")
    return max(
        abs(record["loss"] / other["loss"] - 1) for record, other in zip(records, expected, strict=True)
    )


def in_other_shapes(inputs: Path, shape: str, references: dict[str, Path], output: Path) -> dict[str, float]:
    """`shape` goes on from each reference's checkpoint of half way: relative errors of its losses, by
    reference.
    """
    start_output(inputs, output)
    checkpoints = {
        name: folder / CHECKPOINTS / folder_name(STEPS // 2) for name, folder in references.items()
    }
    recipe = make_recipe(inputs, shape, output, save_every=0)
    metrics = run_ranks(SHAPES[shape].world_size, continue_from, recipe, checkpoints)[0]
    expected = {name: read_metrics(folder)[STEPS // 2 :] for name, folder in references.items()}
    return {name: largest_relative_error(metrics[name], expected[name]) for name in references}


def measure(folder: Path, kills: int) -> dict[str, Any]:
    """Everything, in `folder`: for each shape the kills, what then differed, and errors in other shapes."""
    inputs = folder / "inputs"
    inputs.mkdir()
    prepare_inputs(inputs)
    references = {shape: folder / f"{shape}-whole" for shape in SHAPES}
    found: dict[str, Any] = {}
    for shape, reference in references.items():
        uninterrupted(inputs, shape, reference)
        found[shape] = {"kills": 0, "runs": 0, "differences": []}
        while found[shape]["kills"] < kills:
            seed = found[shape]["runs"]
            output = folder / f"{shape}-{seed}"
            found[shape]["kills"] += killed_and_resumed(
                inputs, shape, output, seed, kills - found[shape]["kills"]
            )
            found[shape]["runs"] += 1
            found[shape]["differences"] += differences(output, reference)
        print(f"{shape}: {found[shape]}", flush=True)
    for shape in SHAPES:
        found[shape]["losses_from"] = in_other_shapes(inputs, shape, references, folder / f"{shape}-others")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="of each shape")
    parser.add_argument("--json", type=Path, default=FOLDER, metavar="FOLDER", help="where resume.json goes")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="resume-") as folder:
        found = measure(Path(folder), options.kills)
    rows = [
        (
            name,
            result["kills"],
            "no" if result["differences"] else "yes",
            *(f"{error:.1e}" for error in result["losses_from"].values()),
        )
        for name, result in found.items()
    ]
    print_table(
        "killed and resumed",
        ("shape", "killed", "bitwise equal", *(f"loss from {name}" for name in SHAPES)),
        rows,
    )
    shapes = {name: {**asdict(SHAPES[name]), **result} for name, result in found.items()}
    command = f"python -m benchmarks.resume --kills {options.kills}"
    write_result("resume", command, {"steps": STEPS, "shapes": shapes}, options.json, threads=1)
    exact = not any(result["differences"] for result in found.values())
    return (
        0
        if exact and all(error <= TOLERANCE for r in found.values() for error in r["losses_from"].values())
        else 1
    )


if __name__ == "__main__":
    sys.exit(main())
