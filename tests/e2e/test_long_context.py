"""benchmarks.long_context in small: a target, two drafts, every length; and it goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import long_context, long_target
from benchmarks.long_target import Stage

pytestmark = pytest.mark.e2e
CPU = torch.device("cpu")


def test_two_drafts_at_every_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["--size", "trial", "--output", str(tmp_path), "--only", "a", "b"]
    assert long_context.main(command) == 0
    result = json.loads((tmp_path / "long_context.json").read_text())
    size = long_context.SIZES["trial"]
    assert set(result["by_context"]) == {"a", "b", long_context.NGRAM}
    for rows in result["by_context"].values():
        assert [row["context"] for row in rows] == list(size.lengths)
        assert all(row["prompts"] == size.prompts and row["rounds"] > 0 for row in rows)
        assert all(1 <= row["acceptance_length"] <= 1 + long_context.TTT_STEPS for row in rows)
    assert json.loads((tmp_path / "runs/b/draft/config.json").read_text())["rope_parameters"]["factor"] == 4
    same = [load_file(tmp_path / f"runs/{name}/draft/model.safetensors") for name in "ab"]
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])
    assert (tmp_path / "long-context.png").stat().st_size > 10_000
    # Nothing is done again.
    monkeypatch.setattr(long_context.subprocess, "run", None)
    monkeypatch.setattr(long_context, "_judge", None)
    assert long_context.main(command) == 0


def test_the_target_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = [Stage(64, 1, 1, 3, 1e-3), Stage(128, 1, 1, 2, 1e-3)]
    monkeypatch.setattr(long_target, "SAVE_EVERY", 1)
    monkeypatch.setattr(long_target, "TOKENIZER_CONVERSATIONS", 40)
    sizes = long_target.sizes(512)
    whole = long_target.train(tmp_path / "whole", sizes, stages, CPU, progress=False)
    real, taken = long_target._Training.take_step, 0

    def stopped(self: long_target._Training, stage: Stage, step: int) -> str:
        nonlocal taken
        taken += 1
        if taken == 4:
            raise KeyboardInterrupt
        return real(self, stage, step)

    monkeypatch.setattr(long_target._Training, "take_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        long_target.train(tmp_path / "stopped", sizes, stages, CPU, progress=False)
    assert long_target.train(tmp_path / "stopped", sizes, stages, CPU, progress=False) == whole and taken == 6
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    with pytest.raises(ValueError, match="other sizes or stages"):
        long_target.train(tmp_path / "whole", sizes, stages[:1], CPU, progress=False)
