"""Turning a recipe and the user's options into a run that can be started, with all checks that are possible
before the first process starts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from eagle3_ds.algorithms import algorithm_of
from eagle3_ds.config import Recipe
from eagle3_ds.device.found import detect_accelerator, device_count
from eagle3_ds.launch.command import CAPTURE_MODULE, LaunchOptions, LaunchPlan, plan_launch, resolve_hosts
from eagle3_ds.run.checks import (
    check_data,
    check_deepspeed,
    check_draft,
    check_kernel,
    check_output,
    check_target_on_ranks,
    check_target_structure,
    check_trackers,
    server_warning,
    target_config,
)
from eagle3_ds.run.counted_setup import counted_setup
from eagle3_ds.run.memory_advice import memory_per_rank
from eagle3_ds.run.mesh_choice import RESERVE, choose_mesh, leaves_mesh
from eagle3_ds.targets import beyond_positions, positions
from eagle3_ds.topology import Mesh


@dataclass(frozen=True)
class RunOptions:
    """The options of a run that are not in its recipe.

    Attributes:
        where: hosts, ranks and launcher.
        resume: `latest` or `auto`, as for `--resume`; None for a new run.
        overwrite: replace the run in `output_dir`.
        dry_run: nothing will be started. What this machine lacks then gives a note and no error.
    """

    where: LaunchOptions = LaunchOptions()
    resume: str | None = None
    overwrite: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class ResolvedRun:
    """A recipe that passed every check, and how it will be launched.

    Attributes:
        given: the recipe as it was given; without a mesh, or `parallel.draft_dp`, it depends on the devices
            found.
        recipe: the same with the whole mesh filled in.
        options: the options that it was resolved with.
        plan, capture_plan: how to launch the ranks that train, and those that capture.
        notes: messages for the user.
        checkpoint: folder of the checkpoint to continue from; None for a new run.
    """

    given: Recipe
    recipe: Recipe
    options: RunOptions
    mesh: Mesh
    plan: LaunchPlan
    capture_plan: LaunchPlan
    notes: tuple[str, ...]
    checkpoint: Path | None

    def again(self) -> ResolvedRun:
        """The same run from the newest intact checkpoint, or from the start where there is none yet."""
        return resolve_run(self.given, replace(self.options, resume="auto", overwrite=False))


def resolve_run(recipe: Recipe, options: RunOptions | None = None) -> ResolvedRun:
    """Judge everything that can be judged before a process starts; changes nothing.

    Raises:
        ValueError: there is a mistake in the recipe or the options. The message says how to correct it.
    """
    options = options or RunOptions()
    accelerator = detect_accelerator()
    parallel = recipe.parallel
    devices = 0 if options.dry_run else device_count(accelerator)
    sp = parallel.ring * parallel.ulysses
    wanted = sp * parallel.draft_dp if parallel.draft_dp else devices or sp
    hosts = resolve_hosts(options.where, accelerator, devices, wanted)
    world_size = sum(len(slots) for slots in hosts.values())
    given, told = recipe, list[str]()
    if leaves_mesh(recipe):
        ranks_per_host = max(len(slots) for slots in hosts.values())
        recipe, told = _infer_mesh(recipe, world_size, ranks_per_host, accelerator, options.dry_run)
        parallel = recipe.parallel
    mesh = Mesh.from_world(world_size, parallel.ring, parallel.ulysses, parallel.draft_dp)
    recipe = recipe.model_copy(update={"parallel": parallel.model_copy(update={"draft_dp": mesh.draft_dp})})
    check_deepspeed(recipe, mesh)
    notes = [*_check_rest(recipe, accelerator, options), *told]
    if parallel.draft_dp is None:
        notes.append(
            f"inferred: parallel.draft_dp = {mesh.draft_dp}, the {world_size} ranks over ulysses "
            f"{mesh.ulysses} x ring {mesh.ring}: each group of {mesh.sp} trains on packs of its own"
        )
    checkpoint, resume = None, "latest" if options.resume else None
    if not options.dry_run:
        checkpoint, found = check_output(recipe, options.resume, options.overwrite)
        notes, resume = [*notes, *found], checkpoint.name if checkpoint else None
    plan = plan_launch(options.where, hosts, accelerator, recipe, resume, os.environ)
    capture_plan = plan_launch(options.where, hosts, accelerator, recipe, None, os.environ, CAPTURE_MODULE)
    return ResolvedRun(given, recipe, options, mesh, plan, capture_plan, tuple(notes), checkpoint)


def _infer_mesh(
    recipe: Recipe, world_size: int, ranks_per_host: int, accelerator: str, dry_run: bool
) -> tuple[Recipe, list[str]]:
    """The recipe with a mesh where the planner can choose one, and how that came about, in lines."""
    target = target_config(recipe, dry_run)
    if world_size == 1 or target is None:
        return recipe, []  # nothing to choose, or nothing known: every rank on a pack of its own
    algorithm = algorithm_of(recipe)
    shape = algorithm.shape(algorithm.build_config(target, recipe))
    try:
        setup = counted_setup(recipe, shape, target, world_size)
    except ValueError as error:
        return recipe, [f"the planner chose no mesh: {error}"]
    budget = memory_per_rank(ranks_per_host) - (0 if accelerator == "cpu" else RESERVE)
    chosen = choose_mesh(recipe, setup, world_size, budget, ranks_per_host)
    return chosen.recipe, [chosen.note]


def _check_rest(recipe: Recipe, accelerator: str, options: RunOptions) -> list[str]:
    """Check target, kernel, data and the draft to start from; returns notes. In a dry run, what this machine
    lacks gives a note and no error.
    """
    notes = []
    try:
        check_trackers(recipe)
    except ValueError as error:
        if not options.dry_run:
            raise
        notes.append(f"on this machine: {error}")
    target = target_config(recipe, options.dry_run)
    if target is None:
        notes.append(
            f"target {recipe.target.path} is not a folder here: its heads and vocabulary were not checked"
        )
    else:
        draft = check_draft(recipe, target)
        warning = beyond_positions(recipe.data.max_length, positions(target))
        notes += [f"warning: {told}" for told in (warning, server_warning(recipe)) if told]
        check_target_on_ranks(recipe)
        check_target_structure(recipe, options.dry_run)
        try:
            notes.append(f"attention kernel {check_kernel(recipe, accelerator, target, draft)}")
        except ValueError as error:
            if not options.dry_run:
                raise
            notes.append(f"on this machine: {error}")
    if not options.dry_run:
        check_data(recipe)
        if recipe.train.init_from is not None and Path(recipe.target.path).is_dir() and not options.resume:
            # Imported only here: a dry run should not wait for torch and transformers.
            from eagle3_ds.train.initial_draft import load_initial_draft

            load_initial_draft(recipe)
    return notes
