"""The `mpu` that DeepSpeed gets when ZeRO shards over draft_dp only (`parallel.zero_group: draft_dp`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from eagle3_ds.topology.groups import Topology


@dataclass(frozen=True)
class ZeroGroupMpu:
    """An `mpu` whose data-parallel group is this rank's `dp_group`, and whose model-parallel group is this
    rank alone.

    It has no sequence-parallel methods: with them DeepSpeed rescales gradients, differently at each ZeRO
    stage.
    """

    data_parallel_group: dist.ProcessGroup
    data_parallel_ranks: tuple[int, ...]
    solo_group: dist.ProcessGroup

    @classmethod
    def create(cls, topology: Topology) -> ZeroGroupMpu:
        """Make the groups. Collective over the world. DeepSpeed needs a process group even for one rank, so
        these are never None.
        """
        rank = topology.place.rank
        # Each rank makes its own alone. All ranks do so at this place: where a group is split from the
        # world's communicator, they split it once, together.
        solo = dist.new_group([rank], use_local_synchronization=True)
        ranks = next(group for group in topology.mesh.dp_groups() if rank in group)
        return cls(topology.dp_group or solo, tuple(ranks), solo)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data_parallel_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(self.data_parallel_ranks)

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.data_parallel_group)

    def get_data_parallel_world_size(self) -> int:
        return len(self.data_parallel_ranks)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.solo_group

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1
