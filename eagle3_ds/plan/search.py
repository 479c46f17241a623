"""Searches: the largest sequence length that fits, and the fastest setups for a number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import get_args

from eagle3_ds.costs import ExchangeName, Setup, ZeroGroup, ZeroSettings
from eagle3_ds.plan.devices import Device
from eagle3_ds.plan.memory import Memory, predict_memory
from eagle3_ds.plan.time import StepTime, attention_pairs, predict_time

GRAIN = 1024
"""`largest_length` searches multiples of this many tokens."""
EXCHANGES: tuple[ExchangeName, ...] = get_args(ExchangeName)
ZERO_GROUPS: tuple[ZeroGroup, ...] = get_args(ZeroGroup)


@dataclass(frozen=True)
class Candidate:
    """A setup with its predicted costs.

    Attributes:
        setup: the way of running.
        deepspeed: the DeepSpeed file with its ZeRO settings.
        memory, time: the predictions.
    """

    setup: Setup
    deepspeed: str
    memory: Memory
    time: StepTime


def largest_length(setup: Setup, budget: int) -> int:
    """The longest packed sequence, in multiples of GRAIN tokens, whose peak is at most `budget` bytes per
    rank; 0 if not even GRAIN tokens fit.
    """

    def fits(grains: int) -> bool:
        return predict_memory(replace(setup, length=grains * GRAIN)).peak <= budget

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * GRAIN


def meshes(setup: Setup, world_size: int) -> Iterator[Setup]:
    """Every mesh draft_dp x ring x ulysses of `world_size` ranks whose ulysses divides both head counts."""
    heads = math.gcd(setup.shape.num_heads, setup.shape.num_kv_heads)
    for sp in _divisors(world_size):
        for ulysses in _divisors(math.gcd(sp, heads)):
            yield replace(setup, draft_dp=world_size // sp, ring=sp // ulysses, ulysses=ulysses)


def variants(setup: Setup, deepspeed: Mapping[str, ZeroSettings]) -> Iterator[tuple[str, Setup]]:
    """Every choice of ZeRO settings, ZeRO group, activation mode and exchange on the mesh of `setup`. Yields
    the DeepSpeed file and the setup.
    """
    groups = ZERO_GROUPS if setup.sp > 1 else ZERO_GROUPS[:1]
    exchanges = EXCHANGES if setup.ring > 1 else EXCHANGES[:1]
    for file, zero in deepspeed.items():
        for group in groups:
            if zero.secondary_partition > 1 and (
                group != "all" or setup.world_size % zero.secondary_partition
            ):
                continue
            for activation in setup.shape.activations:
                for exchange in exchanges:
                    yield (
                        file,
                        replace(
                            setup, zero=zero, zero_group=group, activation=activation, kv_exchange=exchange
                        ),
                    )


def fastest(
    setup: Setup,
    world_size: int,
    budget: int,
    device: Device,
    deepspeed: Mapping[str, ZeroSettings],
    ranks_per_node: int = 8,
) -> list[Candidate]:
    """The setups of `world_size` ranks that fit `budget` bytes per rank at the length of `setup`, in order of
    falling tokens per second.

    Predictions within about one percent count as equal, and the one with less memory comes first.

    Args:
        setup: gives the shape and everything that is not searched.
        world_size: ranks in all.
        budget: bytes per rank.
        device: the accelerator.
        deepspeed: ZeRO settings by DeepSpeed file.
        ranks_per_node: decides which groups stay within a node.
    """
    found = []
    for mesh in meshes(setup, world_size):
        pairs = attention_pairs(mesh)
        for file, variant in variants(mesh, deepspeed):
            memory = predict_memory(variant)
            if memory.peak <= budget:
                found.append(
                    Candidate(variant, file, memory, predict_time(variant, device, pairs, ranks_per_node))
                )
    return sorted(found, key=lambda c: (-round(math.log(c.time.tokens_per_second, 1.01)), c.memory.peak))


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
