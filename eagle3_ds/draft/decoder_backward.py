"""The gradient of a decoder layer's arithmetic, by hand: what a tile must repeat of the forward pass, and no
matmul more.

Autograd would need the outputs of the projections and of `down` to hang the graph on; their gradients need
only their inputs. Weight gradients are added to the caller's sums, in the sums' dtype. The norms are left to
torch, which has fused kernels.

Legend: t slots of a tile, H hidden size, Hq heads, D head size, I width of the MLP.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from eagle3_ds.draft.decoder import AfterWeights, rms_norm


def accumulate_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, without a temporary where the dtypes allow."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


class NormTile:
    """One application of RMSNorm: its output now, its gradient later."""

    def __init__(self, x: Tensor, weight: Tensor, eps: float) -> None:
        self._x, self._weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        with torch.enable_grad():
            self._graph = rms_norm(self._x, self._weight, eps)
        self.output = self._graph.detach()

    def backward(self, doutput: Tensor, dweight: Tensor) -> Tensor:
        """dx [t, H]; the weight's gradient is added to `dweight`."""
        dx, dw = torch.autograd.grad(self._graph, (self._x, self._weight), doutput)
        dweight.add_(dw)
        return dx


def after_attention_backward(
    hidden: Tensor, attended: Tensor, doutput: Tensor, weights: AfterWeights, sums: AfterWeights, eps: float
) -> tuple[Tensor, Tensor]:
    """Backward of `after_attention`: hidden, doutput [t, H], attended [t, Hq * D] -> dhidden, dattended."""
    norm = NormTile(torch.addmm(hidden, attended, weights.o.T), weights.norm, eps)
    x = norm.output
    gate, up = functional.linear(x, weights.gate), functional.linear(x, weights.up)
    activated = functional.silu(gate)
    accumulate_product(sums.down, doutput.T, activated * up)
    dgated = doutput @ weights.down
    dgate = torch.ops.aten.silu_backward(dgated * up, gate)
    dup = dgated.mul_(activated)
    accumulate_product(sums.gate, dgate.T, x)
    accumulate_product(sums.up, dup.T, x)
    dhidden = doutput + norm.backward(torch.addmm(dgate @ weights.gate, dup, weights.up), sums.norm)
    accumulate_product(sums.o, dhidden.T, attended)
    return dhidden, dhidden @ weights.o


def normed_in_tiles(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [S, H] that keeps its input alone for backward, and sums the weight's gradient in fp32."""
    return _Norm.apply(x, weight, eps)


class _Norm(torch.autograd.Function):
    """Forward: y = rms_norm(x) * weight. Backward: repeats it, a tile of rows at a time."""

    ROWS = 4096

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return rms_norm(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        dx = torch.empty_like(x)
        dweight = torch.zeros_like(weight, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        for start in range(0, len(x), _Norm.ROWS):
            rows = slice(start, start + _Norm.ROWS)
            dx[rows] = NormTile(x[rows], weight, ctx.eps).backward(dy[rows], dweight)
        return dx, dweight.to(weight.dtype), None
