"""What to change when a run does not fit: text that the command line prints, and the out-of-memory error of a
training rank.
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
    """Recipe overrides that lower the peak by `saved` bytes per rank, all else as it is."""

    overrides: str
    saved: int


def helpful_changes(setup: Setup, deepspeed: Mapping[str, ZeroSettings], count: int = 3) -> list[Change]:
    """The changes of one setting each that save most, one per setting, most first.

    The number of ranks stays: more of them may share a sequence, at the cost of draft_dp. `deepspeed` holds
    the ZeRO settings of the files that may be named.
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
    """Parts of the peak of one rank and their bytes, the largest first."""
    return sorted(predict_memory(setup).at_peak.items(), key=lambda part: -part[1])


def explain_shortage(setup: Setup, budget: int, deepspeed: Mapping[str, ZeroSettings]) -> str:
    """What is needed, of what it consists and the three settings that would help most, as lines of text."""
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
        (f"train.activation={mode}", replace(setup, activation=mode)) for mode in ("recompute", "offload")
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
