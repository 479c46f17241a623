"""The norms that variants of EAGLE-3 add, by the names that servers read in a config.

    fc_norm               an RMSNorm per captured layer before `fc` (EAGLE-3.1), tensors `fc_norm.i.weight`
    [Ht] norm_before_fc        one RMSNorm over all of them, tensor `input_norm.weight` [A], before those
    norm_before_residual  the first layer's residual is hidden_norm(hidden) norm_output           the next
    step reads norm(hidden), what the head reads

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
    """Whether a draft's config has one of FLAGS; absent is false."""
    return bool(getattr(config, name, False))


def norm_sizes(config: Any) -> tuple[int, ...]:
    """Entries of each norm before `fc`: that over all layers first."""
    layers = num_aux_layers(config)
    whole = (aux_size(config),) if flag(config, "norm_before_fc") else ()
    return (*whole, *([aux_size(config) // layers] * layers if flag(config, "fc_norm") else ()))


def prepare_aux(config: Any) -> Prepare | None:
    """What is done to captured rows [t, A] before `fc`; the weights come in the order of `norm_sizes`."""
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
