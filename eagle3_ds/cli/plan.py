"""`eagle3-ds plan`: what a recipe costs on given devices, how long a sequence may be, and the fastest
settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eagle3_ds.cli.words import Function, recipe_words, terminal, write
from eagle3_ds.config import deepspeed_name, read_recipe
from eagle3_ds.run.target_sizes import SHAPES, SIZES

if TYPE_CHECKING:
    from rich.console import Console

    from eagle3_ds.costs import Setup
    from eagle3_ds.plan import Candidate, Device
    from eagle3_ds.run.planning import Planned

GIB, MIB = 2**30, 2**20
CACHE_ITEMSIZE = 2  # bfloat16, which servers keep a cache in unless told otherwise
SHOWN = 6
# The planner's own table says more of each; it waits for torch, which `--help` does not.
DEVICES = ("A100", "Ascend910B", "Ascend910C", "B200", "H100", "H200")
COUNT = click.IntRange(min=1)
GIBIBYTES = click.FloatRange(min=0, min_open=True, max=float("inf"), max_open=True)


def size_options(function: Function) -> Function:
    """The sizes of a target, each by an option of its own."""
    for size in reversed(SIZES):
        function = click.option(
            f"--{size.replace('_', '-')}",
            size,
            type=COUNT,
            metavar="N",
            help=f"the target's {size}; all of them, or over --shape",
        )(function)
    return function


GPUS_PER_NODE = click.option(
    "--gpus-per-node", type=COUNT, default=8, metavar="N", help="ranks with fast links between them (else 8)"
)


@click.command()
@recipe_words
@click.option(
    "--gpus", type=COUNT, metavar="N", help="ranks of the run, e.g. --gpus 16 (else those of its mesh, or 8)"
)
@GPUS_PER_NODE
@click.option(
    "--gpu-memory",
    type=GIBIBYTES,
    metavar="GIB",
    help="memory a rank may use, e.g. --gpu-memory 80 (else the device's)",
)
@click.option(
    "--reserve",
    type=GIBIBYTES,
    default=2.0,
    metavar="GIB",
    help="of it for context, NCCL and fragmentation (else 2)",
)
@click.option(
    "--device",
    type=click.Choice(DEVICES),
    default="H100",
    help="whose peaks predict the time (else H100)",
)
@click.option(
    "--supervised",
    type=click.FloatRange(min=0, min_open=True, max=1),
    default=1.0,
    metavar="SHARE",
    help="of the tokens, answers that is, e.g. 0.2 (else 1)",
)
@click.option(
    "--shape",
    type=click.Choice(sorted(SHAPES)),
    help="sizes of a target that is not here, e.g. --shape llama3.1-8b",
)
@size_options
def plan(
    recipe: str,
    overrides: tuple[str, ...],
    gpus: int | None,
    gpus_per_node: int,
    gpu_memory: float | None,
    reserve: float,
    device: str,
    supervised: float,
    shape: str | None,
    **sizes: int | None,
) -> int:
    """bytes per rank, the longest sequence that fits, and the fastest settings of a recipe

    The exit status is 1 when the recipe as it stands does not fit.
    """
    from eagle3_ds.run.planning import Machines, plan_recipe

    given = {name: size for name, size in sizes.items() if size is not None}
    loaded, told = read_recipe(recipe, overrides)
    mesh = loaded.parallel
    if gpus is None and mesh.draft_dp is not None:
        gpus = mesh.draft_dp * mesh.ring * mesh.ulysses
        told = (*told, f"inferred: --gpus {gpus}, by the recipe's mesh")
    for line in told:
        write(terminal(), line)
    machines = Machines(gpus or Machines.gpus, gpus_per_node, gpu_memory, reserve, device)
    planned = plan_recipe(loaded, machines, supervised, shape, given)
    _show(planned, terminal())
    return 0 if planned.shortage is None else 1


def _show(planned: Planned, console: Console) -> None:
    setup, device, budget = planned.setup, planned.device, planned.budget
    _show_setup(setup, device, budget, console)
    if planned.mesh_note is not None:
        write(console, planned.mesh_note)
    for note in planned.notes:
        write(console, f"draft: {note}")
    _show_memory(setup, budget, console)
    _show_lengths(setup, budget, console)
    write(console, planned.disk)
    _show_time(setup, device, planned.ranks_per_node, console)
    for line in planned.whole:
        write(console, line)
    _show_candidates(planned.candidates, budget, console)
    for warning in planned.warnings:
        write(console, f"warning: {warning}")
    if planned.shortage is not None:
        write(console, f"The recipe as it stands does not fit. {planned.shortage}")


def _show_setup(setup: Setup, device: Device, budget: int, console: Console) -> None:
    shape = setup.shape
    millions = shape.num_parameters / 1e6
    digits = 0 if millions >= 10 else 2
    write(
        console,
        f"draft: {millions:,.{digits}f} M trained parameters, hidden {shape.hidden_size}, "
        f"{shape.num_heads}/{shape.num_kv_heads} heads of {shape.head_dim}, draft vocabulary "
        f"{shape.draft_vocab_size}, K {setup.ttt_steps}",
    )
    per_token = shape.cache_bytes(CACHE_ITEMSIZE)  # keys and values
    served = setup.length if setup.window is None else min(setup.length, setup.window)
    write(
        console,
        f"the draft's cache when served in bfloat16: {per_token} bytes per token, "
        f"{per_token * served / MIB:.1f} MiB per sequence of {setup.length} tokens (data.max_length)"
        + ("" if setup.window is None else f", of which a window keeps {served}"),
    )
    write(
        console,
        f"run: draft_dp x ring x ulysses = {_mesh_text(setup)}, {setup.dtype}, {setup.length} tokens per "
        f"sequence, {setup.slots} slots per rank, {setup.live_slots} of them live",
    )
    write(console, f"device: {device.name}, {budget / GIB:.1f} GiB per rank for tensors")


def _show_memory(setup: Setup, budget: int, console: Console) -> None:
    from rich.table import Table

    from eagle3_ds.plan import predict_memory

    memory = predict_memory(setup)
    phases = list(memory.phases)
    table = Table("GiB per rank", *phases, title="predicted tensors, phase by phase of a step")
    for part in dict.fromkeys(part for parts in memory.phases.values() for part in parts):
        sizes = [memory.phases[phase].get(part, 0) for phase in phases]
        if any(sizes):
            table.add_row(part, *(f"{size / GIB:.2f}" if size else "" for size in sizes))
    table.add_section()
    table.add_row("total", *(f"{sum(memory.phases[phase].values()) / GIB:.2f}" for phase in phases))
    console.print(table)
    verdict = "fits" if memory.peak <= budget else "does NOT fit"
    write(
        console, f"peak {memory.peak / GIB:.2f} GiB, in {memory.phase}: {verdict} in {budget / GIB:.1f} GiB"
    )
    host = ", ".join(f"{part} {size / GIB:.2f} GiB" for part, size in memory.host.items() if size)
    write(console, f"in the host's memory, per rank: {host or 'nothing'}")


def _show_lengths(setup: Setup, budget: int, console: Console) -> None:
    from eagle3_ds.plan import largest_length

    lengths = {
        mode: largest_length(replace(setup, activation=mode), budget) for mode in setup.shape.activations
    }
    text = ", ".join(f"{mode} {length}" for mode, length in lengths.items())
    write(console, f"longest sequence that fits this mesh, in tokens, by train.activation: {text}")


def _show_time(setup: Setup, device: Device, ranks_per_node: int, console: Console) -> None:
    from eagle3_ds.plan import attention_pairs, predict_time, step_flops
    from eagle3_ds.run.whole_run import figure

    pairs = attention_pairs(setup)
    time, flops = predict_time(setup, device, pairs, ranks_per_node), step_flops(setup, pairs)
    # Half a millisecond is nothing to a real step, but all there is to one of a tiny draft.
    least = min(5e-4, time.seconds / 1000)
    parts = ", ".join(f"{name} {figure(seconds)}" for name, seconds in time.parts.items() if seconds >= least)
    write(
        console,
        f"predicted step: {figure(time.seconds)} s, {time.tokens_per_second:.0f} tokens/s, "
        f"{flops.total / 1e12:.1f} TFLOP per rank and sequence; in seconds: {parts}",
    )
    share = (
        "every token is"
        if setup.supervised == 1
        else f"{setup.supervised:.1%} of the tokens, spread evenly, are"
    )
    write(
        console, f"assumed: one document fills each sequence, {share} supervised, no communication is hidden"
    )
    if setup.target_bytes:
        write(
            console,
            "the target beside: its weights are counted, its forward is not, neither bytes nor seconds",
        )
    if setup.decoder_bytes:
        write(
            console,
            "decoding during training, on rank 0 alone: its weights are counted, its keys and values and its "
            "seconds are not",
        )


def _show_candidates(candidates: Sequence[Candidate], budget: int, console: Console) -> None:
    """The fastest setting of each mesh, the best few of them."""
    if not candidates:
        write(console, "No mesh of these ranks fits this length with the DeepSpeed files at hand.")
        return
    from rich.table import Table

    from eagle3_ds.plan import largest_length

    of_mesh: dict[str, Candidate] = {}
    for candidate in candidates:
        of_mesh.setdefault(_mesh_text(candidate.setup), candidate)
    table = Table("mesh", "DeepSpeed", "group", "activation", "exchange", "GiB", "tokens/s", "longest")
    table.title = "fastest setting of each mesh (draft_dp x ring x ulysses)"
    table.columns[0].no_wrap = True
    for mesh, candidate in list(of_mesh.items())[:SHOWN]:
        setup, file = candidate.setup, Path(candidate.deepspeed).stem
        exchange = setup.kv_exchange if setup.ring > 1 else "-"
        numbers = f"{candidate.memory.peak / GIB:.1f}", f"{candidate.time.tokens_per_second:.0f}"
        longest = str(largest_length(setup, budget))
        table.add_row(mesh, file, setup.zero_group, setup.activation, exchange, *numbers, longest)
    console.print(table)
    write(console, f"best as overrides: {_overrides(candidates[0])}")


def _overrides(candidate: Candidate) -> str:
    setup = candidate.setup
    values: dict[str, object] = {
        "parallel.ulysses": setup.ulysses,
        "parallel.ring": setup.ring,
        "parallel.draft_dp": setup.draft_dp,
        "parallel.zero_group": setup.zero_group,
        "parallel.kv_exchange": setup.kv_exchange,
        "train.activation": setup.activation,
    }
    # Keys that stand in the recipe itself have no name to be given by, and are there already.
    if candidate.deepspeed != deepspeed_name({}):
        values["deepspeed"] = candidate.deepspeed
    return " ".join(f"{key}={value}" for key, value in values.items())


def _mesh_text(setup: Setup) -> str:
    return f"{setup.draft_dp} x {setup.ring} x {setup.ulysses}"
