"""What a draft says of its own costs, whatever its algorithm: the planner sums these numbers and knows no
draft.

A multiplication and an addition are two FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

Parts = dict[str, int]
"""Bytes by what they are."""
FP32, INT64 = 4, 8


@dataclass(frozen=True)
class Traffic:
    """Alike calls of one rank.

    Attributes:
        axis: whose ranks take part: ulysses, ring, sp, zero or world.
        kind: all_to_all, all_gather, reduce_scatter, all_reduce or send (point to point).
        payload: bytes of the tensors that this rank hands to the calls, over all calls.
    """

    axis: str
    kind: str
    calls: int
    payload: int
    ranks: int

    @property
    def sent(self) -> float:
        """Bytes that leave this rank, by the algorithms that send least."""
        others = self.ranks - 1
        factor = {
            "all_to_all": others / self.ranks,
            "all_gather": others,
            "reduce_scatter": others / self.ranks,
            "all_reduce": 2 * others / self.ranks,
            "send": 1,
        }[self.kind]
        return self.payload * factor


@dataclass(frozen=True)
class Flops:
    """One rank, one packed sequence."""

    layers: int
    recompute: int
    attention_forward: int
    attention_backward: int
    loss: int

    @property
    def total(self) -> int:
        return self.layers + self.recompute + self.attention_forward + self.attention_backward + self.loss


@dataclass(frozen=True)
class SequenceBytes:
    """What one packed sequence makes a rank hold, beside the model's states.

    Attributes:
        batch: integers and masks of the sequence, for as long as its optimizer step lasts.
        loss: part by part, what is alive at the worst moment of the loss.
        backward: the moments of the backward that may be the worst; their weight-gradient sums included.
        weight_sums: sums of the weights' gradients that are still there when they are handed out.
        offloaded: bytes that `train.activation: offload` moves to the host, there and back.
    """

    batch: int
    loss: Parts
    backward: tuple[Parts, ...]
    weight_sums: int
    offloaded: int
