"""What `eagle3-ds init` writes is launched as it says: captured, trained, exported, evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eagle3_ds.cli.main import main
from tests.unit.data_samples import write_jsonl
from tests.unit.tiny_target import CONVERSATIONS, build_tiny_target

pytestmark = pytest.mark.e2e


def test_the_recipe_of_init_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    build_tiny_target(tmp_path / "tiny")
    write_jsonl(tmp_path / "chats.jsonl", CONVERSATIONS)
    assert main(["init", "tiny", "--data", "chats.jsonl"]) == 0
    assert "next: eagle3-ds launch tiny.yaml" in capsys.readouterr().out
    small = ["train.epochs=null", "train.steps=2", "eval.num_prompts=1", "eval.max_new_tokens=4"]
    status = main(["launch", "tiny.yaml", *small])
    said = capsys.readouterr()
    assert status == 0, said.out + said.err
    steps = [json.loads(line) for line in (tmp_path / "output/tiny/metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in steps) == 2
    assert json.loads((tmp_path / "output/tiny/eval.json").read_text())["lossless"]
    assert (tmp_path / "output/tiny/draft/model.safetensors").is_file()
