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


@pytest.mark.parametrize("activation", ["keep", "recompute", "offload"])
def test_a_step_leaves_nothing_behind(run_ranks, activation):
    """The unroll's memory and its graph refer to each other: a cycle through C++ that no collector breaks is a leak."""
    run = SampleRun(SHAPE, 64, ttt_steps=3, activation=activation)
    first, second, third = run_ranks(1, live_bytes_after_steps, run, 3)[0]
    assert first == second == third
