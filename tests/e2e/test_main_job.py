"""One command from Python's own sources to an exported draft: ZeRO-3 x ring 2 x ulysses 2, four ranks."""

from __future__ import annotations

import json
import math
import re
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eagle3_ds.config import load_recipe
from eagle3_ds.launch.state import Steps, read_steps
from eagle3_ds.watch import RunReader
from tests.e2e.small_quickstart import QUICKSTART, ROOT, STEPS, Job
from tests.unit.printed_commands import printed_commands, require_usable

pytestmark = pytest.mark.e2e
TTT_STEPS, NUM_RANKS = 7, 4
# Ours begin with "warning: "; the rest is how Python, transformers, DeepSpeed and its extensions speak.
FOREIGN = re.compile(
    r"(?<!^)warning|Warning|WARNING|^\[transformers\]|\[(INFO|ERROR)\]|built successfully|deprecated"
)


def test_the_output_folder_holds_everything(finished: Job) -> None:
    for name in (
        "recipe.resolved.yaml", "metrics.jsonl", "eval.json", "report.png", "state.json", "steps.json"
    ):  # fmt: skip
        assert (finished.folder / name).stat().st_size > 0, name
    for name in ("checkpoints", "draft", "draft-speculators"):
        assert any((finished.folder / name).iterdir()), name
    assert (finished.folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert load_recipe(finished.folder / "recipe.resolved.yaml") == load_recipe(
        ROOT / QUICKSTART, [*finished.overrides, "parallel.draft_dp=1"]
    )


def test_metrics_have_a_line_per_step(finished: Job) -> None:
    records = finished.metrics()
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for record in records:
        assert len(record["step_loss"]) == len(record["step_accuracy"]) == TTT_STEPS
        assert len(record["peak_memory_bytes"]) == NUM_RANKS and min(record["peak_memory_bytes"]) > 0
        for name in ("loss", "tau", "grad_norm", "lr", "tokens", "tokens_per_s"):
            assert math.isfinite(record[name]) and record[name] > 0, name
        assert ("heldout" in record) == (record["step"] % 2 == 0)
    assert records[-1]["loss"] < records[0]["loss"]
    assert records[-1]["heldout"]["loss"] < records[1]["heldout"]["loss"]


def test_the_run_can_be_watched_when_it_is_over(finished: Job) -> None:
    assert read_steps(finished.folder) == Steps(0, STEPS)
    view = RunReader(finished.folder).read()
    assert (view.state, view.has_ended) == ("finished", True)
    assert (view.progress.step, view.progress.last) == (STEPS, STEPS)
    assert view.progress.tokens == sum(record["tokens"] for record in finished.metrics())
    assert [rank.state for rank in view.ranks] == [f"finished after step {STEPS}"] * NUM_RANKS
    assert [rank.peak_bytes for rank in view.ranks] == finished.metrics()[-1]["peak_memory_bytes"]
    assert len(view.curves["loss"]) == STEPS and len(view.curves["held-out loss"]) == STEPS // 2
    assert any(line.startswith("mesh Mesh(draft_dp=1, ring=2, ulysses=2)") for line in view.messages)


def test_evaluation_is_lossless_and_complete(finished: Job) -> None:
    result = json.loads((finished.folder / "eval.json").read_text())
    assert result["lossless"] is True
    assert result["acceptance_length"] >= 1.0 and result["acceptance_length_untrained"] >= 1.0
    assert len(result["acceptance_by_position"]) == TTT_STEPS
    assert result["acceptance_by_context"]


def test_exports_hold_the_trained_weights(finished: Job) -> None:
    trained = load_file(finished.folder / "draft-final.safetensors")
    for name in ("draft", "draft-speculators"):
        folder = finished.folder / name
        tensors = load_file(folder / "model.safetensors")
        assert torch.equal(tensors["fc.weight"], trained["fc.weight"])
        assert tensors["d2t"].shape == (512,) and tensors["t2d"].sum() == 512
        assert json.loads((folder / "config.json").read_text())["architectures"]


def test_the_terminal_tells_the_result(finished: Job) -> None:
    for words in ("mesh: draft_dp 1 x ring 2 x ulysses 2 = 4 ranks", "acceptance length", "lossless: True"):
        assert words in finished.output
    assert finished.output.count(f"everything is in {finished.folder}") == 1


def test_the_commands_that_the_run_ends_with_are_for_this_run(finished: Job, shared: Path) -> None:
    found = printed_commands(finished.output)
    assert [words[1] for words in found] == [
        "evaluate",
        "serve-check",
        "serve",
        "evaluate",
        "export",
        "watch",
    ]
    for words in found:
        require_usable(words, str(ROOT / "launch.sh"), shared / "target")


def test_nobody_else_warns_in_a_first_run(finished: Job) -> None:
    logs = [(finished.folder / "logs" / f"rank_{rank}.log").read_text() for rank in range(NUM_RANKS)]
    lines = [line for text in (finished.output, *logs) for line in text.splitlines()]
    assert len(lines) > 50
    assert [line for line in lines if FOREIGN.search(line)] == []


def test_single_stages_run_again_and_say_the_same(finished: Job) -> None:
    for stage, product in (
        ("export", "draft/model.safetensors"),
        # Before the evaluation, which takes other seconds: the picture tells them.
        ("report", "report.png"),
        ("evaluate", "eval.json"),
    ):
        path = finished.folder / product
        before = path.read_bytes()
        path.unlink()
        status, output = finished.call(stage)
        assert status == 0, output
        # Evaluation notes its own seconds.
        assert stage == "evaluate" or path.read_bytes() == before, stage


def test_a_second_run_needs_a_word_about_the_first(finished: Job) -> None:
    before = (finished.folder / "metrics.jsonl").read_bytes()
    status, output = finished.call("launch")
    assert status == 2
    assert "--resume" in output and "--overwrite" in output
    assert (finished.folder / "metrics.jsonl").read_bytes() == before


def test_resuming_with_another_draft_is_refused(finished: Job) -> None:
    status, output = finished.call("launch", "draft.vocab_size=256", "--resume")
    assert status == 2
    assert "draft.vocab_size" in output


def test_a_truncated_store_is_named_before_training(finished: Job, tmp_path: Path) -> None:
    """Damage, the error, and the repair: nothing is trained on half a file."""
    store = Path(json.loads((finished.folder / "prepared.json").read_text())["store"])
    path = max(store.glob("*.safetensors"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    try:
        status, output = finished.call("launch", f"output_dir={tmp_path}")
    finally:
        path.write_bytes(whole)
    assert status == 2
    assert path.name in output
    assert "training on" not in output


def test_the_console_script_has_the_same_commands(capsys: pytest.CaptureFixture[str]) -> None:
    (script,) = entry_points(group="console_scripts", name="eagle3-ds")
    assert script.load()(["--help"]) == 0
    told = capsys.readouterr().out
    for command in ("launch", "prepare", "evaluate", "export", "report"):
        assert command in told
