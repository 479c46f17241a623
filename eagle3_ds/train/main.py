"""What each rank runs: `python -m eagle3_ds.train.main --recipe OUTPUT/recipe.resolved.yaml [--resume]`, under the launcher.

It reads `prepared.json` in the recipe's output folder, which the prepare stage wrote:
`{"data": folder, "data_fingerprint": str, "store": folder, "store_fingerprint": {...}}`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from eagle3_ds.config import Recipe, fill_deepspeed_config, load_deepspeed_config, load_recipe
from eagle3_ds.data.documents import PreparedData
from eagle3_ds.data.loader import PackedLoader
from eagle3_ds.data.store import HiddenStateStore
from eagle3_ds.layout import PackedSequence
from eagle3_ds.model import DraftModel, VocabularyMap, build_draft_config
from eagle3_ds.target import load_embedding_and_head, load_text_config, resolve_path
from eagle3_ds.topology import Topology, maybe_setup_distributed
from eagle3_ds.train.heart import Heart, beating
from eagle3_ds.train.identity import require_same_identity
from eagle3_ds.train.loop import run_training, save_weights
from eagle3_ds.train.trainer import DraftTrainer


def build_trainer(recipe: Recipe, topology: Topology) -> DraftTrainer:
    """A trainer with a fresh draft, the same on all ranks because all seed alike."""
    torch.manual_seed(recipe.train.seed)
    folder = resolve_path(recipe.target.path)
    draft = DraftModel(build_draft_config(load_text_config(folder), recipe.draft))
    embedding, head = load_embedding_and_head(folder)
    vocabulary = VocabularyMap.load(Path(recipe.output_dir) / "vocabulary.safetensors")
    settings = fill_deepspeed_config(load_deepspeed_config(recipe.deepspeed), recipe, topology.mesh.world_size, topology.draft_dp)
    return DraftTrainer(recipe, settings, topology, draft, embedding, head, vocabulary)


def build_loaders(recipe: Recipe, topology: Topology) -> tuple[PackedLoader, list[PackedSequence]]:
    """The training loader, and the held-out packs of this draft_dp rank."""
    prepared: dict[str, Any] = json.loads((Path(recipe.output_dir) / "prepared.json").read_text())
    data = PreparedData.open(Path(prepared["data"]), prepared["data_fingerprint"])
    store = HiddenStateStore.open(prepared["store"], prepared["store_fingerprint"])
    mesh = {"draft_dp": topology.draft_dp, "dp_rank": topology.place.dp_rank}
    loader = PackedLoader(
        data.train,
        store,
        recipe.data.max_length,
        accumulation=recipe.train.accumulation,
        seed=recipe.train.seed,
        **mesh,
    )
    if not len(data.heldout):
        return loader, []
    return loader, _heldout_packs(PackedLoader(data.heldout, store, recipe.data.max_length, **mesh))


def _heldout_packs(loader: PackedLoader) -> list[PackedSequence]:
    """Equally many packs on every rank. A rank that has none left repeats one without supervision: it takes part in
    every collective, the ZeRO-3 gathers among them, and adds nothing."""
    first = loader.source.sequence(loader.packs[0])
    filler = replace(first, loss_mask=torch.zeros_like(first.loss_mask))
    return [pack if pack is not None else filler for pack in loader.all_packs()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", required=True, help="the resolved recipe")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher; LOCAL_RANK is what counts")
    parser.add_argument("--status_fd", type=int, help="where the supervisor listens, set by it")
    options = parser.parse_args(arguments)
    with beating(options.status_fd) as heart:
        train(load_recipe(options.recipe), options.resume, heart)


def train(recipe: Recipe, resume: bool, heart: Heart) -> None:
    """This rank's part of the run. Collective."""
    parallel = recipe.parallel
    topology = maybe_setup_distributed(parallel.ulysses, parallel.ring, parallel.draft_dp)
    require_same_identity(recipe, topology)
    trainer = build_trainer(recipe, topology)
    loader, heldout = build_loaders(recipe, topology)
    output_dir = Path(recipe.output_dir)
    if topology.place.rank == 0:
        strategy = f"attention kernel {trainer.kernel_name}, kv_exchange {trainer.kv_exchange}"
        print(f"mesh {topology.mesh}, {strategy}, {loader.num_packs} packs", flush=True)
    if not resume:
        save_weights(trainer, output_dir / "draft-initial.safetensors")
    run_training(trainer, loader, heldout, output_dir, resume, heart)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
