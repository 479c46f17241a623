"""Checking that tensors which several ranks hold copies of are still equal, every `faults.check_every` steps.

A copy can drift, for example by a flipped bit or by a collective that one rank missed. Training then goes on
without an error, and gives a wrong draft.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from eagle3_ds.guard.trained import Trained

# {(what, among_peers): digest}. With `among_peers` it must be equal within each sp group, else on all ranks.
# What only one rank holds is left out.
Digests = Mapping[tuple[str, bool], int]
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class PacksOfStep(Protocol):
    """What the check needs of the data: a pure function of the step, counted from 0."""

    def pack_indices(self, step: int) -> list[int]: ...


def require_same_replicas(trainer: Trained, loader: PacksOfStep, step: int) -> None:
    """Compare weights, frozen tensors, random states and places in the data after `step` optimizer steps.
    Collective over the world: one all-reduce of a few digests per rank.

    Raises:
        RuntimeError: something differs. It is raised on all ranks, and names what differs between which
            ranks.
    """
    _require_same(trainer, {**_digests(trainer, loader, step), **_weights(trainer)}, step)


@contextmanager
def weights_compared_before_update(trainer: Trained, step: int) -> Iterator[None]:
    """During the block, compare the ranks' weights right before the first optimizer update. The comparison is
    collective over the world.

    It cannot wait until after the update: at ZeRO 1 and 2 the update rewrites all weights from the fp32
    masters. A wrong weight on one rank has disappeared then, but its wrong gradients are in the masters.

    Args:
        step: optimizer steps done before the block; for the message.

    Raises:
        RuntimeError: the weights of two ranks differ.
    """

    def compare(*_: Any) -> None:
        hook.remove()
        _require_same(trainer, _weights(trainer), step)

    hook = trainer.engine.basic_optimizer.register_step_pre_hook(compare)
    try:
        yield
    finally:
        hook.remove()


def _require_same(trainer: Trained, digests: Digests, step: int) -> None:
    topology = trainer.topology
    table = torch.zeros(topology.mesh.world_size, len(digests), dtype=torch.int64, device=topology.device)
    table[topology.place.rank] = torch.tensor(list(digests.values()))
    if dist.is_initialized():
        dist.all_reduce(table)
    peers: dict[int, list[int]] = {}
    for rank in range(topology.mesh.world_size):
        peers.setdefault(topology.mesh.place(rank).dp_rank, []).append(rank)
    everybody = [list(range(topology.mesh.world_size))]
    for column, (what, among_peers) in zip(table.T.tolist(), digests, strict=True):
        for ranks in peers.values() if among_peers else everybody:
            holders: dict[int, list[int]] = {}
            for rank in ranks:
                holders.setdefault(column[rank], []).append(rank)
            if len(holders) > 1:
                raise RuntimeError(
                    f"After step {step} the ranks do not hold the same {what}: it differs between ranks "
                    f"{' and '.join(map(str, holders.values()))}. Training on would be silently wrong. Go on "
                    "from the last checkpoint by --resume; when it happens again, test the memory of the "
                    "hosts of the smaller party."
                )


def _digests(trainer: Trained, loader: PacksOfStep, step: int) -> Digests:
    packs = loader.pack_indices(step)
    return {
        ("place in the data", False): step,
        ("next packs", True): _number(repr(packs).encode()),
        ("random state", False): _number(torch.get_rng_state().numpy().tobytes()),
        ("frozen tensors", False): _sum_of_bits(trainer.frozen_tensors()),
    }


def _weights(trainer: Trained) -> Digests:
    parameters = list(trainer.engine.module.parameters())
    if trainer.engine.zero_optimization_stage() < 3:
        return {("weights", False): _sum_of_bits(parameters)}
    if trainer.recipe.parallel.zero_group == "draft_dp":
        return {("weights", True): _sum_of_bits(parameter.ds_tensor for parameter in parameters)}
    return {}


def _sum_of_bits(tensors: Iterable[Tensor]) -> int:
    """An int64 that changes when any single bit of the tensors does: the sum of all elements, read as
    integers, each tensor weighted by an odd number that depends on its place.
    """
    total = 0
    for place, tensor in enumerate(tensors):
        words = tensor.detach().contiguous().view(_BITS[tensor.element_size()])
        total += (2 * place + 1) * int(words.sum(dtype=torch.int64))
    return _wrapped(total)


def _number(content: bytes) -> int:
    return _wrapped(int.from_bytes(hashlib.sha256(content).digest()[:8], "big"))


def _wrapped(number: int) -> int:
    """`number` modulo 2**64, as an int64."""
    return (number + 2**63) % 2**64 - 2**63
