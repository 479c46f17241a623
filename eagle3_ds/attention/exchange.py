"""How the keys and values of step 0 reach the ranks of a ring: the protocol that `parallel.kv_exchange`
chooses by.

Legend: Lr columns of this ring rank, Lq live ones; Hq / Hkv heads and u Ulysses ranks that share them; D head
size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from eagle3_ds.kernels import AttentionKernel
from eagle3_ds.layout import SpanPlan


@dataclass(frozen=True)
class RingPlace:
    """What an exchange works with.

    Attributes:
        plan, ring_rank, ring_group: the cut of the sequence and this rank's part of it; None is a ring of
            one.
        kernel: computes the tiles.
        window: keys that a position sees at most, its own among them; None: all before it.
        kv_bytes: bytes of other ranks' keys and values, and of their gradients, that may be held between
            steps.
    """

    plan: SpanPlan
    ring_rank: int
    ring_group: dist.ProcessGroup | None
    kernel: AttentionKernel
    window: int | None = None
    kv_bytes: int = 0


class KVExchange(Protocol):
    """The step-0 keys and values of one layer, for all K TTT steps. Outside autograd: the unroll owns the
    graph.

    Made of this ring rank's k and v, [Lr, Hkv / u, D] each, and its `RingPlace`. Every method is collective
    over the ring.
    """

    def attend(self, q_heads: Tensor, scale: float, step: int = 0) -> tuple[Tensor, Tensor]:
        """The attention of TTT step `step` to them. q [Lq, Hq / u, D] -> out, in any dtype, and fp32 lse [Lq,
        Hq / u].
        """

    def attend_backward(
        self, dout: Tensor, q_heads: Tensor, lse: Tensor, delta: Tensor, scale: float, step: int = 0
    ) -> Tensor:
        """dq [Lq, Hq / u, D] of that step, in fp32, under the merged lse and delta = rowsum(dout * out), [Lq,
        Hq / u]; the keys' and values' gradients are summed here.
        """

    def take_gradients(self) -> tuple[Tensor, Tensor]:
        """dk, dv [Lr, Hkv / u, D] of this ring rank's own columns, fp32, over all steps and ranks; forgotten
        here.
        """
