"""The backward of a decoder layer's arithmetic by hand, for one tile of slots. It repeats only those matmuls
of the forward whose results the gradients need.

Autograd would have to repeat `down` too, only to build its graph, although the gradient of a linear layer
y = x W^T does not need y:

    dx = dy W        dW = dy^T x

Weight gradients are added to the caller's sums, in the dtype of the sums. RMSNorm is left to torch, which has
fused kernels. With n the size of the last dim and r = 1 / sqrt(mean(x^2) + eps), it computes

    y = r x * w        dw = sum_rows dy * r x        dx = r (dy * w) - r^3 / n * sum(dy * w * x) x

Legend: t slots of a tile, H hidden size, Hq heads, D head size, I width of the MLP.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from eagle3_ds.device.runtime import adds_in_product
from eagle3_ds.draft.decoder import AfterWeights, rms_norm


def accumulate_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [m, n] += a [m, t] @ b [t, n]. On CUDA the matmul itself adds to an fp32 total; elsewhere a total
    of another dtype than a takes a temporary of its size in the dtype of a.
    """
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif adds_in_product(total.device.type):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(a @ b)


class NormTile:
    """One application of RMSNorm to x [t, n] with weight [n], whose gradient is asked for later.

    Attributes:
        output: [t, n], outside autograd.
    """

    def __init__(self, x: Tensor, weight: Tensor, eps: float) -> None:
        self._x, self._weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        with torch.enable_grad():
            self._graph = rms_norm(self._x, self._weight, eps)
        self.output = self._graph.detach()

    def backward(self, doutput: Tensor, dweight: Tensor) -> Tensor:
        """Returns dx [t, n] for doutput [t, n]; the weight's gradient is added to `dweight` [n]."""
        dx, dw = torch.autograd.grad(self._graph, (self._x, self._weight), doutput)
        dweight.add_(dw)
        return dx


def after_attention_backward(
    hidden: Tensor, attended: Tensor, doutput: Tensor, weights: AfterWeights, sums: AfterWeights, eps: float
) -> tuple[Tensor, Tensor]:
    """Backward of `after_attention` on one tile.

    With h = hidden + attended o^T, x = norm(h), g = x gate^T, u = x up^T, a = silu(g), m = a * u and output =
    h + m down^T, all but `output` repeated:

        d(down) = doutput^T m     dm = doutput down
        dg = dm * u * silu'(g)    du = dm * a        silu'(g) = sigmoid(g) (1 + g (1 - sigmoid(g)))
        d(gate) = dg^T x          d(up) = du^T x     dx = dg gate + du up
        dh = doutput + (dx through the norm)         d(o) = dh^T attended
        dhidden = dh              dattended = dh o

    Args:
        hidden, doutput: [t, H]; attended: [t, Hq * D].
        weights: of the layer.
        sums: the weights' gradients are added to these, of the weights' shapes.
        eps: of the norm.

    Returns:
        dhidden [t, H] and dattended [t, Hq * D].
    """
    norm = NormTile(torch.addmm(hidden, attended, weights.o.T), weights.norm, eps)
    x = norm.output
    gate, up = functional.linear(x, weights.gate), functional.linear(x, weights.up)
    activated = functional.silu(gate)
    accumulate_product(sums.down, doutput.T, activated * up)
    dgated = doutput @ weights.down
    dgate = torch.ops.aten.silu_backward(dgated * up, gate)
    # In place: dm is not needed any more.
    dup = dgated.mul_(activated)
    accumulate_product(sums.gate, dgate.T, x)
    accumulate_product(sums.up, dup.T, x)
    # h reaches the output twice: through the residual, and through the norm and the MLP.
    dhidden = doutput + norm.backward(torch.addmm(dgate @ weights.gate, dup, weights.up), sums.norm)
    accumulate_product(sums.o, dhidden.T, attended)
    return dhidden, dhidden @ weights.o


def normed_in_tiles(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [S, H] with weight [H] -> [S, H]. It keeps only x for backward, and sums the weight's
    gradient in fp32.
    """
    return _Norm.apply(x, weight, eps)


class _Norm(torch.autograd.Function):
    """Forward: `rms_norm(x, weight, eps)`.
    Backward: repeats it for a tile of ROWS rows at a time, and returns dx and the summed dweight.
    """

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
