"""The product on a pretended CUDA device: what it decides by the device is decided as on CUDA, and kernels
that no meta tensor can reach are replaced by ones that count what they would read and write.

Replaced are torch's fused RMSNorm (one launch forward, one backward) and the product's Triton kernels: the
merge of the diagonals (one launch each way) and the soft cross entropy (one launch, which reads the logits
and the target twice).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from eagle3_ds.draft import decoder_backward
from eagle3_ds.draft.tile_loss import WeightedTerms
from eagle3_ds.kernels.base import Call
from eagle3_ds.kernels.cuda import CudaKernel
from eagle3_ds.kernels.tile import Tile
from eagle3_ds.losses.kl import KL
from judge.device_counts import DeviceCounts

MERGE = "eagle3_ds.attention.merge_triton"


@contextmanager
def pretend_cuda(counts: DeviceCounts) -> Iterator[None]:
    """Within it, the product takes the meta device for a CUDA device, and `counts` sees what it launches."""
    with ExitStack() as stack:
        for replaced in (
            patch.dict(sys.modules, {MERGE: _merge_module(counts)}),
            patch("eagle3_ds.attention.merge._is_fused", lambda q: True),
            patch.object(KL, "fused", lambda loss, logits: _CountedKL(counts)),
            patch.object(decoder_backward, "adds_in_product", lambda device: True),
            patch.object(functional, "rms_norm", lambda *args: _RMSNorm.apply(counts, *args)),
            without_streams(),
            patch("eagle3_ds.parts.record_function", counts.record),
            patch("torch.autograd._profiler_enabled", lambda: True),
        ):
            stack.enter_context(replaced)
        yield


@contextmanager
def without_streams() -> Iterator[None]:
    """Within it, streams wait for nothing and no memory is pinned: the meta device, which never computes."""
    stream = SimpleNamespace(
        wait_stream=lambda other: None, wait_event=lambda event: None, record_event=lambda: None
    )
    module = SimpleNamespace(
        Stream=lambda device: stream, current_stream=lambda device: stream, stream=nullcontext
    )
    with (
        patch("eagle3_ds.device.runtime.device_module", lambda device: module),
        patch.object(Tensor, "pin_memory", lambda tensor: tensor),
    ):
        yield


class CountedCudaKernel(CudaKernel):
    """The kernel `cuda`, which tells the counter how many query-key pairs each call sees."""

    def __init__(self, counts: DeviceCounts) -> None:
        self._counts = counts

    def call_forward(
        self, q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float
    ) -> tuple[Tensor, Tensor]:
        self._counts.pairs = sum(map(visible_pairs, call.tiles))
        return super().call_forward(q, k, v, call, scale)

    def call_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        delta: Tensor,
        call: Call,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        self._counts.pairs = sum(map(visible_pairs, call.tiles))
        return super().call_backward(dout, q, k, v, lse, delta, call, scale)


def visible_pairs(tile: Tile) -> int:
    """Query-key pairs that a tile shows."""
    own = tile.num_keys - tile.num_queries + np.arange(tile.num_queries)
    stop = own + 1 if tile.causal else np.full(tile.num_queries, tile.num_keys)
    start = 0 if tile.left is None else np.maximum(0, own - tile.left)
    return int((stop - start).sum())


class _RMSNorm(torch.autograd.Function):
    """torch's fused RMSNorm: it keeps its input and an fp32 statistic of each row."""

    @staticmethod
    def forward(
        ctx: Any, counts: DeviceCounts, x: Tensor, shape: Sequence[int], weight: Tensor, eps: float
    ) -> Tensor:
        output, statistic = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
        if x.numel():
            counts.add("_fused_rms_norm", (x, weight), (output, statistic))
        ctx.counts = counts
        ctx.save_for_backward(x, weight, statistic)
        return output

    @staticmethod
    def backward(ctx: Any, doutput: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, statistic = ctx.saved_tensors
        dx, dweight = torch.empty_like(x), torch.empty_like(weight)
        if x.numel():
            ctx.counts.add("_fused_rms_norm_backward", (doutput, x, weight, statistic), (dx, dweight))
        return None, dx, None, dweight, None


class _CountedKL:
    """`losses/kl_triton.py`."""

    def __init__(self, counts: DeviceCounts) -> None:
        self._counts = counts

    def __call__(
        self, logits: Tensor, target: Tensor, weight: Tensor, gradient: Tensor | None
    ) -> WeightedTerms:
        columns, weight = len(logits), weight.contiguous()
        value, acceptance = (logits.new_empty(columns, dtype=torch.float32) for _ in range(2))
        best = logits.new_empty(columns, dtype=torch.int64)
        written = [value, acceptance, best, *([] if gradient is None else [gradient])]
        self._counts.add("fused_kl", (logits, logits, target, target, weight), written)
        return WeightedTerms(value, acceptance, best)


def _merge_module(counts: DeviceCounts) -> ModuleType:
    """`attention/merge_triton.py`."""

    def fused_merge(
        out0: Tensor, lse0: Tensor, q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], scale: float
    ) -> tuple[Tensor, Tensor]:
        read = [x.contiguous() for x in (out0, lse0, q, *keys, *values)]
        out, lse = torch.empty_like(read[2]), torch.empty_like(read[1])
        counts.add("fused_merge", read, (out, lse))
        return out, lse

    def fused_merge_backward(
        dout: Tensor,
        q: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        lse: Tensor,
        delta: Tensor,
        scale: float,
        dkeys: Sequence[Tensor],
        dvalues: Sequence[Tensor],
    ) -> Tensor:
        read = [x.contiguous() for x in (dout, q, lse, delta, *keys, *values)]
        dq = torch.empty_like(read[1])
        # The gradients of the diagonals are added to.
        counts.add("fused_merge_backward", (*read, *dkeys, *dvalues), (dq, *dkeys, *dvalues))
        return dq

    module = ModuleType(MERGE)
    module.__dict__.update(fused_merge=fused_merge, fused_merge_backward=fused_merge_backward)
    return module
