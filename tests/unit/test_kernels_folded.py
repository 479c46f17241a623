"""The folded kernel against the dense one: the tiles of any span plan, gathered or by blocks of a ring."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from eagle3_ds.attention.tiles import block_tiles, gathered_tiles
from eagle3_ds.kernels import AttentionKernel, FoldedKernel, Tile, select_kernel
from eagle3_ds.kernels.base import TileKernel
from eagle3_ds.kernels.folded import _parted
from eagle3_ds.kernels.reference import ReferenceKernel
from eagle3_ds.layout import SpanPlan
from tests.unit.span_plans import span_plans

HEAD_DIM = 4


def compare(
    tiles: list[Tile], rows: int, keys: int, heads: tuple[int, int], inner: str, dtype: torch.dtype
) -> float:
    """The largest relative difference of out, lse, dq, dk and dv from the dense kernel's, in fp64."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, dout = (random(rows, heads[0], HEAD_DIM) for _ in range(2))
    k, v = (random(keys, heads[1], HEAD_DIM) for _ in range(2))
    # Statistics of a softmax that has seen more keys.
    more, delta = random(rows, heads[0]), random(rows, heads[0])
    found = []
    folded = FoldedKernel(select_kernel(inner, torch.device("cpu"), dtype, HEAD_DIM))
    kernels: list[tuple[AttentionKernel, torch.dtype]] = [(ReferenceKernel(), torch.float64), (folded, dtype)]
    for kernel, kind in kernels:
        in_q, in_k, in_v = (x.to(kind) for x in (q, k, v))
        out, lse = kernel.forward(in_q, in_k, in_v, tiles, 0.5)
        whole = torch.logaddexp(lse.double(), more).to(lse.dtype)
        # What is there already stays.
        sums = [torch.ones(keys, heads[1], HEAD_DIM, dtype=lse.dtype) for _ in range(2)]
        dk, dv = sums
        dq = kernel.backward(
            dout.to(kind), in_q, in_k, in_v, whole, delta.to(whole.dtype), tiles, 0.5, dk, dv
        )
        found.append([x.double() for x in (out, lse.exp(), dq, *sums)])
        assert out.dtype == kind and out.shape == q.shape
    return max(float((a - b).norm() / a.norm().clamp(min=1e-9)) for a, b in zip(*found, strict=True))


@given(
    span_plans(longest=50, documents=4, ring=3, ulysses=2),
    st.none() | st.integers(1, 20),
    st.sampled_from(((8, 2), (4, 4), (6, 1))),
    st.sampled_from(("blockwise", "cpu")),
    st.data(),
)
def test_it_shows_what_the_tiles_show(
    plan: SpanPlan, window: int | None, heads: tuple[int, int], inner: str, data: st.DataObject
) -> None:
    rank, source = (data.draw(st.integers(0, plan.ring - 1)) for _ in range(2))
    rows = plan.live_per_rank * plan.ulysses
    gathered = list(gathered_tiles(plan, rank, window))
    assert compare(gathered, rows, plan.padded_length, heads, inner, torch.float64) <= 1e-12
    of_block = list(block_tiles(plan, rank, source, window))
    assert compare(of_block, rows, plan.columns_per_ring_rank, heads, inner, torch.float64) <= 1e-12


SCATTERED = [Tile(row, row + 1, 0, 40 + 3 * row, True) for row in range(20)]
LONG = Tile(20, 60, 0, 140, True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_short_and_long_tiles_in_one_call(dtype: torch.dtype) -> None:
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for tiles in (SCATTERED, [LONG], [*SCATTERED, LONG], []):
        assert compare(tiles, 61, 140, (8, 2), "cpu", dtype) <= tolerance


def test_half_precision_rounds_once() -> None:
    assert compare([*SCATTERED, LONG], 61, 140, (8, 2), "blockwise", torch.bfloat16) <= 2e-2


@given(st.lists(st.integers(1, 60), min_size=1, max_size=60), st.integers(2, 5))
@example([40] * 40, 4)
def test_neighbours_share_one_tile_and_every_pair_is_shown_once(gaps: list[int], group: int) -> None:
    stops = torch.tensor(gaps).cumsum(0).tolist()
    tiles = [Tile(row, row + 1, 0, stop, True) for row, stop in enumerate(stops)]
    short, long = _parted(tiles, group)
    assert not long
    shown = torch.zeros(len(stops) * group, stops[-1], dtype=torch.int64)
    for tile in short:
        assert not tile.causal and tile.left is None
        shown[tile.q_start : tile.q_stop, tile.k_start : tile.k_stop] += 1
    expected = torch.arange(stops[-1]) < torch.tensor(stops).repeat_interleave(group)[:, None]
    assert torch.equal(shown, expected.long())


def test_rows_far_into_a_document_are_joined() -> None:
    tiles = [Tile(row, row + 1, 0, 1000 + 10 * row, True) for row in range(32)]
    wide = [tile for tile in _parted(tiles, 4)[0] if tile.num_keys >= 1000]
    assert [tile.num_queries for tile in wide] == [64, 64]


def test_it_is_the_kernel_that_it_folds() -> None:
    inner = select_kernel("blockwise", torch.device("cpu"), torch.float32, HEAD_DIM)
    assert isinstance(inner, TileKernel)
    folded = FoldedKernel(inner)
    assert folded.name == "blockwise"
    assert folded.unavailable_reason(torch.device("cpu"), torch.float32, 4) is None
