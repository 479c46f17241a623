"""What each rank runs in training:
`python -m eagle3_ds.train.main --recipe OUTPUT/recipe.resolved.yaml [--resume step-N]`.

It reads `prepared.json`, which the prepare stage wrote into the recipe's output folder:
`{"data": folder, "data_fingerprint": str, "store": folder or null, "store_fingerprint": {...}}`, and with
`data.hidden_states: stream` `"server": {"url", "folder"}`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from eagle3_ds.algorithms import algorithm_of
from eagle3_ds.checkpoint.format import CHECKPOINTS, INITIAL_WEIGHTS, latest
from eagle3_ds.checkpoint.restore import load_checkpoint
from eagle3_ds.config import Recipe, fill_deepspeed_config, load_deepspeed_config, load_recipe
from eagle3_ds.data.documents import PreparedData
from eagle3_ds.data.loader import HeldoutPacks, HiddenStates, PackedLoader
from eagle3_ds.draft import VocabularyMap, has_own_embedding, load_draft_embedding
from eagle3_ds.guard.heart import Heart, beating
from eagle3_ds.guard.identity import require_same_identity
from eagle3_ds.guard.stop import StopRequest
from eagle3_ds.layout import PackedSequence
from eagle3_ds.say import telling
from eagle3_ds.store.reader import HiddenStateStore
from eagle3_ds.targets import load_embedding_and_head, load_text_config, resolve_path
from eagle3_ds.topology import Topology, maybe_setup_distributed, outlast_watchdog
from eagle3_ds.train.decoded import DecodedAcceptance
from eagle3_ds.train.first_text import look_up_from_start
from eagle3_ds.train.loop import run_training, save_weights
from eagle3_ds.train.online import OnlineStates
from eagle3_ds.train.state import EngineState
from eagle3_ds.train.streamed import StreamedStates
from eagle3_ds.train.target_engine import TargetEngine
from eagle3_ds.train.tracking import Tracking
from eagle3_ds.train.trainer import DraftTrainer

# Not __name__: a rank runs this file as __main__, whose logger is no child of the package's logger.
logger = logging.getLogger("eagle3_ds.train.main")


def build_trainer(recipe: Recipe, topology: Topology, loader: PackedLoader | None = None) -> DraftTrainer:
    """A trainer of a new draft, or of the draft that `train.init_from` names. Collective. The same seed on
    all ranks gives a new draft the same weights everywhere.

    Args:
        loader: of a run that begins; a draft that looks up from its start reads its first pack. None for
            random weights, where they are replaced anyway.
    """
    torch.manual_seed(recipe.train.seed)
    folder = resolve_path(recipe.target.path)
    algorithm = algorithm_of(recipe)
    draft = algorithm.build(algorithm.build_config(load_text_config(folder), recipe))
    if recipe.train.init_from is not None:
        draft.load_state_dict(load_file(Path(recipe.output_dir) / INITIAL_WEIGHTS))
    embedding, head = load_embedding_and_head(folder)
    if has_own_embedding(draft.config):
        embedding = load_draft_embedding(recipe.output_dir, (len(embedding), draft.config.hidden_size))
    if recipe.train.init_from is None:
        draft.start_from(embedding)
    vocabulary = VocabularyMap.load(Path(recipe.output_dir) / "vocabulary.safetensors")
    if loader is not None and recipe.draft.start == "lookup":
        look_up_from_start(draft, recipe, topology, loader.first_pack(), embedding, head, vocabulary)
    settings = fill_deepspeed_config(
        load_deepspeed_config(recipe.deepspeed), recipe, topology.mesh.world_size, topology.draft_dp
    )
    return DraftTrainer(recipe, settings, topology, draft, embedding, head, vocabulary)


def open_states(recipe: Recipe, topology: Topology) -> HiddenStates:
    """The hidden-state store, the online target, or the server. Collective for the last two.

    Called before the draft's engine is built, while the device is empty: sharding takes the target's weights
    through the device layer by layer.

    Raises:
        ValueError: the store is missing or was made from something else, or the target cannot run over
            spans.
    """
    if recipe.data.hidden_states == "online":
        return OnlineStates(TargetEngine(recipe, topology))
    prepared = read_prepared(recipe)
    if recipe.data.hidden_states == "stream":
        server, weights = prepared["server"], prepared["store_fingerprint"]["target_weights"]
        return StreamedStates(recipe, topology, server["url"], Path(server["folder"]), weights)
    return HiddenStateStore.open(prepared["store"], prepared["store_fingerprint"])


def read_prepared(recipe: Recipe) -> dict[str, Any]:
    return json.loads((Path(recipe.output_dir) / "prepared.json").read_text())


def build_loaders(
    recipe: Recipe, topology: Topology, states: HiddenStates, resumed: tuple[int, int] = (0, 0)
) -> tuple[PackedLoader, Sequence[PackedSequence]]:
    """The training loader, and the held-out packs of this draft_dp rank.

    Args:
        resumed: optimizer steps and packs that the checkpoint has done.

    Raises:
        ValueError: the prepared data are missing, or were made from something else.
    """
    prepared = read_prepared(recipe)
    data = PreparedData.open(Path(prepared["data"]), prepared["data_fingerprint"])
    mesh = (topology.draft_dp, topology.place.dp_rank)
    loader = PackedLoader(
        data.train,
        states,
        recipe.data.max_length,
        *mesh,
        accumulation=recipe.train.accumulation,
        seed=recipe.train.seed,
        resumed=resumed,
        anchors=algorithm_of(recipe).anchors(recipe),
    )
    if not len(data.heldout):
        return loader, []
    return loader, HeldoutPacks(PackedLoader(data.heldout, states, recipe.data.max_length, *mesh))


def build_decoded(trainer: DraftTrainer) -> DecodedAcceptance | None:
    """What decodes held-out prompts during training; None without `eval.during`.

    Raises:
        ValueError: no held-out prompt is short enough.
    """
    recipe = trainer.recipe
    if not recipe.eval.during:
        return None
    prompts: list[list[int]] = []
    if trainer.topology.place.rank == 0:
        # Not above: see train/decoded.py.
        from eagle3_ds.eval.heldout import prompts_during

        prepared = read_prepared(recipe)
        data = PreparedData.open(Path(prepared["data"]), prepared["data_fingerprint"])
        config = load_text_config(resolve_path(recipe.target.path))
        prompts = prompts_during(recipe, data, config.max_position_embeddings)
    return DecodedAcceptance(trainer, prompts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", required=True, help="the resolved recipe")
    parser.add_argument(
        "--resume", metavar="FOLDER", help="name of the checkpoint to go on from, or `latest`"
    )
    parser.add_argument(
        "--local_rank", type=int, default=0, help="set by the launcher; LOCAL_RANK is what counts"
    )
    parser.add_argument("--status_fd", type=int, help="where the supervisor listens, set by it")
    options = parser.parse_args(arguments)
    with beating(options.status_fd) as heart:
        recipe = load_recipe(options.recipe)
        with telling(recipe.logging.level, int(os.environ.get("RANK", "0"))):
            train(recipe, options.resume, heart)
    if dist.is_initialized():
        dist.destroy_process_group()


def train(recipe: Recipe, resume: str | None, heart: Heart) -> None:
    """Build the trainer, load a checkpoint if one is named, and train. Collective.

    Args:
        resume: name of a checkpoint's folder, or `latest`; None starts at step 0.

    Raises:
        ValueError: ranks differ in what they run or read, or the checkpoint or the data do not fit the
            recipe.
    """
    parallel, output_dir = recipe.parallel, Path(recipe.output_dir)
    topology = maybe_setup_distributed(parallel.ulysses, parallel.ring, parallel.draft_dp)
    outlast_watchdog(recipe.faults.watchdog_seconds)
    is_first = topology.place.rank == 0
    require_same_identity(recipe, topology)
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest(recipe.train.timeout_minutes if is_first else None))
        states = open_states(recipe, topology)
        # After an error too, no thread that waits for a server keeps this rank from ending.
        stack.callback(states.close)
        resumed = None
        if resume is None:
            loader, heldout = build_loaders(recipe, topology, states)
            trainer = build_trainer(recipe, topology, loader)
        else:
            trainer, checkpoints = build_trainer(recipe, topology), output_dir / CHECKPOINTS
            resumed = load_checkpoint(
                EngineState(trainer), latest(checkpoints) if resume == "latest" else checkpoints / resume
            )
            loader, heldout = build_loaders(recipe, topology, states, (resumed.step, resumed.packs))
        # DeepSpeed has made groups of its own.
        outlast_watchdog(recipe.faults.watchdog_seconds)
        if is_first:
            strategy = f"attention kernel {trainer.kernel_name}, kv_exchange {trainer.kv_exchange}"
            logger.info("mesh %s, %s, %d packs", topology.mesh, strategy, loader.num_packs)
        if resumed is None:
            save_weights(trainer, output_dir / INITIAL_WEIGHTS)
        decoded = build_decoded(trainer)
        tracking = stack.enter_context(Tracking(recipe)) if is_first else None
        run_training(trainer, loader, heldout, output_dir, stop, heart, resumed, decoded, tracking)


if __name__ == "__main__":
    main()
