"""`eagle3-ds serve-check` with a real vLLM: a small run whose exports serve as trained, one whose eval.json
is of another draft, and an export that does not load.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from eagle3_ds.cli.main import main
from tests.unit.tiny_target import CONVERSATIONS

PARSER = Path(__file__).with_name("parsed_by_vllm.py")
DRAFT_TOKENS, NEW_TOKENS, PROMPTS = 4, 24, 3
# Heads of 32 are the least that vLLM has on a CPU. The target has learnt little and repeats a token, which
# its draft guesses: drafts that are sometimes right are judged in test_vllm.py, here the command is.
RECIPE = """
target:
  path: {folder}/target
  dtype: float32
  build: {{vocab_size: 320, hidden_size: 128, intermediate_size: 128, num_layers: 7, num_heads: 4,
    num_kv_heads: 2, max_positions: 512, sequence_length: 64, batch_size: 4, steps: 30, learning_rate: 1e-2}}
draft: {{vocab_size: 200, ttt_steps: 2}}
data:
  train: [{folder}/train.jsonl]
  cache_dir: {folder}/cache
  max_length: 512
  heldout_fraction: 0.2
  hidden_dtype: float32
train: {{steps: 12, dtype: float32, learning_rate: 1e-2}}
eval: {{num_prompts: {prompts}, max_new_tokens: {new_tokens}, draft_tokens: {draft_tokens}}}
export: {{dtype: float32}}
deepspeed: {root}/ds_configs/zero2.json
output_dir: {folder}/run
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a run of one rank that has ended well."""
    folder = tmp_path_factory.mktemp("checked")
    rows = [json.dumps({"messages": talk}) + "\n" for talk in CONVERSATIONS]
    (folder / "train.jsonl").write_text("".join(rows))
    path = folder / "recipe.yaml"
    sizes = {"prompts": PROMPTS, "new_tokens": NEW_TOKENS, "draft_tokens": DRAFT_TOKENS}
    path.write_text(RECIPE.format(folder=folder, root=Path(__file__).parents[2], **sizes))
    assert main(["launch", str(path), "--num_ranks", "1"]) == 0
    return path


@pytest.fixture(autouse=True)
def one_thread_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def rows_of(told: str) -> dict[str, list[str]]:
    """The cells of the table, by the first of each row."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in told.splitlines()]
    return {cells[0]: cells[1:] for cells in rows if cells}


def test_a_run_serves_as_trained(
    recipe: Path, served_python: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = ["serve-check", str(recipe), "--python", served_python, "--tolerance", "0"]
    assert main(words) == 0, capsys.readouterr().out
    told = capsys.readouterr().out
    rows = rows_of(told)
    ways = ("vLLM layout", "speculators layout", "speculators layout alone")
    assert set(rows) == {"the target alone", *ways, "eval.json"}, told
    for way in (*ways, "eval.json"):
        speed, theirs, ours, places = rows[way]
        assert theirs == ours and float(ours) > 1.1, "a draft that is never right would prove nothing"
        pairs = re.findall(r"(\S+) \((\S+)\)", places)
        assert len(pairs) == DRAFT_TOKENS and all(one == other for one, other in pairs)
        assert way == "eval.json" or float(speed) > 0
    assert float(rows["the target alone"][0]) > 0
    recorded = json.loads((recipe.parent / "run" / "eval.json").read_text())
    assert rows["eval.json"][1] == f"{recorded['acceptance_length']:.3f}"
    assert "vLLM warns: " in told and "SGLang, which was not started: " in told
    assert told.rstrip().endswith("serves as trained") and "failed: " not in told
    assert "WARNING" in (recipe.parent / "run" / "serve-check.log").read_text(), "vLLM's own words"


def test_an_export_that_does_not_load_fails(
    recipe: Path, served_python: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = recipe.parent / "run"
    draft = Path(shutil.copytree(run / "draft-speculators", tmp_path / "draft"))
    keys = json.loads((draft / "config.json").read_text())
    # What exports had once, and what transformers does not know.
    (draft / "config.json").write_text(json.dumps({**keys, "model_type": "speculator_model"}))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"input_ids": list(range(3, 20))}) + "\n")
    words = ["--target", recipe.parent / "target", "--draft", draft, "--prompts", prompts]
    assert main(["serve-check", *map(str, words), "--python", served_python]) == 1
    told = capsys.readouterr().out
    assert "failed: speculators layout: does not load" in told and "does not serve as trained" in told


def test_the_card_has_the_figures_and_vllm_knows_the_flags_of_its_commands(
    recipe: Path, run_there: Callable[..., str]
) -> None:
    run = recipe.parent / "run"
    recorded = json.loads((run / "eval.json").read_text())
    commands = []
    for name in ("draft", "draft-speculators"):
        card = (run / name / "README.md").read_text()
        assert f"**{recorded['acceptance_length']:.2f} tokens per forward of the target**" in card
        blocks = (run / name / "serve.md").read_text().split("```")[1::2]
        commands += [words for block in blocks if (words := shlex.split(block))[0] == "vllm"]
    assert len(commands) == 3
    parsed = json.loads(run_there(PARSER, *map(json.dumps, commands)))
    target, draft = (
        str(recipe.parent / "target"),
        {"method": "eagle3", "num_speculative_tokens": DRAFT_TOKENS},
    )
    assert parsed == [
        {"model": target, "dtype": "float32", "draft": draft | {"model": "draft"}},
        {"model": target, "dtype": "float32", "draft": draft | {"model": "draft-speculators"}},
        {"model": "draft-speculators", "dtype": "float32", "draft": None},
    ]
