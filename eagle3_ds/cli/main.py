"""The command line: `eagle3-ds launch RECIPE` is the main job, the other commands run one stage of it alone.

Everything that can be wrong is judged before the first process starts.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console
from rich.table import Table

from eagle3_ds.checkpoint.format import FINAL_WEIGHTS
from eagle3_ds.config import Recipe, dump_recipe, load_recipe
from eagle3_ds.launch.command import (
    CAPTURE_MODULE,
    LAUNCHERS,
    LaunchOptions,
    LaunchPlan,
    plan_launch,
    resolve_hosts,
    write_environment_file,
)
from eagle3_ds.launch.ranks import run_with_restarts
from eagle3_ds.run.checks import (
    RESOLVED,
    check_data,
    check_deepspeed,
    check_kernel,
    check_output,
    check_places,
    check_target,
    check_target_on_ranks,
    clear_output,
    target_shape,
)
from eagle3_ds.topology import Mesh, detect_accelerator

COMMANDS = {
    "launch": "the main job: prepare, train, evaluate, export, report",
    "prepare": "build the target if asked, tokenise the data, capture hidden states",
    "capture": "capture hidden states by many ranks, each its spans; goes on where it was interrupted",
    "evaluate": "speculative decoding with the trained and the untrained draft of a finished run",
    "export": "write the trained draft of a finished run for vLLM / SGLang and speculators",
    "report": "draw report.png of a run from its metrics.jsonl and eval.json",
}
# Commands with sub-commands of their own: the module whose `run(arguments, console)` they are, and their
# meaning.
TOOLS = {
    "doctor": (
        "eagle3_ds.cli.doctor",
        "versions, devices, and which attention kernels run here, each checked",
    ),
    "data": (
        "eagle3_ds.cli.data",
        "look at a row, or let the target answer the prompts: data inspect | regenerate",
    ),
    "plan": (
        "eagle3_ds.cli.plan",
        "bytes per rank, the longest sequence that fits, and the fastest settings of a recipe",
    ),
    "store": (
        "eagle3_ds.cli.store",
        "verify, describe or import hidden states: store verify | info | import",
    ),
}


@dataclass(frozen=True)
class Run:
    """A recipe that passed every check, and how it will be launched."""

    recipe: Recipe
    mesh: Mesh
    plan: LaunchPlan
    capture_plan: LaunchPlan
    notes: tuple[str, ...]
    checkpoint: Path | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. A user's mistake is one message and status 2, without a
    traceback.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    command, *rest = arguments
    console = Console(soft_wrap=True)
    if command not in COMMANDS and command not in TOOLS:
        print(
            f"eagle3-ds: there is no command {command!r}. Commands: {', '.join([*COMMANDS, *TOOLS])}.",
            file=sys.stderr,
        )
        return 2
    try:
        if command in TOOLS:
            return int(importlib.import_module(TOOLS[command][0]).run(rest, console))
        return _run_command(
            command, _parser(command).parse_intermixed_args(_with_explicit_resume(rest)), console
        )
    except (ValueError, OSError) as error:
        # What the system refuses (a path too long, a folder of somebody else) is the user's to mend too.
        print(f"eagle3-ds {command}: {error}", file=sys.stderr)
        return 2


def _run_command(command: str, options: argparse.Namespace, console: Console) -> int:
    if command == "launch":
        return launch(options, console)
    if command == "capture":
        return capture(options, console)
    recipe = load_recipe(options.recipe, options.overrides)
    if command == "prepare":
        check_data(recipe)
        _save_resolved(recipe)
    getattr(_stages(), command)(recipe, console)
    return 0


def _stages() -> ModuleType:
    """The stages, imported when one runs: they need every room, `--help` and `--dry-run` need few."""
    return importlib.import_module("eagle3_ds.run.stages")


def launch(options: argparse.Namespace, console: Console) -> int:
    """The main job. Returns the launcher's exit status when training fails."""
    run = resolve_run(options)
    _describe(run, console)
    if options.dry_run:
        console.print("dry run: nothing was started")
        return 0
    check_places(run.recipe, run.plan, options.launcher)
    stages = _stages()
    output_dir = Path(run.recipe.output_dir)
    if run.checkpoint is None:
        clear_output(output_dir)
    _save_resolved(run.recipe)
    stages.prepare(run.recipe, console, run.checkpoint)
    status = stages.capture(run.recipe, run.capture_plan, console)
    if status:
        return status
    write_environment_file(run.plan)
    outcome = run_with_restarts(
        run.plan, partial(_plan_again, options, console), run.recipe.faults.max_restarts, console
    )
    if outcome.status:
        ranks_per_host = max(len(slots) for slots in run.plan.hosts.values())
        advice = importlib.import_module("eagle3_ds.run.memory_advice").advise_on_memory(
            outcome.reason, run.recipe, ranks_per_host
        )
        if advice is not None:
            print(f"\n{advice}", file=sys.stderr)
        return outcome.status
    if not (output_dir / FINAL_WEIGHTS).is_file():
        console.print(
            "training was stopped before its end: the same command with --resume goes on, then evaluates "
            "and exports"
        )
        return 0
    stages.evaluate(run.recipe, console)
    stages.export(run.recipe, console)
    stages.report(run.recipe, console)
    stages.summary(run.recipe, console)
    return 0


def _plan_again(options: argparse.Namespace, console: Console) -> LaunchPlan:
    """The same command, from the newest intact checkpoint, or from the start where there is none yet."""
    run = resolve_run(argparse.Namespace(**{**vars(options), "resume": "auto", "overwrite": False}))
    for note in run.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    write_environment_file(run.plan)
    return run.plan


def capture(options: argparse.Namespace, console: Console) -> int:
    """Hidden states by all ranks, and nothing after. Returns the launcher's exit status when that fails."""
    options.overrides = [*options.overrides, "target.capture=parallel", "data.hidden_states=offline"]
    run = resolve_run(options)
    _describe(replace(run, plan=run.capture_plan), console)
    if options.dry_run:
        console.print("dry run: nothing was started")
        return 0
    check_places(run.recipe, run.capture_plan, options.launcher)
    _save_resolved(run.recipe)
    stages = _stages()
    stages.prepare(run.recipe, console)
    return int(stages.capture(run.recipe, run.capture_plan, console))


def resolve_run(options: argparse.Namespace) -> Run:
    """Judge everything that can be judged before a process starts. Raises ValueError with the fix."""
    overrides = list(options.overrides)
    if options.ds_config is not None:
        overrides.append(f"deepspeed={options.ds_config}")
    if options.max_restarts is not None:
        overrides.append(f"faults.max_restarts={options.max_restarts}")
    recipe = load_recipe(options.recipe, overrides)
    accelerator = detect_accelerator()
    parallel = recipe.parallel
    launch_options = LaunchOptions(
        hostfile=options.hostfile,
        num_ranks=options.num_ranks,
        num_nodes=options.num_nodes,
        include=options.include,
        exclude=options.exclude,
        master_addr=options.master_addr,
        master_port=options.master_port,
        launcher=options.launcher,
    )
    devices = 0 if options.dry_run else _device_count(accelerator)
    sp = parallel.ring * parallel.ulysses
    wanted = sp * parallel.draft_dp if parallel.draft_dp else devices or sp
    hosts = resolve_hosts(launch_options, accelerator, devices, wanted)
    world_size = sum(len(slots) for slots in hosts.values())
    mesh = Mesh.from_world(world_size, parallel.ring, parallel.ulysses, parallel.draft_dp)
    recipe = recipe.model_copy(update={"parallel": parallel.model_copy(update={"draft_dp": mesh.draft_dp})})
    check_deepspeed(recipe, mesh)
    notes = _check_rest(recipe, accelerator, options)
    checkpoint, resume = None, "latest" if options.resume else None
    if not options.dry_run:
        checkpoint, told = check_output(recipe, options.resume, options.overwrite)
        notes, resume = [*notes, *told], checkpoint.name if checkpoint else None
    plan = plan_launch(launch_options, hosts, accelerator, recipe, resume, os.environ)
    capture_plan = plan_launch(launch_options, hosts, accelerator, recipe, None, os.environ, CAPTURE_MODULE)
    return Run(recipe, mesh, plan, capture_plan, tuple(notes), checkpoint)


def _check_rest(recipe: Recipe, accelerator: str, options: argparse.Namespace) -> list[str]:
    """Target, kernel, data and the draft to start from; a dry run only notes what this machine lacks."""
    notes = []
    shape = target_shape(recipe, options.dry_run)
    if shape is None:
        notes.append(
            f"target {recipe.target.path} is not a folder here: its heads and vocabulary were not checked"
        )
    else:
        check_target(recipe, shape)
        check_target_on_ranks(recipe)
        try:
            notes.append(f"attention kernel {check_kernel(recipe, accelerator, shape)}")
        except ValueError as error:
            if not options.dry_run:
                raise
            notes.append(f"on this machine: {error}")
    if not options.dry_run:
        check_data(recipe)
        if recipe.train.init_from is not None and Path(recipe.target.path).is_dir() and not options.resume:
            _stages().load_initial_draft(recipe)
    return notes


def _device_count(accelerator: str) -> int:
    """Accelerators of this machine; 0 on a CPU, where any number of ranks may run."""
    return 0 if accelerator == "cpu" else int(getattr(torch, accelerator).device_count())


def _describe(run: Run, console: Console) -> None:
    """Print the resolved recipe, each rank's place, and the exact command."""
    mesh, plan = run.mesh, run.plan
    console.print(dump_recipe(run.recipe).rstrip(), markup=False, highlight=False)
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
        console.print(f"note: {note}", markup=False, highlight=False)
    variables = [f"{name}={shlex.quote(value)}" for name, value in plan.environment.items()]
    console.print(
        "command: " + " ".join([*variables, shlex.join(plan.command)]), markup=False, highlight=False
    )
    if plan.exported is not None:
        console.print(f"handed to every host: {', '.join(plan.exported)}", markup=False, highlight=False)


def _save_resolved(recipe: Recipe) -> None:
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESOLVED).write_text(dump_recipe(recipe), encoding="utf-8")


def _overview() -> str:
    meanings = COMMANDS | {name: meaning for name, (_, meaning) in TOOLS.items()}
    width = max(map(len, meanings))
    lines = ["usage: eagle3-ds COMMAND RECIPE [OPTIONS] [section.key=value ...]", ""]
    lines += [f"  {name:{width}}  {meaning}" for name, meaning in meanings.items()]
    return "\n".join([*lines, "", "eagle3-ds COMMAND --help tells a command's options."])


def _with_explicit_resume(arguments: Sequence[str]) -> list[str]:
    """`--resume` as `--resume=latest`, `--resume auto` in one word: else an override behind it would be taken
    for its value.
    """
    found: list[str] = []
    for argument in arguments:
        if argument == "auto" and found and found[-1] == "--resume=latest":
            found[-1] = "--resume=auto"
        else:
            found.append("--resume=latest" if argument == "--resume" else argument)
    return found


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"eagle3-ds {command}", description=COMMANDS[command], allow_abbrev=False
    )
    add = parser.add_argument
    add("recipe", help="recipe file, e.g. recipes/quickstart.yaml")
    add(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="e.g. parallel.ulysses=4 data.max_length=131072",
    )
    if command in ("launch", "capture"):
        _add_where(parser)
    if command == "launch":
        add(
            "--ds_config",
            metavar="F",
            help="DeepSpeed JSON instead of the recipe's, e.g. --ds_config ds_configs/zero3.json",
        )
        add(
            "--resume",
            choices=("latest", "auto"),
            help="go on from the newest checkpoint, e.g. train.steps=200 --resume; `--resume auto`: from the "
            "newest intact one, or from the start when there is none",
        )
        add(
            "--max-restarts",
            type=int,
            metavar="N",
            help="restart a failed run by itself, at most so often, e.g. --max-restarts 3",
        )
        add(
            "--overwrite",
            action="store_true",
            help="replace the run in output_dir, e.g. train.seed=1 --overwrite",
        )
    else:
        parser.set_defaults(ds_config=None, resume=None, max_restarts=None, overwrite=False)
    return parser


def _add_where(parser: argparse.ArgumentParser) -> None:
    """The options that say where ranks run."""
    add = parser.add_argument
    add("--hostfile", metavar="F", help="hosts of a multi-node run, e.g. --hostfile recipes/2nodes.hostfile")
    add(
        "--num_gpus",
        "--num_ranks",
        dest="num_ranks",
        type=int,
        metavar="N",
        help="ranks per host, e.g. --num_gpus 8",
    )
    add(
        "--num_nodes", type=int, metavar="N", help="use the first N hosts of the hostfile, e.g. --num_nodes 2"
    )
    add("--include", metavar="SPEC", help="only these hosts or slots, e.g. --include node-0@node-1:0,2")
    add("--exclude", metavar="SPEC", help="not these hosts or slots, e.g. --exclude node-1:0")
    add("--master_addr", metavar="A", help="address of the first host, e.g. --master_addr 10.0.0.1")
    add(
        "--master_port",
        type=int,
        metavar="P",
        help="rendezvous port, e.g. --master_port 29501; else a free one",
    )
    add(
        "--launcher",
        choices=LAUNCHERS,
        type=str.lower,
        help="multi-node backend, e.g. --launcher slurm (else pdsh)",
    )
    add(
        "--dry-run",
        action="store_true",
        help="print recipe, mesh and command, start nothing, e.g. with --num_gpus 8",
    )


if __name__ == "__main__":
    sys.exit(main())
