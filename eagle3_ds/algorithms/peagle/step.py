"""Guesses of the first layer in training; later layers take EAGLE-3's steps (eagle3/step.py) as they are.

Guess 0 is EAGLE-3's first step, but for the mask token's row of the embedding, which is learned. In the first
layer all masks are one state: guesses k >= 1 have the same x = concat(norm(mask embedding), norm(mask
state)), so q, k and v are projected once, and each slot turns them by its own angle. In backward the turned
gradients are summed over slots before they meet a projection:

    q_i = R_i(Wq x)      dWq = (sum_i R_i^T dq_i)^T x      dx = (sum_i R_i^T dq_i) Wq + ...

Nothing of a mask's input is kept. The gradients of the two vectors are summed over slots and guesses in fp32
beside those of the layer's weights, and the backward of guess 0, the last to run, returns them all.

Legend: S slots of this rank, the first Q of them live, t slots of a tile, H hidden size, Hq / Hkv heads, D
head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eagle3_ds.algorithms.eagle3.layer import BeforeWeights, DraftLayer, attention_input
from eagle3_ds.algorithms.eagle3.layer_backward import project_backward, turned_back
from eagle3_ds.algorithms.eagle3.step import LayerUnroll, Step, StepConstants, run_step
from eagle3_ds.attention.rotary import rotate
from eagle3_ds.config import Activation
from eagle3_ds.draft.decoder import project
from eagle3_ds.draft.tiles import Tiles


@dataclass(frozen=True)
class Mask:
    """What is fed where no token is known.

    Attributes:
        token: the id whose row of the embedding is `embedding`.
        embedding: [H], learned.
        hidden: [H], the learned hidden state after the norms and fc.
    """

    token: int
    embedding: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class FirstStep(Step):
    """Guess 0: tokens and captured states, as in EAGLE-3, with the mask token's row learned."""

    mask: Mask

    def more_weights(self) -> tuple[Tensor, ...]:
        return self.mask.embedding, self.mask.hidden

    def embeds(self, tile: slice) -> Tensor:
        return torch.where(self._is_mask(tile), self.mask.embedding, super().embeds(tile))

    def take_dembeds(self, tile: slice, dembeds: Tensor | None) -> None:
        assert dembeds is not None
        add_rows(self.more_sums()[0], dembeds * self._is_mask(tile))

    def _is_mask(self, tile: slice) -> Tensor:
        return (self.constants.tokens[tile] == self.mask.token)[:, None]


@dataclass(frozen=True)
class MaskStep(FirstStep):
    """A guess after the first: the same two vectors in every slot. Its input [Q, H] is one row, expanded."""

    def kept(self, hidden: Tensor) -> tuple[Tensor, ...]:
        return ()

    def input_again(self, kept: Sequence[Tensor]) -> Tensor:
        return self.mask.hidden.detach().expand(len(self.constants.positions), -1)

    def before(
        self, hidden: Tensor, tile: slice, weights: BeforeWeights, live: bool = True
    ) -> tuple[Tensor, ...]:
        q, k, v = self._projected(hidden, tile, weights, weights[:3])
        cos, sin = self.angles(tile)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def query(self, hidden: Tensor, tile: slice, weights: BeforeWeights) -> Tensor:
        (q,) = self._projected(hidden, tile, weights, (weights.q,))
        return rotate(q, *self.angles(tile))

    def _projected(
        self, hidden: Tensor, tile: slice, weights: BeforeWeights, matrices: Sequence[Tensor]
    ) -> list[Tensor]:
        """The one mask's products with some matrices, seen from each slot of a tile: [t, heads, D] each."""
        x = attention_input(self.mask.embedding[None], hidden[:1], weights, self.layer.eps)
        slots = len(self.constants.positions[tile])
        return [project(x, matrix, self.layer.head_dim).expand(slots, -1, -1) for matrix in matrices]

    def backward_before(
        self, tiles: Tiles, hidden: Tensor, dqkv: tuple[Tensor, Tensor, Tensor], dhidden: Tensor
    ) -> None:
        dq, dk, dv = dqkv
        dembedding, dmask_hidden = self.more_sums()
        columns = [torch.zeros(part[0].numel(), dtype=dembedding.dtype, device=part.device) for part in dqkv]
        for tile in tiles.live:
            turned = turned_back((dq[tile], dk[tile], dv[tile]), self.angles(tile))
            for total, part in zip(columns, turned, strict=True):
                add_rows(total, part)
            add_rows(dmask_hidden, dhidden[tile])
        q, k, v = (total.to(hidden.dtype)[None] for total in columns)
        weights, (sums, _) = self.layer.before_weights(), self.sums()
        embeds = self.mask.embedding.detach()[None]
        part, dembeds = project_backward(embeds, hidden[:1], (q, k, v), weights, sums, self.layer.eps)
        assert dembeds is not None
        add_rows(dembedding, dembeds)
        add_rows(dmask_hidden, part)


def add_rows(total: Tensor, rows: Tensor) -> None:
    """total [n] += the sum of rows [t, n], in the dtype of `total`."""
    total.add_(rows.sum(0, dtype=total.dtype))


def first_layer_step(
    layer: DraftLayer,
    hidden: Tensor,
    constants: StepConstants,
    unroll: LayerUnroll,
    mask: Mask,
    activation: Activation,
    tile_bytes: int,
) -> Tensor:
    """Run the first layer for the guess `unroll.next_step`.

    Args:
        layer, constants, unroll, activation, tile_bytes: as in `eagle3.step.ttt_step`; the constants' tokens
            are read at guess 0 only.
        hidden: [S, H], the projected captured states; from guess 1 on it is not read.
        mask: what the later guesses are fed.

    Returns:
        The layer's output [Q, H].
    """
    number = unroll.next_step
    if number == 0:
        return run_step(FirstStep(layer, constants, unroll, number, mask), hidden, activation, tile_bytes)
    # Under `keep` autograd gives the vectors their gradients; else guess 0 does, for all guesses.
    fed = mask.hidden if activation == "keep" else mask.hidden.detach()
    step = MaskStep(layer, constants, unroll, number, mask)
    return run_step(step, fed.expand(len(constants.positions), -1), activation, tile_bytes)
