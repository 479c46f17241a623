"""`torch_npu.npu_fusion_attention` and its gradient on the CPU, with the rules that their pages state.

The pages are torch_npu-npu_fusion_attention.md of Ascend/op-plugin 26.1.0, and of CANN's ops-transformer
aclnnFlashAttentionVarLenScoreV4 and aclnnFlashAttentionUnpaddingScoreGradV4; docs/ascend.md says which rule
is where. A broken rule is an AssertionError. The statistics have the layout that `softmax_layout` asks for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tests.unit.emulated_dense import dense_backward, dense_forward

UNLIMITED = 2147483647


def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = UNLIMITED,
    next_tockens: int = UNLIMITED,
    inner_precise: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    assert (pse, padding_mask, prefix, keep_prob, inner_precise) == (None, None, None, 1.0, 0)
    check_operands(query, key, value, head_num, input_layout, most_head_dim=768)
    out, lse = torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)
    largest = torch.empty_like(lse)
    lengths = check_lengths(query, key, actual_seq_qlen, actual_seq_kvlen)
    query, key, value = query.float(), key.float(), value.float()
    for rows, keys in lengths:
        shown = mask_of(rows, keys, atten_mask, sparse_mode, pre_tockens, next_tockens)
        out[rows], heads_first = dense_forward(query[rows], key[keys], value[keys], scale, shown)
        lse[rows] = heads_first.T
        # Any m with l = exp(lse - m) stands for the same softmax; half the lse stands for the largest score.
        largest[rows] = heads_first.T / 2
    total = stored((lse - largest).exp(), lengths, softmax_layout)
    return out, stored(largest, lengths, softmax_layout), total, query.new_empty(0), 0, 0, 0


def npu_fusion_attention_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dy: Tensor,
    head_num: int,
    input_layout: str,
    *,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    softmax_max: Tensor | None = None,
    softmax_sum: Tensor | None = None,
    softmax_in: Tensor | None = None,
    attention_in: Tensor | None = None,
    scale_value: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = UNLIMITED,
    next_tockens: int = UNLIMITED,
    inner_precise: int = 0,
    seed: int = 0,
    offset: int = 0,
    numels: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
) -> tuple[Tensor, Tensor, Tensor, None]:
    assert (pse, padding_mask, prefix, softmax_in, keep_prob) == (None, None, None, None, 1.0)
    check_operands(query, key, value, head_num, input_layout, most_head_dim=512)
    assert attention_in is not None and softmax_max is not None and softmax_sum is not None
    assert dy.shape == attention_in.shape == query.shape and dy.dtype == attention_in.dtype == query.dtype
    # Refused in a call of several lengths (ProcessTokensInfo of the gradient's tiling).
    assert sparse_mode != 4 or pre_tockens + next_tockens > 0
    lengths = check_lengths(query, key, actual_seq_qlen, actual_seq_kvlen)
    largest, total = (read(x, lengths, softmax_layout) for x in (softmax_max, softmax_sum))
    # exp(s - m) / l: the logarithm of l belongs to what is subtracted.
    lse = largest + total.log()
    dq, dk, dv = (torch.empty_like(x) for x in (query, key, value))
    query, key, value, dy, attention_in = (x.float() for x in (query, key, value, dy, attention_in))
    for rows, keys in lengths:
        shown = mask_of(rows, keys, atten_mask, sparse_mode, pre_tockens, next_tockens)
        dq[rows], dk[keys], dv[keys] = dense_backward(
            dy[rows], query[rows], key[keys], value[keys], attention_in[rows], lse[rows].T, scale_value, shown
        )
    return dq, dk, dv, None


OPERATORS = {
    "npu_fusion_attention": npu_fusion_attention,
    "npu_fusion_attention_grad": npu_fusion_attention_grad,
}


def check_operands(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, most_head_dim: int
) -> None:
    """Strides are free: the operator makes its operands contiguous."""
    assert input_layout == "TND" and query.dim() == key.dim() == 3
    assert query.dtype == key.dtype == value.dtype
    assert query.dtype in (torch.float16, torch.bfloat16, torch.float32)
    assert key.shape == value.shape and query.shape[2] == key.shape[2] <= most_head_dim
    assert head_num == query.shape[1] <= 256 and query.shape[1] % key.shape[1] == 0
    assert 1 <= len(query) <= 10**6 and 1 <= len(key) <= 10**6


def check_lengths(
    query: Tensor, key: Tensor, cumulated_q: Sequence[int] | None, cumulated_k: Sequence[int] | None
) -> list[tuple[slice, slice]]:
    """Rows and keys of each sequence, from lists on the host that begin with the first length."""
    assert isinstance(cumulated_q, list) and isinstance(cumulated_k, list)
    assert 1 <= len(cumulated_q) == len(cumulated_k) <= 1024
    assert cumulated_q[-1] == len(query) and cumulated_k[-1] == len(key)
    slices = [[slice(a, b) for a, b in pairwise([0, *ends])] for ends in (cumulated_q, cumulated_k)]
    assert all(part.stop > part.start for each in slices for part in each), "the kernel made an empty tile"
    return list(zip(*slices, strict=True))


def mask_of(
    rows: slice, keys: slice, atten_mask: Tensor | None, sparse_mode: int, before: int, after: int
) -> Tensor:
    """The keys that are shown: all without a mask, else those of sparse mode 3 or 4, whose diagonal ends in
    the bottom right corner.
    """
    num_rows, num_keys = rows.stop - rows.start, keys.stop - keys.start
    if atten_mask is None:
        return torch.ones(num_rows, num_keys, dtype=torch.bool)
    assert sparse_mode in (3, 4) and atten_mask.dtype == torch.bool
    assert torch.equal(atten_mask, torch.ones(2048, 2048, dtype=torch.bool).triu(1))
    ahead = torch.arange(num_keys) - (torch.arange(num_rows)[:, None] + num_keys - num_rows)
    if sparse_mode == 3:
        assert num_rows <= num_keys
        return ahead <= 0
    assert before >= 0 and num_rows - after <= num_keys
    return (ahead >= -before) & (ahead <= after)


def sections(x: Tensor, lengths: list[tuple[slice, slice]]) -> Iterator[Tensor]:
    """Views of a tensor of shape [T, N, 8] that holds [N, rows, 8] of one sequence after another."""
    flat, num_heads = x.view(-1, 8), x.shape[1]
    for rows, _ in lengths:
        yield flat[rows.start * num_heads : rows.stop * num_heads].view(num_heads, -1, 8)


def stored(x: Tensor, lengths: list[tuple[slice, slice]], layout: str) -> Tensor:
    """Statistics [T, N] as the operator returns them."""
    repeated = x[..., None].expand(-1, -1, 8).contiguous()
    if layout == "TND":
        return repeated
    assert layout == ""
    result = torch.empty_like(repeated)
    for (rows, _), section in zip(lengths, sections(result, lengths), strict=True):
        section.copy_(repeated[rows].transpose(0, 1))
    return result


def read(x: Tensor, lengths: list[tuple[slice, slice]], layout: str) -> Tensor:
    """The inverse of `stored`."""
    assert x.dtype == torch.float32 and x.is_contiguous() and x.shape[2] == 8
    assert torch.equal(x, x[..., :1].expand_as(x)) and layout in ("", "TND")
    if layout == "TND":
        return x[..., 0]
    return torch.cat([section.transpose(0, 1) for section in sections(x, lengths)])[..., 0]
