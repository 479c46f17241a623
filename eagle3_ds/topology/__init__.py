"""The mesh draft_dp x ring x ulysses, its process groups, and the `mpu` that tells DeepSpeed about them."""

from eagle3_ds.topology.groups import Topology, maybe_setup_distributed
from eagle3_ds.topology.mesh import Mesh, Place, check_heads
from eagle3_ds.topology.mpu import ZeroGroupMpu
from eagle3_ds.topology.patience import outlast_watchdog

__all__ = [
    "Mesh",
    "Place",
    "Topology",
    "ZeroGroupMpu",
    "check_heads",
    "maybe_setup_distributed",
    "outlast_watchdog",
]
