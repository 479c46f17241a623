"""A lock that a killed compiler left behind ends a run with its name, and does not hang it."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

import pytest

from eagle3_ds.train import extensions
from eagle3_ds.train.extensions import wait_for_extensions


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    return lock


def test_no_lock_is_no_wait(lock: Path) -> None:
    began = time.monotonic()
    wait_for_extensions(poll_s=120.0)
    assert time.monotonic() - began < 100.0


def test_an_old_lock_ends_the_run_at_once_and_stays(lock: Path) -> None:
    lock.touch()
    os.utime(lock, (time.time() - 3600, time.time() - 3600))
    with pytest.raises(TimeoutError, match=rf"deepspeed_shm_comm is being compiled.*rm {lock}"):
        wait_for_extensions(poll_s=60.0)
    assert lock.exists()


def test_a_lock_that_nobody_releases_ends_the_run_even_by_a_clock_that_lags(lock: Path) -> None:
    lock.touch()
    os.utime(lock, (time.time() + 3600, time.time() + 3600))
    with pytest.raises(TimeoutError, match="was killed"):
        wait_for_extensions(patience_s=0.3, poll_s=0.05)


def test_a_compiler_that_lives_is_waited_for_and_said(
    lock: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extensions, "_TOLD_AFTER_S", 0.1)
    monkeypatch.setattr(logging.getLogger("eagle3_ds"), "propagate", True)
    lock.touch()
    release = threading.Timer(0.6, lock.unlink)
    release.start()
    wait_for_extensions(poll_s=0.05)
    release.join()
    assert not lock.exists()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and str(lock) in told[0]


def test_locks_of_other_programs_are_theirs(lock: Path) -> None:
    other = lock.parent.parent / "somebody_elses_extension" / "lock"
    other.parent.mkdir()
    other.touch()
    os.utime(other, (0, 0))
    wait_for_extensions()
    assert other.exists()


def test_the_folder_is_the_one_in_which_torch_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils import cpp_extension

    folders: list[object] = []
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(cpp_extension, "_jit_compile", lambda *given, **_: folders.extend(given))
    cpp_extension.load_inline("deepspeed_shm_comm", cpp_sources="")
    assert str(extensions._folder() / "deepspeed_shm_comm") in folders
