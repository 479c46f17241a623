"""A trainer that shares its devices: steps under a time budget, device memory given back and taken again."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from eagle3_ds.train.rollout import RolloutTrainer
from tests.ranks.test_rollout_on_ranks import make_recipe, make_rollouts
from tests.ranks.test_rollout_on_ranks import target as target

pytestmark = pytest.mark.ranks


def live_storages() -> dict[int, torch.UntypedStorage]:
    """Every storage with memory on the CPU that any tensor of this process still reaches."""
    gc.collect()
    tensors = (value for value in gc.get_objects() if isinstance(value, torch.Tensor))
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu")
    return {storage.data_ptr(): storage for storage in storages if storage.nbytes()}


def num_bytes(storages: Iterable[torch.UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in storages)


def sleep_and_go_on(target: str, output: Path, ulysses: int, stage: int) -> dict[str, Any]:
    """Two steps, a sleep, two more; and the same four without a sleep. What is still on the device, here the
    CPU, while the trainer sleeps: everything that came with the trainer, less what went to host memory.
    """
    torch.set_num_threads(1)
    recipe, rollouts = make_recipe(target, output, 1, ulysses, stage), make_rollouts(target)
    before = live_storages()
    trainer = RolloutTrainer(recipe)
    losses = [trainer.step(rollouts).loss for _ in range(2)]
    came = {place: storage for place, storage in live_storages().items() if place not in before}
    held = num_bytes(came.values())
    released = trainer.sleep()
    assert trainer.sleep() == 0
    left = num_bytes(came.values())
    with pytest.raises(ValueError, match="the trainer sleeps"):
        trainer.step(rollouts)
    trainer.wake()
    back = num_bytes(came.values())
    losses += [trainer.step(rollouts).loss for _ in range(2)]
    other = RolloutTrainer(recipe)
    expected = [other.step(rollouts).loss for _ in range(4)]
    theirs = other.state_dict()
    same = all(torch.equal(weight, theirs[name]) for name, weight in trainer.state_dict().items())
    return {
        "losses": losses,
        "expected": expected,
        "same": same,
        "bytes": (held, released, left, back),
        "head": trainer._packer.head.untyped_storage().nbytes(),
    }


@pytest.mark.parametrize(("ulysses", "stage"), [(1, 0), (1, 2), (2, 3), (2, 1)])
def test_a_trainer_that_slept_goes_on_to_the_bit_and_keeps_nothing_meanwhile(
    run_ranks: Any, target: str, tmp_path: Path, ulysses: int, stage: int
) -> None:
    for rank in run_ranks(ulysses, sleep_and_go_on, target, tmp_path, ulysses, stage):
        assert rank["losses"] == rank["expected"] and rank["same"]
        held, released, left, back = rank["bytes"]
        # What may stay: the target's head on the host, the vocabulary's two columns, numbers.
        assert left < rank["head"] + 5_000 and held - left == released and back == held, rank["bytes"]
        assert released > 5 * left


def budget(target: str, output: Path) -> dict[str, Any]:
    """Steps that two draft_dp ranks take, of which the second is made slow."""
    torch.set_num_threads(1)
    trainer = RolloutTrainer(make_recipe(target, output, 2, 1, 2))
    rank = trainer.trainer.topology.place.dp_rank
    rollout = make_rollouts(target)[rank]
    taken = {"no time": len(trainer.train_for(0, [rollout] * 3)), "measured": 0}
    taken["nothing there"] = len(trainer.train_for(60, [[]] * 0 if rank else [rollout]))
    taken["measured"] = len(trainer._step_seconds)
    taken["first"] = len(trainer.train_for(1e-3, [rollout] * 3))
    trainer._step_seconds.extend([0.1, 1.0 if rank else 0.3])
    start = time.monotonic()
    reports = trainer.train_for(5.5, [rollout] * (20 if rank else 30))
    taken["budget"] = len(reports)
    trainer._step_seconds.clear()
    taken["fewest rollouts"] = len(trainer.train_for(600, [rollout] * (4 if rank else 3)))
    taken["steps"] = trainer.steps
    return taken | {"seconds": time.monotonic() - start, "losses": [report.loss for report in reports]}


def test_all_ranks_take_the_steps_that_the_slowest_has_time_for(
    run_ranks: Any, target: str, tmp_path: Path
) -> None:
    first, second = run_ranks(2, budget, target, tmp_path)
    for taken in (first, second):
        assert (taken["no time"], taken["nothing there"], taken["measured"]) == (0, 0, 0)
        assert taken["first"] == 1, "one step is taken to measure it, and then no time is left"
        assert taken["budget"] == 5 and taken["fewest rollouts"] == 3 and taken["steps"] == 9
    assert first["losses"] == second["losses"] and len(set(first["losses"])) == 5
