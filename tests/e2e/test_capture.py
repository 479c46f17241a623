"""`eagle3-ds capture`: ranks under the launcher fill the store that training reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from eagle3_ds.store import HiddenStateStore
from tests.e2e.small_quickstart import Job

pytestmark = pytest.mark.e2e


def test_two_ranks_capture_what_the_main_job_captured_alone(
    finished: Job, shared: Path, tmp_path: Path
) -> None:
    # Another dtype is another store beside the one of the main job.
    arguments = (
        "data.hidden_dtype=float16",
        "parallel.ring=1",
        f"output_dir={tmp_path / 'output'}",
        "--num_ranks",
        "2",
    )
    before = set((shared / "cache").glob("hidden-*"))
    status, output = finished.call("capture", *arguments)
    assert status == 0, output
    assert "capture on 2 ranks" in output
    (folder,) = set((shared / "cache").glob("hidden-*")) - before
    assert f"hidden states: {folder}" in output
    found = HiddenStateStore.open(folder)
    expected = next(store for store in map(HiddenStateStore.open, before) if store.lengths == found.lengths)
    found.verify()
    for document, length in found.lengths.items():
        for name in ("aux", "teacher"):
            wanted = expected.rows(document, name, 0, length).float()
            error = (found.rows(document, name, 0, length).float() - wanted).norm() / wanted.norm()
            assert error <= 1e-3, f"{name} of document {document}: relative error {error:.2e}"
    status, output = finished.call("capture", *arguments)
    assert status == 0 and "capture on" not in output, output
