"""A run from Python: without a console, and with exceptions where a command has exit statuses."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch

from eagle3_ds.checkpoint.format import FINAL_WEIGHTS
from eagle3_ds.cli import launch as launch_command
from eagle3_ds.cli.main import main
from eagle3_ds.config import load_recipe
from eagle3_ds.launch.command import LaunchOptions
from eagle3_ds.launch.ranks import Outcome
from eagle3_ds.launch.state import STOPPED, noted, read_state
from eagle3_ds.run import resolve, training
from eagle3_ds.run.planning import Machines, plan_recipe
from eagle3_ds.run.resolve import ResolvedRun, RunOptions, resolve_run
from eagle3_ds.run.stages import prepare, report
from eagle3_ds.run.training import Trained, finish_run, train
from tests.unit.tiny_target import CONVERSATIONS, build_tiny_target

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


@pytest.mark.parametrize(("length", "warned"), [(64, False), (65, True), (4096, True)])
def test_lengths_beyond_the_targets_positions_are_warned_of(
    length: int, warned: bool, tmp_path: Path
) -> None:
    given = [f"output_dir={tmp_path}", f"data.max_length={length}", f"target.path={tmp_path / 'tiny'}"]
    recipe = load_recipe(QUICKSTART, [*given, "target.build.max_positions=64", "parallel.draft_dp=1"])
    run = resolve_run(recipe, RunOptions(LaunchOptions(num_ranks=4), dry_run=True))
    words = f"warning: data.max_length is {length}, and the target knows 64 positions"
    assert any(note.startswith(words) for note in run.notes) == warned
    assert bool(plan_recipe(recipe, Machines(gpus=4)).warnings) == warned


def test_a_run_beyond_the_targets_positions_is_warned_of_to_its_report(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows, target = tmp_path / "rows.jsonl", build_tiny_target(tmp_path / "tiny")
    rows.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in CONVERSATIONS))
    folders = [f"output_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}"]
    given = [f"target.path={target}", "target.build=null", f"data.train=[{rows}]", "draft.vocab_size=64"]
    recipe = load_recipe(QUICKSTART, [*folders, *given, "data.max_length=513", "data.hidden_states=online"])
    prepare(recipe)
    record = {"step": 1, "loss": 1.0, "step_loss": [1.0], "step_accuracy": [0.5]}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert report(recipe).is_file()
    words = "data.max_length is 513, and the target knows 512 positions"
    told = [line.getMessage() for line in caplog.records if words in line.getMessage()]
    assert [line.partition("data.max_length")[0] for line in told] == ["", "report: "]


@pytest.mark.parametrize(
    ("trained", "status"),
    [(Trained(0, finished=True), 0), (Trained(0, finished=False), 75), (Trained(7, finished=False), 7)],
)
def test_a_run_that_was_stopped_has_a_status_of_its_own(
    trained: Trained, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "train_run", lambda run: trained)
    monkeypatch.setattr(training, "finish_run", lambda recipe: None)
    monkeypatch.setattr(launch_command, "_show_summary", lambda recipe: None)
    monkeypatch.setattr(resolve, "check_data", lambda recipe: None)
    assert main(["launch", str(QUICKSTART), f"output_dir={tmp_path / 'run'}", "--num_ranks", "4"]) == status


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


@pytest.mark.parametrize("crash", [RuntimeError, ValueError, torch.OutOfMemoryError, None])
def test_exports_come_first_and_outlive_the_evaluation(
    crash: type[Exception] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def evaluate(_recipe: object) -> None:
        done.append("evaluate")
        if crash is not None:
            raise crash("the evaluation crashed")

    monkeypatch.setattr(training, "evaluate", evaluate)
    for name in ("export", "report"):
        monkeypatch.setattr(training, name, lambda _recipe, name=name: done.append(name))
    recipe = load_recipe(QUICKSTART, [f"output_dir={tmp_path}"])
    with contextlib.nullcontext() if crash is None else pytest.raises(crash, match="the evaluation crashed"):
        finish_run(recipe)
    assert done == ["export", "evaluate", "report"]
    state = read_state(tmp_path)
    assert state is not None and state.phase == "ended"
    if crash is None:
        assert (state.status, state.message) == (0, "")
    else:
        assert state.status is None and state.message.endswith(f"{crash.__name__}: the evaluation crashed")


@pytest.mark.parametrize(
    ("outcome", "weights", "ended"),
    [
        (Outcome(0, False), True, (0, "")),
        (Outcome(0, True), False, (STOPPED, "")),
        (Outcome(7, False, "ValueError: a bad row"), False, (7, "ValueError: a bad row")),
        (ValueError("a bad row"), False, (None, "ValueError: a bad row")),
    ],
)
def test_a_run_notes_what_it_does_and_how_it_ended(
    outcome: Outcome | Exception,
    weights: bool,
    ended: tuple[int | None, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, phases = tmp_path / "run", []

    def note(*_arguments: object) -> int:
        state = read_state(folder)
        phases.append(None if state is None else state.phase)
        return 0

    def run_ranks(*_arguments: object) -> Outcome:
        note()
        if isinstance(outcome, Exception):
            raise outcome
        if weights:
            (folder / FINAL_WEIGHTS).touch()
        return outcome

    given = [f"output_dir={folder}", f"data.cache_dir={tmp_path / 'cache'}", "parallel.draft_dp=1"]
    run = resolve_run(
        load_recipe(QUICKSTART, given), RunOptions(LaunchOptions(num_ranks=4), overwrite=True, dry_run=True)
    )
    (folder / "logs").mkdir(parents=True)
    (folder / "logs" / "rank_0.end.json").write_text("{}")
    monkeypatch.setattr(training, "check_places", lambda *_: None)
    monkeypatch.setattr(training, "clear_output", lambda _folder: None)
    monkeypatch.setattr(training, "prepare", note)
    monkeypatch.setattr(training, "capture", note)
    monkeypatch.setattr(training, "run_with_restarts", run_ranks)
    monkeypatch.setattr(training, "_advise", lambda *_: None)
    with pytest.raises(ValueError) if isinstance(outcome, Exception) else contextlib.nullcontext():
        training.train_run(run)
    assert phases == ["preparing", "capturing", "training"]
    state = read_state(folder)
    assert state is not None and state.phase == "ended" and (state.status, state.message) == ended
    assert load_recipe(folder / "recipe.resolved.yaml") == run.recipe
    assert not (folder / "logs" / "rank_0.end.json").exists(), "the ends of the run before"


def test_a_run_goes_on_where_its_state_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with noted(tmp_path / "gone") as notes:
        notes.at("training")
    assert "state.json: not written (" in caplog.text and "shows an older state" in caplog.text
