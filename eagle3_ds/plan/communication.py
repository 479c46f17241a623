"""Calls and bytes of one optimizer step, as pure functions of the setup.

What the draft's attention sends is the draft's to say; here is what ZeRO moves, and the sum of both. Tests
count both through the real step, call by call.
"""

from __future__ import annotations

from eagle3_ds.costs import Setup, Traffic


def attention_traffic(setup: Setup) -> list[Traffic]:
    """Of one packed sequence, forward and backward, as the draft says."""
    return setup.shape.attention_traffic(setup)


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
