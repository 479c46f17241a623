"""Every ZeRO stage under sequence parallelism: killed and resumed bitwise, and gone on with in every other
shape.

`python -m benchmarks.resume --kills N` does the same with more kills.
"""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.resume import (
    TOLERANCE,
    in_other_shapes,
    killed_and_resumed,
    largest_relative_error,
    uninterrupted,
)
from eagle3_ds.checkpoint.format import (
    CHECKPOINTS,
    FINAL_WEIGHTS,
    INITIAL_WEIGHTS,
    folder_name,
    require_intact,
    step_folders,
)
from judge.ranks import run_ranks
from judge.resume_runs import (
    SHAPES,
    STEPS,
    Blow,
    differences,
    make_recipe,
    read_metrics,
    restored_in_place,
    run,
    run_struck,
    start_output,
)

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def references(resume_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An uninterrupted run of each shape."""
    outputs = {shape: tmp_path_factory.mktemp(shape) / "whole" for shape in SHAPES}
    for shape, output in outputs.items():
        uninterrupted(resume_inputs, shape, output)
    return outputs


# These seeds kill after the first checkpoint; the odd ones write in the background.
@pytest.mark.parametrize(("shape", "seed"), [("zero0", 0), ("zero1", 7), ("zero2", 6), ("zero3", 5)])
def test_a_killed_run_ends_as_if_nothing_had_been(
    shape: str, seed: int, resume_inputs: Path, references: dict[str, Path], tmp_path: Path
) -> None:
    killed = killed_and_resumed(resume_inputs, shape, tmp_path / "run", seed, most=1)
    assert killed == 1
    assert differences(tmp_path / "run", references[shape]) == []
    # The newest two; the best by held-out loss is among them, as losses fall.
    assert [path.name for path in step_folders(tmp_path / "run" / CHECKPOINTS)] == [
        folder_name(STEPS),
        folder_name(STEPS - 1),
    ]


def test_all_ranks_stop_after_the_same_step_when_one_gets_a_signal(
    resume_inputs: Path, references: dict[str, Path], tmp_path: Path
) -> None:
    output, world_size = tmp_path / "run", SHAPES["zero0"].world_size
    start_output(resume_inputs, output)
    recipe = make_recipe(resume_inputs, "zero0", output, save_every=0)
    run_struck(recipe, world_size, Blow(step=1, moment=0.0, rank=1, number=signal.SIGTERM))
    assert require_intact(output / CHECKPOINTS).name == folder_name(2)
    assert len(read_metrics(output)) == 2
    assert not (output / FINAL_WEIGHTS).exists()
    run(recipe, world_size)
    assert differences(output, references["zero0"]) == []


def test_a_run_whose_time_is_up_stops_with_a_checkpoint(
    resume_inputs: Path, references: dict[str, Path], tmp_path: Path
) -> None:
    """So little time that no step is begun."""
    output, world_size = tmp_path / "run", SHAPES["zero0"].world_size
    start_output(resume_inputs, output)
    run(make_recipe(resume_inputs, "zero0", output, save_every=0, timeout_minutes=1e-9), world_size)
    assert require_intact(output / CHECKPOINTS).name == folder_name(0)
    assert not (output / FINAL_WEIGHTS).exists()
    run(make_recipe(resume_inputs, "zero0", output, save_every=0), world_size)
    assert differences(output, references["zero0"]) == []


@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape_goes_on_from_any_other(
    shape: str, resume_inputs: Path, references: dict[str, Path], tmp_path: Path
) -> None:
    errors = in_other_shapes(resume_inputs, shape, references, tmp_path / "others")
    assert errors.keys() == SHAPES.keys()
    assert errors.pop(shape) == 0.0
    assert max(errors.values()) <= TOLERANCE, errors


def test_a_run_starts_from_the_draft_it_was_given(
    resume_inputs: Path, references: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    start_output(resume_inputs, output)
    given = references["zero3"] / FINAL_WEIGHTS
    shutil.copy(given, output / INITIAL_WEIGHTS)
    run(
        make_recipe(resume_inputs, "zero3", output, steps=1, warmup_steps=0, init_from="an export"),
        SHAPES["zero3"].world_size,
    )
    expected, found = load_file(given), load_file(output / INITIAL_WEIGHTS)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert read_metrics(output)[0]["loss"] < read_metrics(references["zero3"])[0]["loss"]


def test_the_comparison_of_losses_can_fail(resume_inputs: Path, references: dict[str, Path]) -> None:
    records = read_metrics(references["zero0"])
    assert largest_relative_error(records[2:], records[:-2]) == float("inf")
    shifted = [{**record, "step": record["step"] + 1} for record in records[:-1]]
    assert largest_relative_error(shifted, records[1:]) > 10 * TOLERANCE


@pytest.mark.parametrize(("shape", "deepspeed"), [("zero0", "zero0"), ("zero3", "zero3_offload")])
def test_bf16_goes_on_bitwise(shape: str, deepspeed: str, resume_inputs: Path, tmp_path: Path) -> None:
    start_output(resume_inputs, tmp_path / "run")
    recipe = make_recipe(resume_inputs, shape, tmp_path / "run", dtype="bfloat16", save_async=True)
    path = Path(str(recipe.deepspeed)).with_name(f"{deepspeed}.json")
    results = run_ranks(
        SHAPES[shape].world_size, restored_in_place, recipe.model_copy(update={"deepspeed": str(path)})
    )
    for before, after in results:
        assert before == after
