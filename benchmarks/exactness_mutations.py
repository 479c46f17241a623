"""Deliberate faults, to prove that the comparison can reject. Applied inside the ranks of one case."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.exactness_cases import Case
from eagle3_ds.attention import prefix_kv
from eagle3_ds.kernels import Tile
from eagle3_ds.layout import LocalBatch, LocalRows, SpanPlan
from eagle3_ds.model import draft
from eagle3_ds.train import trainer as trainer_module

MUTATIONS = ("scale_by_sp", "dropped_halo", "leaking_document", "rope_off_by_one")


@contextmanager
def mutate(name: str | None, case: Case) -> Iterator[None]:
    """Patch the product while a case runs; `scale_by_sp` is applied by `mutate_trainer`.

    Raises:
        ValueError: an unknown mutation, or one that cannot show in this case.
    """
    if name is None or name == "scale_by_sp":
        yield
    elif name == "dropped_halo":
        with mock.patch.object(trainer_module, "prepare_usp_input", _without_halo(trainer_module.prepare_usp_input)):
            yield
    elif name == "leaking_document":
        if case.kv_exchange != "gather":
            raise ValueError("leaking_document patches the gathered tiles. Use a case with kv_exchange gather.")
        with mock.patch.object(prefix_kv, "gathered_tiles", _leaking(prefix_kv.gathered_tiles)):
            yield
    elif name == "rope_off_by_one":
        # From the second step on. All of them one behind would be no fault: RoPE is relative.
        with mock.patch.object(draft, "rotary_positions", lambda position, step: position + max(step - 1, 0)):
            yield
    else:
        raise ValueError(f"mutation = {name!r} is unknown. Use one of {', '.join(MUTATIONS)}.")


def mutate_trainer(name: str | None, trainer: trainer_module.DraftTrainer) -> None:
    """`scale_by_sp`: the factor that the loss share is multiplied by forgets the sequence-parallel ranks."""
    if name == "scale_by_sp":
        trainer.loss_scale /= trainer.topology.sp_world_size


def _without_halo(cut: Any) -> Any:
    """Rows that belong to other ranks read as zeros."""

    def cut_without_halo(*args: Any) -> LocalBatch:
        batch = cut(*args)
        own = torch.zeros(len(batch.token_ids), dtype=torch.bool)
        own[batch.row] = True
        teacher = batch.teacher[:] * own[:, None]
        rows = LocalRows(teacher, np.arange(len(own)), len(own))
        return replace(batch, token_ids=batch.token_ids * own, teacher=rows)

    return cut_without_halo


def _leaking(tiles: Any) -> Any:
    """Every slot attends to the documents before its own, too."""

    def leaking_tiles(plan: SpanPlan, ring_rank: int) -> tuple[Tile, ...]:
        return tuple(tile._replace(k_start=0) for tile in tiles(plan, ring_rank))

    return leaking_tiles
