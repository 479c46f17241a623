"""Calls and bytes of the real training step, counted, against the planner's formulas: equal to the byte."""

from dataclasses import replace

import pytest

from benchmarks.collective_calls import CollectiveCalls
from benchmarks.exactness_cases import Case, make_inputs
from benchmarks.exactness_product import DS_CONFIGS, as_pack, make_recipe, vocabulary_map
from eagle3_ds.config import fill_deepspeed_config, load_deepspeed_config
from eagle3_ds.model import DraftModel
from eagle3_ds.plan.communication import attention_traffic, separate_all_to_alls, state_traffic
from eagle3_ds.plan.setup import DraftShape, Setup
from eagle3_ds.topology import maybe_setup_distributed
from eagle3_ds.train.trainer import DraftTrainer

pytestmark = pytest.mark.dist
BASE = Case(
    draft_dp=1,
    ring=1,
    ulysses=1,
    deepspeed="zero2",
    zero_group="all",
    accumulation=1,
    documents="one",
    heads="gqa",
    kv_exchange="gather",
    ttt_steps=3,
    dtype="float32",
    alignment="served",
    reduction="supervised",
    layers=1,
    activation="recompute",
    tiles="one",
    kernel="auto",
    rope="default",
)
CASES = [
    replace(BASE, ulysses=2, ttt_steps=7),
    replace(BASE, ulysses=2, dtype="bfloat16", documents="indivisible", layers=2, ttt_steps=1),
    replace(BASE, ring=2, ttt_steps=7),
    replace(BASE, ring=2, dtype="bfloat16", accumulation=2, deepspeed="zero3"),
    replace(BASE, ring=2, kv_exchange="ring", layers=2),
    replace(BASE, ring=2, ulysses=2, dtype="bfloat16", documents="many_unaligned", ttt_steps=2),
    replace(BASE, ring=4, kv_exchange="ring", dtype="bfloat16", activation="keep", zero_group="draft_dp"),
    replace(BASE, ring=4, kv_exchange="ring_kept", activation="offload", ttt_steps=2),
]


def setup_of(case, config, length):
    recipe = make_recipe(case)
    setup = Setup.of(recipe, load_deepspeed_config(DS_CONFIGS / f"{case.deepspeed}.json"), DraftShape.of(config), case.draft_dp)
    return replace(setup, length=length)


def counted_step(case):
    """On every rank: one optimizer step through the trainer; counts by (axis, kind)."""
    inputs = make_inputs(case)
    topology = maybe_setup_distributed(case.ulysses, case.ring, case.draft_dp)
    recipe = make_recipe(case)
    settings = fill_deepspeed_config(load_deepspeed_config(recipe.deepspeed), recipe, topology.mesh.world_size, case.draft_dp)
    draft = DraftModel(inputs.config)
    draft.load_state_dict(inputs.weights)
    frozen = inputs.frozen
    trainer = DraftTrainer(recipe, settings, topology, draft, frozen.embedding, frozen.head, vocabulary_map(frozen))
    packs = [as_pack(batch, frozen) for batch in inputs.steps[0][topology.place.dp_rank]]
    with CollectiveCalls({"ulysses": topology.ulysses_group, "ring": topology.ring_group}) as calls:
        trainer.step(packs)
    return {key: (count.calls, count.payload) for key, count in calls.counts.items()}


def predicted(case):
    """The same from the formulas, summed over the micro-batches of the step."""
    inputs = make_inputs(case)
    total = {}
    for batch in inputs.steps[0][0]:
        for traffic in attention_traffic(setup_of(case, inputs.config, len(batch.token_ids))):
            calls, payload = total.get((traffic.axis, traffic.kind), (0, 0))
            total[traffic.axis, traffic.kind] = (calls + traffic.calls, payload + traffic.payload)
    for traffic in state_traffic(setup_of(case, inputs.config, length=1)):
        if traffic.axis == "sp":
            # The sum of the gradients over one sequence's ranks runs on the one group that they have here.
            total["ring" if case.ulysses == 1 else "ulysses", traffic.kind] = (traffic.calls, traffic.payload)
    return total


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_step_sends_what_the_formulas_say(run_ranks, case):
    expected = predicted(case)
    for counts in run_ranks(case.world_size, counted_step, case):
        assert {key: value for key, value in counts.items() if key[0] in ("ulysses", "ring")} == expected


def test_seven_steps_cost_28_all_to_alls_one_gather_and_one_reduce_scatter_per_layer():
    shape = DraftShape(4096, 14336, 32, 8, 128, 128256, 32000)
    setup = Setup(shape, length=131072, ulysses=4, ring=2)
    calls = {(t.axis, t.kind): t.calls for t in attention_traffic(setup)}
    assert calls == {("ulysses", "all_to_all"): 28, ("ring", "all_gather"): 1, ("ring", "reduce_scatter"): 1}
    assert separate_all_to_alls(setup) == 56
    ring = replace(setup, kv_exchange="ring", kv_bytes=0)
    gathered, streamed = (sum(t.sent for t in attention_traffic(s) if t.axis == "ring") for s in (setup, ring))
    assert streamed > 9 * gathered


def test_one_rank_sends_nothing():
    alone = Setup(DraftShape(64, 96, 4, 2, 16, 160, 128), length=128)
    assert attention_traffic(alone) == state_traffic(alone) == []
    assert separate_all_to_alls(alone) == 0
