"""A DFlash draft through the whole of the small quickstart, launched: drawn anchors, two layers, ring 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.small_quickstart import STEPS, small_job

pytestmark = pytest.mark.e2e


def test_a_dflash_draft_is_trained_decoded_with_losslessly_and_exported(shared: Path, tmp_path: Path) -> None:
    job = small_job(
        shared,
        tmp_path / "output",
        "draft.block_size=4",
        "draft.num_layers=2",
        "draft.anchor_share=0.5",
        "eval.draft_tokens=3",
        "parallel.ring=2",
        "parallel.ulysses=1",
        f"train.steps={STEPS}",
        recipe="recipes/quickstart_dflash.yaml",
    )
    status, said = job.call("launch")
    assert status == 0, said
    losses = [row["loss"] for row in job.metrics() if "grad_norm" in row]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    report = json.loads((job.folder / "eval.json").read_text())
    assert report["lossless"] is True
    config = json.loads((job.folder / "draft" / "config.json").read_text())
    assert config["architectures"] == ["DFlashDraftModel"]
    assert config["block_size"] == 4
