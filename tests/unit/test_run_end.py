"""What `launch` ends with: what was made, its figures, and commands for this run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eagle3_ds.cli.launch import _show_summary
from eagle3_ds.cli.main import main
from eagle3_ds.config import Recipe, load_recipe
from eagle3_ds.run.stages import save_resolved
from tests.unit.printed_commands import printed_commands, require_usable

QUICKSTART = Path(__file__).parents[2] / "recipes/quickstart.yaml"
EVALUATION = {
    "acceptance_length": 2.345,
    "acceptance_length_interval": [2.2, 2.5],
    "acceptance_length_untrained": 1.004,
    "acceptance_length_untrained_interval": None,
    "acceptance_length_without_loops": 2.0,
    "looping_prompts": 3,
    "prompts": 16,
    "lossless": True,
}
SERVED = ["evaluate", "serve-check", "serve", "evaluate", "export", "watch"]
RECORDS = [
    # 7,200 tokens at 1 token/s are two hours; a step that was not finite counts none.
    {"step": 1, "loss": 9.5, "tokens": 7200, "tokens_per_s": 1.0, "peak_memory_bytes": [2**30, 2**30]},
    {"step": 2, "loss": 9.0, "tokens": 0, "tokens_per_s": 0.0, "peak_memory_bytes": [2**30, 2**30]},
    {"step": 3, "loss": 1.25, "tokens": 3600, "tokens_per_s": 1.0, "peak_memory_bytes": [2**30, 3 * 2**30]},
]


def finished_run(folder: Path, *overrides: str) -> Recipe:
    """The files that a finished run has left, as far as its end looks at them. A blank in its path must not
    break a command that is copied.
    """
    target, output = folder / "target", folder / "my run"
    target.mkdir()
    (target / "config.json").write_text("{}")
    given = [f"target.path={target}", "target.build=null", f"output_dir={output}", *overrides]
    recipe = load_recipe(QUICKSTART, given)
    save_resolved(recipe)
    (output / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in RECORDS))
    (output / "report.png").touch()
    names = {"vllm": "draft", "speculators": "draft-speculators"}
    for layout in recipe.export.formats:
        (output / names[layout]).mkdir()
        (output / names[layout] / "model.safetensors").touch()
    if recipe.eval.num_prompts:
        (output / "eval.json").write_text(json.dumps(EVALUATION))
    return recipe


def shown(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    _show_summary(recipe)
    return capsys.readouterr().out


def test_what_was_made_and_its_figures_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(finished_run(tmp_path), capsys).splitlines()
    start = lines.index(f"everything is in {tmp_path / 'my run'}")
    assert lines[start + 1 : start + 5] == [
        "  drafts: draft (vllm layout), draft-speculators (speculators layout)",
        "  evaluation: eval.json",
        "  report: report.png",
        "acceptance length 2.35 [2.20, 2.50] tokens per forward of the target, untrained 1.00, "
        "2.00 without the 3 of 16 answers that loop; lossless: True; loss 1.250, 9.500 at the first step; "
        "3 steps in 3.0 hours, 1 tokens/s at the last; peak memory 3.00 GiB per rank",
    ]


def test_a_draft_that_was_never_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = finished_run(tmp_path)
    nothing = {
        **EVALUATION,
        "looping_prompts": 0,
        "acceptance_length": None,
        "acceptance_length_untrained": None,
    }
    (tmp_path / "my run" / "eval.json").write_text(json.dumps(nothing))
    assert "acceptance length none (every answer ended before the draft was asked)" in shown(recipe, capsys)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), SERVED),
        (("export.formats=[speculators]",), SERVED),
        (("export.formats=[]",), ["evaluate", "export", "watch"]),
        (("eval.num_prompts=0", "export.formats=[]"), ["evaluate", "export", "watch"]),
        (("eval.num_prompts=0", "data.heldout_fraction=0", "train.eval_every=0"),
         SERVED[1:]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("program", ["eagle3-ds", "../my tools/launch.sh"])
def test_every_command_is_one_that_this_run_can_be_given(
    program: str,
    overrides: tuple[str, ...],
    expected: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("EAGLE3_DS_CALLED", raising=False)
    if program != "eagle3-ds":
        monkeypatch.setenv("EAGLE3_DS_CALLED", program)
    found = printed_commands(shown(finished_run(tmp_path, *overrides), capsys))
    assert [words[1] for words in found] == expected
    for words in found:
        require_usable(words, program, tmp_path / "target")


def test_an_evaluation_that_the_recipe_left_out_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = printed_commands(shown(finished_run(tmp_path, "eval.num_prompts=0"), capsys))[0]
    assert load_recipe(words[2], words[3:]).eval.num_prompts == 16


def test_the_page_can_be_written_by_the_command_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = finished_run(tmp_path)
    metrics = "".join(f"{json.dumps({**r, 'step_accuracy': [0.5]})}\n" for r in RECORDS)
    (tmp_path / "my run" / "metrics.jsonl").write_text(metrics)
    words = printed_commands(shown(recipe, capsys))[-1]
    assert main(words[1:]) == 0
    assert (tmp_path / "my run" / "run.html").is_file()
