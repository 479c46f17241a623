"""The accelerators that the planner knows, and its assumptions about how much of a peak is reached.

Peaks are the vendors' published figures for dense arithmetic, bandwidths those of one direction. Published
figures of the Ascends differ; the lowest are used. A device of the Ascend 910C is one of its two dies.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One accelerator and its links.

    Attributes:
        name: as the command line takes it.
        memory: GiB that a process can use.
        half_tflops, single_tflops: peak of matrix products in bf16 and in fp32, TFLOP/s.
        memory_gbs: bandwidth of its own memory, GB/s.
        node_gbs, network_gbs, host_gbs: bandwidth out of one device, GB/s: to the other devices of its node,
            to other nodes, to the host.
        attention: the shares of the peak that the attention reaches, forward and backward, by the kernel that
            `auto` takes without a package.
    """

    name: str
    memory: float
    half_tflops: float
    single_tflops: float
    memory_gbs: float
    node_gbs: float
    network_gbs: float
    host_gbs: float
    attention: tuple[float, float] = (0.33, 0.27)  # FlashAttention 2's on an H200


@dataclass(frozen=True)
class Assumptions:
    """Estimates, not measurements of your machine.

    Attributes:
        attention_forward, attention_backward, matmul: the share of the arithmetic peak that is reached.
        memory, link: the share of a bandwidth that is reached. That of the memory is low, because the planner
            does not count all that is read and written.
        call_seconds: the fixed cost of one collective.
        host_memory_gbs: memory bandwidth of an optimizer that runs on the host, GB/s per rank.
    """

    attention_forward: float
    attention_backward: float
    matmul: float = 0.70
    memory: float = 0.45
    link: float = 0.80
    call_seconds: float = 30e-6
    host_memory_gbs: float = 50.0


def estimates(device: Device) -> Assumptions:
    """What is assumed of a device: the shares that an H200 reached in a step of 32,768 slots, heads of 128
    (docs/lab-notes.md), and the device's own for the attention.
    """
    forward, backward = device.attention
    return Assumptions(attention_forward=forward, attention_backward=backward)


# As an H200 ran cuDNN 9.19. A B200's were not measured.
_CUDNN = (0.62, 0.51)
DEVICES = {
    device.name: device
    for device in (
        Device("B200", 179, 2250, 80, 8000, 900, 50, 55, _CUDNN),
        Device("H100", 80, 989, 67, 3350, 450, 50, 55, _CUDNN),
        Device("H200", 141, 989, 67, 4800, 450, 50, 55, _CUDNN),
        Device("A100", 80, 312, 19.5, 2039, 300, 25, 25),
        Device("Ascend910B", 64, 280, 75, 1600, 196, 25, 25),
        Device("Ascend910C", 64, 376, 75, 1600, 196, 12.5, 25),
    )
}
