"""The main job on one CUDA device: the flash kernel trains as the reference kernel does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.e2e.small_quickstart import Job, small_job

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
ONE_DEVICE = (
    "parallel.ulysses=1",
    "parallel.ring=1",
    "train.dtype=bfloat16",
    "train.steps=3",
    "eval.num_prompts=0",
)


def test_flash_trains_as_the_reference_kernel_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    flash, reference = (_trained(tmp_path, kernel).metrics() for kernel in ("cuda", "reference"))
    for ours, theirs in zip(flash, reference, strict=True):
        for name in ("loss", "grad_norm", "step_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-2), name
        assert ours["tokens"] == theirs["tokens"]
    assert flash[-1]["loss"] < flash[0]["loss"]


def _trained(folder: Path, kernel: str) -> Job:
    job = small_job(folder, folder / kernel, *ONE_DEVICE, f"attention.kernel={kernel}")
    result = job.launch()
    assert result.returncode == 0, result.stdout
    return job
