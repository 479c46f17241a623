"""Advice on what to change when a run does not fit the memory: text for the command line, and for the
out-of-memory error of a training rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from eagle3_ds.costs import Setup, ZeroSettings
from eagle3_ds.plan.memory import predict_memory
from eagle3_ds.plan.search import meshes

GIB = 2**30


@dataclass(frozen=True)
class Change:
    """A change of one setting of the recipe.

    Attributes:
        overrides: as the command line takes them, e.g. `train.activation=recompute`.
        saved: bytes by which the change alone lowers the peak of a rank.
    """

    overrides: str
    saved: int


def helpful_changes(setup: Setup, deepspeed: Mapping[str, ZeroSettings], count: int = 3) -> list[Change]:
    """The single changes that save most, the best first, and at most one per setting.

    The number of ranks stays the same; a change of the mesh may let more of them share a sequence, which
    leaves fewer for draft_dp.

    Args:
        setup: the run that does not fit.
        deepspeed: ZeRO settings by the DeepSpeed file that may be named instead.
        count: the most changes to return.
    """
    peak = predict_memory(setup).peak
    best: dict[str, Change] = {}
    for overrides, changed in _single_changes(setup, deepspeed):
        change = Change(overrides, peak - predict_memory(changed).peak)
        setting = overrides.partition("=")[0]
        if change.saved > 0 and (setting not in best or change.saved > best[setting].saved):
            best[setting] = change
    return sorted(best.values(), key=lambda change: -change.saved)[:count]


def breakdown(setup: Setup) -> list[tuple[str, int]]:
    """The parts of one rank's peak with their bytes, the largest first."""
    return sorted(predict_memory(setup).at_peak.items(), key=lambda part: -part[1])


def explain_shortage(setup: Setup, budget: int, deepspeed: Mapping[str, ZeroSettings]) -> str:
    """Text for a user: how much memory is needed, for which parts, and which three settings would help most.

    Args:
        setup: the run that does not fit.
        budget: bytes that a rank has.
        deepspeed: ZeRO settings by the DeepSpeed file that may be named instead.
    """
    memory = predict_memory(setup)
    lines = [
        f"{memory.peak} bytes ({memory.peak / GIB:.1f} GiB) per rank are needed at the peak "
        f"({memory.phase}), and {budget} ({budget / GIB:.1f} GiB) are there:"
    ]
    lines += [f"  {size / GIB:8.2f} GiB  {part}" for part, size in breakdown(setup) if size]
    changes = helpful_changes(setup, deepspeed)
    lines.append(
        "What would help most, each alone:" if changes else "No single setting would help; use more ranks."
    )
    lines += [f"  {change.overrides}  saves {change.saved / GIB:.2f} GiB" for change in changes]
    return "\n".join(lines)


def _single_changes(setup: Setup, deepspeed: Mapping[str, ZeroSettings]) -> list[tuple[str, Setup]]:
    found = [
        (f"train.activation={mode}", replace(setup, activation=mode))
        for mode in setup.shape.activations
        if mode != "keep"
    ]
    found += [(f"deepspeed={file}", replace(setup, zero=zero)) for file, zero in deepspeed.items()]
    found += [
        (f"parallel.ulysses={mesh.ulysses} parallel.ring={mesh.ring} parallel.draft_dp={mesh.draft_dp}", mesh)
        for mesh in meshes(setup, setup.world_size)
    ]
    if setup.ring > 1:
        found.append(("parallel.kv_exchange=ring", replace(setup, kv_exchange="ring")))
    found.append(("parallel.zero_group=all", replace(setup, zero_group="all")))
    found.append(
        (f"train.tile_bytes={setup.tile_bytes // 4}", replace(setup, tile_bytes=setup.tile_bytes // 4))
    )
    half = setup.length // 2
    return [*found, (f"data.max_length={half}", replace(setup, length=half))] if half else found
