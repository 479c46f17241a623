"""What each rank runs in a capture: `python -m eagle3_ds.train.capture --recipe OUTPUT/recipe.resolved.yaml`.

The draft_dp groups take different packs; within a group each rank runs its own spans and writes the rows that
it computed, so that no hidden state travels and no device holds more than its share. It reads
`prepared.json`, as training does, and goes on after what an interrupted capture left, on any number of ranks.
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
from eagle3_ds.topology import Topology, maybe_setup_distributed
from eagle3_ds.train.target_engine import SpanStates, TargetEngine


class Stretch(NamedTuple):
    """Rows [first, last) of a rank's slots that are rows `start` and following of a document of the pack."""

    first: int
    last: int
    document: int
    start: int


def stretches(states: SpanStates) -> Iterator[Stretch]:
    """A rank's slots, without padding, as runs of consecutive rows of one document each."""
    slots, plan = states.slots[states.slots < states.plan.length], states.plan
    documents = plan.document[slots]
    breaks = np.flatnonzero((np.diff(slots) != 1) | (np.diff(documents) != 0)) + 1
    edges = [0, *breaks.tolist(), len(slots)]
    for first, last in zip(edges, edges[1:], strict=False):
        if first < last:
            yield Stretch(first, last, int(documents[first]), int(plan.position[slots[first]]))


def capture(recipe: Recipe, heart: Heart) -> None:
    """This rank's part of the capture. Collective."""
    parallel = recipe.parallel
    topology = maybe_setup_distributed(parallel.ulysses, parallel.ring, parallel.draft_dp)
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
        # A group that has no pack left repeats the first one: it takes part in the gathers of ZeRO-3, and
        # writes nothing.
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
        # Nobody leaves before the store has its name.
        dist.barrier()


class _Tokens:
    """Token ids of a document by its number, training and held-out alike."""

    def __init__(self, data: PreparedData) -> None:
        self._rows = datasets.concatenate_datasets([data.train, data.heldout]).with_format("numpy")
        self._row_of = {int(document): row for row, document in enumerate(self._rows["document_id"])}

    def of(self, document: int) -> torch.Tensor:
        """int64 [L]."""
        return torch.from_numpy(self._rows[self._row_of[document]]["input_ids"]).long()


def _agreed(missing: list[int], topology: Topology) -> list[int]:
    """Rank 0's list, for everybody, once all ranks have looked at what is there: nobody writes before."""
    if topology.world_group is None:
        return missing
    shared: list[Any] = [missing]
    dist.broadcast_object_list(shared, src=0, device=topology.device)
    dist.barrier()
    return shared[0]


def _write(writer: HiddenStateWriter, states: SpanStates, documents: Sequence[int]) -> None:
    for stretch in stretches(states):
        document, rows = documents[stretch.document], slice(stretch.first, stretch.last)
        # What an interrupted capture on another mesh left may complete the document before its last stretch.
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
