"""Collectives of 2 and 4 gloo ranks against what one process computes from all ranks' tensors.

Each case is a module-level function that runs on every rank. A rank's tensor is a function of its rank, so
every rank builds all of them, and the whole that it compares with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import eagle3_ds.collectives.gather as gather_module
from eagle3_ds.collectives import (
    Gather,
    RingExchange,
    SeqAllToAll4D,
    all_gather_rows,
    all_gather_tensor,
    all_to_all_4D,
    gather_outputs_and_unpad,
    heads_to_sequence,
    reduce_scatter_rows,
    sequence_to_heads,
    start_sequence_to_heads,
)
from eagle3_ds.collectives.agreement import sum_reals_over_ranks
from judge.collective_calls import CollectiveCalls
from judge.ranks import RankFailure, RankPools

pytestmark = pytest.mark.ranks
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def share(rank: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def check_autograd(
    on_rank: Callable[[Tensor], Tensor],
    in_one_process: Callable[[list[Tensor]], list[Tensor]],
    shapes: list[list[int]],
) -> None:
    """Output and gradient of this rank equal those of the whole computation, the loss being the sum over all
    ranks.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    everyone = [share(r, *shapes[r]).requires_grad_() for r in range(size)]
    outputs = in_one_process(everyone)
    weights = [share(r, *outputs[r].shape, seed=1) for r in range(size)]
    loss = sum(((o * w).sum() for o, w in zip(outputs, weights, strict=True)), torch.zeros(()))
    grads = torch.autograd.grad(loss, everyone)
    mine = everyone[rank].detach().clone().requires_grad_()
    output = on_rank(mine)
    torch.testing.assert_close(output, outputs[rank], rtol=0, atol=0)
    (grad,) = torch.autograd.grad((output * weights[rank]).sum(), mine)
    torch.testing.assert_close(grad, grads[rank], rtol=1e-13, atol=1e-13)


def whole_sequence_to_heads(xs: list[Tensor]) -> list[Tensor]:
    return list(torch.cat(xs, 0).chunk(len(xs), dim=1))


def exchange_case() -> None:
    world, size = dist.group.WORLD, dist.get_world_size()
    for dtype in DTYPES:
        x = share(dist.get_rank(), 3, 2 * size, 5, dtype=dtype)
        heads = sequence_to_heads(x, world)
        wanted = whole_sequence_to_heads([share(r, 3, 2 * size, 5, dtype=dtype) for r in range(size)])
        assert torch.equal(heads, wanted[dist.get_rank()]) and heads.is_contiguous()
        assert torch.equal(start_sequence_to_heads(x, world).wait(), heads)
        back = heads_to_sequence(heads, world)
        assert torch.equal(back, x) and back.is_contiguous()


def strided_exchange_case() -> None:
    """Rows that are slices of wider ones, as after a split of q, k and v."""
    size = dist.get_world_size()
    x = share(dist.get_rank(), 3, 2 * size, 10)[..., ::2]
    assert torch.equal(
        sequence_to_heads(x, dist.group.WORLD), sequence_to_heads(x.contiguous(), dist.group.WORLD)
    )
    y = share(dist.get_rank(), 2 * size, 3, 10)[..., ::2]
    assert torch.equal(
        heads_to_sequence(y, dist.group.WORLD), heads_to_sequence(y.contiguous(), dist.group.WORLD)
    )


def all_to_all_4d_case() -> None:
    world, size = dist.group.WORLD, dist.get_world_size()
    check_autograd(
        lambda x: SeqAllToAll4D.apply(world, x, 2, 1),
        lambda xs: list(torch.cat(xs, 1).chunk(size, dim=2)),
        [[2, 3, 2 * size, 5]] * size,
    )
    check_autograd(
        lambda x: SeqAllToAll4D.apply(world, x, 1, 2),
        lambda xs: list(torch.cat(xs, 2).chunk(size, dim=1)),
        [[2, 3 * size, 2, 5]] * size,
    )
    x = share(dist.get_rank(), 2, 3, 2 * size, 5)
    assert torch.equal(all_to_all_4D(all_to_all_4D(x, 2, 1, world), 1, 2, world), x)


def rows_case() -> None:
    world, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    for dtype in DTYPES:
        gathered = all_gather_rows(share(rank, 3, 2, 4, dtype=dtype)[:, ::2], world)
        assert torch.equal(gathered, torch.cat([share(r, 3, 2, 4, dtype=dtype)[:, ::2] for r in range(size)]))
        scattered = reduce_scatter_rows(share(rank, 3 * size, 2, dtype=dtype), world)
        total = sum(share(r, 3 * size, 2, dtype=dtype).double() for r in range(size))
        assert isinstance(total, Tensor) and scattered.dtype == dtype
        # bf16 sums round after every rank.
        rtol, atol = (2e-2, 4e-2) if dtype == torch.bfloat16 else (1e-5, 1e-5)
        torch.testing.assert_close(scattered, total[3 * rank : 3 * rank + 3].to(dtype), rtol=rtol, atol=atol)


def older_names_case() -> None:
    """What torch 2.11 and 2.12 call all_gather_single and reduce_scatter_single."""
    newer = gather_module._all_gather_single, gather_module._reduce_scatter_single
    gather_module._all_gather_single = dist.all_gather_into_tensor
    gather_module._reduce_scatter_single = dist.reduce_scatter_tensor
    try:
        rows_case()
    finally:
        gather_module._all_gather_single, gather_module._reduce_scatter_single = newer


def gather_case(dim: int, sizes: list[int] | None) -> None:
    world, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    shapes = [[2, 3, 4] for _ in range(size)]
    for r in range(size):
        shapes[r][dim] = sizes[r] if sizes else 3
    whole = torch.cat([share(r, *shapes[r]) for r in range(size)], dim)
    assert torch.equal(all_gather_tensor(share(rank, *shapes[rank]), world, dim, sizes), whole)
    check_autograd(
        lambda x: Gather.apply(world, x, dim, sizes), lambda xs: [torch.cat(xs, dim)] * size, shapes
    )


def unpad_case(gather_dim: int, unpad_dim: int | None, padding: int) -> None:
    world, size = dist.group.WORLD, dist.get_world_size()

    def whole(xs: list[Tensor]) -> list[Tensor]:
        gathered = torch.cat(xs, gather_dim)
        dim = gather_dim if unpad_dim is None else unpad_dim
        return [gathered.narrow(dim, 0, gathered.shape[dim] - padding)] * size

    check_autograd(
        lambda x: gather_outputs_and_unpad(x, gather_dim, world, unpad_dim, padding),
        whole,
        [[2, 3, 4]] * size,
    )


def ring_case() -> None:
    """Two hops under way at once, tensors of two dtypes, and the sent ones overwritten before they arrive."""
    world = dist.group.WORLD
    assert world is not None
    check_ring(world)


def ring_of_three_case() -> None:
    """An odd ring, of ranks 1, 2 and 3."""
    group = dist.new_group([1, 2, 3])
    if dist.get_rank() > 0:
        check_ring(group)


def check_ring(group: dist.ProcessGroup) -> None:
    rank, size = group.rank(), group.size()

    def block(owner: int, seed: int) -> list[Tensor]:
        shapes = ((3, 4), (2,), (0, 3), (5, 1))
        dtypes = (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16)
        return [share(owner, *s, seed=seed, dtype=d) for s, d in zip(shapes, dtypes, strict=True)]

    exchange = RingExchange(group)
    first, second = block(rank, 0), block(rank, 1)
    for hop in range(1, size + 1):
        pending = [exchange.start(first), exchange.start(second)]
        for tensor in (*first, *second):
            tensor.zero_()
        first, second = (transfer.wait() for transfer in pending)
        for received, seed in ((first, 0), (second, 1)):
            wanted = block((rank - hop) % size, seed)
            assert all(torch.equal(a, b) for a, b in zip(received, wanted, strict=True))


def subgroup_case() -> None:
    """Groups that are not the world, and whose ranks are not 0..n-1: the odd and the even ranks of four."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    rank = dist.get_rank()
    group, members = groups[rank % 2], [rank % 2, rank % 2 + 2]
    place = members.index(rank)
    shares = [share(r, 2, 4, 3) for r in members]
    assert torch.equal(sequence_to_heads(shares[place], group), whole_sequence_to_heads(shares)[place])
    assert torch.equal(all_gather_tensor(shares[place], group, 1), torch.cat(shares, 1))
    uneven = [share(r, 1 + r) for r in members]
    assert torch.equal(
        all_gather_tensor(uneven[place], group, 0, [1 + r for r in members]), torch.cat(uneven)
    )
    (received,) = RingExchange(group).start([shares[place]]).wait()
    assert torch.equal(received, shares[1 - place])


def bad_input_case() -> None:
    world, size = dist.group.WORLD, dist.get_world_size()
    x = torch.zeros(size + 1, size + 1, 2)
    refused: Sequence[tuple[str, Callable[[], Any]]] = (
        (f"{size + 1} heads cannot be shared by {size} ranks", lambda: sequence_to_heads(x, world)),
        (f"{size + 1} rows cannot be shared by {size} ranks", lambda: heads_to_sequence(x, world)),
        (f"{size + 1} rows cannot be scattered to {size} ranks", lambda: reduce_scatter_rows(x, world)),
        (f"has 1 entries for {size} ranks", lambda: all_gather_tensor(x, world, 0, [size + 1])),
        (f"whose share has {size + 1}", lambda: all_gather_tensor(x, world, 0, [size] * size)),
        ("padding is -1, but dim 1", lambda: gather_outputs_and_unpad(x, 0, world, 1, -1)),
        ("padding is 99, but dim 0", lambda: gather_outputs_and_unpad(x, 0, world, None, 99)),
    )
    for message, call in refused:
        with pytest.raises(ValueError, match=message):
            call()


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError("this rank is broken")
    dist.barrier()


def my_rank_and_threads(offset: int) -> tuple[int, int]:
    return dist.get_rank() + offset, torch.get_num_threads()


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(
    "case",
    [
        exchange_case,
        strided_exchange_case,
        all_to_all_4d_case,
        rows_case,
        older_names_case,
        ring_case,
        bad_input_case,
    ],
)
def test_every_rank_agrees_with_one_process(
    run_ranks: RankPools, world_size: int, case: Callable[[], None]
) -> None:
    run_ranks(world_size, case)


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("sizes", [None, [3, 1, 0, 4]], ids=["even", "uneven"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_gather(run_ranks: RankPools, world_size: int, sizes: list[int] | None, dim: int) -> None:
    run_ranks(world_size, gather_case, dim, sizes and sizes[:world_size])


@pytest.mark.parametrize(
    ("gather_dim", "unpad_dim", "padding"), [(1, None, 0), (1, None, 4), (1, 1, 2), (0, 2, 1), (-1, -1, 3)]
)
@pytest.mark.parametrize("world_size", [2, 4])
def test_gather_and_unpad(
    run_ranks: RankPools, world_size: int, gather_dim: int, unpad_dim: int | None, padding: int
) -> None:
    run_ranks(world_size, unpad_case, gather_dim, unpad_dim, padding)


def test_groups_that_are_not_the_world(run_ranks: RankPools) -> None:
    run_ranks(4, subgroup_case)


def test_ring_of_three(run_ranks: RankPools) -> None:
    run_ranks(4, ring_of_three_case)


def test_a_group_of_none_is_one_rank() -> None:
    x = share(0, 2, 3, 4, 5)
    assert torch.equal(sequence_to_heads(x[0], None), x[0]) and torch.equal(
        heads_to_sequence(x[0], None), x[0]
    )
    assert torch.equal(all_to_all_4D(x, 2, 1, None), x)
    assert torch.equal(all_gather_rows(x, None), x) and torch.equal(reduce_scatter_rows(x, None), x)
    assert torch.equal(all_gather_tensor(x, None, 1), x)
    assert torch.equal(gather_outputs_and_unpad(x, 1, None, None, 1), x[:, :-1])
    transfer = RingExchange(None).start([x, x.float()])
    assert all(torch.equal(a, b) for a, b in zip(transfer.wait(), (x, x.float()), strict=True))
    y = x.clone().requires_grad_()
    output = Gather.apply(None, SeqAllToAll4D.apply(None, y, 1, 2), 0)
    assert torch.equal(torch.autograd.grad((output * x).sum(), y)[0], x)


def test_all_to_all_4d_refuses_other_dims() -> None:
    with pytest.raises(ValueError, match="scatter_idx 0, gather_idx 1"):
        all_to_all_4D(torch.zeros(1, 2, 3, 4), 0, 1, None)
    with pytest.raises(ValueError, match=r"the input is \(2, 3, 4\)"):
        all_to_all_4D(torch.zeros(2, 3, 4), 2, 1, None)


def summed_reals(own: list[list[float]]) -> list[float]:
    mine = torch.tensor(own[dist.get_rank()], dtype=torch.float64)
    return sum_reals_over_ranks(mine, torch.device("cpu")).tolist()


def test_reals_are_summed_to_48_bits_and_equally_on_all_ranks(run_ranks: RankPools) -> None:
    third, large, infinite = 1 / 3, float(2**40 + 1), float("inf")
    own = [[third, large, infinite, -1e-300], [1e-9, -3.0, 1.0, float("nan")]]
    first, second = run_ranks(2, summed_reals, own)
    assert str(first) == str(second)
    assert first[0] == pytest.approx(third + 1e-9, rel=2**-46)
    assert first[1] == large - 3.0
    assert first[2] == infinite
    assert math.isnan(first[3])


def test_a_dtype_that_some_backend_refuses_is_not_sent(run_ranks: RankPools) -> None:
    with pytest.raises(RankFailure, match="allreduce_ sends torch.float64"):
        run_ranks(2, send_doubles)


def send_doubles() -> None:
    with CollectiveCalls({}, everywhere=True):
        dist.all_reduce(torch.ones(2, dtype=torch.float64))


def test_a_broken_rank_fails_the_test_and_the_pool_recovers(run_ranks: RankPools) -> None:
    assert run_ranks(2, my_rank_and_threads, 10) == [(10, 1), (11, 1)]
    with pytest.raises(RankFailure, match=r"rank 1 of 2 raised(?s:.*)fail_on(?s:.*)this rank is broken"):
        run_ranks(2, fail_on, 1)
    assert run_ranks(2, my_rank_and_threads, 0) == [(0, 1), (1, 1)]
