"""Reading a checkpoint with all ranks, of whatever shape they are: each reads the share of the state that it holds."""

from __future__ import annotations

from pathlib import Path

from eagle3_ds.draft import VocabularyMap
from eagle3_ds.train.agreement import max_over_ranks
from eagle3_ds.train.checkpoint import (
    MANIFEST,
    VOCABULARY,
    Manifest,
    PieceReader,
    damage,
    differing_shapes,
    rank_file,
    read_manifest,
    read_prefix,
)
from eagle3_ds.train.rng import PREFIX, restore_random_states
from eagle3_ds.train.shards import find_shards, parameter_shapes, write_state
from eagle3_ds.train.trainer import DraftTrainer


def load_checkpoint(trainer: DraftTrainer, folder: Path) -> Manifest:
    """Put a trainer of any shape where a checkpoint was. Collective; files are checked before any tensor is read.

    A rank takes the random states of the rank of its number, counted round when the checkpoint had fewer ranks.

    Raises:
        ValueError: a damaged file, another geometry or vocabulary, or a checkpoint that does not hold every element once.
    """
    manifest, place, device = read_manifest(folder), trainer.topology.place, trainer.topology.device
    own_files = sorted(manifest.files)[place.rank :: trainer.topology.mesh.world_size]
    problem = damage(folder, manifest, own_files)
    (found,) = max_over_ranks([place.rank + 1 if problem else 0], device)
    if found:
        raise ValueError(f"the checkpoint is damaged: {problem or f'rank {found - 1} says where'}. Try --resume auto.")
    differing = differing_shapes(manifest, parameter_shapes(trainer.engine.module))
    if differing:
        raise ValueError(f"{folder / MANIFEST} is of another draft: {'; '.join(differing)}. Resume with its own recipe.")
    if not VocabularyMap.load(folder / VOCABULARY).equals(trainer.vocabulary):
        raise ValueError(f"{folder / VOCABULARY} is another draft vocabulary than this run's. Resume with its own recipe.")
    write_state(trainer.engine, find_shards(trainer.engine), manifest.adam_steps, PieceReader(folder, manifest).read)
    num_saved = sum(name.startswith("rank-") for name in manifest.files)
    restore_random_states(read_prefix(folder / rank_file(place.rank % num_saved), PREFIX), device)
    engine = trainer.engine
    engine.global_steps, engine.skipped_steps = manifest.step, manifest.skipped_steps
    engine.micro_steps = manifest.step * engine.gradient_accumulation_steps()
    engine.global_samples = manifest.step * engine.train_batch_size()
    return manifest
