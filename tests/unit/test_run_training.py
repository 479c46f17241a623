"""A run from Python: without a console, and with exceptions where a command has exit statuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from eagle3_ds.config import load_recipe
from eagle3_ds.launch.command import LaunchOptions
from eagle3_ds.run import resolve, training
from eagle3_ds.run.resolve import ResolvedRun, RunOptions, resolve_run
from eagle3_ds.run.training import Trained, train

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "recipes/quickstart.yaml"


@pytest.fixture(autouse=True)
def at_root_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def test_a_run_is_resolved_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(QUICKSTART, [f"output_dir={tmp_path / 'run'}", "parallel.draft_dp=null"])
    options = RunOptions(LaunchOptions(num_ranks=8), overwrite=True, dry_run=True)
    run = resolve_run(recipe, options)
    assert (run.mesh.world_size, run.recipe.parallel.draft_dp) == (8, 2)
    assert any(note.startswith("attention kernel ") for note in run.notes)
    assert capfd.readouterr() == ("", "") and not (tmp_path / "run").exists()


def test_a_restart_goes_on_from_the_newest_checkpoint_on_the_devices_of_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(QUICKSTART, [f"output_dir={tmp_path / 'run'}", "parallel.draft_dp=null"])
    run = resolve_run(recipe, RunOptions(overwrite=True, dry_run=True))
    asked: list[object] = []
    monkeypatch.setattr(resolve, "resolve_run", lambda *arguments: asked.append(arguments))
    run.again()
    assert asked == [(recipe, RunOptions(resume="auto", dry_run=True))]


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        (Trained(0, finished=True), "draft-final.safetensors"),
        (Trained(0, finished=False), None),
        (
            Trained(7, finished=False, reason="ValueError: a bad row"),
            "training failed: ValueError: a bad row",
        ),
        (Trained(7, finished=False), "training failed: the launcher ended with status 7"),
    ],
)
def test_what_train_returns_and_raises(
    trained: Trained, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[ResolvedRun] = []

    def run_it(run: ResolvedRun) -> Trained:
        runs.append(run)
        return trained

    monkeypatch.setattr(training, "train_run", run_it)
    recipe = load_recipe(QUICKSTART, [f"output_dir={tmp_path}"])
    if trained.status:
        with pytest.raises(RuntimeError, match=expected):
            train(recipe)
    else:
        assert train(recipe) == (tmp_path / expected if expected else None)
    assert len(runs) == 1 and runs[0].given == recipe
