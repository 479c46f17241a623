"""Bytes of the real training step."""

import gc

import pytest

from benchmarks.sample_run import SampleRun
from benchmarks.tensor_bytes import TensorBytes
from eagle3_ds.plan import DraftShape

pytestmark = pytest.mark.dist
SHAPE = DraftShape(32, 64, 4, 2, 8, 128, 64)


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
    """The unroll's memory and its graph refer to each other: a cycle through C++ that no collector breaks is a leak."""
    run = SampleRun(SHAPE, 64, ttt_steps=3, activation=activation)
    first, second, third = run_ranks(1, live_bytes_after_steps, run, 3)[0]
    assert first == second == third
