"""The npu kernel: Ascend's fused attention, `npu_fusion_attention` of torch_npu and its gradient.

A call is in the layout TND, the operator's variable-length one: q [T, Hq, D] with the cumulated lengths of
its tiles as a list on the host. The forward returns the largest score m and the sum l of exp(s - m) of each
row, each eight times over; the log-sum-exp is m + log l. The gradient computes its probabilities as
exp(s - m) / l from the m and l that it is given, so a log-sum-exp from outside is passed as m, with l = 1.
docs/ascend.md has the operator's rules, and where each is written.

No Ascend device has run this: the tests compute the operator's documented masks on the CPU.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from eagle3_ds.kernels.base import Call
from eagle3_ds.kernels.tile import Tile, cut_into_blocks
from eagle3_ds.kernels.varlen import JoiningKernel

_CHIPS = re.compile(r"Ascend(910B\d|910_93|950)")
"""The names, as torch_npu tells them, of the chips that the operator is made for: those of Atlas A2 and A3
trainers, and the Ascend 950. The plain Ascend910B, without a digit, is older.
"""
# What the operator takes in one call; docs/ascend.md says where each limit is written.
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MOST_HEAD_DIM = 512
_MOST_HEADS = 256
_MOST_TILES = 1024
_MOST_TOKENS = 10**6
_MASK_SIZE = 2048
_COPIES = 8
"""How often the operator repeats the statistics of a row."""


class NpuKernel(JoiningKernel):
    """Ascend's fused attention for bf16, fp16 and fp32."""

    name = "npu"

    def unavailable_reason(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if device.type != "npu":
            return f"it runs on Ascend NPUs, and the device is {device}"
        try:
            chip = _torch_npu().npu.get_device_name(device)
        except (ImportError, OSError) as error:
            return f"torch_npu does not import ({error})"
        if not _CHIPS.match(chip):
            return f"its operator is made for Atlas A2, A3 and the Ascend 950, and {device} is {chip}"
        if dtype not in _DTYPES:
            return f"it takes {', '.join(map(str, _DTYPES))}, not {dtype}"
        if head_dim > _MOST_HEAD_DIM:
            return f"head_dim must be at most {_MOST_HEAD_DIM}, and is {head_dim}"
        if dtype == torch.float32 and torch.are_deterministic_algorithms_enabled():
            return "its fp32 backward is not deterministic, and torch.use_deterministic_algorithms is on"
        return None

    def arranged(self, tiles: list[Tile]) -> list[Tile]:
        """As the base's, with no tile longer than a call may be, and no causal band of a single key."""
        parts = (
            part for tile in super().arranged(tiles) for part in cut_into_blocks(tile, _MOST_TOKENS // 2)
        )
        return [single for part in parts for single in _without_single_keys(part)]

    def calls(self, tiles: Iterable[Tile], most: int | None = None) -> list[Call]:
        """As the base's, with at most `_MOST_TILES` tiles and `_MOST_TOKENS` rows and keys in a call."""
        return [
            Call(call.tiles[start : start + _MOST_TILES])
            for call in super().calls(tiles, most or _MOST_TOKENS)
            for start in range(0, len(call.tiles), _MOST_TILES)
        ]

    def call_forward(
        self, q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float
    ) -> tuple[Tensor, Tensor]:
        options = _options(call, q.device)

        def attend(rows: slice, keys: slice) -> Sequence[Tensor]:
            query, key, value = q[:, rows], k[:, keys], v[:, keys]
            out, largest, total, *_ = _torch_npu().npu_fusion_attention(
                query, key, value, query.shape[1], "TND", scale=scale, **options
            )
            return out, largest[..., 0] + total[..., 0].log()

        out, lse = _by_heads(attend, q.shape[1], k.shape[1])
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
        options = _options(call, q.device)

        def differentiate(rows: slice, keys: slice) -> Sequence[Tensor]:
            query, key, value = q[:, rows], k[:, keys], v[:, keys]
            largest = lse[:, rows, None].expand(-1, -1, _COPIES).contiguous()
            dq, dk, dv, *_ = _torch_npu().npu_fusion_attention_grad(
                query,
                key,
                value,
                dout[:, rows],
                query.shape[1],
                "TND",
                softmax_max=largest,
                softmax_sum=torch.ones_like(largest),
                attention_in=delta[:, rows],
                scale_value=scale,
                **options,
            )
            return dq, dk, dv

        dq, dk, dv = _by_heads(differentiate, q.shape[1], k.shape[1])
        return dq, dk, dv


def _torch_npu() -> Any:
    return importlib.import_module("torch_npu")


def _options(call: Call, device: torch.device) -> dict[str, Any]:
    """The lengths and the mask of a call, alike for the operator and its gradient."""
    rows = list(accumulate(tile.num_queries for tile in call.tiles))
    keys = list(accumulate(tile.num_keys for tile in call.tiles))
    # Without "TND" the statistics would come as [Hq, rows] tile by tile, in a tensor that says [T, Hq].
    options: dict[str, Any] = {"actual_seq_qlen": rows, "actual_seq_kvlen": keys, "softmax_layout": "TND"}
    if not call.causal and call.left is None:
        return options
    options["atten_mask"] = _later_keys(device)
    if call.left is None:
        return {**options, "sparse_mode": 3}
    # A band from `left` keys before a row's own to `ahead` keys after it.
    ahead = 0 if call.causal else max(tile.num_keys for tile in call.tiles)
    return {**options, "sparse_mode": 4, "pre_tockens": call.left, "next_tockens": ahead}


@cache
def _later_keys(device: torch.device) -> Tensor:
    """bool [2048, 2048], true above the diagonal: the compressed mask that the operator demands for a causal
    square or a band of any size. 4 MiB, made once per device.
    """
    return torch.ones(_MASK_SIZE, _MASK_SIZE, dtype=torch.bool, device=device).triu(1)


def _without_single_keys(tile: Tile) -> list[Tile]:
    """The gradient refuses a band in which each row sees its own key alone: such a tile becomes its pairs."""
    if not tile.causal or tile.left != 0:
        return [tile]
    first_key = tile.k_stop - tile.num_queries
    return [
        Tile(tile.q_start + i, tile.q_start + i + 1, first_key + i, first_key + i + 1, False)
        for i in range(tile.num_queries)
    ]


def _by_heads(
    compute: Callable[[slice, slice], Sequence[Tensor]], num_heads: int, num_kv_heads: int
) -> Sequence[Tensor]:
    """`compute(query heads, key heads)` for as many heads at once as the operator takes; what it returns has
    the heads in dim 1, and is concatenated there.

    Raises:
        ValueError: a single key head has more query heads than the operator takes.
    """
    group = num_heads // num_kv_heads
    if group > _MOST_HEADS:
        raise ValueError(
            f"attention.kernel npu takes at most {_MOST_HEADS} query heads for a key head, and the draft has "
            f"{group}, counted for every input of a block. Set attention.kernel: blockwise."
        )
    step = _MOST_HEADS // group
    starts = range(0, num_kv_heads, step)
    stops = [min(start + step, num_kv_heads) for start in starts]
    parts = [
        compute(slice(start * group, stop * group), slice(start, stop))
        for start, stop in zip(starts, stops, strict=True)
    ]
    return parts[0] if len(parts) == 1 else [torch.cat(each, dim=1) for each in zip(*parts, strict=True)]
