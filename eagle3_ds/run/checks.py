"""Checks before any process starts: DeepSpeed JSON, hosts, target, kernel, data files, output folder."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from transformers import LlamaConfig

from eagle3_ds.algorithms import algorithm_of
from eagle3_ds.checkpoint.format import (
    CHECKPOINTS,
    FINAL_WEIGHTS,
    INITIAL_WEIGHTS,
    newest_intact,
    read_manifest,
    require_intact,
)
from eagle3_ds.config import (
    RESOLVED,
    Recipe,
    deepspeed_name,
    fill_deepspeed_config,
    load_deepspeed_config,
    load_recipe,
    missing_packages,
    recipe_differences,
)
from eagle3_ds.data.sources import expand_sources
from eagle3_ds.device.found import detect_accelerator
from eagle3_ds.draft import DRAFT_EMBEDDING, check_tile_bytes, slots_per_tile
from eagle3_ds.kernels import select_kernel
from eagle3_ds.launch import hosts
from eagle3_ds.launch.command import LaunchPlan
from eagle3_ds.launch.state import STATE, STEPS
from eagle3_ds.run.target_config import built_config
from eagle3_ds.targets import (
    attention_size,
    check_config_structure,
    check_parallel,
    check_quantization,
    check_spans,
    check_supported,
    check_target_end,
    check_weight_names,
    choose_aux_layers,
    load_full_config,
    load_text_config,
    no_known_server,
    resolve_path,
)
from eagle3_ds.topology import Mesh, check_heads
from eagle3_ds.train.trackers import missing_trackers
from eagle3_ds.train.tracking import FOLDER as TRACKERS

# Files that only a run which has begun to train leaves, and further files that --overwrite removes with them.
RESULTS = ("metrics.jsonl", CHECKPOINTS, FINAL_WEIGHTS, "eval.json", "report.png", "draft")
BYPRODUCTS = (
    RESOLVED,
    "prepared.json",
    "vocabulary.safetensors",
    DRAFT_EMBEDDING,
    INITIAL_WEIGHTS,
    "draft-speculators",
    "deepspeed.env",
    "logs",
    STATE,
    STEPS,
    TRACKERS,
    "profile",
)
# Keys that must not change when a run is resumed. All other keys may.
FIXED_ON_RESUME = ("target.", "draft.", "data.", "loss.", "train.seed", "train.init_from")
FREE_ON_RESUME = ("data.workers",)


def check_deepspeed(recipe: Recipe, mesh: Mesh) -> dict[str, Any]:
    """The complete DeepSpeed configuration, after the installed DeepSpeed has accepted it.

    Raises:
        ValueError: the recipe, this project or DeepSpeed refuses keys or values. The message names the file.
    """
    user = load_deepspeed_config(recipe.deepspeed)
    try:
        filled = fill_deepspeed_config(user, recipe, mesh.world_size, mesh.draft_dp)
    except ValueError as error:
        raise ValueError(f"{deepspeed_name(recipe.deepspeed)}: {error}") from error
    if detect_accelerator() == "cpu":
        # Without this variable DeepSpeed warns that it finds no accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Importing DeepSpeed takes seconds, for which `--help` and `plan` should not wait.
    judge = importlib.import_module("eagle3_ds.train.deepspeed_config")
    complaints = [*judge.deepspeed_complaints(filled, user.keys()), *missing_packages(user)]
    if complaints:
        raise ValueError("\n  ".join([f"{deepspeed_name(recipe.deepspeed)}:", *complaints]))
    return filled


def check_trackers(recipe: Recipe) -> None:
    """Raises ValueError when the package of a tracker of the recipe is not installed here."""
    if missing := missing_trackers(recipe):
        raise ValueError("\n  ".join(missing))


def check_places(recipe: Recipe, plan: LaunchPlan, launcher: str | None) -> None:
    """Check the hosts of a run.

    Raises:
        ValueError: a host cannot be reached, has other packages or code than this one, or lacks a shared
            folder.
    """
    folders = [Path(recipe.output_dir), Path(recipe.data.cache_dir)]
    # A target that is yet to be built, or that comes from the hub, has no folder to look for yet, and a
    # shipped DeepSpeed JSON comes with the package, which each host has its own of.
    own = [] if isinstance(recipe.deepspeed, dict) else [Path(recipe.deepspeed)]
    paths = [
        *(path for path in own if path.is_file()),
        *(path for path in [Path(recipe.target.path)] if path.is_dir()),
    ]
    hosts.check_places(plan, launcher, folders, paths)


def target_config(recipe: Recipe, dry_run: bool) -> Any:
    """The target's text config; None in a dry run without the target's folder.

    Raises:
        ValueError: there is no target, it is no model folder, or its family is not supported.
    """
    build, path = recipe.target.build, Path(recipe.target.path)
    if build is not None and not path.exists():
        return built_config(build)
    if dry_run and not path.is_dir():
        return None
    config = load_text_config(resolve_path(recipe.target.path))
    check_supported(config, recipe.target.path)
    choose_aux_layers(config.num_hidden_layers, recipe.target.aux_layers)
    return config


def check_draft(recipe: Recipe, target: Any) -> LlamaConfig:
    """The draft's config, checked against the target's config and the recipe.

    Raises:
        ValueError: the target does not allow such a draft, or the Ulysses degree or the bytes of a tile do
            not fit it.
    """
    config = algorithm_of(recipe).build_config(target, recipe)
    check_heads(recipe.parallel.ulysses, config.num_attention_heads, config.num_key_value_heads)
    itemsize = getattr(torch, recipe.train.dtype).itemsize
    check_tile_bytes(recipe.loss.tile_bytes, recipe.draft.vocab_size, recipe.draft.num_guesses, itemsize)
    slots_per_tile(config.hidden_size, config.intermediate_size, itemsize, recipe.train.tile_bytes)
    return config


def check_target_structure(recipe: Recipe, dry_run: bool = False) -> None:
    """Raises ValueError when the target's modules, logits or weights are not as a capture needs them.

    Nothing is loaded: the model is built without weights. A target that the recipe builds is as it should. A
    dry run judges the config alone. Of a target that a server runs, and no decoding here, only embedding,
    final norm and head are looked for.
    """
    if recipe.target.build is not None:
        return
    path = resolve_path(recipe.target.path)
    if recipe.target.capture == "server" and not (recipe.eval.num_prompts or recipe.eval.during):
        if not dry_run:
            check_target_end(path)
        return
    config = load_full_config(path)
    check_config_structure(config, recipe.target.path)
    if not dry_run:
        check_quantization(config, recipe.target.path)
        check_weight_names(path)


def server_warning(recipe: Recipe) -> str | None:
    """What to warn of when no server is known for drafts of the target. One that the recipe builds is a
    Llama.
    """
    path = Path(recipe.target.path).expanduser()
    return no_known_server(load_full_config(path)) if path.is_dir() else None


def check_kernel(recipe: Recipe, accelerator: str, target: Any, draft: LlamaConfig) -> str:
    """The name of the attention kernel that will run the draft of config `draft`.

    Raises:
        ValueError: the kernel is not available. The message names those that are.
    """
    device = torch.device(accelerator)
    if target_runs_on_ranks(recipe):
        select_kernel(
            recipe.attention.kernel, device, getattr(torch, recipe.target.dtype), attention_size(target)
        )
    return select_kernel(
        recipe.attention.kernel, device, getattr(torch, recipe.train.dtype), draft.head_dim
    ).name


def target_runs_on_ranks(recipe: Recipe) -> bool:
    """Whether the target runs cut into spans over all ranks: in a parallel capture, or online."""
    return recipe.target.capture == "parallel" or recipe.data.hidden_states == "online"


def check_target_on_ranks(recipe: Recipe) -> None:
    """Check a target that is to run cut over ranks. One that is yet to be built can do so.

    Raises:
        ValueError: the target cannot run cut over ranks.
    """
    path = Path(recipe.target.path)
    if target_runs_on_ranks(recipe) and (recipe.target.build is None or path.exists()):
        config = load_full_config(resolve_path(recipe.target.path))
        check_parallel(config, recipe.target.path, recipe.parallel.ulysses, recipe.data.max_length)
        check_spans(config, recipe.target.path)


def check_data(recipe: Recipe) -> None:
    """Check that the data files exist.

    Raises:
        ValueError: one does not.
    """
    expand_sources(recipe.data.train, "data.train")
    expand_sources(recipe.data.heldout, "data.heldout")


def check_output(recipe: Recipe, resume: str | None, overwrite: bool) -> tuple[Path | None, list[str]]:
    """Check that a run does not mix its files with those of another run. Changes nothing.

    Args:
        resume: `latest`, `auto` or None, as given by `--resume`.

    Returns:
        The checkpoint to continue from, with all its files checked, or None for a new run; and notes for the
        user about the choice.

    Raises:
        ValueError: the folder holds a run and neither flag is given, or there is no checkpoint to resume, it
            is damaged, or is of a run with other fixed keys.
    """
    folder = Path(recipe.output_dir)
    if resume and overwrite:
        raise ValueError("--resume and --overwrite contradict each other. Keep one of them.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir: {folder} is a file. Choose another folder.")
    present = [name for name in RESULTS if (folder / name).exists()]
    if resume:
        root = folder / CHECKPOINTS
        checkpoint, passed_over = (require_intact(root), []) if resume == "latest" else _newest_or_none(root)
        _check_same_experiment(recipe, folder, checkpoint)
        if checkpoint is not None:
            return checkpoint, [
                *(f"passed over: {problem}" for problem in passed_over),
                f"going on from {checkpoint}",
            ]
    elif present and not overwrite:
        raise ValueError(
            f"output_dir: {folder} already holds a run ({', '.join(present)}). Go on with it by --resume, "
            "replace it by --overwrite, or choose another folder."
        )
    if present and not (folder / RESOLVED).is_file():
        raise ValueError(
            f"output_dir: {folder} has {', '.join(present)} but no {RESOLVED}, so it is not a run of this "
            "program and will not be replaced. Choose another folder."
        )
    return None, ["there is no checkpoint yet, so the run starts from the beginning"] if resume else []


def _newest_or_none(root: Path) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint, or None if there are no checkpoints; and what is wrong with newer ones.

    Raises:
        ValueError: there are checkpoints, but all are damaged.
    """
    found, problems = newest_intact(root)
    if found is None and problems:
        raise ValueError(
            f"--resume auto: no checkpoint in {root} is intact ({'; '.join(problems)}). Restore a file, or "
            "start again by --overwrite."
        )
    return found, problems


def _check_same_experiment(recipe: Recipe, folder: Path, checkpoint: Path | None) -> None:
    """Compare the keys that must not change with those of the checkpoint, or of the run in `folder` if it has
    no checkpoint yet.

    Raises:
        ValueError: some differ. The message lists them.
    """
    if checkpoint is not None:
        before = saved_recipe(checkpoint)
    elif (folder / RESOLVED).is_file():
        before = load_recipe(folder / RESOLVED)
    else:
        return
    changed = [
        line
        for line in recipe_differences(before, recipe)
        if (key := line.partition(":")[0]).startswith(FIXED_ON_RESUME) and key not in FREE_ON_RESUME
    ]
    if changed:
        raise ValueError(
            f"--resume: the run in {folder} was another experiment ({'; '.join(changed)}). Undo these "
            "changes, or choose another output_dir."
        )


def saved_recipe(checkpoint: Path) -> Recipe:
    """The recipe of the run that wrote a checkpoint.

    Raises:
        ValueError: this version cannot read it.
    """
    try:
        return Recipe.model_validate_json(json.dumps(read_manifest(checkpoint).recipe))
    except ValidationError as error:
        keys = ", ".join(".".join(map(str, detail["loc"])) for detail in error.errors())
        raise ValueError(
            f"{checkpoint} was written by another version of this program, which has other recipe keys "
            f"({keys}). Resume with that version."
        ) from error


def clear_output(folder: Path) -> None:
    """Remove the files that a run writes from its output folder, and no others."""
    for name in (*RESULTS, *BYPRODUCTS):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
