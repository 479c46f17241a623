"""Process groups of the mesh, as one frozen object that is passed on as an argument."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from eagle3_ds.launch.announced import announcement
from eagle3_ds.topology.mesh import Mesh, Place

_BACKEND = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}


@dataclass(frozen=True)
class Topology:
    """This rank's place in the mesh and its groups; a group is None when its axis has one rank.

    `sp_ring_degree`, `sp_ulysses_degree`, `sp_world_size` and `sp_rank` are the names RFC 338 uses.
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


def detect_accelerator() -> str:
    """`cuda`, `npu` or `cpu`: what this machine's ranks run on. DS_ACCELERATOR, DeepSpeed's own switch,
    decides.
    """
    forced = os.environ.get("DS_ACCELERATOR")
    if forced:
        if forced not in _BACKEND:
            raise ValueError(
                f"DS_ACCELERATOR is {forced!r}, but only {', '.join(_BACKEND)} are supported. Unset it."
            )
        return forced
    if torch.cuda.is_available():
        return "cuda"
    npu = getattr(torch, "npu", None)
    return "npu" if npu is not None and npu.is_available() else "cpu"


def maybe_setup_distributed(
    ulysses: int = 1, ring: int = 1, draft_dp: int | None = None, backend: str | None = None
) -> Topology:
    """Join the world that the launcher announces through RANK, and make the groups of the mesh.

    Without RANK this is a single process: no process group is made and every group is None. A process group
    that exists already is used. Collective: all ranks must call it with the same arguments.

    Args:
        ulysses, ring: sequence-parallel degrees.
        draft_dp: data-parallel degree; None takes what the world leaves.
        backend: torch.distributed backend; None picks the one of the device (gloo, nccl, hccl).

    Raises:
        ValueError: the world size is not draft_dp x ring x ulysses.
    """
    kind = detect_accelerator()
    # What torch and DeepSpeed read, where MPI or Slurm say it otherwise; the launch exported MASTER_ADDR and
    # _PORT.
    os.environ.update(announcement(os.environ))
    if not dist.is_initialized() and "RANK" not in os.environ:
        mesh = Mesh.from_world(1, ring, ulysses, draft_dp)
        return Topology(mesh, mesh.place(0), torch.device(kind))
    # Judged from the environment when possible, so that a wrong world fails before anybody waits for a
    # rendezvous.
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    mesh = Mesh.from_world(world_size, ring, ulysses, draft_dp)
    device = _set_device(kind)
    if not dist.is_initialized():
        dist.init_process_group(backend or _BACKEND[kind])
    place = mesh.place(dist.get_rank())
    ulysses_group = _make_group(mesh.ulysses_groups(), place.rank)
    ring_group = _make_group(mesh.ring_groups(), place.rank)
    return Topology(
        mesh=mesh,
        place=place,
        device=device,
        ulysses_group=ulysses_group,
        ring_group=ring_group,
        # One communicator less where sp is a single axis.
        sp_group=_make_group(mesh.sp_groups(), place.rank)
        if min(ring, ulysses) > 1
        else ulysses_group or ring_group,
        dp_group=_make_group(mesh.dp_groups(), place.rank),
        world_group=dist.group.WORLD if world_size > 1 else None,
    )


def _set_device(kind: str) -> torch.device:
    """Select this rank's accelerator, so that collectives and allocations use it."""
    if kind == "cpu":
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    getattr(torch, kind).set_device(index)
    return torch.device(kind, index)


def _make_group(groups: list[list[int]], rank: int) -> dist.ProcessGroup | None:
    """Every rank makes every group, in the same order: new_group waits for all ranks of the world."""
    if len(groups[0]) == 1:
        return None
    made = [dist.new_group(ranks) for ranks in groups]
    return next(group for ranks, group in zip(groups, made, strict=True) if rank in ranks)
