"""`python -m benchmarks.large_world`: what one rank of a large world does on its host before its first step.

Worlds of 256 to 4,096 ranks and one document of 1,048,576 tokens, the last quarter of each turn of 4,096
supervised. The product's own functions make, in this process and for a few ranks of each world: the process
groups, on torch's fake backend, which makes a group's object and talks to nobody; the span plan and a rank's
share of it; its attention tiles for both exchanges; the messages that an online target's rows travel in; and
what it reads of a checkpoint that as many ranks have written (large_resume.py).
Seconds are those of the slowest of these ranks on one core. What no single process can see is not in them:
waiting for other ranks, and making NCCL's communicators. DeepSpeed's own groups are not in them either.

Prints a table and writes benchmarks/results/large_world.json. The exit status is 1 if a rank is in a wrong
group, a slot is dealt to no rank or to two, a query-key pair is in no tile or in two, one rank sends another
number of rows than the other awaits, or a rank reads other elements of the checkpoint than were written.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar
from unittest import mock

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.large_resume import Resume, resume_world
from eagle3_ds.attention.tiles import block_tiles, gathered_tiles
from eagle3_ds.kernels import Tile
from eagle3_ds.layout import SpanPlan
from eagle3_ds.topology.groups import Topology, maybe_setup_distributed
from eagle3_ds.topology.mesh import Mesh
from eagle3_ds.topology.mpu import ZeroGroupMpu
from eagle3_ds.train.row_exchange import RowExchange
from judge.result_file import FOLDER, print_table, write_result

LENGTH, TURN, TTT_STEPS = 1_048_576, 4_096, 7
WORLDS = (Mesh(4, 8, 8), Mesh(16, 8, 8), Mesh(64, 8, 8), Mesh(8, 64, 8), Mesh(1, 512, 8))
Made = TypeVar("Made")


@dataclass
class Groups:
    """The process groups of one rank.

    Attributes:
        made: calls of `new_group` on each rank: all ranks make every group, whoever is in it.
        member_of: groups that the rank is in, that of all ranks included.
        seconds: to make them.
        made_for_zero, seconds_for_zero: what `zero_group: draft_dp` makes beyond them.
        faults: groups that are not those of the mesh.
    """

    made: int
    member_of: int
    seconds: float
    made_for_zero: int
    seconds_for_zero: float
    faults: list[str]


@dataclass
class Share:
    """What one sp rank makes of the span plan.

    Attributes:
        tiles: of its live columns against gathered keys.
        block_tiles: of them against the blocks of all hops of `kv_exchange: ring`.
        receives_from: sp ranks that send it rows of an online target, itself included.
        view_seconds, tile_seconds, message_seconds: to make its slots and rows, both kinds of tiles, and the
            message sizes.
        faults: pairs of queries and keys that the tiles do not have once.
    """

    tiles: int
    block_tiles: int
    receives_from: int
    view_seconds: float
    tile_seconds: float
    message_seconds: float
    faults: list[str]


@dataclass
class World:
    """Figures of one world, of the largest or slowest of its ranks that were looked at.

    Attributes:
        groups_made, groups_of_a_rank, groups_made_for_zero: as in `Groups`.
        slots_of_a_rank: of the document, padding included.
        largest_over_mean_work: query-key pairs of a ring rank.
        plan_bytes: of the plan's arrays, which every rank holds whole.
        tiles, block_tiles, receives_from: as in `Share`.
        resume: what going on from a checkpoint takes.
        seconds: by what they go to.
        faults: empty when all is right.
    """

    mesh: Mesh
    groups_made: int
    groups_of_a_rank: int
    groups_made_for_zero: int
    slots_of_a_rank: int
    largest_over_mean_work: float
    plan_bytes: int
    tiles: int
    block_tiles: int
    receives_from: int
    resume: Resume
    seconds: dict[str, float]
    faults: list[str]


def timed(make: Callable[[], Made]) -> tuple[Made, float]:
    """What `make` returns, and the seconds that it took."""
    started = time.perf_counter()
    made = make()
    return made, round(time.perf_counter() - started, 6)


@contextmanager
def _member(rank: int, world_size: int) -> Iterator[None]:
    """This process as one rank of a world whose other ranks are not there."""
    with mock.patch.dict(os.environ, DS_ACCELERATOR="cpu"):
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        try:
            yield
        finally:
            dist.destroy_process_group()


def make_groups(mesh: Mesh, rank: int) -> Groups:
    """Make the groups of one rank, as a run does at its start. This process may be in no other world."""
    with (
        _member(rank, mesh.world_size),
        mock.patch.object(dist, "new_group", wraps=dist.new_group) as new_group,
    ):
        topology, seconds = timed(lambda: maybe_setup_distributed(mesh.ulysses, mesh.ring, mesh.draft_dp))
        made, member_of = new_group.call_count, len(distributed_c10d._world.pg_map)
        faults = _wrong_groups(topology)
        _, seconds_for_zero = timed(lambda: ZeroGroupMpu.create(topology))
        return Groups(made, member_of, seconds, new_group.call_count - made, seconds_for_zero, faults)


def _wrong_groups(topology: Topology) -> list[str]:
    """Groups that do not hold the ranks which differ from this one along their axis alone."""
    mesh, place = topology.mesh, topology.place
    places = [mesh.place(rank) for rank in range(mesh.world_size)]
    expected = {
        "ulysses": [p.rank for p in places if (p.dp_rank, p.ring_rank) == (place.dp_rank, place.ring_rank)],
        "ring": [
            p.rank for p in places if (p.dp_rank, p.ulysses_rank) == (place.dp_rank, place.ulysses_rank)
        ],
        "sp": [p.rank for p in places if p.dp_rank == place.dp_rank],
        "dp": [p.rank for p in places if p.sp_rank == place.sp_rank],
    }
    faults = []
    for axis, ranks in expected.items():
        group = getattr(topology, f"{axis}_group")
        found = [place.rank] if group is None else dist.get_process_group_ranks(group)
        if found != ranks:
            faults.append(f"rank {place.rank} is in the {axis} group {found[:8]}, not in {ranks[:8]}")
    return faults


def supervised(length: int) -> NDArray[np.bool_]:
    """bool [length]: the last quarter of each turn."""
    return np.arange(length) % TURN >= TURN * 3 // 4


def make_share(plan: SpanPlan, sp_rank: int) -> tuple[Share, RowExchange]:
    """What one sp rank makes of the plan, and its messages."""
    ring_rank, ulysses_rank = divmod(sp_rank, plan.ulysses)

    def view() -> None:
        plan.slots(ring_rank, ulysses_rank)
        plan.runs(ring_rank)
        plan.halo_slots(ring_rank, ulysses_rank, TTT_STEPS)
        _ = plan.sequence_order

    def tiles() -> tuple[list[Tile], list[Tile]]:
        blocks = [tile for source in range(plan.ring) for tile in block_tiles(plan, ring_rank, source)]
        return list(gathered_tiles(plan, ring_rank)), blocks

    def messages() -> RowExchange:
        wanted = [
            plan.teacher_slots(ring, ulysses, TTT_STEPS)
            for ring in range(plan.ring)
            for ulysses in range(plan.ulysses)
        ]
        return RowExchange(plan, wanted, sp_rank, None)

    _, view_seconds = timed(view)
    (gathered, blocks), tile_seconds = timed(tiles)
    exchange, message_seconds = timed(messages)
    due = int(plan.ring_work()[ring_rank])
    faults = [
        f"the {name} tiles of ring rank {ring_rank} have {found} pairs, the plan {due}"
        for name, some in (("gathered", gathered), ("block", blocks))
        if (found := sum(map(_pairs, some))) != due
    ]
    received = sum(size > 0 for size in exchange.receive_sizes)
    share = Share(len(gathered), len(blocks), received, view_seconds, tile_seconds, message_seconds, faults)
    return share, exchange


def _pairs(tile: Tile) -> int:
    """Query-key pairs of a tile without a window: of a causal one, whose last row sees its last key, those
    on and below the diagonal.
    """
    rows, keys = tile.num_queries, tile.num_keys
    return rows * keys - (rows * (rows - 1) // 2 if tile.causal else 0)


def plan_world(mesh: Mesh, length: int = LENGTH) -> World:
    """Make groups, plan and shares of the first, the middle and the last rank of a world."""
    ranks = sorted({0, mesh.world_size // 2, mesh.world_size - 1})
    groups = [make_groups(mesh, rank) for rank in ranks]
    live = supervised(length)
    plan, plan_seconds = timed(lambda: SpanPlan.make([length], mesh.ring, mesh.ulysses, live=live))
    sp_ranks = sorted({0, mesh.sp // 2, mesh.sp - 1})
    shares, exchanges = zip(*(make_share(plan, sp_rank) for sp_rank in sp_ranks), strict=True)
    work = plan.ring_work()
    resume = resume_world(mesh.world_size, ranks)
    faults = [fault for made in (*groups, *shares, resume) for fault in made.faults]
    return World(
        mesh=mesh,
        groups_made=groups[0].made,
        groups_of_a_rank=groups[0].member_of,
        groups_made_for_zero=groups[0].made_for_zero,
        slots_of_a_rank=plan.slots_per_rank,
        largest_over_mean_work=round(float(work.max() / work.mean()), 4),
        plan_bytes=plan_bytes(plan),
        tiles=max(share.tiles for share in shares),
        block_tiles=max(share.block_tiles for share in shares),
        receives_from=max(share.receives_from for share in shares),
        resume=resume,
        seconds={
            "groups": max(made.seconds for made in groups),
            "draft_dp's groups": max(made.seconds_for_zero for made in groups),
            "plan": plan_seconds,
            "view": max(share.view_seconds for share in shares),
            "tiles": max(share.tile_seconds for share in shares),
            "messages": max(share.message_seconds for share in shares),
            "resume": resume.seconds,
        },
        faults=faults + wrong_deal(plan) + wrong_messages(sp_ranks, exchanges),
    )


def plan_bytes(plan: SpanPlan) -> int:
    """Of the arrays that a rank holds of the plan, those it has made on the way included."""
    return sum(value.nbytes for value in vars(plan).values() if isinstance(value, np.ndarray))


def wrong_deal(plan: SpanPlan) -> list[str]:
    """The first slot that not exactly one rank holds."""
    dealt = np.bincount(plan.ring_slots.reshape(-1), minlength=plan.padded_length)
    wrong = np.flatnonzero(dealt != 1)
    return [f"slot {wrong[0]} is dealt to {dealt[wrong[0]]} ranks"] if len(wrong) else []


def wrong_messages(sp_ranks: Sequence[int], exchanges: Sequence[RowExchange]) -> list[str]:
    """Messages between these sp ranks, an exchange each, of which the two ends give other sizes."""
    return [
        f"sp rank {sender} sends {sent.send_sizes[receiver]} rows to {receiver}, which awaits "
        f"{received.receive_sizes[sender]}"
        for sender, sent in zip(sp_ranks, exchanges, strict=True)
        for receiver, received in zip(sp_ranks, exchanges, strict=True)
        if sent.send_sizes[receiver] != received.receive_sizes[sender]
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large_world", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the JSON goes")
    options = parser.parse_args(arguments)
    worlds = [plan_world(mesh) for mesh in WORLDS]
    columns = [
        "draft_dp x ring x ulysses", "groups made", "a rank's", "made for draft_dp", "tiles", "block tiles",
        "plan MB", "files opened", "orders read/s", *(f"s, {name}" for name in worlds[0].seconds),
    ]  # fmt: skip
    print_table(f"one rank, a document of {LENGTH:,} tokens", columns, map(_row, worlds))
    body = {
        "length": LENGTH,
        "turn": TURN,
        "ttt_steps": TTT_STEPS,
        "worlds": [asdict(world) for world in worlds],
    }
    path = write_result("large_world", "python -m benchmarks.large_world", body, options.folder)
    faults = [fault for world in worlds for fault in world.faults]
    print(*faults, path, sep="\n")
    return int(bool(faults))


def _row(world: World) -> tuple[object, ...]:
    return (
        " x ".join(str(size) for size in asdict(world.mesh).values()),
        world.groups_made,
        world.groups_of_a_rank,
        world.groups_made_for_zero,
        world.tiles,
        world.block_tiles,
        f"{world.plan_bytes / 1e6:.1f}",
        world.resume.opened,
        f"{world.resume.orders_a_second:.0f}",
        *(f"{seconds:.3f}" for seconds in world.seconds.values()),
    )


if __name__ == "__main__":
    sys.exit(main())
