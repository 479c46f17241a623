"""Calls and bytes of one optimizer step, as pure functions of the setup.

The draft's shape states what its attention sends; this module adds what ZeRO sends. Tests compare both with
the calls of a real step.
"""

from __future__ import annotations

from eagle3_ds.costs import Setup, Traffic


def attention_traffic(setup: Setup) -> list[Traffic]:
    """Calls and bytes of the attention for one packed sequence, forward and backward."""
    return setup.shape.attention_traffic(setup)


def state_traffic(setup: Setup) -> list[Traffic]:
    """What ZeRO sends per optimizer step and, under `zero_group: draft_dp`, the all-reduce of gradients over
    the ranks of a sequence.

    Gradients and weights count as one call each, because DeepSpeed's buckets change the number of calls and
    not the bytes, on which the time depends. The check of DeepSpeed's scale, in the first step alone, is left
    out.
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
    # Stage 1 reduces once, at the last micro-batch. Stages 2 and 3 shard the gradients and reduce in each.
    times = 1 if zero.stage == 1 else micro
    found.append(Traffic("zero", "reduce_scatter", times, times * weights, ranks))
    # Stages 1 and 2 gather the updated weights once after the step; stage 3 gathers them for each forward and
    # each backward.
    gathers = 2 * micro if zero.stage == 3 else 1
    found.append(Traffic("zero", "all_gather", gathers, gathers * weights // ranks, ranks))
    return found


def step_traffic(setup: Setup) -> list[Traffic]:
    """All calls and bytes of one optimizer step."""
    micro = setup.accumulation
    attention = [
        Traffic(t.axis, t.kind, micro * t.calls, micro * t.payload, t.ranks) for t in attention_traffic(setup)
    ]
    return attention + state_traffic(setup)


def separate_all_to_alls(setup: Setup) -> int:
    """For comparison, the number of all-to-alls of plain Ulysses: q, k, v and out each in a call of its own,
    in every TTT step, forward and backward.
    """
    return 8 * setup.ttt_steps * setup.shape.num_layers if setup.ulysses > 1 else 0
