"""Calls and bytes of one optimizer step, as pure functions of the setup.

The attention's part is what tests count through the real step, call by call. Legend: S slots of a rank, Q
live ones, K TTT steps, Hq / Hkv heads, D head size, b bytes of an entry.
"""

from __future__ import annotations

from dataclasses import dataclass

from eagle3_ds.plan.setup import FP32, KVExchange, Setup


@dataclass(frozen=True)
class Traffic:
    """Alike calls of one rank.

    Attributes:
        axis: whose ranks take part: ulysses, ring, sp, zero or world.
        kind: all_to_all, all_gather, reduce_scatter, all_reduce or send (point to point).
        payload: bytes of the tensors that this rank hands to the calls, over all calls.
    """

    axis: str
    kind: str
    calls: int
    payload: int
    ranks: int

    @property
    def sent(self) -> float:
        """Bytes that leave this rank, by the algorithms that send least."""
        others = self.ranks - 1
        factor = {
            "all_to_all": others / self.ranks,
            "all_gather": others,
            "reduce_scatter": others / self.ranks,
            "all_reduce": 2 * others / self.ranks,
            "send": 1,
        }[self.kind]
        return self.payload * factor


def attention_traffic(setup: Setup) -> list[Traffic]:
    """Of one packed sequence, forward and backward, all layers; nothing on an axis with one rank."""
    found = []
    if setup.ulysses > 1:
        found.append(_ulysses(setup))
    if setup.ring > 1:
        found += _gathered(setup) if setup.kv_exchange == "gather" else [_streamed(setup)]
    return found


def _ulysses(setup: Setup) -> Traffic:
    """Forward: q, k and v of step 0 in one call, q of each later step, (out, lse) of every step.

    Backward: (dout, q, lse, delta) of every step, dq of each later step, dq, dk and dv of step 0 in one call.
    """
    shape, steps, item = setup.shape, setup.ttt_steps, setup.itemsize
    q, statistics = setup.live_slots * shape.query_size * item, setup.live_slots * shape.num_heads * FP32
    kv = setup.slots * 2 * shape.kv_size * item
    forward = (q + kv) + (steps - 1) * q + steps * (q + statistics)
    backward = steps * (2 * q + 2 * statistics) + (steps - 1) * q + (q + kv)
    layers = shape.num_layers
    return Traffic("ulysses", "all_to_all", 4 * steps * layers, (forward + backward) * layers, setup.ulysses)


def _gathered(setup: Setup) -> list[Traffic]:
    """Keys and values once, their gradients once in fp32, whatever K."""
    entries = 2 * setup.shape.kv_size // setup.ulysses
    layers = setup.shape.num_layers
    return [
        Traffic("ring", "all_gather", layers, layers * setup.columns * entries * setup.itemsize, setup.ring),
        Traffic("ring", "reduce_scatter", layers, layers * setup.padded_length * entries * FP32, setup.ring),
    ]


def _streamed(setup: Setup) -> Traffic:
    """Blocks of keys and values pass round; those of the first hops are kept after step 0, the others pass in
    every step.

    In backward the gradients of passing blocks follow them, the last hop being home, and those of kept blocks
    make one lap at the end, several in one message where they have one owner. Gradients are fp32.
    """
    steps, ring, kept = setup.ttt_steps, setup.ring, kept_blocks(setup)
    passing = ring - kept
    blocks = (ring - 1) + (2 * steps - 1) * passing
    gradients = steps * passing + (ring - 1 if kept > 1 else 0)
    entries = setup.columns * 2 * setup.shape.kv_size // setup.ulysses
    layers = setup.shape.num_layers
    payload = layers * entries * (blocks * setup.itemsize + gradients * FP32)
    return Traffic("ring", "send", layers * (blocks + gradients), payload, ring)


def block_bytes(setup: Setup) -> int:
    """One ring rank's keys and values for one Ulysses rank's heads, one layer, with their fp32 gradients."""
    return setup.columns * 2 * setup.shape.kv_size // setup.ulysses * (setup.itemsize + FP32)


def kept_blocks(setup: Setup) -> int:
    """Blocks that `kv_exchange: ring` holds between the TTT steps in each layer, a rank's own among them."""
    return min(setup.ring, 1 + setup.kv_bytes // block_bytes(setup))


def choose_kv_exchange(setup: Setup) -> KVExchange:
    """What `kv_exchange: auto` means: gather, which sends least, unless what other ranks contribute exceeds
    `kv_bytes` a layer.

    The same on all ranks and for all packs, because it depends on the packing length and not on a pack.
    """
    return "gather" if (setup.ring - 1) * block_bytes(setup) <= setup.kv_bytes else "ring"


def state_traffic(setup: Setup) -> list[Traffic]:
    """What ZeRO moves per optimizer step, and under `zero_group: draft_dp` the sum over the sequence's ranks.

    Whole gradients and weights, however DeepSpeed cuts them into buckets; the bytes are what time depends on.
    """
    zero, item = setup.zero, setup.itemsize
    weights = setup.shape.num_parameters * item
    micro = setup.accumulation
    found = []
    if setup.zero_group == "draft_dp" and setup.sp > 1:
        tensors = len(setup.shape.parameter_sizes)
        found.append(Traffic("sp", "all_reduce", micro * tensors, micro * weights, setup.sp))
    ranks = setup.zero_ranks
    if ranks == 1:
        return found
    if zero.stage == 0:
        return [*found, Traffic("zero", "all_reduce", 1, weights, ranks)]
    # Stage 1 reduces once, at the last micro-batch; 2 and 3 own a part of the gradient from the first on.
    times = 1 if zero.stage == 1 else micro
    found.append(Traffic("zero", "reduce_scatter", times, times * weights, ranks))
    # Stages 1 and 2 gather the updated weights after the step; 3 gathers them for each forward and each
    # backward.
    gathers = 2 * micro if zero.stage == 3 else 1
    found.append(Traffic("zero", "all_gather", gathers, gathers * weights // ranks, ranks))
    return found


def step_traffic(setup: Setup) -> list[Traffic]:
    """One optimizer step."""
    micro = setup.accumulation
    attention = [
        Traffic(t.axis, t.kind, micro * t.calls, micro * t.payload, t.ranks) for t in attention_traffic(setup)
    ]
    return attention + state_traffic(setup)


def separate_all_to_alls(setup: Setup) -> int:
    """All-to-alls of the plain Ulysses design: q, k, v and out each on its own, at each step, forward and
    backward.
    """
    return 8 * setup.ttt_steps * setup.shape.num_layers if setup.ulysses > 1 else 0
