"""The plan's tiles against the dense mask of the definition, for every ring rank, with and without a sliding
window.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate, pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eagle3_ds.attention.tiles import block_tiles, gathered_tiles
from eagle3_ds.kernels import AttentionKernel, Tile, select_kernel, varlen
from eagle3_ds.kernels.blockwise import BlockwiseKernel
from eagle3_ds.kernels.cuda import CudaKernel
from eagle3_ds.kernels.cudnn import CudnnKernel
from eagle3_ds.kernels.halves import cut_in_halves
from eagle3_ds.kernels.tile import cut_into_blocks, cut_into_powers
from eagle3_ds.layout import SpanPlan
from tests.unit.span_plans import span_plans

plans = span_plans(longest=40, documents=8, ulysses=3, chunks=6)
windows = st.none() | st.integers(1, 50)


def dense_mask(plan: SpanPlan, window: int | None) -> np.ndarray:
    """[padded_length, padded_length]: slot i sees key j iff same document, j <= i and i - j < window."""
    slot = np.arange(plan.padded_length)
    back = slot[:, None] - slot
    same = (plan.document[:, None] == plan.document) & (plan.document >= 0)
    return same & (back >= 0) & (back < (window or plan.padded_length))


def live_slots(plan: SpanPlan, rank: int) -> np.ndarray:
    """Slots of a ring rank's live columns."""
    return plan.live[rank].reshape(-1)


def shown(tiles: Iterable[Tile], num_rows: int, num_keys: int) -> np.ndarray:
    """How often the tiles show each key to each row, straight from the docstring of `Tile`."""
    times = np.zeros((num_rows, num_keys), dtype=np.int64)
    for tile in tiles:
        tile.check()
        for row in range(tile.q_start, tile.q_stop):
            own = tile.k_stop - (tile.q_stop - row)
            first = tile.k_start if tile.left is None else max(tile.k_start, own - tile.left)
            stop = own + 1 if tile.causal else tile.k_stop
            assert first < stop, f"row {row} of {tile} is empty"
            times[row, first:stop] += 1
    return times


def assert_no_key_is_idle(tiles: Iterable[Tile], num_rows: int, num_keys: int) -> None:
    for tile in tiles:
        assert (shown([tile], num_rows, num_keys)[:, tile.k_start : tile.k_stop] > 0).any(0).all(), tile


@settings(deadline=None)
@given(plans, windows, st.booleans())
def test_gathered_tiles_are_the_dense_mask(plan: SpanPlan, window: int | None, live: bool) -> None:
    mask = dense_mask(plan, window)
    for rank in range(plan.ring):
        tiles = gathered_tiles(plan, rank, window, live)
        slots = live_slots(plan, rank) if live else plan.ring_slots[rank]
        assert (shown(tiles, len(slots), plan.padded_length) == mask[slots]).all()
        assert_no_key_is_idle(tiles, len(slots), plan.padded_length)


@settings(deadline=None)
@given(plans, windows, st.integers(1, 40))
def test_blocks_of_a_tile_show_the_same(plan: SpanPlan, window: int | None, most: int) -> None:
    size = plan.ulysses * plan.live_per_rank
    for rank in range(plan.ring):
        for source in (None, *range(plan.ring)):
            tiles = (
                gathered_tiles(plan, rank, window)
                if source is None
                else block_tiles(plan, rank, source, window)
            )
            num_keys = plan.padded_length if source is None else plan.columns_per_ring_rank
            blocks = [block for tile in tiles for block in cut_into_blocks(tile, most)]
            assert (shown(blocks, size, num_keys) == shown(tiles, size, num_keys)).all()
            for block in blocks:
                assert block.num_queries <= most or (block.left is not None and not block.causal)
                assert block.num_keys < 2 * most or block.left is not None


@settings(deadline=None)
@given(plans, windows, st.booleans())
def test_halves_show_the_same(plan: SpanPlan, window: int | None, gathered: bool) -> None:
    size = plan.ulysses * plan.live_per_rank
    for rank in range(plan.ring):
        tiles = gathered_tiles(plan, rank, window) if gathered else block_tiles(plan, rank, 0, window)
        num_keys = plan.padded_length if gathered else plan.columns_per_ring_rank
        halves = cut_in_halves(tiles)
        assert (shown(halves, size, num_keys) == shown(tiles, size, num_keys)).all()
        for tile in halves:
            tile.check()


@settings(deadline=None)
@given(plans, windows, st.booleans(), st.integers(0, 3), st.integers(0, 3))
def test_powers_show_the_same(
    plan: SpanPlan, window: int | None, gathered: bool, lower: int, more: int
) -> None:
    least, largest, size = 2**lower, 2 ** (lower + more), plan.ulysses * plan.live_per_rank
    for rank in range(plan.ring):
        tiles = gathered_tiles(plan, rank, window) if gathered else block_tiles(plan, rank, 0, window)
        num_keys = plan.padded_length if gathered else plan.columns_per_ring_rank
        pieces = [(tile, piece) for tile in tiles for piece in cut_into_powers(tile, least, largest)]
        assert (shown([piece for _, piece in pieces], size, num_keys) == shown(tiles, size, num_keys)).all()
        for tile, piece in pieces:
            piece.check()
            rows, keys = piece.num_queries, piece.num_keys
            whole = rows % least == keys % least == 0 and rows.bit_count() == keys.bit_count() == 1
            remains = piece == tile or rows < least or keys < least
            assert remains or (whole and rows <= largest and (rows == keys or not piece.causal))


def test_blocks_of_cudnn_have_few_sizes_and_nearly_all_pairs() -> None:
    """Documents of lengths drawn at random, in forward and in backward, whose calls are cut further."""
    lengths = np.random.default_rng(1).integers(1_000, 140_000, 40).tolist()
    starts = [0, *accumulate(lengths)]
    kernel = CudnnKernel()
    tiles = [Tile(a, b, a, b, True) for a, b in pairwise(starts)]
    for most in (None, kernel.backward_rows(4096), kernel.backward_rows(5120)):
        parts = kernel.arranged(tiles)
        if most is not None:
            parts = [block for tile in parts for block in cut_into_blocks(tile, most)]
        calls = kernel.calls(parts, most)
        blocks = [call.tiles[0] for call in calls if kernel._is_block(*call.tiles)]
        sizes = {(tile.num_queries, tile.num_keys, tile.causal) for tile in blocks}
        assert len(sizes) <= 44
        pairs = sum(t.num_queries * t.num_keys // (2 if t.causal else 1) for t in blocks)
        assert pairs > 0.96 * sum(length * length / 2 for length in lengths)


def test_answers_of_a_long_document_are_a_few_calls() -> None:
    """Of 256 turns of 512 tokens the last 128 are live, in two documents; the flash kernels' own calls."""
    turns, answer, turn = 256, 128, 512
    tiles = [
        Tile(i * answer, (i + 1) * answer, i // 128 * 128 * turn, (i + 1) * turn, True) for i in range(turns)
    ]
    calls = CudaKernel().calls(cut_in_halves(tiles))
    # One of what each answer has for itself, and one for each depth of the halves of 128.
    assert len(calls) == 1 + 7
    for call in calls:
        for before, after in pairwise(call.tiles):
            assert before.q_stop <= after.q_start and before.k_stop <= after.k_start
    pairs = sum(tile.num_queries * tile.num_keys for call in calls for tile in call.tiles)
    assert pairs == sum(tile.num_queries * tile.num_keys for tile in tiles)
    few = [Tile(0, 2048, 0, 4096, True), Tile(2048, 4096, 0, 8192, True), Tile(4096, 6144, 0, 12288, True)]
    assert cut_in_halves(few) == few


@settings(deadline=None)
@given(plans, windows)
def test_block_tiles_are_the_dense_mask(plan: SpanPlan, window: int | None) -> None:
    mask, sizes = dense_mask(plan, window), (plan.ulysses * plan.live_per_rank, plan.columns_per_ring_rank)
    for rank in range(plan.ring):
        for source in range(plan.ring):
            tiles = block_tiles(plan, rank, source, window)
            wanted = mask[np.ix_(live_slots(plan, rank), plan.ring_slots[source])]
            assert (shown(tiles, *sizes) == wanted).all()
            assert_no_key_is_idle(tiles, *sizes)


KERNELS = [select_kernel(name, torch.device("cpu"), torch.float64, 8) for name in ("cpu", "blockwise")]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@settings(deadline=None, max_examples=30)
@given(plan=plans, window=windows, gathered=st.booleans(), block=st.sampled_from([3, 2**13]))
def test_kernels_on_random_plans_equal_a_dense_mask(
    kernel: AttentionKernel, plan: SpanPlan, window: int | None, gathered: bool, block: int
) -> None:
    """One rank's rows, forward and raw gradients, against a masked softmax in fp64."""
    rank, source = plan.ring - 1, 0
    if gathered:
        tiles, key_slots = gathered_tiles(plan, rank, window), np.arange(plan.padded_length)
    else:
        tiles, key_slots = block_tiles(plan, rank, source, window), plan.ring_slots[source]
    mask = torch.from_numpy(dense_mask(plan, window)[np.ix_(live_slots(plan, rank), key_slots)])
    generator = torch.Generator().manual_seed(plan.padded_length)
    q, k, v, dout = (
        torch.randn(length, heads, 8, generator=generator, dtype=torch.float64)
        for length, heads in ((mask.shape[0], 2), (mask.shape[1], 1), (mask.shape[1], 1), (mask.shape[0], 2))
    )
    out, lse, *grads = dense_attention(q, k, v, dout, mask)
    actual_out, actual_lse = kernel.forward(q, k, v, tiles, 0.4)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    # Of a kernel that folds, the one that it folds for; those without calls have no such limit.
    with mock.patch.object(getattr(kernel, "kernel", kernel), "backward_rows", lambda _: block, create=True):
        dq = kernel.backward(dout, q, k, v, lse, (dout * out).sum(-1), tiles, 0.4, dk, dv)
    for actual, wanted in zip((actual_out, actual_lse, dq, dk, dv), (out, lse, *grads), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-11)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv of one masked softmax; a row without a key has out 0 and lse -inf."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    scores = torch.einsum("ihd,jd->hij", q, k[:, 0]) * 0.4
    scores = scores.masked_fill(~mask, -torch.inf)
    weights = torch.where(mask.any(1)[:, None], scores, torch.zeros_like(scores)).softmax(-1) * mask
    out = torch.einsum("hij,jd->ihd", weights, v[:, 0])
    grads = torch.autograd.grad((out * dout).sum(), (q, k, v))
    return out.detach(), scores.logsumexp(-1).T.detach(), *grads


@pytest.mark.parametrize("window", [0, -3])
def test_a_window_without_a_token_is_refused(window: int) -> None:
    plan = SpanPlan.make([4, 3])
    with pytest.raises(ValueError, match=f"window = {window}: .* 1 token or more"):
        gathered_tiles(plan, 0, window)
    with pytest.raises(ValueError, match=f"window = {window}"):
        block_tiles(plan, 0, 0, window)


@settings(deadline=None)
@given(plans, windows, st.none() | st.integers(1, 60))
def test_calls_of_a_varlen_kernel_share_out_the_tiles(
    plan: SpanPlan, window: int | None, most: int | None
) -> None:
    """Every tile in one call; no row and no key twice in a call; as many calls as a document has chunks, not
    documents.
    """
    for rank in range(plan.ring):
        tiles = gathered_tiles(plan, rank, window)
        calls = CudaKernel().calls(tiles, most)
        assert sorted(tile for call in calls for tile in call.tiles) == sorted(tiles)
        for call in calls:
            for tile, following in pairwise(call.tiles):
                assert tile.q_stop <= following.q_start and tile.k_stop <= following.k_start
            if most is not None and len(call.tiles) > 1:
                assert sum(tile.num_queries for tile in call.tiles) <= most
                assert sum(tile.num_keys for tile in call.tiles) <= most
        documents = [run.document_start for run in plan.live_runs(rank)]
        if window is None and most is None:
            assert len(calls) == max(map(documents.count, documents), default=0)


@pytest.mark.parametrize("length", [2**19])
def test_planning_a_backward_takes_a_time_that_grows_with_its_blocks(length: int) -> None:
    """A document of 512k tokens is 8,256 blocks, each a call of its own. Looking at every earlier call for
    each block took minutes.
    """
    looks = 0
    takes = varlen._Group.takes

    def counted(group: varlen._Group, tile: Tile, most: int | None) -> bool:
        nonlocal looks
        looks += 1
        return takes(group, tile, most)

    blocks = list(cut_into_blocks(Tile(0, length, 0, length, True), 4096))
    with mock.patch.object(varlen._Group, "takes", counted):
        calls = CudaKernel().calls(blocks, 4096)
        assert len(calls) == len(blocks) == 8256
        assert looks <= len(blocks)
        looks = 0
        # Blocks that leave a little room keep their calls open, but no block looks at more than a few.
        documents = [Tile(at, at + 3000, at, at + 3000, True) for at in range(0, length, 3000)]
        short = Tile(length, length + 1, length, length + 1, True)
        calls = CudaKernel().calls([*documents, short], 4096)
        assert len(calls) == len(documents)
        assert looks <= 65 * len(documents)


def test_a_backward_is_planned_once_for_all_steps() -> None:
    kernel, generator = BlockwiseKernel(), torch.Generator()
    q, k, v, dout = (torch.randn(16, 2, 8, generator=generator, dtype=torch.float64) for _ in range(4))
    tiles = [Tile(0, 16, 0, 16, True)]
    with mock.patch.object(
        BlockwiseKernel, "calls", autospec=True, side_effect=BlockwiseKernel.calls
    ) as planned:
        for _ in range(3):
            out, lse = kernel.forward(q, k, v, tiles, 1.0)
            delta = (dout * out).sum(-1)
            sums = torch.zeros_like(k), torch.zeros_like(v)
            kernel.backward(dout, q, k, v, lse, delta, tiles, 1.0, *sums)
    assert planned.call_count == 2
