"""One TTT step of one layer in training, and what it keeps for backward.

`keep` is plain autograd. `recompute` and `offload` are one autograd Function per step, which keeps the hidden
state that came in, the attention's output and its log-sum-exp; `offload` moves the first two to pinned host
memory. Its backward repeats everything but the attention, a tile of slots at a time. The weight gradients are
summed over the tiles and over the K steps in fp32, and the backward of step 0, the last to run, returns them.

The input of step 0 is all slots of this rank, its output the live ones only: of the others it needs just a
key and a value.

Legend: S slots of this rank, the first Q of them live; from step 1 on there are these only. H hidden size, Hq
/ Hkv heads, D head size, I width of the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from eagle3_ds.algorithms.eagle3.layer import BeforeWeights, DraftLayer, attention_input
from eagle3_ds.algorithms.eagle3.layer_backward import project_backward, turned_back
from eagle3_ds.attention.rotary import RotaryFrequencies, rotate
from eagle3_ds.attention.usp import Attended, LlamaUSPFlashAttention, UnrollKV
from eagle3_ds.config import Activation
from eagle3_ds.draft.decoder import AfterWeights, after_attention, project
from eagle3_ds.draft.decoder_backward import NormTile, after_attention_backward
from eagle3_ds.draft.offload import HostStash
from eagle3_ds.draft.tiles import Tiles, map_tiles, slots_per_tile


@dataclass(frozen=True)
class StepConstants:
    """What a step reads beside the hidden state.

    Attributes:
        tokens: int64 [S] ([Q] from step 1 on), the token that each slot reads at this step.
        positions: int64 [S] ([Q] from step 1 on), the rotary positions of this step.
        embedding: [V, H], the target's, frozen.
        rotary: the draft's frequencies.
    """

    tokens: Tensor
    positions: Tensor
    embedding: Tensor
    rotary: RotaryFrequencies


class LayerUnroll(UnrollKV):
    """`UnrollKV`, plus what the recomputing modes keep of one layer over the steps of one unroll.

    Attributes:
        dweights: fp32 (fp64 for fp64) sums of the weights' gradients over the backward of the steps; empty
            before the first of these.
        stash: where `offload` puts what a step keeps, shared by all layers; None in the other modes.
    """

    def __init__(self, *place: Any, stash: HostStash | None = None) -> None:
        super().__init__(*place)
        self.dweights: list[Tensor] = []
        self.stash = stash


def ttt_step(
    layer: DraftLayer,
    hidden: Tensor,
    constants: StepConstants,
    unroll: LayerUnroll,
    activation: Activation,
    tile_bytes: int,
) -> Tensor:
    """Run one layer for the TTT step `unroll.next_step`.

    Args:
        layer: with patched attention.
        hidden: [S, H] ([Q, H] from step 1 on).
        constants: of the step.
        unroll: of the layer; the step's keys and values are added to it.
        activation: what is kept for backward.
        tile_bytes: budget of a tile of slots; `keep` ignores it.

    Returns:
        The layer's output [Q, H].

    Raises:
        ValueError: `tile_bytes` does not hold one slot.
    """
    return run_step(Step(layer, constants, unroll, unroll.next_step), hidden, activation, tile_bytes)


def run_step(step: Step, hidden: Tensor, activation: Activation, tile_bytes: int) -> Tensor:
    """`ttt_step` for a step that is made already: hidden [S, H] ([Q, H] from step 1 on) -> [Q, H]."""
    layer, unroll = step.layer, step.unroll
    num_live = unroll.plan.live_per_rank
    if activation == "keep" or not torch.is_grad_enabled():
        qkv = step.all_before(hidden, Tiles.cut(num_live, len(hidden), len(hidden)), layer.before_weights())
        return after_attention(
            layer.residual(hidden[:num_live]),
            layer.self_attn.attend(*qkv, unroll),
            layer.after_weights(),
            layer.eps,
        )
    size = slots_per_tile(
        hidden.shape[1], layer.mlp.gate_proj.out_features, hidden.element_size(), tile_bytes
    )
    tiles = Tiles.cut(num_live, len(hidden), size)
    # The weights are inputs of step 0 only: its backward runs last and returns the sums over all steps.
    weights = step.weights() if step.number == 0 else ()
    output, unroll.ticket = _RecomputedStep.apply(step, tiles, hidden, unroll.ticket, *weights)
    return output


@dataclass(frozen=True)
class Step:
    """The arithmetic of one step before the attention, on a tile of slots, and what its backward keeps and
    gives. An algorithm that feeds its first layer otherwise derives a class from it (algorithms/peagle).

    Attributes:
        layer, constants, unroll: as in `ttt_step`.
        number: of the step.
    """

    layer: DraftLayer
    constants: StepConstants
    unroll: LayerUnroll
    number: int

    @property
    def attention(self) -> LlamaUSPFlashAttention:
        return self.layer.self_attn

    def weights(self) -> list[Tensor]:
        """What is trained in this layer, in the order of `LayerUnroll.dweights`."""
        before = [weight for weight in self.layer.before_weights() if weight is not None]
        return [*before, *self.layer.after_weights(), *self.more_weights()]

    def more_weights(self) -> tuple[Tensor, ...]:
        """What else than the layer's own weights is trained through it, of any shapes."""
        return ()

    def embeds(self, tile: slice) -> Tensor:
        return functional.embedding(self.constants.tokens[tile], self.constants.embedding)

    def angles(self, tile: slice) -> tuple[Tensor, Tensor]:
        return self.constants.rotary.angles(self.constants.positions[tile])

    def all_before(
        self, hidden: Tensor, tiles: Tiles, weights: BeforeWeights
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`before` for all slots: hidden [S, H] -> rotated q [Q, Hq, D], rotated k and v [S, Hkv, D]."""
        q, k, v = map_tiles(lambda tile: self.before(hidden[tile], tile, weights), tiles.live)
        if tiles.rest:
            rest_k, rest_v = map_tiles(
                lambda tile: self.before(hidden[tile], tile, weights, live=False), tiles.rest
            )
            k, v = torch.cat((k, rest_k)), torch.cat((v, rest_v))
        return q, k, v

    def before(
        self, hidden: Tensor, tile: slice, weights: BeforeWeights, live: bool = True
    ) -> tuple[Tensor, ...]:
        """Norms, projections and rotation of a tile: hidden [t, H] -> rotated q [t, Hq, D] (if `live`),
        rotated k and v [t, Hkv, D].
        """
        x = attention_input(self.embeds(tile), hidden, weights, self.layer.eps)
        cos, sin = self.angles(tile)
        k, v = (project(x, weight, self.layer.head_dim) for weight in (weights.k, weights.v))
        query = (rotate(project(x, weights.q, self.layer.head_dim), cos, sin),) if live else ()
        return *query, rotate(k, cos, sin), v

    def query(self, hidden: Tensor, tile: slice, weights: BeforeWeights) -> Tensor:
        """Only q of `before`: hidden [t, H] -> [t, Hq, D]."""
        x = attention_input(self.embeds(tile), hidden, weights, self.layer.eps)
        return rotate(project(x, weights.q, self.layer.head_dim), *self.angles(tile))

    def sums(self) -> tuple[BeforeWeights, AfterWeights]:
        """The sums of the weights' gradients, of the weights' shapes; the first call of a backward makes
        them.
        """
        sums = self._all_sums()
        last = len(sums) - len(self.more_weights())
        first = last - len(AfterWeights._fields)
        return BeforeWeights(*sums[:first]), AfterWeights(*sums[first:last])

    def more_sums(self) -> tuple[Tensor, ...]:
        """The sums of the gradients of `more_weights`."""
        sums = self._all_sums()
        return tuple(sums[len(sums) - len(self.more_weights()) :])

    def _all_sums(self) -> list[Tensor]:
        if not self.unroll.dweights:
            dtype = torch.float64 if self.layer.before_weights().q.dtype == torch.float64 else torch.float32
            self.unroll.dweights = [torch.zeros_like(weight, dtype=dtype) for weight in self.weights()]
        return self.unroll.dweights

    def kept(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """What backward must have of the input [S, H]."""
        return (hidden,)

    def input_again(self, kept: Sequence[Tensor]) -> Tensor:
        """The input [S, H], from what was kept of it."""
        (hidden,) = kept
        return hidden

    def backward_before(
        self, tiles: Tiles, hidden: Tensor, dqkv: tuple[Tensor, Tensor, Tensor], dhidden: Tensor
    ) -> Tensor | None:
        """Backward of what precedes the attention.

        Args:
            tiles, hidden: as in forward.
            dqkv: gradients of q [Q, Hq, D], k and v [S, Hkv, D].
            dhidden: [S, H], the gradient that came through the residual; it may be changed.

        Returns:
            The gradient of the input [S, H]; None for one that has none.
        """
        _backward_before(self, tiles, hidden, dqkv, dhidden)
        return dhidden

    def take_dembeds(self, tile: slice, dembeds: Tensor | None) -> None:
        """Take the gradient [t, H] of what `embeds` returned. That of a frozen embedding is nobody's."""


class _RecomputedStep(torch.autograd.Function):
    """Forward: one layer at one TTT step, and a new ticket (see `UnrollKV`).
    Backward: repeats it tile by tile, except the attention; step 0 also returns the weights' gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, step: Step, tiles: Tiles, hidden: Tensor, _ticket: Tensor | None, *_weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        layer, unroll = step.layer, step.unroll
        before, after = layer.before_weights(), layer.after_weights()
        q, k, v = step.all_before(hidden, tiles, before)
        attended = step.attention.attend_forward(q, k, v, unroll)
        (output,) = map_tiles(
            lambda tile: (
                after_attention(
                    layer.residual(hidden[tile]), attended.out[tile].flatten(1), after, layer.eps
                ),
            ),
            tiles.live,
        )
        ctx.step, ctx.tiles, ctx.lse = step, tiles, attended.lse
        kept = (*step.kept(hidden), attended.out)
        if unroll.stash is None:
            ctx.save_for_backward(*kept)
        else:
            ctx.place = unroll.stash.put(kept)
        return output, hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, doutput: Tensor, dticket: Tensor) -> tuple[Tensor | None, ...]:
        step, tiles = ctx.step, ctx.tiles
        stash = step.unroll.stash
        *kept, out = ctx.saved_tensors if stash is None else stash.take(ctx.place)
        hidden = step.input_again(kept)
        dhidden, dout = _backward_after(step, tiles, hidden, out, doutput)
        q = _query(step, tiles.live, hidden)
        dqkv = step.attention.attend_backward(dout, q, Attended(out, ctx.lse), step.unroll, step.number)
        dinput = step.backward_before(tiles, hidden, dqkv, dhidden)
        if step.number:
            return None, None, dinput, dticket
        sums, step.unroll.dweights = step.unroll.dweights, []
        return None, None, dinput, None, *(total.to(hidden.dtype) for total in sums)


def _backward_after(
    step: Step, tiles: Tiles, hidden: Tensor, out: Tensor, doutput: Tensor
) -> tuple[Tensor, Tensor]:
    """Backward of what follows the attention, tile by tile.

    hidden [S, H], out [Q, Hq, D] and doutput [Q, H] -> dhidden [S, H], only the part that comes through the
    residual, and dout [Q, Hq, D].
    """
    layer = step.layer
    weights, (before, sums) = layer.after_weights(), step.sums()
    dhidden, dout = hidden.new_empty(hidden.shape), torch.empty_like(out)
    dhidden[len(out) :] = 0
    for tile in tiles.live:
        norm = None
        if layer.normed_residual:
            norm = NormTile(hidden[tile], layer.hidden_norm.weight, layer.eps)
        dresidual, dattended = after_attention_backward(
            hidden[tile] if norm is None else norm.output,
            out[tile].flatten(1),
            doutput[tile],
            weights,
            sums,
            layer.eps,
        )
        dout[tile] = dattended.view_as(out[tile])
        if norm is not None:
            assert before.hidden_norm is not None
            dresidual = norm.backward(dresidual, before.hidden_norm)
        dhidden[tile] = dresidual
    return dhidden, dout


def _query(step: Step, tiles: Sequence[slice], hidden: Tensor) -> Tensor:
    """Repeat q [Q, Hq, D], which forward has not kept."""
    weights = step.layer.before_weights()
    (q,) = map_tiles(lambda tile: (step.query(hidden[tile], tile, weights),), tiles)
    return q


def _backward_before(
    step: Step, tiles: Tiles, hidden: Tensor, dqkv: tuple[Tensor, Tensor, Tensor], dhidden: Tensor
) -> None:
    """Backward of what precedes the attention, tile by tile; adds its part to dhidden [S, H].

    dqkv: gradients of q [Q, Hq, D], k and v [S, Hkv, D].
    """
    layer = step.layer
    weights, (sums, _) = layer.before_weights(), step.sums()
    dq, dk, dv = dqkv
    for tile in (*tiles.live, *tiles.rest):
        # dq has no rows of slots that are not live, so dq[tile] is empty for their tiles.
        columns = turned_back((dq[tile], dk[tile], dv[tile]), step.angles(tile))
        part, dembeds = project_backward(step.embeds(tile), hidden[tile], columns, weights, sums, layer.eps)
        dhidden[tile] += part
        step.take_dembeds(tile, dembeds)
