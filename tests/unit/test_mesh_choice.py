"""A recipe without a mesh gets one: as few ranks to a sequence as fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from eagle3_ds.cli.main import main
from eagle3_ds.config import Recipe, dump_recipe, load_recipe
from eagle3_ds.launch.command import LaunchOptions
from eagle3_ds.plan import predict_memory
from eagle3_ds.run import resolve
from eagle3_ds.run.planning import Machines, plan_recipe
from eagle3_ds.run.resolve import ResolvedRun, RunOptions, resolve_run
from tests.unit.tiny_target import build_tiny_target

GIB = 2**30
TEXT = "target: {path: PLACE, dtype: float32}\ndata: {train: [rows.jsonl]}\ntrain: {steps: 1}\n"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_target(tmp_path_factory.mktemp("mesh") / "tiny")


@pytest.fixture
def file(tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT.replace("PLACE", str(target)))
    return path


def dry(recipe: Recipe, ranks: int) -> ResolvedRun:
    return resolve_run(recipe, RunOptions(LaunchOptions(num_ranks=ranks), dry_run=True))


def told(run: ResolvedRun) -> list[str]:
    return [note for note in run.notes if note.startswith("inferred: parallel")]


def axes(run: ResolvedRun) -> tuple[int, int, int]:
    return run.mesh.ulysses, run.mesh.ring, run.mesh.draft_dp


def test_what_fits_a_rank_is_shared_by_none(file: Path) -> None:
    run = dry(load_recipe(file), 4)
    assert axes(run) == (1, 1, 4)
    (note,) = told(run)
    assert note.startswith(
        "inferred: parallel = ulysses 1 x ring 1 x draft_dp 4 of 4 ranks: the fewest ranks"
    )
    resolved = dump_recipe(run.recipe)
    again = file.with_name("again.yaml")
    again.write_text(resolved)
    assert not told(dry(load_recipe(again), 4)), "the resolved recipe leaves nothing to be chosen"


def test_what_does_not_fit_is_shared_by_as_few_as_it_takes(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = ["data.max_length=65536", "draft.vocab_size=320"]
    recipe, peaks = load_recipe(file, long), {}
    for ulysses, ring in ((1, 1), (2, 1), (2, 2)):
        mesh = load_recipe(file, [*long, f"parallel.ulysses={ulysses}", f"parallel.ring={ring}"])
        planned = plan_recipe(mesh, Machines(4, 4, 80.0))
        peaks[ulysses * ring] = predict_memory(planned.setup).peak
    assert peaks[1] > peaks[2] > peaks[4]
    monkeypatch.setattr(resolve, "memory_per_rank", lambda ranks: peaks[2])
    assert axes(dry(recipe, 4)) == (2, 1, 2)
    monkeypatch.setattr(resolve, "memory_per_rank", lambda ranks: peaks[2] - 1)
    assert axes(dry(recipe, 4)) == (2, 2, 1)
    monkeypatch.setattr(resolve, "memory_per_rank", lambda ranks: peaks[4] - 1)
    run = dry(recipe, 4)
    assert axes(run) == (2, 2, 1) and "does NOT fit by the planner's count" in told(run)[0]


def test_an_axis_that_is_given_leaves_the_others_as_they_are(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolve, "memory_per_rank", lambda ranks: 1)
    run = dry(load_recipe(file, ["parallel.ring=1"]), 4)
    assert axes(run) == (1, 1, 4)
    assert [note.partition(",")[0] for note in told(run)] == ["inferred: parallel.draft_dp = 4"]
    other = dry(load_recipe(file, ["parallel.kv_bytes=1000"]), 4)
    assert axes(other) != (1, 1, 4), "what is no axis gives no mesh"


def test_a_target_that_is_not_here_leaves_a_pack_to_each_rank(file: Path) -> None:
    run = dry(load_recipe(file, ["target.path=owner/name"]), 4)
    assert axes(run) == (1, 1, 4) and "inferred: parallel.draft_dp = 4" in told(run)[0]


def test_plan_chooses_the_same_way(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(file), "--gpus", "4"]) == 0
    assert "inferred: parallel = ulysses 1 x ring 1 x draft_dp 4 of 4 ranks" in capsys.readouterr().out
    assert main(["plan", str(file), "parallel.ring=2", "--gpus", "4"]) == 0
    assert "inferred: parallel =" not in capsys.readouterr().out
