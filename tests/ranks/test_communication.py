"""Calls and bytes of the real training step, counted, against the planner's formulas: equal to the byte."""

from dataclasses import replace

import pytest

from benchmarks.comm import SMALL, counted_step
from eagle3_ds.algorithms.dflash.costs import DFlashShape
from eagle3_ds.algorithms.eagle3 import Eagle3Shape
from eagle3_ds.algorithms.peagle import PEagleShape
from eagle3_ds.costs import Setup
from eagle3_ds.plan import attention_traffic, separate_all_to_alls, state_traffic
from judge.sample_run import SampleRun

pytestmark = pytest.mark.ranks
BASE = SampleRun(SMALL, 128, ttt_steps=3)
ZERO_3 = {"zero_optimization": {"stage": 3}}
BLOCKS = DFlashShape(64, 96, 8, 4, 8, 256, 128, num_layers=2, aux_size=192)
# Of one layer on a ring of 4, fp32: 32 columns of 2 * 4 * 8 entries, 4 bytes each and 4 more of their
# gradient.
BLOCK = 32 * 64 * 8
RUNS = {
    "ulysses 2, K 7": replace(BASE, ulysses=2, ttt_steps=7),
    "ulysses 2, bf16, two layers, a length that does not divide": replace(
        BASE, ulysses=2, dtype="bfloat16", shape=replace(SMALL, num_layers=2), length=131, ttt_steps=1
    ),
    "ring 2, K 7": replace(BASE, ring=2, ttt_steps=7),
    "ring 2, bf16, two micro-batches, ZeRO-3": replace(
        BASE, ring=2, dtype="bfloat16", accumulation=2, deepspeed=ZERO_3
    ),
    "ring 2, streamed, two layers": replace(
        BASE, ring=2, kv_exchange="ring", shape=replace(SMALL, num_layers=2)
    ),
    "ulysses 2 x ring 2, packed documents": replace(
        BASE, ring=2, ulysses=2, length=128, lengths=(37, 5, 61, 1, 24)
    ),
    "ring 4, streamed, replicas summed": replace(
        BASE, ring=4, kv_exchange="ring", dtype="bfloat16", activation="keep", zero_group="draft_dp"
    ),
    "ring 4, two of four blocks kept": replace(
        BASE, ring=4, kv_exchange="ring", kv_bytes=BLOCK, activation="offload"
    ),
    "ulysses 2, answers of a quarter": replace(BASE, ulysses=2, answered=0.25),
    "ulysses 2 x ring 2, bf16, answers of a third": replace(
        BASE, ring=2, ulysses=2, answered=0.33, dtype="bfloat16", ttt_steps=7
    ),
    "ring 2, streamed, answers of a half": replace(BASE, ring=2, kv_exchange="ring", answered=0.5),
    "P-EAGLE, ulysses 2 x ring 2, streamed, answers of a third": replace(
        BASE,
        shape=PEagleShape(**vars(SMALL)),
        ring=2,
        ulysses=2,
        kv_exchange="ring",
        answered=0.33,
        ttt_steps=5,
    ),
    "P-EAGLE, ring 2, two layers, replicas summed": replace(
        BASE, shape=PEagleShape(**{**vars(SMALL), "num_layers": 2}), ring=2, zero_group="draft_dp"
    ),
    "DFlash, ulysses 2 x ring 2, bf16, two layers, a third of the anchors": replace(
        BASE, shape=BLOCKS, ring=2, ulysses=2, dtype="bfloat16", anchor_share=0.33
    ),
    "DFlash, ring 2, streamed, a window": replace(
        BASE, shape=BLOCKS, ring=2, kv_exchange="ring", window=40, anchor_share=0.5
    ),
    "ring 4, all blocks kept": replace(BASE, ring=4, kv_exchange="ring", kv_bytes=3 * BLOCK, ttt_steps=2),
}


def predicted(run):
    """By (axis, kind): calls and payload of one optimizer step."""
    found = {
        (t.axis, t.kind): (run.accumulation * t.calls, run.accumulation * t.payload)
        for t in attention_traffic(run.setup())
    }
    for traffic in state_traffic(run.setup()):
        if traffic.axis == "sp":
            # The sum of the gradients over one sequence's ranks runs on the one group that they have here.
            found["ring" if run.ulysses == 1 else "ulysses", traffic.kind] = (traffic.calls, traffic.payload)
    return found


@pytest.mark.parametrize("name", RUNS)
def test_the_step_sends_what_the_formulas_say(run_ranks, name):
    run = RUNS[name]
    expected = predicted(run)
    for counts in run_ranks(run.world_size, counted_step, run):
        assert {key: value for key, value in counts.items() if key[0] in ("ulysses", "ring")} == expected


def test_seven_steps_cost_28_all_to_alls_one_gather_and_one_reduce_scatter_per_layer():
    shape = Eagle3Shape(4096, 14336, 32, 8, 128, 128256, 32000)
    setup = Setup(shape, length=131072, ulysses=4, ring=2)
    calls = {(t.axis, t.kind): t.calls for t in attention_traffic(setup)}
    assert calls == {("ulysses", "all_to_all"): 28, ("ring", "all_gather"): 1, ("ring", "reduce_scatter"): 1}
    assert separate_all_to_alls(setup) == 56
    ring = replace(setup, kv_exchange="ring", kv_bytes=0)
    gathered, streamed = (
        sum(t.sent for t in attention_traffic(s) if t.axis == "ring") for s in (setup, ring)
    )
    assert streamed > 9 * gathered


def test_one_rank_sends_nothing():
    alone = Setup(SMALL, length=128)
    assert attention_traffic(alone) == state_traffic(alone) == []
    assert separate_all_to_alls(alone) == 0
