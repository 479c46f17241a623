"""The look-up start of a new draft (`draft.start: lookup`): all ranks together read the text of the first
pack, and rank 0 makes the weights of it, for all.

The text and what is made of it are the same for any mesh: the same rows of the same pack, on one rank.

Legend: N slots of the text, A entries of a slot's captured hidden states, V vocabulary, Vd the draft's.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from eagle3_ds.algorithms import algorithm_of
from eagle3_ds.config import Recipe
from eagle3_ds.draft import Draft, ReadText, VocabularyMap
from eagle3_ds.layout import PackedSequence, prepare_usp_input
from eagle3_ds.topology import Topology
from eagle3_ds.train.spans import plan_spans

MOST_SLOTS = 16_384
"""Of the first pack: more tell little more, and rank 0 holds their captured states."""
SLOTS_AT_ONCE = 1024


@torch.no_grad()
def look_up_from_start(
    draft: Draft,
    recipe: Recipe,
    topology: Topology,
    pack: PackedSequence,
    embedding: Tensor,
    head: Tensor,
    vocabulary: VocabularyMap,
) -> None:
    """Give a fresh draft, on the CPU of every rank, the weights of `Draft.look_up_from_start`. Collective.

    Args:
        pack: the first one of this draft_dp rank; that of draft_dp rank 0 is read.
        embedding: [V, H], what the draft reads. head: the target's, [V, H].
    """
    if topology.place.dp_rank == 0:
        text = _gathered(recipe, topology, pack, vocabulary)
        if text is not None:
            # What this draws is drawn by one rank alone, and all must go on with the same random state.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(recipe.train.seed)
                draft.look_up_from_start(text, embedding, head[vocabulary.draft_to_target.to(head.device)])
    if not dist.is_initialized():
        return
    for parameter in draft.parameters():
        whole = parameter.to(topology.device)
        dist.broadcast(whole, 0)
        parameter.copy_(whole)


def _gathered(
    recipe: Recipe, topology: Topology, pack: PackedSequence, vocabulary: VocabularyMap
) -> ReadText | None:
    """The first slots of the pack, whole on rank 0; None on the others of its sp group. Collective."""
    plan = plan_spans(recipe, pack.lengths, pack.loss_mask, pack.anchors)
    place = topology.place
    ranks = (place.ring_rank, place.ulysses_rank)
    batch = prepare_usp_input(pack, plan, *ranks, algorithm_of(recipe).supervision(recipe))
    slots, count = plan.slots(*ranks), min(MOST_SLOTS, plan.length)
    parts = []
    for first in range(0, count, SLOTS_AT_ONCE):
        end = min(count, first + SLOTS_AT_ONCE)
        (own,) = np.nonzero((slots >= first) & (slots < end))
        rows = batch.aux.take(own)
        # Each slot is one rank's, so adding is exact; gloo and HCCL do not add every dtype of a store.
        part = torch.zeros(end - first, rows.shape[1], dtype=torch.float32, device=topology.device)
        part[torch.from_numpy(slots[own] - first).to(part.device)] = rows.to(part.device, torch.float32)
        if topology.sp_group is not None:
            dist.all_reduce(part, group=topology.sp_group)
        if topology.place.rank == 0:
            parts.append(part.cpu())
    if topology.place.rank != 0:
        return None
    document = torch.from_numpy(plan.document[: count + 1])
    follows = torch.zeros(count, dtype=torch.bool)
    follows[:-1] = document[1:count] == document[: count - 1]
    # The last token of the text has none behind it; no slot follows there either.
    tokens = torch.cat((pack.token_ids[1 : count + 1], pack.token_ids[-1:]))[:count]
    return ReadText(torch.cat(parts), tokens, follows, vocabulary.draft_to_target.cpu())
