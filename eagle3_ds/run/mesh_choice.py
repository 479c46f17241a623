"""The mesh of a recipe that gives none: as few ranks to a sequence as fit the memory, by the planner's
count.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from eagle3_ds.attention.costs import choose_kv_exchange
from eagle3_ds.config import Recipe
from eagle3_ds.costs import Setup
from eagle3_ds.plan import meshes, predict_memory
from eagle3_ds.run.checks import check_target_on_ranks

GIB = 2**30
AXES = {"ulysses", "ring", "draft_dp"}
RESERVE = 2 * GIB
"""Bytes of a device that are left for its context, the communication library and fragmentation, as in
`eagle3-ds plan`.
"""


class ChosenMesh(NamedTuple):
    """`recipe`: with the mesh, which `setup` counts. `note`: the choice and its reason, a line."""

    recipe: Recipe
    setup: Setup
    note: str


def leaves_mesh(recipe: Recipe) -> bool:
    """Whether the recipe says nothing of its mesh. What it says of one axis leaves the others as they are."""
    return not AXES & recipe.parallel.model_fields_set


def choose_mesh(
    recipe: Recipe, setup: Setup, world_size: int, budget: int, ranks_per_host: int
) -> ChosenMesh:
    """Give the recipe the mesh in which the fewest ranks share a sequence, of those that fit.

    Ranks that share a sequence exchange keys and values; ranks that do not train on a pack each. Of meshes
    that share alike, the one with the most Ulysses within a host is taken, which sends less than a ring.

    Args:
        setup: the recipe on any mesh, as the planner counts it.
        budget: bytes per rank for tensors.
    """
    found = [mesh for mesh in meshes(setup, world_size) if _suits_target(_with_mesh(recipe, mesh))]
    # Where the target can run on no mesh, the checks that follow say why.
    counted = [_exchanging(recipe, mesh) for mesh in found or meshes(setup, world_size)]
    peaks = {mesh: predict_memory(mesh).peak for mesh in counted}
    fitting = [mesh for mesh in counted if peaks[mesh] <= budget]
    reason = "the fewest ranks to a sequence that fit"
    if fitting:
        near = math.gcd(ranks_per_host, world_size)
        mesh = min(fitting, key=lambda one: (one.sp, one.ulysses > near, -one.ulysses))
    else:
        mesh = min(counted, key=lambda one: peaks[one])
        reason = "which needs least and does NOT fit by the planner's count (see eagle3-ds plan)"
    return ChosenMesh(
        _with_mesh(recipe, mesh),
        mesh,
        f"inferred: parallel = ulysses {mesh.ulysses} x ring {mesh.ring} x draft_dp {mesh.draft_dp} of "
        f"{world_size} ranks: {reason}; {peaks[mesh] / GIB:.2f} of {budget / GIB:.2f} GiB per rank are "
        f"counted for packs of {setup.length} tokens",
    )


def _exchanging(recipe: Recipe, mesh: Setup) -> Setup:
    is_auto = recipe.parallel.kv_exchange == "auto"
    return replace(mesh, kv_exchange=choose_kv_exchange(mesh)) if is_auto else mesh


def _suits_target(recipe: Recipe) -> bool:
    """Whether a target that is here and runs on the ranks can do so on the recipe's mesh."""
    if not Path(recipe.target.path).is_dir():
        return True
    try:
        check_target_on_ranks(recipe)
    except ValueError:
        return False
    return True


def _with_mesh(recipe: Recipe, mesh: Setup) -> Recipe:
    axes = {"ulysses": mesh.ulysses, "ring": mesh.ring, "draft_dp": mesh.draft_dp}
    return recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update=axes)})
