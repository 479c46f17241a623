"""The norms that variants of EAGLE-3 add, by the names of the flags that servers read in a config.

    fc_norm               before `fc`, an RMSNorm per captured layer (EAGLE-3.1): `fc_norm.i.weight` [Ht]
    norm_before_fc        before those, one RMSNorm over all captured layers: `input_norm.weight` [A]
    norm_before_residual  the residual of the first layer is hidden_norm(hidden) instead of hidden
    norm_output           the next step reads norm(hidden), as the head does, instead of hidden

Legend: t rows, Ht hidden size of the target, A = layers * Ht.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eagle3_ds.draft.decoder import rms_norm
from eagle3_ds.draft.geometry import aux_size, num_aux_layers
from eagle3_ds.draft.stream import Prepare

FLAGS = ("fc_norm", "norm_before_fc", "norm_before_residual", "norm_output")


def flag(config: Any, name: str) -> bool:
    """Whether the flag `name`, one of FLAGS, is set in a draft's config; an absent flag is not set."""
    return bool(getattr(config, name, False))


def norm_sizes(config: Any) -> tuple[int, ...]:
    """Entries of each norm before `fc`, in the order in which they are applied."""
    layers = num_aux_layers(config)
    whole = (aux_size(config),) if flag(config, "norm_before_fc") else ()
    return (*whole, *([aux_size(config) // layers] * layers if flag(config, "fc_norm") else ()))


def prepare_aux(config: Any) -> Prepare | None:
    """The function that norms captured rows [t, A] -> [t, A] before `fc`, or None if the config has no such
    norm. It takes the norms' weights in the order of `norm_sizes`.
    """
    if not norm_sizes(config):
        return None
    return partial(
        _normed, before=flag(config, "norm_before_fc"), layers=num_aux_layers(config), eps=config.rms_norm_eps
    )


def _normed(rows: Tensor, weights: Sequence[Tensor], before: bool, layers: int, eps: float) -> Tensor:
    if before:
        rows, weights = rms_norm(rows, weights[0], eps), weights[1:]
    if not weights:
        return rows
    parts = zip(rows.chunk(layers, dim=-1), weights, strict=True)
    return torch.cat([rms_norm(part, weight, eps) for part, weight in parts], dim=-1)
