"""What is missing is told at the start, files hold the lines of metrics.jsonl, errors end nothing."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eagle3_ds.config import Recipe, load_recipe
from eagle3_ds.launch.command import LaunchOptions
from eagle3_ds.run.resolve import RunOptions, resolve_run
from eagle3_ds.train import trackers, tracking
from eagle3_ds.train.metrics import MetricsFile
from tests.unit.tracker_files import READERS, held, installed, picture_of, wandb_records

ROOT = Path(__file__).parents[2]
SECRET = "s3cret-0123456789"


def recipe_of(folder: Path, *names: str, **more: Any) -> Recipe:
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in more.items()]
    asked = f"train.trackers=[{', '.join(names)}]"
    return load_recipe(ROOT / "recipes/quickstart.yaml", [f"output_dir={folder}", asked, *overrides])


def line(step: int, scale: float = 1.0) -> dict[str, Any]:
    found: dict[str, Any] = {
        "step": step,
        "lr": 1e-4,
        "loss": scale / step,
        "step_accuracy": [0.1 * step, 0.3],
    }
    found |= {"tokens_per_s": 10.0, "wait_s": 0.5, "grad_norm": scale, "peak_memory_bytes": [2**20, 3]}
    return found | ({"heldout": {"loss": 2.5 * scale, "step_loss": [1.5, None]}} if step % 2 == 0 else {})


def run(recipe: Recipe, first: int, lines: list[dict[str, Any]]) -> None:
    """A process of training that goes on from step `first`."""
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with tracking.Tracking(recipe) as opened:
        metrics = MetricsFile(folder / "metrics.jsonl", first, opened)
        for record in lines:
            metrics.write(record, durably=False)


def expected(folder: Path) -> dict[int, dict[str, float]]:
    records = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: trackers.numbers_of(record) for record in records}


def require_equal(name: str, folder: Path) -> None:
    """The tracker holds just the lines of metrics.jsonl; TensorBoard's scalars are float32."""
    wanted = expected(folder)
    if name == "tensorboard":
        wanted = {step: {k: float(np.float32(v)) for k, v in row.items()} for step, row in wanted.items()}
    assert held(name, folder / "trackers") == wanted


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable and no key of who runs the tests; secrets of ours that must not be written."""
    for name in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_API_KEY", "TRACKIO_DIR", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)


def test_a_line_becomes_one_level_of_numbers() -> None:
    record = {
        "step": 3,
        "loss": 1,
        "skipped": True,
        "step_loss": [2.0, 3.0],
        "heldout": {"tau": 2.0, "x": None},
    }
    wanted = {"loss": 1.0, "skipped": 1.0, "step_loss/0": 2.0, "step_loss/1": 3.0, "heldout/tau": 2.0}
    assert trackers.numbers_of(record) == wanted
    with pytest.raises(TypeError, match="loss of a step's metrics is 'low'"):
        trackers.numbers_of({"loss": "low"})


def test_each_tracker_has_an_extra_with_the_same_bounds() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for name, requirement in trackers.PACKAGES.items():
        assert f'\n{name} = ["{requirement}"]\n' in text
    assert set(trackers.PACKAGES) == set(trackers.TRACKERS) == set(READERS)


def test_a_missing_package_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "mlflow" else object())
    recipe = recipe_of(tmp_path / "run", "tensorboard", "mlflow")
    options = RunOptions(LaunchOptions(num_ranks=4))
    words = (
        "train.trackers is [tensorboard, mlflow], but the package mlflow is not installed here, and each "
        f"tracker is written through its own. Install it (pip install '{trackers.PACKAGES['mlflow']}'), or "
        "remove mlflow"
    )
    with pytest.raises(ValueError, match=re.escape(words)):
        resolve_run(recipe, options)
    notes = resolve_run(recipe, replace(options, dry_run=True)).notes
    assert any(note.startswith(f"on this machine: {words}") for note in notes)
    assert not (tmp_path / "run").exists()


def test_recipes_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape("Use ['wandb', 'mlflow'].")):
        recipe_of(tmp_path, "wandb", "mlflow", "wandb")
    with pytest.raises(ValueError, match=r"train\.trackers\.0: the value is \"comet\""):
        recipe_of(tmp_path, "comet")
    with pytest.raises(ValueError, match="environment variable COMET_API_KEY") as caught:
        recipe_of(tmp_path, deepspeed=f"{{comet: {{enabled: true, api_key: {SECRET}}}}}")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("name", sorted(READERS))
@pytest.mark.usefixtures("alone")
def test_files_hold_the_lines_of_metrics(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    installed(name)
    folder = tmp_path / "run"
    recipe, state = recipe_of(folder, name), folder / "trackers" / "runs.json"
    run(recipe, 0, [line(step) for step in (1, 2, 3)])
    require_equal(name, folder)
    first = json.loads(state.read_text())[name]
    assert first["step"] == 3 and "failed" not in first

    # Stopped after step 3, and gone on with: the same run of the tracker.
    longer = recipe_of(folder, name, train__warmup_steps=3)
    run(longer, 3, [line(4)])
    require_equal(name, folder)
    assert json.loads(state.read_text())[name]["identity"] == first["identity"]

    # Back to step 2, and other values from there: what was undone is nowhere.
    run(longer, 2, [line(3, 7.0), line(4, 7.0)])
    require_equal(name, folder)
    assert held(name, folder / "trackers")[4]["heldout/loss"] == 17.5

    (folder / "report.png").write_bytes((ROOT / "docs/pictures/balance.png").read_bytes())
    tracking.add_report(longer, folder / "report.png")
    require_equal(name, folder)
    identity = json.loads(state.read_text())[name]["identity"]
    assert picture_of(name, folder / "trackers", identity) == 1
    assert not tracking.failed_trackers(longer) and "stopped" not in caplog.text
    written = b"".join(path.read_bytes() for path in (folder / "trackers").rglob("*") if path.is_file())
    assert b"warmup_steps" in written and SECRET.encode() not in written


@pytest.mark.usefixtures("alone")
def test_wandb_config_is_the_resolved_recipe(tmp_path: Path) -> None:
    installed("wandb")
    recipe = recipe_of(tmp_path / "run", "wandb")
    run(recipe, 0, [line(1)])
    config: dict[str, Any] = {}
    for record in wandb_records(tmp_path / "run/trackers"):
        for update in [*record.run.config.update, *record.config.update]:
            config[update.key] = json.loads(update.value_json)
    assert {key: config[key] for key in recipe.model_dump(mode="json")} == recipe.model_dump(mode="json")


def test_where_wandb_finds_a_key(tmp_path: Path) -> None:
    file = tmp_path / "netrc"
    environ = {"NETRC": str(file)}
    assert not trackers.has_wandb_key(environ)
    file.write_text("machine api.wandb.ai\n  login user\n  password x\n")
    file.chmod(0o600)
    assert trackers.has_wandb_key(environ)
    assert not trackers.has_wandb_key({**environ, "WANDB_BASE_URL": "https://wandb.example:8080"})
    assert trackers.has_wandb_key({"WANDB_API_KEY": "x"})


class Fake:
    """A tracker that keeps what it gets in a list, raises at one step, and waits at another."""

    identity = "fake"

    def __init__(self, opening: trackers.Opening, taken: list[int], fails: int = 0, waits: int = 0) -> None:
        self._taken, self._fails, self._waits = taken, fails, waits
        self.is_open = threading.Event()
        if not opening.is_whole:
            taken[:] = [record["step"] for record in opening.kept]

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step == self._fails:
            raise ConnectionError(f"no answer from https://user:{SECRET}@host/?key={SECRET}")
        if step == self._waits:
            threading.Event().wait()
        self._taken.append(step)

    def picture(self, name: str, png: Path, step: int) -> None:
        self._taken.append(-step)

    def close(self) -> None:
        pass


@pytest.mark.usefixtures("alone")
def test_an_error_is_told_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    good: list[int] = []
    bad: list[int] = []
    kinds: dict[str, Any] = {
        "wandb": lambda opening: Fake(opening, bad, fails=3),
        "mlflow": lambda opening: Fake(opening, good),
    }
    monkeypatch.setattr(tracking, "TRACKERS", kinds)
    recipe = recipe_of(tmp_path / "run", "wandb", "mlflow")
    with caplog.at_level(logging.WARNING):
        run(recipe, 0, [line(step) for step in range(1, 7)])
    assert (bad, good) == ([1, 2], [1, 2, 3, 4, 5, 6])
    (told,) = [record.getMessage() for record in caplog.records]
    assert "the tracker wandb stopped after step 2: ConnectionError: no answer from https://***@host" in told
    assert list(tracking.failed_trackers(recipe)) == ["wandb"]
    state = (tmp_path / "run/trackers/runs.json").read_text()
    assert SECRET not in told and SECRET not in state

    # A resumed run tries again, and writes what is missing.
    kinds["wandb"] = lambda opening: Fake(opening, bad)
    run(recipe, 6, [line(7)])
    assert bad == good == [1, 2, 3, 4, 5, 6, 7] and not tracking.failed_trackers(recipe)


def test_a_tracker_that_hangs_keeps_no_run_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(tracking, "TRACKERS", {"trackio": lambda opening: Fake(opening, taken, waits=2)})
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 0.5)
    recipe = recipe_of(tmp_path / "run", "trackio")
    run(recipe, 0, [line(step) for step in range(1, 4)])
    assert taken == [1] and [*expected(tmp_path / "run")] == [1, 2, 3]
    assert "stopped after step 1: it had not taken everything 0 s after the end" in caplog.text
    assert "trackio" in tracking.failed_trackers(recipe)


def test_a_killed_process_leaves_no_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its end, nobody knows what a tracker still took: the next process writes it anew."""
    taken: list[int] = []
    monkeypatch.setattr(tracking, "TRACKERS", {"trackio": lambda opening: Fake(opening, taken)})
    recipe, folder = recipe_of(tmp_path / "run", "trackio"), tmp_path / "run"
    run(recipe, 0, [line(1), line(2)])
    state = folder / "trackers/runs.json"
    state.write_text(json.dumps({"trackio": {"identity": "fake"}}))
    taken.remove(2)
    run(recipe, 2, [line(3)])
    assert taken == [1, 2, 3]


@pytest.mark.usefixtures("alone")
def test_two_runs_of_one_process_have_each_their_own_files(tmp_path: Path) -> None:
    installed("trackio")
    for name in ("one", "two"):
        run(recipe_of(tmp_path / name, "trackio"), 0, [line(1), line(2)])
    for name in ("one", "two"):
        require_equal("trackio", tmp_path / name)
