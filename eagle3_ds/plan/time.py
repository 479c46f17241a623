"""FLOPs of one optimizer step and its predicted seconds, for the rank with the most attention work.

Only the offload of activations is assumed to overlap with computation, so a run that overlaps its
communication is faster than predicted. A multiplication and an addition are two FLOPs. Slots that are not
live cost only their step-0 keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eagle3_ds.costs import FP32, Flops, Setup, Traffic
from eagle3_ds.layout import SpanPlan
from eagle3_ds.plan.communication import step_traffic
from eagle3_ds.plan.devices import Assumptions, Device, estimates


@dataclass(frozen=True)
class StepTime:
    """The predicted time of one optimizer step.

    Attributes:
        parts: seconds by what they are spent on.
        tokens: that the step trains on, over all draft_dp replicas.
    """

    parts: dict[str, float]
    tokens: int

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def attention_pairs(setup: Setup, documents: Sequence[int] | None = None) -> int:
    """Query-key pairs of the busiest ring rank at one TTT step. Supervised tokens are assumed to be spread
    evenly over the sequence.

    Args:
        setup: the way of running.
        documents: lengths of the packed documents; None for one document that fills the sequence.

    Raises:
        ValueError: `documents` do not suit the length of `setup` (`SpanPlan.make`).
    """
    counted = np.floor(np.arange(setup.length + 1) * setup.live_share)
    live = np.diff(counted) > 0 if setup.shape.live_slots_alone else None
    plan = SpanPlan.make(
        documents or (setup.length,), setup.ring, setup.ulysses, setup.chunks_per_rank, live, setup.window
    )
    return int(plan.ring_work().max())


def step_flops(setup: Setup, pairs: int) -> Flops:
    """FLOPs of one packed sequence on one rank; `pairs` is the result of `attention_pairs`."""
    return setup.shape.flops(setup, pairs)


def predict_time(
    setup: Setup, device: Device, pairs: int, ranks_per_node: int = 8, assume: Assumptions | None = None
) -> StepTime:
    """Predict the seconds of one optimizer step; all draft_dp replicas run side by side.

    Args:
        setup: the way of running.
        device: the accelerator.
        pairs: the result of `attention_pairs`.
        ranks_per_node: decides whether a group's traffic leaves the node.
        assume: shares of the peaks that are reached; None for the `estimates` of the device.
    """
    assume = assume or estimates(device)
    flops = step_flops(setup, pairs)
    peak = 1e12 * (device.single_tflops if setup.dtype == "float32" else device.half_tflops)
    parts = {
        "layers": flops.layers / (peak * assume.matmul),
        "recompute": flops.recompute / (peak * assume.matmul),
        "attention": flops.attention_forward / (peak * assume.attention_forward)
        + flops.attention_backward / (peak * assume.attention_backward),
        "loss": flops.loss / (peak * assume.matmul),
        "elementwise": setup.shape.elementwise_bytes(setup) / (1e9 * device.memory_gbs * assume.memory),
    }
    compute = sum(parts.values())
    moved = 2 * setup.shape.sequence_bytes(setup).offloaded / (1e9 * device.host_gbs * assume.link)
    parts["offload beyond compute"] = max(0.0, moved - compute)
    parts = {name: seconds * setup.accumulation for name, seconds in parts.items()}
    for traffic in step_traffic(setup):
        name = f"{traffic.axis} exchange"
        parts[name] = parts.get(name, 0.0) + _exchange_seconds(traffic, setup, device, ranks_per_node, assume)
    parts["optimizer"] = _optimizer_seconds(setup, device, assume)
    return StepTime(parts, setup.length * setup.draft_dp * setup.accumulation)


def _exchange_seconds(
    traffic: Traffic, setup: Setup, device: Device, ranks_per_node: int, assume: Assumptions
) -> float:
    # How many consecutive ranks a group extends over. Ulysses ranks are consecutive; ring ranks are `ulysses`
    # apart, so a ring extends over all ranks of the sequence.
    span = {"ulysses": setup.ulysses, "ring": setup.sp, "sp": setup.sp}.get(traffic.axis, setup.world_size)
    bandwidth = device.node_gbs if span <= ranks_per_node else device.network_gbs
    return traffic.sent / (1e9 * bandwidth * assume.link) + traffic.calls * assume.call_seconds


def _optimizer_seconds(setup: Setup, device: Device, assume: Assumptions) -> float:
    """Seconds of AdamW, which is limited by memory bandwidth: per parameter it reads the fp32 master, two
    moments and the gradient, writes the first three (7 fp32 values in all) and writes the weight.
    """
    owned = setup.shape.num_parameters / (setup.zero_ranks if setup.zero.stage else 1)
    moved = owned * (7 * FP32 + setup.itemsize)
    if not setup.zero.offload_optimizer:
        return moved / (1e9 * device.memory_gbs * assume.memory)
    over_link = owned * 2 * setup.itemsize / (1e9 * device.host_gbs * assume.link)
    return moved / (1e9 * assume.host_memory_gbs) + over_link
