"""`ring_attention_hybrid_masked` against one dense softmax: each ring rank in one process, blocks as they
pass.
"""

from __future__ import annotations

import pytest
import torch

from eagle3_ds.attention import ring_attention_hybrid_masked
from eagle3_ds.attention.tiles import block_tiles
from eagle3_ds.kernels import select_kernel
from eagle3_ds.layout import SpanPlan

LENGTHS, HEADS, KV_HEADS, SIZE = (23, 5, 40), 4, 2, 8


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: SpanPlan, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """[L, Hq, D], [L, Hq] over the whole padded sequence in its order."""
    document, slot = torch.from_numpy(plan.document), torch.arange(plan.padded_length)
    back = slot[:, None] - slot[None, :]
    seen = (back >= 0) & (document[:, None] == document[None, :]) & (document[:, None] >= 0)
    if window is not None:
        seen &= back < window
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * SIZE**-0.5
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    weight = (scores - lse[..., None]).exp().nan_to_num(0.0)
    return torch.einsum("hij,jhd->ihd", weight, v), lse.T


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("ring", [1, 2, 4])
def test_blocks_in_any_order_of_passing_give_one_softmax(ring: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    live = torch.rand(sum(LENGTHS), generator=generator).numpy() < 0.4
    plan = SpanPlan.make(LENGTHS, ring, 1, 2, live)
    q, k, v = (
        torch.randn(plan.padded_length, heads, SIZE, generator=generator, dtype=torch.float64)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    expected, expected_lse = dense(q, k, v, plan, window)
    kernel = select_kernel("reference", torch.device("cpu"), torch.float64, SIZE)
    for rank in range(ring):
        slots = torch.from_numpy(plan.ring_slots[rank])
        rows = slots[: plan.live_per_rank]
        blocks, tiles = [], []
        for hop in range(ring):
            source = (rank - hop) % ring
            theirs = torch.from_numpy(plan.ring_slots[source])
            blocks.append((hop, (k[theirs], v[theirs])))
            tiles.append(block_tiles(plan, rank, source, window))
        out, lse = ring_attention_hybrid_masked(q[rows], blocks, tiles, kernel, SIZE**-0.5)
        real = torch.from_numpy(plan.document)[rows] >= 0
        assert torch.allclose(out[real], expected[rows][real], rtol=1e-12, atol=1e-13)
        assert torch.allclose(lse[real], expected_lse[rows][real], rtol=1e-12)
        assert not out[~real].any() and (lse[~real] == -torch.inf).all()
