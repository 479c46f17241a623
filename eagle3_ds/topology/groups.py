"""The process groups of the mesh. They are one frozen object, passed as an argument; there is no global."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from eagle3_ds.device.found import detect_accelerator, take_device
from eagle3_ds.device.world import join_world
from eagle3_ds.launch.announced import announcement
from eagle3_ds.topology.mesh import Mesh, Place


@dataclass(frozen=True)
class Topology:
    """This rank's place in the mesh, its device and its process groups.

    Attributes:
        ulysses_group, ring_group: the ranks along one sequence-parallel axis.
        sp_group: the ranks that share one packed sequence, in the order of sp_rank.
        dp_group: the ranks with the same sp_rank, which hold the same part of different sequences.
        world_group: all ranks.

    A group of one rank is None. The properties have the names of RFC 338.
    """

    mesh: Mesh
    place: Place
    device: torch.device
    ulysses_group: dist.ProcessGroup | None = None
    ring_group: dist.ProcessGroup | None = None
    sp_group: dist.ProcessGroup | None = None
    dp_group: dist.ProcessGroup | None = None
    world_group: dist.ProcessGroup | None = None

    @property
    def sp_ring_degree(self) -> int:
        return self.mesh.ring

    @property
    def sp_ulysses_degree(self) -> int:
        return self.mesh.ulysses

    @property
    def sp_world_size(self) -> int:
        return self.mesh.sp

    @property
    def sp_rank(self) -> int:
        return self.place.sp_rank

    @property
    def draft_dp(self) -> int:
        return self.mesh.draft_dp


def maybe_setup_distributed(
    ulysses: int = 1, ring: int = 1, draft_dp: int | None = None, backend: str | None = None
) -> Topology:
    """Initialise torch.distributed from the launcher's environment, and make the groups of the mesh.

    Collective: all ranks must call it with the same arguments. A default process group that exists already is
    used. Without one and without RANK in the environment the world is this process, and every group is None.

    Args:
        ulysses, ring: sequence-parallel degrees.
        draft_dp: data-parallel degree: how many packed sequences are trained on side by side. None divides
            the world size by ulysses x ring.
        backend: torch.distributed backend; None picks that of the device's kind.

    Raises:
        ValueError: the world size is not draft_dp x ring x ulysses, DS_ACCELERATOR is not supported, or this
            rank has no device.
    """
    kind = detect_accelerator()
    # mpirun and srun give rank and world size by other names than RANK and WORLD_SIZE, which torch and
    # DeepSpeed read. The launch has exported MASTER_ADDR and MASTER_PORT.
    os.environ.update(announcement(os.environ))
    if not dist.is_initialized() and "RANK" not in os.environ:
        mesh = Mesh.from_world(1, ring, ulysses, draft_dp)
        return Topology(mesh, mesh.place(0), torch.device(kind))
    # From the environment where possible: a wrong world size then fails before the ranks wait for each other
    # in the rendezvous.
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    mesh = Mesh.from_world(world_size, ring, ulysses, draft_dp)
    device = take_device(kind)
    if not dist.is_initialized():
        join_world(device, backend)
    place = mesh.place(dist.get_rank())
    ulysses_group = _make_group(mesh.ulysses_groups(), place.rank)
    ring_group = _make_group(mesh.ring_groups(), place.rank)
    return Topology(
        mesh=mesh,
        place=place,
        device=device,
        ulysses_group=ulysses_group,
        ring_group=ring_group,
        # When one of the two axes has size 1, the other's group is the sp group: this saves a communicator.
        sp_group=_make_group(mesh.sp_groups(), place.rank)
        if min(ring, ulysses) > 1
        else ulysses_group or ring_group,
        dp_group=_make_group(mesh.dp_groups(), place.rank),
        world_group=dist.group.WORLD if world_size > 1 else None,
    )


def _make_group(groups: list[list[int]], rank: int) -> dist.ProcessGroup | None:
    """This rank's group of `groups`; None for groups of one rank. Collective over the world.

    Every rank makes every group in the same order: `new_group` waits for all ranks, also for those that are
    not in the group.
    """
    if len(groups[0]) == 1:
        return None
    made = [dist.new_group(ranks) for ranks in groups]
    return next(group for ranks, group in zip(groups, made, strict=True) if rank in ranks)
