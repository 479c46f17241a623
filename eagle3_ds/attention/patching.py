"""The patch that gives a served draft the attention with which it trains under sequence parallelism."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist
from torch import nn

from eagle3_ds.attention.usp import LlamaUSPFlashAttention
from eagle3_ds.costs import ExchangeName
from eagle3_ds.kernels import AttentionKernel

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
Model = TypeVar("Model", bound=nn.Module)


def patch_attention(
    model: Model,
    kernel: AttentionKernel,
    ulysses_group: dist.ProcessGroup | None = None,
    ring_group: dist.ProcessGroup | None = None,
    kv_exchange: ExchangeName = "gather",
    kv_bytes: int = 0,
    window: int | None = None,
) -> Model:
    """Replace every attention layer of an existing draft with `LlamaUSPFlashAttention`, in place.

    An attention layer is a module with `q_proj`, `k_proj`, `v_proj`, `o_proj` and `head_dim`. The new module
    takes over the projections themselves, so parameter names, the state dict and references in an optimizer
    stay valid. The model gets the attributes `sp_ring_degree`, `sp_ulysses_degree`, `sp_world_size` and
    `sp_rank`. Patching again replaces the earlier patch.

    Args:
        model: the draft.
        kernel: computes the attention.
        ulysses_group, ring_group: this rank's groups; None is a group of one.
        kv_exchange: how the step-0 keys and values travel over the ring.
        kv_bytes: for `ring`, bytes of other ranks' keys and values that may be kept between steps.
        window: the most keys that a position sees, its own included; None for no limit.

    Returns:
        `model`.

    Raises:
        ValueError: the model has no attention layer, or one whose heads ulysses does not divide.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if all(hasattr(child, projection) for projection in _PROJECTIONS) and hasattr(child, "head_dim")
    ]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no layer with {', '.join(_PROJECTIONS)} and head_dim to patch."
        )
    degree = ulysses_group.size() if ulysses_group else 1
    for parent, name, child in found:
        heads = [getattr(child, projection).out_features // child.head_dim for projection in _PROJECTIONS[:2]]
        if any(count % degree for count in heads):
            raise ValueError(
                f"{name} has {heads[0]} query and {heads[1]} key heads, which ulysses = {degree} does not "
                "divide. Use a divisor of both and give the rest of the sequence-parallel degree to the "
                "ring."
            )
        setattr(
            parent,
            name,
            LlamaUSPFlashAttention(child, kernel, ulysses_group, ring_group, kv_exchange, kv_bytes, window),
        )
    patched = getattr(found[0][0], found[0][1])
    for attribute in ("sp_ring_degree", "sp_ulysses_degree", "sp_world_size", "sp_rank"):
        setattr(model, attribute, getattr(patched, attribute))
    return model
