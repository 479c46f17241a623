"""The small quickstart, run once by the real command; all tests of the session look at what it left."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.small_quickstart import STEPS, Job, small_job


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def finished(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run of the main job that has ended well."""
    job = small_job(
        shared,
        tmp_path_factory.mktemp("run") / "output",
        f"train.steps={STEPS}",
        f"train.save_every={STEPS // 2}",
    )
    result = job.launch()
    assert result.returncode == 0, result.stdout
    return Job(job.folder, job.overrides, result.stdout)
