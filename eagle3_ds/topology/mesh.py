"""The mesh draft_dp x ring x ulysses as integers: pure functions of rank and sizes, without processes.

`draft_dp` is the draft's data-parallel degree: how many packed sequences are trained on side by side. The
ring x ulysses ranks of one sp group share one sequence. The ulysses rank varies fastest with the global rank:
the ranks of a ulysses group are neighbours, on one node with NVLink, and the ring crosses nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Coordinates of one rank in the mesh: sp_rank = ring_rank * ulysses + ulysses_rank."""

    rank: int
    dp_rank: int
    ring_rank: int
    ulysses_rank: int
    sp_rank: int


@dataclass(frozen=True)
class Mesh:
    """Sizes of the three axes: rank = (dp_rank * ring + ring_rank) * ulysses + ulysses_rank.

    Raises:
        ValueError: a size is below 1.
    """

    draft_dp: int = 1
    ring: int = 1
    ulysses: int = 1

    def __post_init__(self) -> None:
        for axis in ("draft_dp", "ring", "ulysses"):
            if getattr(self, axis) < 1:
                raise ValueError(
                    f"parallel.{axis} is {getattr(self, axis)}, but it must be at least 1. Set it to 1."
                )

    @classmethod
    def from_world(
        cls, world_size: int, ring: int = 1, ulysses: int = 1, draft_dp: int | None = None
    ) -> Mesh:
        """The mesh of `world_size` ranks; without `draft_dp` it is world_size / (ring * ulysses).

        Raises:
            ValueError: ring * ulysses does not divide the world size, or the product of the three axes is
                another number.
        """
        sp = cls(1, ring, ulysses).sp
        product = f"ulysses {ulysses} x ring {ring}"
        if world_size < 1 or world_size % sp:
            below, above = world_size // sp * sp, (world_size // sp + 1) * sp
            nearest = f"{below} or {above}" if below else f"{above}"
            raise ValueError(
                f"The world size {world_size} is not divisible by {product} = {sp}. "
                f"Start {nearest} ranks, or change parallel.ulysses and parallel.ring."
            )
        if draft_dp is not None and draft_dp * sp != world_size:
            raise ValueError(
                f"parallel.draft_dp {draft_dp} x {product} = {draft_dp * sp}, but the world size is "
                f"{world_size}. Start {draft_dp * sp} ranks, or set parallel.draft_dp to {world_size // sp} "
                "or null."
            )
        return cls(world_size // sp, ring, ulysses)

    @property
    def sp(self) -> int:
        """Ranks that share one sequence."""
        return self.ring * self.ulysses

    @property
    def world_size(self) -> int:
        return self.draft_dp * self.sp

    def place(self, rank: int) -> Place:
        assert 0 <= rank < self.world_size, (rank, self)
        dp_rank, sp_rank = divmod(rank, self.sp)
        ring_rank, ulysses_rank = divmod(sp_rank, self.ulysses)
        return Place(rank, dp_rank, ring_rank, ulysses_rank, sp_rank)

    def rank(self, dp_rank: int, ring_rank: int, ulysses_rank: int) -> int:
        """The inverse of `place`."""
        return (dp_rank * self.ring + ring_rank) * self.ulysses + ulysses_rank

    def ulysses_groups(self) -> list[list[int]]:
        """The ranks of each ulysses group, which exchange parts of the sequence for attention heads."""
        return [
            [self.rank(dp, ring, ulysses) for ulysses in range(self.ulysses)]
            for dp in range(self.draft_dp)
            for ring in range(self.ring)
        ]

    def ring_groups(self) -> list[list[int]]:
        """The ranks of each ring group, which hold the same heads of different parts of one sequence."""
        return [
            [self.rank(dp, ring, ulysses) for ring in range(self.ring)]
            for dp in range(self.draft_dp)
            for ulysses in range(self.ulysses)
        ]

    def sp_groups(self) -> list[list[int]]:
        """The ranks of each sp group, which share one sequence, in the order of sp_rank."""
        return [list(range(dp * self.sp, (dp + 1) * self.sp)) for dp in range(self.draft_dp)]

    def dp_groups(self) -> list[list[int]]:
        """The ranks of each data-parallel group, which hold the same part of different sequences."""
        return [list(range(sp_rank, self.world_size, self.sp)) for sp_rank in range(self.sp)]


def check_heads(ulysses: int, num_heads: int, num_kv_heads: int) -> None:
    """Check that every rank of a ulysses group gets whole query and key/value heads.

    Raises:
        ValueError: `ulysses` does not divide gcd(num_heads, num_kv_heads).
    """
    common = math.gcd(num_heads, num_kv_heads)
    if common % ulysses:
        largest = max(degree for degree in range(1, min(ulysses, common) + 1) if common % degree == 0)
        raise ValueError(
            f"parallel.ulysses is {ulysses}, but it must divide {common}, the greatest common divisor of the "
            f"draft's {num_heads} query heads and {num_kv_heads} key/value heads. Set parallel.ulysses to "
            f"{largest}; the rest of the sequence parallelism belongs to parallel.ring."
        )
