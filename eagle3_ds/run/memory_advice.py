"""Advice after a rank has run out of memory: what the planner says it needs, and which settings help most."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from eagle3_ds.algorithms import algorithm_of
from eagle3_ds.config import (
    Recipe,
    deepspeed_file,
    deepspeed_name,
    fill_deepspeed_config,
    load_deepspeed_config,
    missing_packages,
    shipped,
)
from eagle3_ds.costs import ZeroSettings
from eagle3_ds.device.found import detect_accelerator, device_memory
from eagle3_ds.plan import explain_shortage
from eagle3_ds.run.counted_setup import counted_setup
from eagle3_ds.targets import load_text_config, resolve_path

_SHORTAGE = re.compile(r"out ?of ?memory|MemoryError|can't allocate memory|not enough memory", re.IGNORECASE)
_PERHAPS = "(SIGKILL)"


def advise_on_memory(reason: str, recipe: Recipe, ranks_per_host: int) -> str | None:
    """The planner's advice for a run in which a rank has failed.

    Args:
        reason: the error of that rank.
        recipe: the resolved recipe.
        ranks_per_host: ranks that share the host's memory on a CPU.

    Returns:
        None when the rank has not failed for lack of memory.
    """
    if not _SHORTAGE.search(reason) and _PERHAPS not in reason:
        return None
    assert recipe.parallel.draft_dp is not None
    algorithm, target = algorithm_of(recipe), load_text_config(resolve_path(recipe.target.path))
    shape = algorithm.shape(algorithm.build_config(target, recipe))
    setup = counted_setup(recipe, shape, target, recipe.parallel.draft_dp)
    opening = "If memory was the reason: " if _PERHAPS in reason else ""
    files, notes = deepspeed_files(recipe, setup.world_size)
    try:
        advice = explain_shortage(setup, memory_per_rank(ranks_per_host), files)
    except ValueError as error:  # an algorithm that is not counted
        advice = f"no advice on memory: {error}"
    return "\n".join([opening + advice, *(f"note: {note}" for note in notes)])


def memory_per_rank(ranks_per_host: int) -> int:
    """Bytes that a rank may use on this machine: its device's memory, or on a CPU its share of the host's."""
    accelerator = detect_accelerator()
    if accelerator == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // ranks_per_host
    return device_memory(accelerator)


def deepspeed_files(recipe: Recipe, world: int) -> tuple[dict[str, ZeroSettings], list[str]]:
    """The ZeRO settings of the recipe's DeepSpeed JSON, and of others, which the planner may propose instead:
    those in its folder, and the shipped ones beside a shipped one or keys in the recipe. Files that cannot be
    used are skipped.

    Returns:
        {what a recipe calls it: its settings}, the recipe's own first; and a note about each file that was
        skipped.

    Raises:
        ValueError: the recipe's own is refused.
    """
    draft_dp = recipe.parallel.draft_dp or 1
    own = ZeroSettings.of(load_deepspeed_config(recipe.deepspeed))
    found, notes = {deepspeed_name(recipe.deepspeed): own}, []
    for name, path in _others(recipe.deepspeed).items():
        try:
            config = load_deepspeed_config(path)
            if "zero_optimization" not in config:
                raise ValueError(f"{path}: no `zero_optimization`, so it is no DeepSpeed configuration")
            fill_deepspeed_config(config, recipe, world, draft_dp)
            for line in missing_packages(config):
                raise ValueError(line)
        except (ValueError, OSError) as error:
            reason = str(error).removeprefix(f"{path}:").strip().splitlines()[0]
            notes.append(f"passed over {path}: {reason}")
        else:
            found[name] = ZeroSettings.of(config)
    return found, notes


def _others(own: str | dict[str, Any]) -> dict[str, Path]:
    """{what a recipe calls it: file} of the DeepSpeed JSONs that may stand in for `own`, by the alphabet."""
    if isinstance(own, str) and Path(own).is_file():
        siblings = sorted(path for path in Path(own).parent.glob("*.json") if path != Path(own))
        return {str(path): path for path in siblings}
    known = shipped("ds_configs")
    taken = None if isinstance(own, dict) else deepspeed_file(own)
    return {name: path for name, path in known.items() if path != taken}
