"""A lock that a killed compiler left behind ends a run with its name, and does not hang it."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from pathlib import Path

import pytest

from eagle3_ds.train import extensions
from eagle3_ds.train.extensions import prepare_extensions


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "pin_memory" / "lock"
    lock.parent.mkdir()
    return lock


def test_the_extension_that_no_training_uses_is_not_compiled(lock: Path) -> None:
    """On CPUs it was minutes of each first start, and 69 MB of memory that no run gave back."""
    from deepspeed.comm.torch import build_shm_op

    prepare_extensions()
    assert build_shm_op() is None
    assert not lock.parent.with_name("deepspeed_shm_comm").exists()


def test_no_lock_is_no_wait(lock: Path) -> None:
    began = time.monotonic()
    prepare_extensions(poll_s=120.0)
    assert time.monotonic() - began < 100.0


def test_an_old_lock_ends_the_run_at_once_and_stays(lock: Path) -> None:
    lock.touch()
    os.utime(lock, (time.time() - 3600, time.time() - 3600))
    with pytest.raises(TimeoutError, match=rf"pin_memory is being compiled.*rm {lock}"):
        prepare_extensions(poll_s=60.0)
    assert lock.exists()


def test_a_lock_that_nobody_releases_ends_the_run_even_by_a_clock_that_lags(lock: Path) -> None:
    lock.touch()
    os.utime(lock, (time.time() + 3600, time.time() + 3600))
    with pytest.raises(TimeoutError, match="was killed"):
        prepare_extensions(patience_s=0.3, poll_s=0.05)


def test_a_compiler_that_lives_is_waited_for_and_said(
    lock: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extensions, "_TOLD_AFTER_S", 0.1)
    monkeypatch.setattr(logging.getLogger("eagle3_ds"), "propagate", True)
    lock.touch()
    release = threading.Timer(0.6, lock.unlink)
    release.start()
    prepare_extensions(poll_s=0.05)
    release.join()
    assert not lock.exists()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and str(lock) in told[0]


def test_locks_of_other_programs_are_theirs(lock: Path) -> None:
    other = lock.parent.parent / "somebody_elses_extension" / "lock"
    other.parent.mkdir()
    other.touch()
    os.utime(other, (0, 0))
    prepare_extensions()
    assert other.exists()


def compiled_in(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch would compile DeepSpeed's extension now."""
    from torch.utils import cpp_extension

    arguments: list[object] = []
    monkeypatch.setattr(cpp_extension, "_jit_compile", lambda *given, **_: arguments.extend(given))
    cpp_extension.load_inline("pin_memory", cpp_sources="")
    return next(Path(a) for a in arguments if isinstance(a, str) and a.endswith("/pin_memory"))


@pytest.mark.parametrize("own", [None, "set/by/the/user"])
def test_each_environment_compiles_in_a_folder_of_its_own(
    own: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.utils.cpp_extension.get_default_build_root", lambda: str(tmp_path))
    folders = []
    for prefix in ("/one", "/two", "/one"):
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "to be put back")
        if own:
            monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / own))
        else:
            monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
        monkeypatch.setattr(sys, "prefix", prefix)
        prepare_extensions()
        folders.append(compiled_in(monkeypatch).parent)
    assert folders[0] == folders[2]
    assert (folders[0] == folders[1] == tmp_path / own) if own else folders[0] != folders[1]
    assert all(tmp_path in folder.parents for folder in folders)
