"""The protocol of the two ways in which the step-0 keys and values reach the ranks of a ring: `gather`
(prefix_kv.py) and `ring` (ring.py), chosen by `parallel.kv_exchange`.

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
    """What an exchange needs to know of the sequence and of this rank.

    Attributes:
        plan: the cut of the sequence.
        ring_rank: whose columns this rank computes.
        ring_group: the ranks of the ring; None is a ring of one.
        kernel: computes the tiles.
        window: the most keys that a position sees, its own included; None for no limit.
        kv_bytes: the most bytes of other ranks' keys and values, and of their gradients, that may be held
            between steps. `gather` ignores it.
    """

    plan: SpanPlan
    ring_rank: int
    ring_group: dist.ProcessGroup | None
    kernel: AttentionKernel
    window: int | None = None
    kv_bytes: int = 0


class KVExchange(Protocol):
    """The step-0 keys and values of one layer, for all K TTT steps.

    It is made from this ring rank's k and v, [Lr, Hkv / u, D] each, and a `RingPlace`. It builds no autograd
    graph: `attention.usp` calls the methods from the forward and the backward of its own Functions. Every
    method is collective over the ring.
    """

    def attend(self, q_heads: Tensor, scale: float, step: int = 0) -> tuple[Tensor, Tensor]:
        """Attention of TTT step `step` to the step-0 keys: q [Lq, Hq / u, D] -> out [Lq, Hq / u, D], of any
        dtype, and lse [Lq, Hq / u], fp32 (fp64 for fp64).
        """

    def attend_backward(
        self, dout: Tensor, q_heads: Tensor, lse: Tensor, delta: Tensor, scale: float, step: int = 0
    ) -> Tensor:
        """Backward of `attend` under the merged softmax (kernels/base.py); keeps the sum of dk and dv.

        Args:
            dout, q_heads: [Lq, Hq / u, D].
            lse, delta: [Lq, Hq / u], fp32 (fp64 for fp64), of step-0 and diagonal keys together.

        Returns:
            dq [Lq, Hq / u, D], fp32 (fp64 for fp64).
        """

    def take_gradients(self) -> tuple[Tensor, Tensor]:
        """dk and dv [Lr, Hkv / u, D] of this ring rank's own columns, fp32 (fp64 for fp64), summed over all
        steps and all ring ranks. The exchange drops its sums.
        """
