"""Planning a recipe: its memory and time on given devices, the longest sequence that fits, and the fastest
settings.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, LlamaConfig

from eagle3_ds.algorithms import algorithm_of
from eagle3_ds.config import Recipe
from eagle3_ds.costs import Setup
from eagle3_ds.draft import aux_size
from eagle3_ds.draft.geometry import target_hidden_size
from eagle3_ds.plan import (
    DEVICES,
    Candidate,
    Device,
    attention_pairs,
    explain_shortage,
    fastest,
    predict_memory,
    predict_time,
)
from eagle3_ds.run.checks import server_warning
from eagle3_ds.run.counted_setup import counted_setup
from eagle3_ds.run.memory_advice import deepspeed_files
from eagle3_ds.run.mesh_choice import choose_mesh, leaves_mesh
from eagle3_ds.run.target_config import built_config, llama_config
from eagle3_ds.run.target_sizes import SHAPES, SIZES
from eagle3_ds.run.whole_run import Counted, Uncounted, capture_text, counted_documents, run_text
from eagle3_ds.store import RowFormat
from eagle3_ds.store.index import DTYPES
from eagle3_ds.targets import (
    beyond_positions,
    check_config_structure,
    check_supported,
    load_full_config,
    load_text_config,
    positions,
)
from eagle3_ds.topology import Mesh, check_heads

GIB = 2**30
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Machines:
    """The machines that a run is planned for.

    Attributes:
        gpus: ranks of the run.
        gpus_per_node: ranks of a node, which have fast links between them.
        gpu_memory: GiB of a rank's device; None takes the device's own.
        reserve: GiB of it that are left for the CUDA context, NCCL and fragmentation.
        device: name of the device whose peak rates predict the time.
    """

    gpus: int = 8
    gpus_per_node: int = 8
    gpu_memory: float | None = None
    reserve: float = 2.0
    device: str = "H100"


@dataclass(frozen=True)
class Planned:
    """Attributes:
    setup: the run, as the planner counts it.
    device: whose peaks predict the time.
    ranks_per_node: with fast links between them.
    budget: bytes per rank for tensors.
    candidates: settings that fit, the fastest first.
    warnings: about the recipe and the target.
    notes: what of the draft's shape is neither the recipe's nor plainly the target's.
    disk: what a store of hidden states takes, in words.
    mesh_note: how the mesh was chosen, where the recipe gives none.
    whole: steps and time of the whole run, and time and disk of the capture, in words.
    shortage: what is missing and would help; None where the recipe fits as it stands.
    """

    setup: Setup
    device: Device
    ranks_per_node: int
    budget: int
    candidates: Sequence[Candidate] = field(default_factory=tuple)
    shortage: str | None = None
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    disk: str = ""
    mesh_note: str | None = None
    whole: Sequence[str] = ()


def plan_recipe(
    recipe: Recipe,
    machines: Machines,
    supervised: float = 1.0,
    shape: str | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Planned:
    """Predict memory and time of a recipe, and look for faster settings.

    Args:
        supervised: share of the tokens that are supervised.
        shape: name of a target in `SHAPES`, whose sizes are used.
        sizes: the target's sizes, by the names in `SIZES`; they override those of `shape`.

    Raises:
        ValueError: the mesh or the Ulysses degree is impossible, the target's sizes are unknown, or no
            setting fits the memory.
    """
    parallel = recipe.parallel
    mesh = Mesh.from_world(machines.gpus, parallel.ring, parallel.ulysses, parallel.draft_dp)
    target = _target_config(recipe, shape, sizes or {})
    algorithm = algorithm_of(recipe)
    config = algorithm.build_config(target, recipe)
    draft = algorithm.shape(config)
    shape_notes = algorithm.notes(target, recipe)
    check_heads(parallel.ulysses, draft.num_heads, draft.num_kv_heads)
    device = DEVICES[machines.device]
    budget = int(((machines.gpu_memory or device.memory) - machines.reserve) * GIB)
    if budget <= 0:
        raise ValueError(f"--reserve {machines.reserve} leaves nothing of the device's memory. Lower it.")
    files, notes = deepspeed_files(recipe, mesh.world_size)
    for note in notes:
        logger.info("note: %s", note)
    setup, mesh_note = counted_setup(recipe, draft, target, mesh.draft_dp, supervised), None
    if leaves_mesh(recipe):
        chosen = choose_mesh(recipe, setup, machines.gpus, budget, machines.gpus_per_node)
        setup, mesh_note = chosen.setup, chosen.note
    fits = predict_memory(setup).peak <= budget
    candidates = fastest(setup, machines.gpus, budget, device, files, machines.gpus_per_node)
    shortage = None if fits else explain_shortage(setup, budget, files)
    if not fits and not candidates:
        raise ValueError(f"data.max_length = {setup.length} fits no mesh and no setting.\n{shortage}")
    # Sizes that are given say nothing of positions.
    warning = None if shape or sizes else beyond_positions(recipe.data.max_length, positions(target))
    server = None if shape or sizes else server_warning(recipe)
    warnings = tuple(told for told in (warning, server) if told)
    where = (setup, device, machines.gpus_per_node, budget)
    # Documents are those of the target's own tokenizer: sizes that are given have none.
    sizes_given = Uncounted("not counted: they depend on the target's tokenizer, and only sizes are given")
    counted = sizes_given if shape or sizes else counted_documents(recipe)
    disk = _disk_text(recipe, config, counted)
    time = predict_time(setup, device, attention_pairs(setup), machines.gpus_per_node)
    row_bytes = RowFormat(aux_size(config), target_hidden_size(config), recipe.data.hidden_dtype).row_bytes
    capture = capture_text(recipe, counted, target, device, machines.gpus, row_bytes)
    whole = [run_text(recipe, counted, setup.draft_dp, time.seconds), *([capture] if capture else [])]
    return Planned(*where, candidates, shortage, warnings, shape_notes, disk, mesh_note, whole)


def _disk_text(recipe: Recipe, draft: LlamaConfig, counted: Counted | Uncounted) -> str:
    """What a hidden-state store takes, for each `data.hidden_dtype`: for a token, and for the documents where
    they are prepared.
    """
    tokens = counted.tokens if isinstance(counted, Counted) else None
    aux_width = aux_size(draft)
    parts = []
    for dtype in DTYPES:
        row_bytes = RowFormat(aux_width, target_hidden_size(draft), dtype).row_bytes
        whole = "" if tokens is None else f" ({tokens * row_bytes / GIB:.1f} GiB)"
        parts.append(f"{dtype} {row_bytes / 1024:.1f} KiB{whole}")
    of = "" if tokens is None else f", in brackets for the {tokens} tokens that are prepared"
    return (
        f"hidden states on disk, per token{of}: {', '.join(parts)}; data.hidden_dtype is "
        f"{recipe.data.hidden_dtype}. No disk: data.hidden_states=stream (from a server) or online"
    )


def _target_config(recipe: Recipe, shape: str | None, given: Mapping[str, int]) -> Any:
    """The target's text config: from the given sizes, its folder, its hub name, or `target.build`."""
    if shape or given:
        sizes = {**dict(zip(SIZES, SHAPES[shape] if shape else (), strict=False)), **given}
        missing = [f"--{size.replace('_', '-')}" for size in SIZES if size not in sizes]
        if missing:
            raise ValueError(
                f"{', '.join(missing)}: not given. Give every size of the target, or a --shape to start from."
            )
        return llama_config(sizes)
    path, build = Path(recipe.target.path).expanduser(), recipe.target.build
    if path.is_dir():
        config = load_text_config(path)
    elif build is not None:
        return built_config(build)
    else:
        config = _hub_config(recipe.target.path)
    check_supported(config, recipe.target.path)
    if path.is_dir():
        check_config_structure(load_full_config(path), recipe.target.path)
    return config


def _hub_config(name: str) -> Any:
    """The config.json of a hub name; the weights are not downloaded."""
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"target.path = {name!r} is no folder here, and its config could not be fetched from the hub "
            f"({reason}). Say its sizes instead: --shape {' | '.join(SHAPES)}, or --hidden-size and the "
            "others."
        ) from error
