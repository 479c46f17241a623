"""A small run with trackers, its resume, and what their files hold afterwards."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.e2e.small_quickstart import STEPS, small_job
from tests.unit.test_trackers import require_equal
from tests.unit.tracker_files import READERS, picture_of

pytestmark = pytest.mark.e2e
INSTALLED = [name for name in sorted(READERS) if find_spec(name)]


@pytest.mark.skipif(not INSTALLED, reason="no tracker is installed: pip install tensorboard")
def test_trackers_hold_what_metrics_hold(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("MLFLOW_TRACKING_URI", "TRACKIO_DIR", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    asked = f"train.trackers=[{', '.join(INSTALLED)}]"
    job = small_job(shared, tmp_path / "output", asked, "eval.num_prompts=0", "export.formats=[vllm]")
    status, output = job.call("launch", f"train.steps={STEPS}")
    assert status == 0, output
    status, output = job.call("launch", f"train.steps={STEPS + 1}", "--resume")
    assert status == 0 and "warning: the tracker" not in output, output
    assert [record["step"] for record in job.metrics()] == list(range(1, STEPS + 2))
    folder = job.folder / "trackers"
    runs = json.loads((folder / "runs.json").read_text())
    for name in INSTALLED:
        require_equal(name, job.folder)
        assert picture_of(name, folder, runs[name]["identity"]) >= 1
        assert runs[name]["step"] == STEPS + 1
