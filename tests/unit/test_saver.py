"""Saving and restoring in one process: what a full disk, a failing thread and a damaged file do. Shapes:
tests/ranks.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from eagle3_ds.checkpoint import saver as saver_module
from eagle3_ds.checkpoint.format import VOCABULARY as VOCABULARY_FILE
from eagle3_ds.checkpoint.format import (
    CheckpointError,
    folder_name,
    newest_intact,
    rank_file,
    read_manifest,
    step_folders,
)
from eagle3_ds.checkpoint.restore import load_checkpoint
from eagle3_ds.checkpoint.saver import FAILED, IDLE, WRITING, CheckpointSaver, Progress
from eagle3_ds.config import load_recipe
from eagle3_ds.draft import VocabularyMap
from eagle3_ds.topology import maybe_setup_distributed
from eagle3_ds.train.state import EngineState, find_masters

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
VOCABULARY = VocabularyMap(torch.zeros(4, dtype=torch.int64), torch.tensor([True] * 4 + [False]))


@pytest.fixture(autouse=True)
def alone_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.delenv("RANK", raising=False)


class Trainer:
    """What saving needs of a DraftTrainer, around a plain AdamW as DeepSpeed leaves it at stage 0 in fp32."""

    def __init__(self, *overrides: str, seed: int = 0, width: int = 8) -> None:
        torch.manual_seed(seed)
        module = nn.Module()
        module.draft = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 4))
        optimizer = torch.optim.AdamW(module.parameters())
        self.engine = SimpleNamespace(
            module=module,
            optimizer=optimizer,
            basic_optimizer=optimizer,
            skipped_steps=0,
            zero_optimization_stage=lambda: 0,
            gradient_accumulation_steps=lambda: 2,
            train_batch_size=lambda: 2,
        )
        self.recipe = load_recipe(RECIPE, overrides)
        self.topology = maybe_setup_distributed()
        self.vocabulary = VOCABULARY

    def step(self) -> float:
        loss = self.engine.module.draft(torch.ones(1, 4)).square().sum()
        loss.backward()
        self.engine.optimizer.step()
        self.engine.optimizer.zero_grad()
        return loss.item()


def test_a_restored_trainer_goes_on_bitwise(tmp_path: Path) -> None:
    trainer, fresh = Trainer(), Trainer(seed=1)
    saver = CheckpointSaver(EngineState(trainer), tmp_path)
    saver.save(Progress(0, 0))
    losses = [trainer.step() for _ in range(2)]
    saver.save(Progress(2, 8, heldout_loss=1.5, skipped_in_a_row=1))
    later = [trainer.step() for _ in range(3)]
    manifest = load_checkpoint(EngineState(fresh), tmp_path / folder_name(2))
    assert (manifest.step, manifest.packs, manifest.adam_steps, manifest.heldout_loss) == (2, 8, 2, 1.5)
    assert manifest.skipped_in_a_row == 1
    assert [fresh.step() for _ in range(3)] == later
    assert (fresh.engine.global_steps, fresh.engine.micro_steps) == (2, 4)
    # The first checkpoint is of before AdamW had any state.
    load_checkpoint(EngineState(fresh), tmp_path / folder_name(0))
    assert [fresh.step() for _ in range(2)] == losses


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664), (0o077, 0o600)])
def test_who_may_read_the_manifest_may_read_the_rest(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        CheckpointSaver(EngineState(Trainer()), tmp_path).save(Progress(1, 4))
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / folder_name(1)).iterdir()}
    assert modes["manifest.json"] == modes[rank_file(0)] == modes[VOCABULARY_FILE] == mode, modes
    assert len(modes) == 3


def test_a_background_copy_is_of_the_moment_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, go_on = Trainer("train.save_async=true"), threading.Event()
    write = saver_module._write
    monkeypatch.setattr(saver_module, "_write", lambda *arguments: go_on.wait(10) and write(*arguments))
    saver = CheckpointSaver(EngineState(trainer), tmp_path)
    trainer.step()
    saver.save(Progress(1, 4))
    expected = [trainer.step() for _ in range(2)]
    assert saver.is_pending and saver.state == WRITING and step_folders(tmp_path) == []
    go_on.set()
    saver.finish()
    assert not saver.is_pending and saver.state == IDLE
    fresh = Trainer(seed=1)
    load_checkpoint(EngineState(fresh), tmp_path / folder_name(1))
    assert [fresh.step() for _ in range(2)] == expected


def test_an_error_of_the_thread_is_raised_at_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer("train.save_async=true")
    saver = CheckpointSaver(EngineState(trainer), tmp_path)
    saver.save(Progress(1, 4))
    saver.finish()
    failed = threading.Event()

    def full_disk(*_: object) -> None:
        failed.set()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saver_module, "save_file", full_disk)
    saver.save(Progress(2, 8))
    failed.wait(10)
    while saver.state == WRITING:
        pass
    assert saver.is_pending and saver.state == FAILED
    with pytest.raises(
        CheckpointError, match=r"step-000002 could not be written \(OSError: .*No space left.*bytes; .* free"
    ):
        saver.finish()
    assert [path.name for path in step_folders(tmp_path)] == ["step-000001"]
    assert newest_intact(tmp_path) == (tmp_path / "step-000001", [])
    assert not list(tmp_path.glob(".step*"))


def test_a_checkpoint_that_would_not_fit_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = CheckpointSaver(EngineState(Trainer()), tmp_path)
    saver.save(Progress(1, 4))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(saver_module.shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1234, 1234))
    with pytest.raises(
        CheckpointError,
        match=r"step-000002 was not written: it needs 1,04\d,\d\d\d bytes, and .* has 1,234 free",
    ):
        saver.save(Progress(2, 8))
    assert newest_intact(tmp_path) == (tmp_path / "step-000001", [])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        refused = subprocess.run(command, check=False, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if refused.returncode:
        pytest.skip(f"no right to mount: {refused.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_while_writing(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(width=8192)
    # What was free when it was looked at, somebody else has taken.
    monkeypatch.setattr(saver_module, "_SMALL_FILES", 0)
    saver = CheckpointSaver(EngineState(trainer), small_disk)
    # Masters and moments of 8192 x 9 + 4 elements are 0.9 MB: two checkpoints do not fit.
    saver.save(Progress(1, 4))
    real = saver_module.shutil.disk_usage
    monkeypatch.setattr(saver_module.shutil, "disk_usage", lambda path: real(path)._replace(free=10**9))
    with pytest.raises(
        CheckpointError,
        match=r"step-000002 could not be written \(SafetensorError: .*No space left on device",
    ):
        saver.save(Progress(2, 8))
    assert newest_intact(small_disk) == (small_disk / "step-000001", [])
    assert not list(small_disk.glob(".step*"))


def test_a_damaged_checkpoint_changes_nothing(tmp_path: Path) -> None:
    trainer = Trainer()
    trainer.step()
    CheckpointSaver(EngineState(trainer), tmp_path).save(Progress(1, 4))
    path = tmp_path / folder_name(1) / rank_file(0)
    path.write_bytes(path.read_bytes()[:-8])
    before = [parameter.clone() for parameter in trainer.engine.module.parameters()]
    with pytest.raises(
        ValueError, match=rf"the checkpoint is damaged: .*{rank_file(0)} has \d+ bytes instead of"
    ):
        load_checkpoint(EngineState(trainer), tmp_path / folder_name(1))
    assert all(torch.equal(*pair) for pair in zip(before, trainer.engine.module.parameters(), strict=True))


def test_another_draft_is_refused(tmp_path: Path) -> None:
    CheckpointSaver(EngineState(Trainer()), tmp_path).save(Progress(1, 4))
    with pytest.raises(ValueError, match=r"of another draft: 0.bias \[8\] instead of \[16\]"):
        load_checkpoint(EngineState(Trainer(width=16)), tmp_path / folder_name(1))
    other = Trainer()
    other.vocabulary = VocabularyMap(VOCABULARY.d2t, ~VOCABULARY.t2d)
    with pytest.raises(ValueError, match="another draft vocabulary"):
        load_checkpoint(EngineState(other), tmp_path / folder_name(1))


def test_checkpoints_rotate_and_hold_only_what_is_trained(tmp_path: Path) -> None:
    trainer = Trainer("train.keep_checkpoints=1")
    saver = CheckpointSaver(EngineState(trainer), tmp_path)
    for step, loss in enumerate((2.0, float("nan"), None)):
        saver.save(Progress(step, 4 * step, loss))
    assert [path.name for path in step_folders(tmp_path)] == ["step-000002", "step-000000"]
    assert read_manifest(tmp_path / "step-000002").files.keys() == {rank_file(0), "vocabulary.safetensors"}
    trained = sum(parameter.numel() for parameter in trainer.engine.module.parameters())
    held = (tmp_path / "step-000002" / rank_file(0)).stat().st_size - 3 * 4 * trained
    assert 0 < held < 30_000


def test_an_optimizer_of_unknown_layout_is_refused() -> None:
    trainer = Trainer()
    trainer.engine.optimizer = object()
    with pytest.raises(ValueError, match="DeepSpeed chose object, whose state this program cannot save"):
        find_masters(trainer.engine)
