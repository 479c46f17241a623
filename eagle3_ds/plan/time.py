"""FLOPs of one optimizer step and the seconds it should take: what the rank with the most attention work
does.

Nothing is assumed to overlap but the offload of activations, so a run that overlaps its communication is
faster than this. A multiplication and an addition are two FLOPs. Legend: S slots of a rank, H hidden size, I
the MLP's, Hq / Hkv heads, D head size, K TTT steps, Vd draft vocabulary. Slots that are not live cost their
keys and values alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eagle3_ds.layout import SpanPlan
from eagle3_ds.plan.activations import offloaded_activations
from eagle3_ds.plan.communication import Traffic, step_traffic
from eagle3_ds.plan.devices import ESTIMATES, Assumptions, Device
from eagle3_ds.plan.setup import FP32, Setup


@dataclass(frozen=True)
class Flops:
    """One rank, one packed sequence."""

    layers: int
    recompute: int
    attention_forward: int
    attention_backward: int
    loss: int

    @property
    def total(self) -> int:
        return self.layers + self.recompute + self.attention_forward + self.attention_backward + self.loss


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by what they go to, and the tokens it trains on."""

    parts: dict[str, float]
    tokens: int

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def attention_pairs(setup: Setup, documents: Sequence[int] | None = None) -> int:
    """Query-key pairs of the busiest ring rank at one TTT step; without `documents`, one document fills the
    sequence.

    Supervised tokens are taken to be spread evenly.
    """
    counted = np.floor(np.arange(setup.length + 1) * setup.supervised)
    live = np.diff(counted) > 0 if setup.shape.num_layers == 1 else None
    plan = SpanPlan.make(
        documents or (setup.length,), setup.ring, setup.ulysses, setup.chunks_per_rank, live, setup.window
    )
    return int(plan.ring_work().max())


def step_flops(setup: Setup, pairs: int) -> Flops:
    """FLOPs by kind. `pairs` is `attention_pairs`; each Ulysses rank computes its heads' part of them."""
    shape, slots, steps = setup.shape, setup.live_slots, setup.ttt_steps
    fc = shape.parameter_sizes[0]
    layers = [shape.layer_weights(layer) for layer in range(shape.num_layers)]
    # Forward once, backward twice; fc has constant inputs, so no gradient of them. The rest has keys and
    # values alone.
    rest = (setup.slots - slots) * 3 * sum(layers[0][name] for name in ("k", "v"))
    matmul = 2 * (
        setup.slots * 2 * fc + rest + slots * 3 * steps * sum(sum(weights.values()) for weights in layers)
    )
    recompute = 0
    if setup.activation != "keep":
        # Keys, values and the attention's output are kept, and nothing in backward needs the output of
        # `down`.
        recompute = (
            2 * slots * steps * sum(weights[name] for weights in layers for name in ("q", "o", "gate", "up"))
        )
    attention = 2 * pairs * shape.query_size // setup.ulysses * steps * shape.num_layers
    head = 2 * slots * shape.hidden_size * shape.draft_vocab_size
    return Flops(
        layers=matmul,
        recompute=recompute,
        # Two products forward; in backward the scores again, and four more.
        attention_forward=2 * attention,
        attention_backward=5 * attention,
        # The teacher's logits once, and of each step the student's and two gradients.
        loss=head * (1 + 3 * steps),
    )


def elementwise_bytes(setup: Setup) -> int:
    """Bytes that norms, rotations, activations and the softmax of the loss move, one rank, one packed
    sequence.
    """
    shape, steps, item = setup.shape, setup.ttt_steps, setup.itemsize
    wide = 10 * shape.hidden_size + 4 * (shape.query_size + 2 * shape.kv_size) + 6 * shape.intermediate_size
    passes = 3 if setup.activation == "keep" else 4
    # k diagonals, of keys and of values, are read at step k, once forward and twice backward.
    diagonals = 3 * 2 * shape.kv_size * steps * (steps - 1) // 2
    softmax = 8 * shape.draft_vocab_size * FP32 * (steps + 1)
    return setup.live_slots * (shape.num_layers * item * (steps * passes * wide + diagonals) + softmax)


def predict_time(
    setup: Setup, device: Device, pairs: int, ranks_per_node: int = 8, assume: Assumptions = ESTIMATES
) -> StepTime:
    """Seconds of one optimizer step of all `draft_dp` replicas side by side."""
    flops = step_flops(setup, pairs)
    peak = 1e12 * (device.single_tflops if setup.dtype == "float32" else device.half_tflops)
    parts = {
        "layers": flops.layers / (peak * assume.matmul),
        "recompute": flops.recompute / (peak * assume.matmul),
        "attention": flops.attention_forward / (peak * assume.attention_forward)
        + flops.attention_backward / (peak * assume.attention_backward),
        "loss": flops.loss / (peak * assume.matmul),
        "elementwise": elementwise_bytes(setup) / (1e9 * device.memory_gbs * assume.memory),
    }
    compute = sum(parts.values())
    moved = 2 * offloaded_activations(setup) / (1e9 * device.host_gbs * assume.link)
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
    # Ranks that a group reaches over: ulysses runs fastest, so its groups are neighbours, and the ring steps
    # by ulysses.
    span = {"ulysses": setup.ulysses, "ring": setup.sp, "sp": setup.sp}.get(traffic.axis, setup.world_size)
    bandwidth = device.node_gbs if span <= ranks_per_node else device.network_gbs
    return traffic.sent / (1e9 * bandwidth * assume.link) + traffic.calls * assume.call_seconds


def _optimizer_seconds(setup: Setup, device: Device, assume: Assumptions) -> float:
    """AdamW reads and writes master, two moments and gradient (fp32), and writes the weight."""
    owned = setup.shape.num_parameters / (setup.zero_ranks if setup.zero.stage else 1)
    moved = owned * (7 * FP32 + setup.itemsize)
    if not setup.zero.offload_optimizer:
        return moved / (1e9 * device.memory_gbs * assume.memory)
    over_link = owned * 2 * setup.itemsize / (1e9 * device.host_gbs * assume.link)
    return moved / (1e9 * assume.host_memory_gbs) + over_link
