"""A target in four bits that only its server can run: rows from the server, three steps on two ranks, an
export, and the server with it, whose figures `evaluate --server` takes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from eagle3_ds.cli.main import main
from eagle3_ds.config import TargetSection
from eagle3_ds.data.documents import PreparedData
from eagle3_ds.store import HiddenStateStore
from eagle3_ds.targets import capture_hidden_states, choose_aux_layers, load_tokenizer
from eagle3_ds.targets.load import Target
from tests.e2e.small_quickstart import ROOT
from tests.served.gptq import quantize_body
from tests.served.on_cpu import ON_CPU, vllm
from tests.served.pairs import random_target
from tests.unit.data_samples import write_jsonl
from tests.unit.tiny_target import CONVERSATIONS, build_tiny_target

pytestmark = pytest.mark.e2e
DRAFT_TOKENS = 3
HALF_PRECISION = 2e-2
RECIPE = """
target:
  {path: ROOT/target, dtype: float16, capture: server,
   server: {python: PYTHON, arguments: [--enforce-eager, --max-num-seqs=8], concurrency: 2}}
draft: {vocab_size: 200, ttt_steps: 3}
data: {train: [ROOT/rows.jsonl], heldout_fraction: 0.2, max_length: 128, hidden_dtype: float16,
       cache_dir: ROOT/cache}
parallel: {ring: 2}
train: {steps: 3, dtype: float32}
eval: {num_prompts: 0, max_new_tokens: 8, draft_tokens: 3}
export: {dtype: float32}
deepspeed: ds_configs/zero2.json
output_dir: ROOT/run
"""


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name, value in ON_CPU.items():
        monkeypatch.setenv(name, value)


def written_recipe(folder: Path, python: str) -> Path:
    write_jsonl(folder / "rows.jsonl", CONVERSATIONS[:10])
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.replace("ROOT", str(folder)).replace("PYTHON", python))
    return path


def test_a_target_in_four_bits_gets_a_draft_that_its_server_runs(
    served_python: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = random_target(tmp_path / "target", "llama")
    quantize_body(model, tmp_path / "target")
    load_tokenizer(TargetSection(path=str(build_tiny_target(tmp_path / "tiny")))).save_pretrained(
        tmp_path / "target"
    )
    recipe, run = written_recipe(tmp_path, served_python), tmp_path / "run"
    assert main(["launch", str(recipe), "--num_ranks", "2"]) == 0, capsys.readouterr()
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and all(map(math.isfinite, losses)) and len(set(losses)) == 3
    require_rows_of(model, tmp_path)
    draft = {"method": "eagle3", "model": str(run / "draft"), "num_speculative_tokens": DRAFT_TOKENS}
    words = ("--dtype", "float16", "--max-model-len", "256", "--speculative-config", json.dumps(draft))
    with vllm(served_python, tmp_path / "target", tmp_path, *words) as (url, _):
        asked = ["evaluate", str(recipe), "eval.num_prompts=2", "--server", url, "--ignore_eos"]
        assert main(asked) == 0, capsys.readouterr()
    told = json.loads((run / "eval.json").read_text())["served"]
    assert told["prompts"] == 2 and told["new_tokens"] == 16 and told["rounds"] > 0


def require_rows_of(model: Any, folder: Path) -> None:
    """The store has, to half precision, the states of the model whose weights the four bits stand for."""
    target = Target(model, None, model.config, choose_aux_layers(model.config.num_hidden_layers))
    prepared = json.loads((folder / "run" / "prepared.json").read_text())
    data = PreparedData.open(Path(prepared["data"]), prepared["data_fingerprint"])
    (place,) = (folder / "cache").glob("hidden-*")
    store = HiddenStateStore.open(place)
    for row in (*data.train, *data.heldout):
        aux, teacher = capture_hidden_states(target, torch.tensor(row["input_ids"]))
        document, length = row["document_id"], len(aux)
        for found, expected in (
            (store.rows(document, "aux", 0, length), aux),
            (store.rows(document, "teacher", 0, length), teacher),
        ):
            errors = (found.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
            assert errors.max() <= HALF_PRECISION, f"document {document}: relative error {errors.max():.2e}"
