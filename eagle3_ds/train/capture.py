"""Capture with all ranks: `python -m eagle3_ds.train.capture --recipe OUTPUT/recipe.resolved.yaml`.

Each sp group takes its own packs. A rank runs the target over its spans of the pack and writes the rows that
it computed: no hidden state is sent to another rank, and no device holds more than its share. Like training,
it reads `prepared.json`. After an interruption it captures what is missing, on any number of ranks.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
import torch.distributed as dist

from eagle3_ds.config import Recipe, load_recipe
from eagle3_ds.data.documents import PreparedData
from eagle3_ds.data.packing import pack
from eagle3_ds.guard.heart import Heart, beating
from eagle3_ds.say import progress_bar, telling
from eagle3_ds.store import HiddenStateWriter, RowFormat
from eagle3_ds.targets import choose_aux_layers, load_text_config, resolve_path
from eagle3_ds.topology import Topology, maybe_setup_distributed, outlast_watchdog
from eagle3_ds.train.target_engine import SpanStates, TargetEngine


class Stretch(NamedTuple):
    """A run of one document's tokens in a rank's slots.

    Attributes:
        first, last: it is rows [first, last) of the rank's slots.
        document: number of the document in the pack.
        start: the row of the document that row `first` is.
    """

    first: int
    last: int
    document: int
    start: int


def stretches(states: SpanStates) -> Iterator[Stretch]:
    """Cut a rank's slots, padding left out, into runs of consecutive rows of one document."""
    slots, plan = states.slots[states.slots < states.plan.length], states.plan
    documents = plan.document[slots]
    breaks = np.flatnonzero((np.diff(slots) != 1) | (np.diff(documents) != 0)) + 1
    edges = [0, *breaks.tolist(), len(slots)]
    for first, last in zip(edges, edges[1:], strict=False):
        if first < last:
            yield Stretch(first, last, int(documents[first]), int(plan.position[slots[first]]))


def capture(recipe: Recipe, heart: Heart) -> None:
    """Capture this rank's rows of all missing documents into the hidden-state store. Collective.

    Raises:
        ValueError: the target cannot run over spans, or the store cannot be written.
    """
    parallel = recipe.parallel
    topology = maybe_setup_distributed(parallel.ulysses, parallel.ring, parallel.draft_dp)
    outlast_watchdog(recipe.faults.watchdog_seconds)
    prepared: dict[str, Any] = json.loads((Path(recipe.output_dir) / "prepared.json").read_text())
    data = PreparedData.open(Path(prepared["data"]), prepared["data_fingerprint"])
    config = load_text_config(resolve_path(recipe.target.path))
    captured = choose_aux_layers(config.num_hidden_layers, recipe.target.aux_layers)
    layout = RowFormat(len(captured) * config.hidden_size, config.hidden_size, recipe.data.hidden_dtype)
    rank = topology.place.rank
    writer = HiddenStateWriter(
        prepared["store"], data.lengths(), layout, prepared["store_fingerprint"], rank=rank
    )
    missing = _agreed(writer.missing(), topology)
    engine = TargetEngine(recipe, topology)
    # DeepSpeed has made groups of its own.
    outlast_watchdog(recipe.faults.watchdog_seconds)
    lengths = [writer.lengths[document] for document in missing]
    packs = [
        [missing[place] for place in places]
        for places in pack(lengths, recipe.data.max_length, recipe.data.seed)
    ]
    tokens = _Tokens(data)
    progress = progress_bar(
        total=sum(lengths), desc="capture", unit=" tokens", unit_scale=True, disable=rank != 0
    )
    for turn in range(0, len(packs), topology.draft_dp):
        heart.at("capturing", turn)
        place = turn + topology.place.dp_rank
        # An sp group without a pack in the last turn runs the first pack again and writes nothing: the other
        # groups would wait for it in ZeRO-3's gathers.
        documents = packs[place] if place < len(packs) else packs[0]
        token_ids = [tokens.of(document) for document in documents]
        states = engine.run(torch.cat(token_ids), [len(ids) for ids in token_ids])
        if place < len(packs):
            _write(writer, states, documents)
        progress.update(
            sum(
                writer.lengths[document]
                for group in packs[turn : turn + topology.draft_dp]
                for document in group
            )
        )
    progress.close()
    writer.flush()
    if topology.world_group is not None:
        dist.barrier()
    if rank == 0:
        writer.finish()
    if topology.world_group is not None:
        # No rank returns before rank 0 has given the store its final name.
        dist.barrier()


class _Tokens:
    """Token ids of training and held-out documents, by document id."""

    def __init__(self, data: PreparedData) -> None:
        self._rows = datasets.concatenate_datasets([data.train, data.heldout]).with_format("numpy")
        self._row_of = {int(document): row for row, document in enumerate(self._rows["document_id"])}

    def of(self, document: int) -> torch.Tensor:
        """The token ids of a document, int64 [L], whole."""
        return torch.from_numpy(self._rows[self._row_of[document]]["input_ids"]).long()


def _agreed(missing: list[int], topology: Topology) -> list[int]:
    """Rank 0's list on all ranks. Collective. After the barrier every rank has read the store, so that none
    finds rows that another rank has written in this run.
    """
    if topology.world_group is None:
        return missing
    shared: list[Any] = [missing]
    dist.broadcast_object_list(shared, src=0, device=topology.device)
    dist.barrier()
    return shared[0]


def _write(writer: HiddenStateWriter, states: SpanStates, documents: Sequence[int]) -> None:
    for stretch in stretches(states):
        document, rows = documents[stretch.document], slice(stretch.first, stretch.last)
        # An interrupted capture on another mesh may have left rows that complete a document before its last
        # stretch here.
        if not writer.holds(document):
            writer.append(
                document, states.aux[rows], states.teacher[rows], states.teacher_token[rows], stretch.start
            )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", required=True, help="the resolved recipe")
    parser.add_argument(
        "--local_rank", type=int, default=0, help="set by the launcher; LOCAL_RANK is what counts"
    )
    parser.add_argument("--status_fd", type=int, help="where the supervisor listens, set by it")
    options = parser.parse_args(arguments)
    with beating(options.status_fd) as heart:
        recipe = load_recipe(options.recipe)
        with telling(recipe.logging.level, int(os.environ.get("RANK", "0"))):
            capture(recipe, heart)
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
