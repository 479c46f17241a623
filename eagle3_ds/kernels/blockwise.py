"""The blockwise kernel: plain torch on any device (CPU, CUDA, NPU, MPS), temporary memory of one block.

Online softmax over blocks of keys (Dao et al., FlashAttention-2, 2023), computed in fp32 (fp64 for fp64).
With m the largest score so far, l the sum of exp(s - m) and o the same sum of exp(s - m) v, a block of
scores s changes them to

    m' = max(m, max s)    l' = exp(m - m') l + sum exp(s - m')    o' = exp(m - m') o + sum exp(s - m') v

and in the end out = o / l and lse = m + log l. The backward computes the scores again, block by block:

    p = exp(s - lse)        ds = p * (dout v^T - delta)
    dv += p^T dout        dk += ds^T (scale q)        dq += scale ds k

Legend: N key heads, R rows of one query block times the G query heads that share a key head, B keys of one
block.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from eagle3_ds.kernels.base import Call, TileKernel, accumulation_dtype

# Measured forward + backward of 2048 causal rows, 8 heads of 64, fp32, on one CPU core: blocks of 128 x 256
# 181 ms, 256 x 256 190 ms, 512 x 512 285 ms (the scores no longer fit the cache). Of the two fast sizes the
# larger one is taken, because accelerators pay for every kernel launch.
_QUERY_BLOCK = 256
_KEY_BLOCK = 256


class BlockwiseKernel(TileKernel):
    """FlashAttention-2's loops in plain torch; one call is one tile."""

    name = "blockwise"

    def unavailable_reason(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        return None

    def call_forward(
        self, q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(q.dtype)
        out = torch.empty_like(q, dtype=dtype, memory_format=torch.contiguous_format)
        lse = torch.empty(q.shape[:2], dtype=dtype, device=q.device)
        num_kv_heads = k.shape[1]
        reach = _Reach.of(q.shape[0], k.shape[0], call.causal, call.left)
        for rows in _blocks(q.shape[0], _QUERY_BLOCK):
            q_NRD = _fold(q[rows], num_kv_heads, dtype) * scale
            # m starts at the least finite number instead of -inf: in a block of which a row sees no key,
            # s - m' would be (-inf) - (-inf) = nan.
            best = q_NRD.new_full((*q_NRD.shape[:2], 1), torch.finfo(dtype).min)
            total, summed = torch.zeros_like(best), torch.zeros_like(q_NRD)
            for keys in _visible_blocks(rows, reach, k.shape[0]):
                k_NBD, v_NBD = _wide(k[keys], dtype), _wide(v[keys], dtype)
                s_NRB = q_NRD @ k_NBD.mT
                _mask(s_NRB, rows, keys, reach)
                new_best = torch.maximum(best, s_NRB.amax(-1, keepdim=True))
                p_NRB = s_NRB.sub_(new_best).exp_()
                shrink = (best - new_best).exp()
                total = total * shrink + p_NRB.sum(-1, keepdim=True)
                summed = summed.mul_(shrink).baddbmm_(p_NRB, v_NBD)
                best = new_best
            out[rows] = _unfold(summed.div_(total), q.shape[1])
            lse[rows] = _unfold(best + total.log(), q.shape[1])[..., 0]
        return out, lse

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
        dtype = accumulation_dtype(q.dtype)
        num_kv_heads = k.shape[1]
        reach = _Reach.of(q.shape[0], k.shape[0], call.causal, call.left)
        dq = torch.empty_like(q, dtype=dtype, memory_format=torch.contiguous_format)
        dk, dv = torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
        for rows in _blocks(q.shape[0], _QUERY_BLOCK):
            q_NRD, dout_NRD = (_fold(x[rows], num_kv_heads, dtype) for x in (q, dout))
            lse_NR1, delta_NR1 = (_fold(x[rows, :, None], num_kv_heads, dtype) for x in (lse, delta))
            q_NRD = q_NRD * scale
            dq_NRD = torch.zeros_like(q_NRD)
            for keys in _visible_blocks(rows, reach, k.shape[0]):
                k_NBD, v_NBD = _wide(k[keys], dtype), _wide(v[keys], dtype)
                s_NRB = q_NRD @ k_NBD.mT
                _mask(s_NRB, rows, keys, reach)
                # The lse of the whole softmax, so p is final and needs no rescaling by later blocks.
                p_NRB = s_NRB.sub_(lse_NR1).exp_()
                dv[keys] += (p_NRB.mT @ dout_NRD).transpose(0, 1)
                ds_NRB = (dout_NRD @ v_NBD.mT).sub_(delta_NR1).mul_(p_NRB)
                dk[keys] += (ds_NRB.mT @ q_NRD).transpose(0, 1)
                dq_NRD.baddbmm_(ds_NRB, k_NBD)
            # q carries `scale` already, so only dq needs it here; dk has it from q.
            dq[rows] = _unfold(dq_NRD.mul_(scale), q.shape[1])
        return dq, dk, dv


class _Reach(NamedTuple):
    """The band of a tile: its row i sees the keys from i + first to i + last, as far as the tile has them."""

    first: int
    last: int

    @staticmethod
    def of(num_queries: int, num_keys: int, causal: bool, left: int | None) -> _Reach:
        diagonal = num_keys - num_queries
        return _Reach(-num_queries if left is None else diagonal - left, diagonal if causal else num_keys)


def _blocks(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _visible_blocks(rows: slice, reach: _Reach, num_keys: int) -> Iterator[slice]:
    """The blocks of keys of which some row in `rows` sees at least one key."""
    first = max(0, rows.start + reach.first) // _KEY_BLOCK
    return islice(_blocks(min(num_keys, rows.stop + reach.last), _KEY_BLOCK), first, None)


def _mask(s_NRB: Tensor, rows: slice, keys: slice, reach: _Reach) -> None:
    """Set the scores of the keys that a row does not see to -inf, in place."""
    if keys.stop <= rows.start + reach.last + 1 and keys.start >= rows.stop - 1 + reach.first:
        return
    row = torch.arange(rows.start, rows.stop, device=s_NRB.device)[:, None]
    key = torch.arange(keys.start, keys.stop, device=s_NRB.device)
    hidden = (key > row + reach.last) | (key < row + reach.first)
    s_NRB.unflatten(1, (rows.stop - rows.start, -1)).masked_fill_(hidden[:, None], -torch.inf)


def _wide(x_BND: Tensor, dtype: torch.dtype) -> Tensor:
    return x_BND.transpose(0, 1).to(dtype)


def _fold(x_LHD: Tensor, num_kv_heads: int, dtype: torch.dtype) -> Tensor:
    """[L, N * G, D] -> [N, L * G, D]: the query heads of one key head become rows, so that nothing is
    repeated.
    """
    return x_LHD.unflatten(1, (num_kv_heads, -1)).to(dtype).transpose(0, 1).flatten(1, 2)


def _unfold(x_NRD: Tensor, num_heads: int) -> Tensor:
    """[N, L * G, D] -> [L, N * G, D]."""
    return x_NRD.unflatten(1, (-1, num_heads // x_NRD.shape[0])).transpose(0, 1).flatten(1, 2)
