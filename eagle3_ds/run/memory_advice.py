"""Advice after a rank has run out of memory: what the planner says it needs, and which settings help most."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from eagle3_ds.algorithms import algorithm_of
from eagle3_ds.config import Recipe, fill_deepspeed_config, load_deepspeed_config, missing_packages
from eagle3_ds.costs import ZeroSettings
from eagle3_ds.plan import explain_shortage
from eagle3_ds.run.counted_setup import counted_setup
from eagle3_ds.targets import load_text_config, resolve_path
from eagle3_ds.topology import detect_accelerator

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
    advice = explain_shortage(setup, memory_per_rank(ranks_per_host), files)
    return "\n".join([opening + advice, *(f"note: {note}" for note in notes)])


def memory_per_rank(ranks_per_host: int) -> int:
    """Bytes that a rank may use on this machine: its device's memory, or on a CPU its share of the host's."""
    accelerator = detect_accelerator()
    if accelerator == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // ranks_per_host
    return int(getattr(torch, accelerator).get_device_properties(0).total_memory)


def deepspeed_files(recipe: Recipe, world: int) -> tuple[dict[str, ZeroSettings], list[str]]:
    """The ZeRO settings of the recipe's DeepSpeed JSON, and of the other JSONs in its folder, which the
    planner may propose instead. Files there that cannot be used are skipped.

    Returns:
        {file: its settings}, the recipe's own first; and a note about each file that was skipped.

    Raises:
        ValueError: the recipe's own file is refused.
    """
    own, draft_dp = Path(recipe.deepspeed), recipe.parallel.draft_dp or 1
    found, notes = {str(own): ZeroSettings.of(load_deepspeed_config(own))}, []
    for path in sorted(path for path in own.parent.glob("*.json") if path != own):
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
            found[str(path)] = ZeroSettings.of(config)
    return found, notes
