"""What benchmarks.algorithms tells of three runs: read from files that are made up here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import algorithms
from eagle3_ds.config import load_recipe
from eagle3_ds.run.serve_check import WITHOUT, Report, Served

EVALUATION = {"acceptance_length": 2.5, "acceptance_length_interval": [2.25, 2.75], "prompts": 64}
STEP = {"steps": 300, "tokens": 600_000, "step_seconds": 0.5}


def test_steps_are_counted_once_and_timed_after_the_first(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"step": step, "tokens": 2000, "tokens_per_s": 100 if step < 6 else 4000} for step in range(1, 9)
    ]
    # Step 8 was taken twice, because the run was stopped before it was kept; an evaluation is no step.
    lines += [{"step": 8, "tokens": 2000, "tokens_per_s": 1000}, {"step": 8, "heldout": {"loss": 1.0}}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert algorithms.trained(path) == {"steps": 8, "tokens": 16000, "step_seconds": 0.5}


def test_a_row_has_both_acceptances_and_the_speed_beside_the_target_alone() -> None:
    ways = (
        Served(WITHOUT, (), tokens_per_second=20.0),
        Served("vLLM layout", (), 30.0, (2.4, 2.4), ((0.9, 0.9), (0.5, 0.5))),
    )
    row = algorithms.figures(EVALUATION, STEP, 10**6, Report(ways))
    assert (row["acceptance_length"], row["vllm"], row["ours_of_the_export"]) == (2.5, 2.4, 2.4)
    assert row["faster"] == pytest.approx(1.5)
    assert row["failures"] == [] and row["accepted_by_position"] == [[0.9, 0.9], [0.5, 0.5]]


def test_a_draft_that_is_not_served_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    ways = (Served(WITHOUT, (), 20.0), Served("vLLM layout", ("does not load: x",)))
    row = algorithms.figures(EVALUATION, STEP, 10**6, Report(ways))
    assert row["failures"] == ["vLLM layout: does not load: x"]
    assert row["vllm"] is row["faster"] is None
    algorithms.show({"EAGLE-3": row})
    assert "not served" in capsys.readouterr().out


def test_the_three_recipes_train_on_the_same_packs(tmp_path: Path) -> None:
    recipes = [
        load_recipe(algorithms.ROOT / "recipes" / f"{name}.yaml", algorithms.overrides(tmp_path, name))
        for name in algorithms.RECIPES.values()
    ]
    assert [recipe.draft.algorithm for recipe in recipes] == ["eagle3", "peagle", "dflash"]
    assert len({(recipe.data.model_dump_json(), recipe.target.model_dump_json()) for recipe in recipes}) == 1
    assert (
        len({(recipe.train.model_dump_json(), recipe.parallel.model_dump_json()) for recipe in recipes}) == 1
    )
    assert len({recipe.output_dir for recipe in recipes}) == 3


def test_bytes_are_those_of_the_draft_and_not_of_deepspeeds_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(algorithms.ROOT / "recipes" / "quickstart.yaml")
    without = algorithms.predicted_bytes(recipe)
    assert 10**6 < without < 10**8
    monkeypatch.setattr(algorithms, "BUCKETS", "no part has this name")
    assert algorithms.predicted_bytes(recipe) > 10 * without


def test_a_python_without_vllm_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        algorithms.main(["--python", "/no/such/python"])
    assert "--python" in capsys.readouterr().err
