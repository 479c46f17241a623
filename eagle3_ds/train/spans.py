"""Cutting a packed sequence into the spans of the ranks, as the recipe says. The draft and an online target
use the same cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from eagle3_ds.algorithms import algorithm_of
from eagle3_ds.collectives import all_gather_rows
from eagle3_ds.config import Recipe
from eagle3_ds.layout import SpanPlan, live_slots


def whole_tokens(own: Tensor, plan: SpanPlan, group: dist.ProcessGroup | None) -> Tensor:
    """The target's tokens int64 [L] of a packed sequence, on the host, from those [S] of every rank's slots.
    Collective over the sp group.
    """
    return all_gather_rows(own, group).cpu()[plan.sequence_order[: plan.length]]


def plan_spans(
    recipe: Recipe, lengths: Sequence[int], loss_mask: Tensor, anchors: Tensor | None = None
) -> SpanPlan:
    """Cut a packed sequence into spans. Pure: the same arguments give the same plan on all ranks.

    Args:
        lengths: the tokens of each document.
        loss_mask: bool [L], whole: true for assistant tokens of the documents laid end to end.
        anchors: bool [L], whole, as in `PackedSequence`.
    """
    algorithm, live = algorithm_of(recipe), None
    if algorithm.live_slots_alone(recipe):
        live = live_slots(lengths, loss_mask, algorithm.supervision(recipe), anchors)
    parallel, window = recipe.parallel, recipe.draft.sliding_window
    return SpanPlan.make(lengths, parallel.ring, parallel.ulysses, parallel.chunks_per_rank, live, window)
