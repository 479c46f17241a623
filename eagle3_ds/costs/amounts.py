"""The costs that every draft algorithm states of its draft. The planner adds these numbers and needs to know
nothing else of the draft.

A multiplication and an addition are two FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

Parts = dict[str, int]
"""Bytes by the name of what they hold, e.g. {"weights": 1024}."""
FP32, INT64 = 4, 8


@dataclass(frozen=True)
class Traffic:
    """Calls of one kind by one rank.

    Attributes:
        axis: the group that takes part: ulysses, ring, sp, zero or world.
        kind: all_to_all, all_gather, reduce_scatter, all_reduce or send (point to point).
        calls: how many.
        payload: bytes of the tensors that this rank passes to the calls, summed over all of them.
        ranks: size of the group.
    """

    axis: str
    kind: str
    calls: int
    payload: int
    ranks: int

    @property
    def sent(self) -> float:
        """Bytes that leave this rank, for the collective algorithms that send least."""
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
    """FLOPs of one rank for one packed sequence.

    Attributes:
        layers: matrix products of the layers, forward and backward.
        recompute: products that backward repeats.
        attention_forward, attention_backward: the products of the attention.
        loss: the products with the teacher's head and the draft's.
    """

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
    """Bytes that one packed sequence makes a rank hold, beside the model's states.

    Attributes:
        batch: integers and masks of the sequence, held for the whole optimizer step.
        loss: bytes by part at the worst moment of the loss.
        backward: bytes by part at each moment of the backward that may be the worst one, sums of weight
            gradients included.
        weight_sums: fp32 sums of weight gradients that still exist when the gradients are made from them.
        offloaded: bytes that `train.activation: offload` moves to the host, and back in backward.
    """

    batch: int
    loss: Parts
    backward: tuple[Parts, ...]
    weight_sums: int
    offloaded: int
