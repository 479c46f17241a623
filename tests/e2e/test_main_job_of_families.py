"""Targets of four kinds through the main job: captured, three steps on two ranks, exported, evaluated."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from eagle3_ds.cli.main import main
from judge.family_configs import tiny_config
from tests.e2e.small_quickstart import ROOT
from tests.unit.data_samples import write_jsonl
from tests.unit.tiny_families import random_model
from tests.unit.tiny_target import CONVERSATIONS, build_tiny_target

pytestmark = pytest.mark.e2e
RECIPE = """
target: {path: ROOT/target, dtype: float32, capture: CAPTURE}
draft: {vocab_size: 160, ttt_steps: 3}
data: {train: [ROOT/rows.jsonl], heldout_fraction: 0.2, max_length: 128, hidden_dtype: float32,
       cache_dir: ROOT/cache}
parallel: {RING}
train: {steps: 3, dtype: float32}
eval: {num_prompts: 1, max_new_tokens: 4, draft_tokens: 3}
export: {dtype: float32}
deepspeed: ds_configs/zero2.json
output_dir: ROOT/run
"""
# Hybrid of linear and gated attention with experts; partly rotary; latent attention; sinks and windows.
FAMILIES = {
    "qwen3_5_moe_text": ("single", 2),
    "glm4": ("parallel", 2),
    "deepseek_v3": ("parallel", 2),
    "gpt_oss": ("parallel", 2),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_target_of_this_kind_gets_a_draft(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    capture, ring = FAMILIES[family]
    tokenizer = build_tiny_target(tmp_path / "llama")
    config = tiny_config(family)
    config.vocab_size = 320
    random_model(config).save_pretrained(tmp_path / "target")
    for file in [*tokenizer.glob("tokenizer*"), *tokenizer.glob("*.jinja")]:
        shutil.copy(file, tmp_path / "target")
    write_jsonl(tmp_path / "rows.jsonl", CONVERSATIONS[:10])
    recipe = tmp_path / "recipe.yaml"
    text = RECIPE.replace("ROOT", str(tmp_path)).replace("CAPTURE", capture)
    recipe.write_text(text.replace("RING", f"ring: {ring}"))
    status = main(["launch", str(recipe), "--num_ranks", str(ring)])
    said = capsys.readouterr()
    assert status == 0, said.out + said.err
    run = tmp_path / "run"
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and all(map(math.isfinite, losses)) and len(set(losses)) == 3
    result = json.loads((run / "eval.json").read_text())
    assert result["lossless"] is True and result["prompts"] == 1
    trained = load_file(run / "draft-final.safetensors")
    for name in ("draft", "draft-speculators"):
        config = json.loads((run / name / "config.json").read_text())
        tensors = load_file(run / name / "model.safetensors")
        assert (tensors["fc.weight"] == trained["fc.weight"]).all()
        assert config["draft_vocab_size"] == 160
