"""Whether the ranks still hold the same of what each of them holds: cheap enough to ask every hundred steps.

A rank whose copy has drifted (a flipped bit, a collective that one rank missed) trains on without any error,
and wrongly.
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

# {(what, whether sp peers alone hold the same): digest}; what a rank holds alone is left out.
Digests = Mapping[tuple[str, bool], int]
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class PacksOfStep(Protocol):
    """What is asked of the data: a pure function of the step, counted from 0."""

    def pack_indices(self, step: int) -> list[int]: ...


def require_same_replicas(trainer: Trained, loader: PacksOfStep, step: int) -> None:
    """Compare what must be equal after `step` optimizer steps. Collective; one small all-reduce.

    Raises:
        RuntimeError: on all ranks, naming what differs and which ranks hold which state.
    """
    _require_same(trainer, {**_digests(trainer, loader, step), **_weights(trainer)}, step)


@contextmanager
def weights_compared_before_update(trainer: Trained, step: int) -> Iterator[None]:
    """The first update in here, after `step` optimizer steps, compares the weights that its gradients were
    computed with.

    At ZeRO 1 and 2 an update writes every rank's weights anew from the masters: what was wrong with one
    rank's is gone, and its gradients are in the masters of all. Raises RuntimeError before that, as
    `require_same_replicas`.
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
    """A number that changes when any one bit does: the tensors' words as integers, summed, each tensor
    weighed by its place.
    """
    total = 0
    for place, tensor in enumerate(tensors):
        words = tensor.detach().contiguous().view(_BITS[tensor.element_size()])
        total += (2 * place + 1) * int(words.sum(dtype=torch.int64))
    return _wrapped(total)


def _number(content: bytes) -> int:
    return _wrapped(int.from_bytes(hashlib.sha256(content).digest()[:8], "big"))


def _wrapped(number: int) -> int:
    """Into int64."""
    return (number + 2**63) % 2**64 - 2**63
