"""What a draft says of its own costs, whatever its algorithm: the planner sums these numbers and knows no
draft.

A multiplication and an addition are two FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eagle3_ds.costs.setup import Setup

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


@dataclass(frozen=True)
class DraftShape:
    """Sizes of a draft; its algorithm derives a class from this one that says what they cost.

    `vocab_size` is the target's, `draft_vocab_size` the draft's own.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    num_layers: int = 1

    @property
    def query_size(self) -> int:
        """Entries of one slot's queries, over all heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Entries of one slot's keys, over all heads; its values have as many."""
        return self.num_kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        return sum(self.parameter_sizes)

    @property
    def parameter_sizes(self) -> tuple[int, ...]:
        """Elements of every trained tensor."""
        raise NotImplementedError

    def layer_weights(self, layer: int) -> dict[str, int]:
        """Parameters of each matrix of a layer."""
        raise NotImplementedError

    @property
    def live_slots_alone(self) -> bool:
        """Whether slots that no loss reads give keys and values and cost nothing else (layout/plan.py)."""
        raise NotImplementedError

    def sequence_bytes(self, setup: Setup) -> SequenceBytes:
        """What a packed sequence makes a rank hold."""
        raise NotImplementedError

    def attention_traffic(self, setup: Setup) -> list[Traffic]:
        """Of one packed sequence, forward and backward, all layers; nothing on an axis with one rank."""
        raise NotImplementedError

    def flops(self, setup: Setup, pairs: int) -> Flops:
        """One rank, one packed sequence; `pairs`: query-key pairs of the busiest ring rank in one pass."""
        raise NotImplementedError

    def elementwise_bytes(self, setup: Setup) -> int:
        """Bytes that norms, rotations, activations and the softmax of the loss move, one rank, one
        sequence.
        """
        raise NotImplementedError
