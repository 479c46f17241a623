"""Accelerators that the planner knows, and what it assumes of each.

Peaks and bandwidths are the vendors' published figures for dense arithmetic and one direction. For the Ascend
910B sources differ between variants; the lower ones stand here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One accelerator and its links.

    Attributes:
        memory: GiB that a process can use.
        half_tflops, single_tflops: peak of matrix products in bf16 and in fp32.
        memory_gbs: bandwidth of its own memory, GB/s.
        node_gbs, network_gbs, host_gbs: GB/s out of one device: to its neighbours in the node, to other
            nodes, to the host.
    """

    name: str
    memory: float
    half_tflops: float
    single_tflops: float
    memory_gbs: float
    node_gbs: float
    network_gbs: float
    host_gbs: float


@dataclass(frozen=True)
class Assumptions:
    """Shares of a peak that are reached, and fixed costs: estimates, not measurements of your machine.

    Attributes:
        matmul, attention_forward, attention_backward: share of the arithmetic peak.
        memory, link: share of a bandwidth.
        call_seconds: fixed cost of one collective.
        host_memory_gbs: what an optimizer on the host moves, GB/s per rank.
    """

    matmul: float = 0.75
    attention_forward: float = 0.60
    attention_backward: float = 0.50
    memory: float = 0.80
    link: float = 0.80
    call_seconds: float = 30e-6
    host_memory_gbs: float = 50.0


ESTIMATES = Assumptions()
DEVICES = {
    device.name: device
    for device in (
        Device("H100", 80, 989, 67, 3350, 450, 50, 55),
        Device("H200", 141, 989, 67, 4800, 450, 50, 55),
        Device("A100", 80, 312, 19.5, 2039, 300, 25, 25),
        Device("Ascend910B", 64, 280, 75, 1600, 196, 25, 25),
    )
}
