"""The groups of the mesh on real ranks: who sums with whom, and what DeepSpeed is told."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from eagle3_ds.topology import Mesh, ZeroGroupMpu, maybe_setup_distributed
from judge.ranks import RankPools

pytestmark = pytest.mark.ranks


def sums(ulysses: int, ring: int) -> dict[str, float | int | None]:
    """The sum of 2**rank over each group of this rank: it spells the group's members."""
    topology = maybe_setup_distributed(ulysses, ring)
    found: dict[str, float | int | None] = {}
    for name in ("ulysses", "ring", "sp", "dp", "world"):
        group = getattr(topology, f"{name}_group")
        value = torch.tensor(2.0**topology.place.rank)
        if group is not None:
            dist.all_reduce(value, group=group)
        found[name] = value.item() if group is not None else None
    mpu = ZeroGroupMpu.create(topology)
    value = torch.tensor(2.0**topology.place.rank)
    dist.all_reduce(value, group=mpu.get_data_parallel_group())
    found["mpu_dp"] = value.item()
    found["mpu_dp_rank"] = mpu.get_data_parallel_rank()
    found["mpu_dp_size"] = mpu.get_data_parallel_world_size()
    value = torch.tensor(2.0**topology.place.rank)
    dist.all_reduce(value, group=mpu.get_model_parallel_group())
    found["mpu_model"] = value.item()
    return found


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (4, 1)])
def test_groups_hold_the_ranks_of_the_mesh(run_ranks: RankPools, ring: int, ulysses: int) -> None:
    mesh = Mesh.from_world(4, ring, ulysses)
    for rank, found in enumerate(run_ranks(4, sums, ulysses, ring)):
        for name, groups in (
            ("ulysses", mesh.ulysses_groups()),
            ("ring", mesh.ring_groups()),
            ("sp", mesh.sp_groups()),
            ("dp", mesh.dp_groups()),
            ("world", [list(range(4))]),
        ):
            group = next(group for group in groups if rank in group)
            expected = None if len(group) == 1 else sum(2.0**other for other in group)
            assert found[name] == expected, (rank, name)
        group = next(group for group in mesh.dp_groups() if rank in group)
        assert found["mpu_dp"] == sum(2.0**other for other in group)
        assert (found["mpu_dp_rank"], found["mpu_dp_size"]) == (mesh.place(rank).dp_rank, len(group))
        assert found["mpu_model"] == 2.0**rank
