"""Writing checkpoints with all ranks: each rank writes the share of the state that it holds."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from eagle3_ds import __version__
from eagle3_ds.checkpoint.format import (
    KINDS,
    VOCABULARY,
    CheckpointError,
    FileEntry,
    Manifest,
    aside_folder,
    file_entry,
    folder_name,
    let_others_read,
    publish,
    rank_file,
    remove_hidden,
    rotate,
    sync_file,
    write_manifest,
)
from eagle3_ds.checkpoint.rng import random_states
from eagle3_ds.checkpoint.state import FlatMaster, TrainingState, shares
from eagle3_ds.collectives.agreement import gather_bytes, max_over_ranks, sum_over_ranks
from eagle3_ds.draft import VocabularyMap

# State of the thread that writes. The loop takes the maximum over all ranks: one that writes or has failed
# counts for all.
IDLE, WRITING, FAILED = range(3)
# An upper estimate, in bytes per rank, of headers, random states, manifest and vocabulary map.
_SMALL_FILES = 2**20


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps done.
        packs: packed sequences trained on, over all draft_dp ranks.
        heldout_loss, heldout_acceptance: loss and simulated acceptance length on the held-out packs; None
            when they were not evaluated at this step.
        heldout_decoded: acceptance length of held-out prompts that were decoded at this step.
        skipped_in_a_row: how many steps in a row, ending with this one, were skipped.
    """

    step: int
    packs: int
    heldout_loss: float | None = None
    skipped_in_a_row: int = 0
    heldout_acceptance: float | None = None
    heldout_decoded: float | None = None


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written.

    Attributes:
        manifest: its manifest, with no files listed yet.
        needed: bytes that all ranks together write.
        written: size and digest of this rank's file, once it is written.
    """

    manifest: Manifest
    needed: int
    written: Future[FileEntry]


class CheckpointSaver:
    """Writes the checkpoints of a run. `save` and `finish` are collective.

    With `train.save_async`, `save` copies this rank's state to the host, and a thread writes the copy while
    training goes on. The checkpoint gets its name in `finish`, which the training loop calls when the threads
    of all ranks are done.
    """

    def __init__(self, training: TrainingState, root: Path) -> None:
        self._training, self._root = training, root
        self._device, self._rank = training.topology.device, training.topology.place.rank
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: _Pending | None = None

    @property
    def is_pending(self) -> bool:
        """Whether a checkpoint waits for `finish`. The same on all ranks."""
        return self._pending is not None

    @property
    def state(self) -> int:
        """State of this rank's thread: IDLE, WRITING or FAILED."""
        if self._pending is None:
            return IDLE
        if not self._pending.written.done():
            return WRITING
        return FAILED if self._pending.written.exception() else IDLE

    def save(self, progress: Progress) -> None:
        """Write a checkpoint. Collective. Without `train.save_async` it has its name on return.

        Raises:
            CheckpointError: this checkpoint, or the one before that was still being written, could not be
                written. Earlier ones stay. It is raised on all ranks.
        """
        self.finish()
        own = shares(self._training.masters, *self._training.replica)
        numel = sum(fragment.numel for master in own for fragment in master.fragments)
        needed = self._require_space(progress.step, len(KINDS) * 4 * numel + _SMALL_FILES)
        vocabulary = self._training.vocabulary if self._rank == 0 else None
        aside = aside_folder(self._root, progress.step)
        written = self._thread.submit(_write, aside, self._rank, self._host_copy(own), vocabulary)
        self._pending = _Pending(self._describe(progress), needed, written)
        if not self._training.recipe.train.save_async:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any, and give it its name. Collective.

        Raises:
            CheckpointError: a rank could not write its file, or rank 0 could not rename the folder. It is
                raised on all ranks.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        error = pending.written.exception()
        rows = gather_bytes(bytes(_ROW) if error else _as_row(pending.written.result()), self._device)
        complete = all(any(row) for row in rows)
        if complete and self._rank == 0:
            try:
                self._publish(pending.manifest, [_from_row(row) for row in rows])
            except OSError as caught:
                error = caught
        (failed,) = max_over_ranks([self._rank + 1 if error else 0], self._device)
        if failed:
            self._give_up(pending, error, failed - 1)

    def _require_space(self, step: int, own_bytes: int) -> int:
        """The bytes that all ranks together will write. Collective.

        Raises:
            CheckpointError: the file system has less free.
        """
        if self._rank == 0:
            self._root.mkdir(parents=True, exist_ok=True)
            remove_hidden(self._root)
        (needed,) = sum_over_ranks([own_bytes], self._device)
        short = self._rank == 0 and needed > shutil.disk_usage(self._root).free
        if max_over_ranks([int(short)], self._device)[0]:
            raise CheckpointError(
                f"{folder_name(step)} was not written: it needs {needed:,} bytes, and {self._root} has "
                f"{shutil.disk_usage(self._root).free:,} free. Free some space or lower "
                "train.keep_checkpoints, then go on with --resume. Earlier checkpoints are untouched."
            )
        return needed

    def _host_copy(self, own: Sequence[FlatMaster]) -> dict[str, Tensor]:
        tensors = random_states(self._device)
        for master in own:
            for kind, flat in self._training.read(master).items():
                parts = {part.key(kind): part.of(flat) for part in master.fragments}
                tensors |= {key: part.to("cpu", torch.float32, copy=True) for key, part in parts.items()}
        return tensors

    def _describe(self, progress: Progress) -> Manifest:
        training = self._training
        return Manifest(
            step=progress.step,
            packs=progress.packs,
            adam_steps=training.adam_steps,
            skipped_steps=training.skipped_steps,
            skipped_in_a_row=progress.skipped_in_a_row,
            heldout_loss=_finite(progress.heldout_loss),
            heldout_acceptance=_finite(progress.heldout_acceptance),
            heldout_decoded=progress.heldout_decoded,
            recipe=training.recipe.model_dump(mode="json"),
            mesh={**vars(training.topology.mesh), "zero_stage": training.zero_stage},
            parameters=training.parameter_shapes,
            versions={"eagle3_ds": __version__, **training.versions},
            files={},
        )

    def _publish(self, manifest: Manifest, entries: Sequence[FileEntry]) -> None:
        aside = aside_folder(self._root, manifest.step)
        files = {rank_file(rank): entry for rank, entry in enumerate(entries)}
        for name, entry in files.items():
            if not (aside / name).is_file() or (aside / name).stat().st_size != entry.bytes:
                raise OSError(
                    f"rank 0 does not see {name} as it was written; output_dir must be on storage that all "
                    "hosts share"
                )
        files[VOCABULARY] = file_entry(aside / VOCABULARY)
        write_manifest(aside, manifest.model_copy(update={"files": files}))
        folder = self._root / folder_name(manifest.step)
        publish(aside, folder, manifest.step)
        train = self._training.recipe.train
        rotate(self._root, folder, train.keep_checkpoints, train.best_by)

    def _give_up(self, pending: _Pending, error: BaseException | None, failed: int) -> None:
        name, free = folder_name(pending.manifest.step), shutil.disk_usage(self._root).free
        if self._rank == 0:
            remove_hidden(self._root)
        cause = f"{type(error).__name__}: {error}" if error else f"rank {failed} says why"
        raise CheckpointError(
            f"{name} could not be written ({cause}). It needs {pending.needed:,} bytes; {self._root} had "
            f"{free:,} free. Earlier checkpoints are untouched: free some space, then go on with --resume."
        ) from error


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _write(aside: Path, rank: int, tensors: dict[str, Tensor], vocabulary: VocabularyMap | None) -> FileEntry:
    """Write this rank's file, and the vocabulary map if one is given."""
    # Every rank makes the folder: on shared storage, other hosts may see a new folder late.
    aside.mkdir(exist_ok=True)
    if vocabulary is not None:
        vocabulary.save(aside / VOCABULARY)
        let_others_read(aside / VOCABULARY)
        sync_file(aside / VOCABULARY)
    path = aside / rank_file(rank)
    save_file(tensors, path)
    let_others_read(path)
    sync_file(path)
    return file_entry(path)


# Bytes by which a rank describes its file to rank 0: 8 of size, 32 of sha256; all zero when it was not
# written.
_ROW = 40


def _as_row(entry: FileEntry) -> bytes:
    return entry.bytes.to_bytes(8, "big") + bytes.fromhex(entry.sha256)


def _from_row(row: bytes) -> FileEntry:
    return FileEntry(bytes=int.from_bytes(row[:8], "big"), sha256=row[8:].hex())
