"""The planner's FLOPs against torch's own counter in the real training step."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from eagle3_ds.algorithms.dflash.costs import DFlashShape
from eagle3_ds.algorithms.eagle3 import Eagle3Shape
from eagle3_ds.algorithms.peagle import PEagleShape
from eagle3_ds.plan import attention_pairs, step_flops
from judge.sample_run import SampleRun

pytestmark = pytest.mark.ranks
SHAPE = Eagle3Shape(128, 384, 4, 2, 32, 1024, 512)
BLOCKS = DFlashShape(128, 384, 4, 2, 32, 1024, 512, num_layers=2, aux_size=384)


def product_flops(_total, a, b, **_):
    """Shapes [m, k] and [k, n]. torch counts addmm, but not its form in place."""
    return 2 * a[0] * a[1] * b[1]


def counted_matmuls(run):
    """On every rank: FLOPs of the matmuls of one optimizer step; the attention is one operator that torch
    does not count.
    """
    trainer, packs = run.trainer(run.topology()), run.packs()
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product_flops}) as counter:
        trainer.step(packs)
    return counter.get_total_flops()


@pytest.mark.parametrize("activation", ["keep", "recompute"])
@pytest.mark.parametrize("answered", [1.0, 0.25])
@pytest.mark.parametrize(
    "shape", [SHAPE, PEagleShape(**vars(SHAPE)), BLOCKS], ids=["eagle3", "peagle", "dflash"]
)
def test_matmuls_are_those_of_the_step(run_ranks, activation, answered, shape):
    run = SampleRun(
        shape,
        512,
        ttt_steps=3,
        activation=activation,
        tile_bytes=2**20,
        loss_tile_bytes=2**20,
        answered=answered,
    )
    flops = step_flops(run.setup(), attention_pairs(run.setup()))
    counted = run_ranks(1, counted_matmuls, run)[0]
    # The last slots of a document have nothing ahead to learn from.
    assert counted == pytest.approx(
        flops.layers + flops.recompute + flops.loss, rel=2e-3 if answered == 1 else 1e-2
    )
