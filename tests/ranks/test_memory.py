"""Bytes of the real training step: nothing leaks, and the planner predicts them."""

import gc

import pytest

from benchmarks.memory import count
from eagle3_ds.algorithms.eagle3 import Eagle3Shape
from eagle3_ds.plan import predict_memory
from judge.sample_run import SampleRun, small_buckets
from judge.tensor_bytes import TensorBytes

pytestmark = pytest.mark.ranks
SHAPE = Eagle3Shape(32, 64, 4, 2, 8, 128, 64)


def live_bytes_after_steps(run, count):
    """On every rank: bytes alive after each optimizer step, the collector having run."""
    topology = run.topology()
    packs = run.packs(topology.place.dp_rank)
    live = []
    with TensorBytes() as counted:
        trainer = run.trainer(topology)
        for _ in range(count):
            trainer.step(packs)
            gc.collect()
            live.append(counted.live)
    return live


def peak_of_a_step(run):
    """On every rank: peak bytes of the second step beyond what is alive between steps."""
    topology = run.topology()
    packs = run.packs(topology.place.dp_rank)
    with TensorBytes() as counted:
        trainer = run.trainer(topology)
        trainer.step(packs)
        counted.mark()
        trainer.step(packs)
    return counted.above_baseline


def test_a_second_micro_batch_adds_its_integers_and_the_accumulated_gradient(run_ranks):
    runs = [SampleRun(SHAPE, 256, ttt_steps=3, accumulation=count) for count in (1, 2)]
    one, two = (run_ranks(1, peak_of_a_step, run)[0] for run in runs)
    integers = runs[1].setup().slots * (4 * 8 + 3 * 3)
    gradient = SHAPE.num_parameters * 4
    assert two - one < 2 * integers + gradient
    # Less than what holding the first one's keys and values would add.
    keys_and_values = runs[1].setup().slots * 3 * 2 * SHAPE.kv_size * 4
    assert two - one < keys_and_values


@pytest.mark.parametrize("activation", ["keep", "recompute", "offload"])
def test_a_step_leaves_nothing_behind(run_ranks, activation):
    """The unroll's memory and its graph refer to each other: a cycle through C++ that no collector breaks is
    a leak.
    """
    run = SampleRun(SHAPE, 64, ttt_steps=3, activation=activation)
    first, second, third = run_ranks(1, live_bytes_after_steps, run, 3)[0]
    assert first == second == third


def of_stage(stage, **changes):
    deepspeed = small_buckets({"zero_optimization": {"stage": stage}}, 10_000)
    return SampleRun(
        WIDE, 1024, ttt_steps=3, deepspeed=deepspeed, tile_bytes=2**20, loss_tile_bytes=2**20, **changes
    )


WIDE = Eagle3Shape(128, 384, 4, 2, 32, 1024, 512)
PREDICTED = {
    "one rank, bf16": of_stage(2, dtype="bfloat16"),
    "kept, fp32": of_stage(0, activation="keep"),
    "ulysses 2": of_stage(3, ulysses=2),
    "ring 2, streamed, bf16": of_stage(1, ring=2, kv_exchange="ring", dtype="bfloat16"),
    "ulysses 2, answers of a quarter": of_stage(2, ulysses=2, answered=0.25),
    "kept, answers of an eighth": of_stage(0, activation="keep", answered=0.125),
}


@pytest.mark.parametrize("name", PREDICTED)
def test_the_planner_predicts_the_peak_within_ten_percent(run_ranks, name):
    run = PREDICTED[name]
    counted = run_ranks(run.world_size, count, run)
    memory = predict_memory(run.setup())
    assert memory.states == pytest.approx(max(c.rest for c in counted), rel=0.02)
    assert memory.peak == pytest.approx(max(c.peak for c in counted), rel=0.10)
