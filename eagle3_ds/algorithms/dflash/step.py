"""The pass of a DFlash draft over a packed sequence, in training (docs/dflash.md, "How it trains on ranks").

First the context: `fc` of every slot's captured states, streamed from the host. Each layer makes keys and
values of it, which are exchanged once (attention/blocks.py); the blocks of the anchors run through the
layers. Nothing of a slot that is no anchor is computed but those keys and values.

Under `recompute` autograd keeps of a layer its input, queries, own keys and values, the attention's output,
and the exchanged context; everything between is repeated in backward, a tile of rows at a time.

Legend: S slots of this rank, the first Q of them anchors, B inputs of a block, H hidden size, Hq / N heads,
D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from eagle3_ds.algorithms.dflash.layer import BlockLayer, normed_heads
from eagle3_ds.attention.blocks import attend_blocks
from eagle3_ds.attention.rotary import RotaryFrequencies
from eagle3_ds.config import Activation
from eagle3_ds.draft.decoder import AfterWeights, after_attention, project, rms_norm
from eagle3_ds.draft.in_tiles import in_tiles
from eagle3_ds.draft.tiles import slots_per_tile
from eagle3_ds.layout import LocalBatch


@dataclass(frozen=True)
class BlockSettings:
    """How blocks are trained.

    Attributes:
        block_size: B.
        activation: what is kept for backward: `keep` everything, `recompute` as above.
        tile_bytes: budget of the temporary tensors of one tile of rows.
    """

    block_size: int
    activation: Activation
    tile_bytes: int


def block_tokens(batch: LocalBatch, block_size: int, mask_token_id: int, device: torch.device) -> Tensor:
    """What the blocks are fed: the newest token of each anchor, then masks. int64 [Q, B]."""
    tokens = torch.full((len(batch.live_row), block_size), mask_token_id)
    tokens[:, 0] = batch.token_ids[batch.live_row + 1]
    return tokens.to(device)


def run_layers(
    layers: Sequence[BlockLayer],
    states: Tensor,
    norm: Tensor,
    embeds: Tensor,
    batch: LocalBatch,
    rotary: RotaryFrequencies,
    settings: BlockSettings,
) -> Tensor:
    """Run the blocks of all anchors through the layers. Collective over the sp group.

    Args:
        layers: with patched attention.
        states: [S, H], `fc` of the captured states; norm: the weight of the norm behind it.
        embeds: [Q, B, H], the inputs.
        batch: this rank's slots.

    Returns:
        [Q, B, H].
    """
    anchors, inputs, width = embeds.shape
    position = batch.position.to(embeds.device)
    at = position[:anchors, None] + 1 + torch.arange(inputs, device=embeds.device)
    angles, context_angles = rotary.angles(at.flatten()), rotary.angles(position)
    hidden, size = embeds.flatten(0, 1), None
    if settings.activation != "keep" and torch.is_grad_enabled():
        inner = layers[0].mlp.gate_proj.out_features
        size = slots_per_tile(width, inner, embeds.element_size(), settings.tile_bytes)
    for layer in layers:
        attention, eps, heads = layer.self_attn, layer.eps, layer.self_attn.head_dim
        of_keys = [attention.k_proj.weight, attention.k_norm.weight, attention.v_proj.weight]
        make_context = partial(_context, eps=eps, head_dim=heads)
        context = in_tiles(make_context, (states, *context_angles), (norm, *of_keys), size)
        of_block = [layer.input_layernorm.weight, attention.q_proj.weight, attention.q_norm.weight]
        before = partial(_before, eps=eps, head_dim=heads)
        q, k, v = (
            x.unflatten(0, (anchors, inputs))
            for x in in_tiles(before, (hidden, *angles), (*of_block, *of_keys), size)
        )
        place = (batch.plan, batch.ring_rank)
        attended = attend_blocks(attention, q, (context[0], context[1]), (k, v), *place, layer.causal)
        after = partial(_after, eps=eps)
        (hidden,) = in_tiles(after, (hidden, attended.flatten(0, 1)), layer.after_weights(), size)
    return hidden.unflatten(0, (anchors, inputs))


def _context(
    states: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm: Tensor,
    k: Tensor,
    k_norm: Tensor,
    v: Tensor,
    eps: float,
    head_dim: int,
) -> tuple[Tensor, ...]:
    """Keys and values [t, N, D] that one layer makes of the context, states [t, H]."""
    context = rms_norm(states, norm, eps)
    return normed_heads(context, k, k_norm, (cos, sin), eps), project(context, v, head_dim)


def _before(
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm: Tensor,
    q: Tensor,
    q_norm: Tensor,
    k: Tensor,
    k_norm: Tensor,
    v: Tensor,
    eps: float,
    head_dim: int,
) -> tuple[Tensor, ...]:
    """Queries [t, Hq, D], keys and values [t, N, D] of the blocks' inputs, hidden [t, H]."""
    x = rms_norm(hidden, norm, eps)
    queries, keys = (normed_heads(x, *weights, (cos, sin), eps) for weights in ((q, q_norm), (k, k_norm)))
    return queries, keys, project(x, v, head_dim)


def _after(hidden: Tensor, attended: Tensor, *weights: Tensor, eps: float) -> tuple[Tensor, ...]:
    """The layer's output [t, H] of hidden [t, H] and attended [t, Hq * D]."""
    return (after_attention(hidden, attended, AfterWeights(*weights), eps),)
