"""`eagle3-ds launch | capture`: the commands that start ranks."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from eagle3_ds.cli.words import (
    CALLED,
    PROGRAM,
    Function,
    log_level,
    recipe_words,
    telling_recipe,
    terminal,
    write,
)
from eagle3_ds.config import Recipe, dump_recipe, load_recipe
from eagle3_ds.launch.command import LAUNCHERS, LaunchOptions

if TYPE_CHECKING:
    from eagle3_ds.run.resolve import ResolvedRun

PLACES = (
    click.option(
        "--hostfile", metavar="F", help="hosts of a multi-node run, e.g. --hostfile recipes/2nodes.hostfile"
    ),
    click.option(
        "--num_gpus",
        "--num_ranks",
        "num_ranks",
        type=int,
        metavar="N",
        help="ranks per host, e.g. --num_gpus 8",
    ),
    click.option(
        "--num_nodes", type=int, metavar="N", help="use the first N hosts of the hostfile, e.g. --num_nodes 2"
    ),
    click.option(
        "--include", metavar="SPEC", help="only these hosts or slots, e.g. --include node-0@node-1:0,2"
    ),
    click.option("--exclude", metavar="SPEC", help="not these hosts or slots, e.g. --exclude node-1:0"),
    click.option("--master_addr", metavar="A", help="address of the first host, e.g. --master_addr 10.0.0.1"),
    click.option(
        "--master_port",
        type=int,
        metavar="P",
        help="rendezvous port, e.g. --master_port 29501; else a free one",
    ),
    click.option(
        "--launcher",
        type=click.Choice(LAUNCHERS, case_sensitive=False),
        help="multi-node backend, e.g. --launcher slurm (else pdsh)",
    ),
)


def place_options(function: Function) -> Function:
    """The options that say where ranks run, the fields of `LaunchOptions`."""
    for option in reversed(PLACES):
        function = option(function)
    return function


dry_run = click.option(
    "--dry-run", is_flag=True, help="print recipe, mesh and command, start nothing, e.g. with --num_gpus 8"
)


class Launch(click.Command):
    """`--resume` may stand alone or before `auto`; click would take an override behind it for its value."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        found: list[str] = []
        for argument in args:
            if argument == "auto" and found and found[-1] == "--resume=latest":
                found[-1] = "--resume=auto"
            else:
                found.append("--resume=latest" if argument == "--resume" else argument)
        return super().parse_args(ctx, found)


@click.command(cls=Launch)
@recipe_words
@place_options
@dry_run
@click.option(
    "--ds_config",
    metavar="F",
    help="DeepSpeed JSON instead of the recipe's, e.g. --ds_config ds_configs/zero3.json",
)
@click.option(
    "--resume",
    type=click.Choice(("latest", "auto")),
    metavar="[auto]",
    help="go on from the newest checkpoint, e.g. train.steps=200 --resume; `--resume auto`: from the newest "
    "intact one, or from the start when there is none",
)
@click.option(
    "--max-restarts",
    type=int,
    metavar="N",
    help="restart a failed run by itself, at most so often, e.g. --max-restarts 3",
)
@click.option(
    "--overwrite", is_flag=True, help="replace the run in output_dir, e.g. train.seed=1 --overwrite"
)
@log_level
def launch(
    recipe: str,
    overrides: tuple[str, ...],
    dry_run: bool,
    ds_config: str | None,
    resume: str | None,
    max_restarts: int | None,
    overwrite: bool,
    log_level: str | None,
    **places: Any,
) -> int:
    """the main job: prepare, train, export, evaluate, report

    The exit status is 75 when the run was asked to stop before its end: the same command with --resume
    goes on.
    """
    more = [] if ds_config is None else [f"deepspeed={ds_config}"]
    more += [] if max_restarts is None else [f"faults.max_restarts={max_restarts}"]
    with telling_recipe(recipe, overrides, log_level, *more) as loaded:
        from eagle3_ds.run.resolve import RunOptions, resolve_run

        run = resolve_run(loaded, RunOptions(LaunchOptions(**places), resume, overwrite, dry_run))
        _show_run(run)
        if dry_run:
            return 0
        from eagle3_ds.run.training import finish_run, train_run

        trained = train_run(run)
        if trained.finished:
            finish_run(run.recipe)
            _show_summary(run.recipe)
        return trained.exit_status


@click.command()
@recipe_words
@place_options
@dry_run
@log_level
def capture(
    recipe: str, overrides: tuple[str, ...], dry_run: bool, log_level: str | None, **places: Any
) -> int:
    """capture hidden states by many ranks, each its spans, or by the recipe's server; goes on where it was
    interrupted
    """
    more = ["data.hidden_states=offline"]
    by_server = load_recipe(recipe, [*overrides, *more]).target.capture == "server"
    more += [] if by_server else ["target.capture=parallel"]
    with telling_recipe(recipe, overrides, log_level, *more) as loaded:
        if by_server and not dry_run:
            from eagle3_ds.run.stages import prepare

            prepare(loaded)
            return 0
        from eagle3_ds.run.resolve import RunOptions, resolve_run

        run = resolve_run(loaded, RunOptions(LaunchOptions(**places), dry_run=dry_run))
        _show_run(replace(run, plan=run.capture_plan))
        if dry_run:
            return 0
        from eagle3_ds.run.training import capture_run

        return capture_run(run)


def _show_run(run: ResolvedRun) -> None:
    """The resolved recipe, each rank's place, and the exact command."""
    from rich.table import Table

    console, mesh, plan = terminal(), run.mesh, run.plan
    write(console, dump_recipe(run.recipe).rstrip())
    mesh_text = (
        f"draft_dp {mesh.draft_dp} x ring {mesh.ring} x ulysses {mesh.ulysses} = {mesh.world_size} ranks"
    )
    table = Table("rank", "host", "slot", "draft_dp", "ring", "ulysses", "sp", title=f"mesh: {mesh_text}")
    slots = [(host, slot) for host, numbers in plan.hosts.items() for slot in numbers]
    for rank, (host, slot) in enumerate(slots):
        place = mesh.place(rank)
        numbers = (place.dp_rank, place.ring_rank, place.ulysses_rank, place.sp_rank)
        table.add_row(str(rank), host, str(slot), *map(str, numbers))
    console.print(table)
    for note in run.notes:
        write(console, f"note: {note}")
    variables = [f"{name}={shlex.quote(value)}" for name, value in plan.environment.items()]
    write(console, "command: " + " ".join([*variables, shlex.join(plan.command)]))
    if plan.exported is not None:
        write(console, f"handed to every host: {', '.join(plan.exported)}")
    if run.options.dry_run:
        write(console, "dry run: nothing was started")


def _show_summary(recipe: Recipe) -> None:
    """What the run has made, its figures in a line, and the commands to go on with."""
    from eagle3_ds.run.next_steps import next_steps
    from eagle3_ds.run.summary import summary

    console, told = terminal(), summary(recipe)
    for name, why in told.failed_trackers.items():
        write(console, f"warning: the tracker {name} does not hold the whole run: it stopped {why}")
    write(console, f"\neverything is in {recipe.output_dir}")
    for what, names in told.made.items():
        write(console, f"  {what}: {names}")
    write(console, told.figures)
    write(console, "\nnext, for this run:")
    for step in next_steps(recipe, os.environ.get(CALLED, PROGRAM)):
        write(console, f"  # {step.what}")
        write(console, f"  {step.command}")
