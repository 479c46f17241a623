"""Reading a checkpoint with all ranks, on any mesh: each rank reads the share of the state that it holds."""

from __future__ import annotations

from pathlib import Path

from eagle3_ds.checkpoint.format import (
    MANIFEST,
    RANK_FILE,
    VOCABULARY,
    Manifest,
    damage,
    differing_shapes,
    rank_file,
    read_manifest,
    read_prefix,
)
from eagle3_ds.checkpoint.fragments import FragmentReader, Piece, as_bytes, from_bytes, pieces_in
from eagle3_ds.checkpoint.rng import PREFIX, restore_random_states
from eagle3_ds.checkpoint.state import TrainingState
from eagle3_ds.collectives.agreement import gather_bytes, max_over_ranks
from eagle3_ds.draft import VocabularyMap


def load_checkpoint(training: TrainingState, folder: Path) -> Manifest:
    """Load a checkpoint into a training state on any mesh and at any ZeRO stage. Collective.

    Each rank checks the sha256 of some of the files and reads what they hold, and no rank reads a tensor
    before all are checked. A rank takes the random states of rank `rank % n` of the n ranks that wrote the
    checkpoint.

    Raises:
        ValueError: a file is damaged, the checkpoint is of a draft with other shapes or another vocabulary,
            or its fragments do not cover every parameter exactly once.
    """
    manifest, place, device = read_manifest(folder), training.topology.place, training.topology.device
    own_files = sorted(manifest.files)[place.rank :: training.topology.mesh.world_size]
    problem = damage(folder, manifest, own_files)
    found: list[Piece] = []
    if problem is None:
        try:
            found = pieces_in(folder, own_files)
        except ValueError as error:
            problem = str(error)
    told = as_bytes(found)
    failed, longest = max_over_ranks([place.rank + 1 if problem else 0, len(told)], device)
    if failed:
        raise ValueError(
            f"the checkpoint is damaged: {problem or f'rank {failed - 1} says where'}. Try --resume auto."
        )
    differing = differing_shapes(manifest, training.parameter_shapes)
    if differing:
        raise ValueError(
            f"{folder / MANIFEST} is of another draft: {'; '.join(differing)}. Resume with its own recipe."
        )
    if not VocabularyMap.load(folder / VOCABULARY).equals(training.vocabulary):
        raise ValueError(
            f"{folder / VOCABULARY} is another draft vocabulary than this run's. Resume with its own recipe."
        )
    rows = gather_bytes(told.ljust(longest), device)
    pieces = [piece for row in rows for piece in from_bytes(row)]
    with FragmentReader(folder, manifest, pieces) as reader:
        training.write(manifest.adam_steps, reader.read)
    num_saved = sum(RANK_FILE.fullmatch(name) is not None for name in manifest.files)
    restore_random_states(read_prefix(folder / rank_file(place.rank % num_saved), PREFIX), device)
    training.count_steps(manifest.step, manifest.skipped_steps)
    return manifest
