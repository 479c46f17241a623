"""`eagle3-ds plan`: what a recipe costs on given devices, how long a sequence may be, and the fastest
settings.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from eagle3_ds.algorithms import algorithm_of
from eagle3_ds.attention.costs import choose_kv_exchange
from eagle3_ds.config import Recipe, load_deepspeed_config, load_recipe
from eagle3_ds.costs import Setup
from eagle3_ds.plan import (
    DEVICES,
    Candidate,
    Device,
    attention_pairs,
    explain_shortage,
    fastest,
    largest_length,
    predict_memory,
    predict_time,
)
from eagle3_ds.run.memory_advice import deepspeed_files
from eagle3_ds.targets import check_supported, load_text_config
from eagle3_ds.topology import Mesh, check_heads

GIB = 2**30
SHOWN = 6
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "vocab_size",
    "num_layers",
)
# Sizes of targets in the order of SIZES, as their config.json gives them.
SHAPES: Mapping[str, tuple[int, ...]] = {
    "llama3.1-8b": (4096, 14336, 32, 8, 128, 128256, 32),
    "llama3.1-70b": (8192, 28672, 64, 8, 128, 128256, 80),
    "qwen3-8b": (4096, 12288, 32, 8, 128, 151936, 36),
    "qwen3-32b": (5120, 25600, 64, 8, 128, 151936, 64),
}


def run(arguments: Sequence[str], console: Console) -> int:
    """Print the plan. Returns 1 when the recipe as it stands does not fit.

    Raises:
        ValueError: a mesh that cannot be, heads that do not divide, a target without sizes, or nothing that
            fits.
    """
    return _plan(_parser().parse_intermixed_args(arguments), console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="eagle3-ds plan", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("recipe", help="recipe file, e.g. recipes/llama3.1-8b_128k_usp.yaml")
    add(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="e.g. data.max_length=262144 train.activation=offload",
    )
    add("--gpus", type=_positive, default=8, metavar="N", help="ranks of the run, e.g. --gpus 16 (else 8)")
    add(
        "--gpus-per-node",
        type=_positive,
        default=8,
        metavar="N",
        help="ranks with fast links between them (else 8)",
    )
    add(
        "--gpu-memory",
        type=_gibibytes,
        metavar="GIB",
        help="memory a rank may use, e.g. --gpu-memory 80 (else the device's)",
    )
    add(
        "--reserve",
        type=_gibibytes,
        default=2.0,
        metavar="GIB",
        help="of it for context, NCCL and fragmentation (else 2)",
    )
    add("--device", choices=sorted(DEVICES), default="H100", help="whose peaks predict the time (else H100)")
    add(
        "--supervised",
        type=_share,
        default=1.0,
        metavar="SHARE",
        help="of the tokens, answers that is, e.g. 0.2 (else 1)",
    )
    add(
        "--shape", choices=sorted(SHAPES), help="sizes of a target that is not here, e.g. --shape llama3.1-8b"
    )
    for size in SIZES:
        add(
            f"--{size.replace('_', '-')}",
            type=_positive,
            metavar="N",
            help=f"the target's {size}; all of them, or over --shape",
        )
    return parser


def _plan(options: argparse.Namespace, console: Console) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    parallel = recipe.parallel
    mesh = Mesh.from_world(options.gpus, parallel.ring, parallel.ulysses, parallel.draft_dp)
    target = _target_config(recipe, options)
    algorithm = algorithm_of(recipe)
    shape = algorithm.shape(algorithm.build_config(target, recipe))
    check_heads(parallel.ulysses, shape.num_heads, shape.num_kv_heads)
    device = DEVICES[options.device]
    budget = int(((options.gpu_memory or device.memory) - options.reserve) * GIB)
    if budget <= 0:
        raise ValueError(f"--reserve {options.reserve} leaves nothing of the device's memory. Lower it.")
    files, notes = deepspeed_files(recipe, mesh.world_size)
    for note in notes:
        _say(console, f"note: {note}")
    setup = Setup.of(recipe, load_deepspeed_config(recipe.deepspeed), shape, mesh.draft_dp)
    setup = replace(setup, supervised=options.supervised)
    if recipe.data.hidden_states == "online":
        setup = replace(setup, target_bytes=_weight_bytes(target, recipe.target.dtype))
    if parallel.kv_exchange == "auto":
        setup = replace(setup, kv_exchange=choose_kv_exchange(setup))
    fits = predict_memory(setup).peak <= budget
    candidates = fastest(setup, options.gpus, budget, device, files, options.gpus_per_node)
    if not fits and not candidates:
        raise ValueError(
            f"data.max_length = {setup.length} fits no mesh and no "
            f"setting.\n{explain_shortage(setup, budget, files)}"
        )
    _print_setup(setup, device, budget, console)
    _print_memory(setup, budget, console)
    _print_lengths(setup, budget, console)
    _print_time(setup, device, options.gpus_per_node, console)
    _print_candidates(candidates, budget, console)
    if not fits:
        _say(console, "The recipe as it stands does not fit. " + explain_shortage(setup, budget, files))
    return 0 if fits else 1


def _target_config(recipe: Recipe, options: argparse.Namespace) -> Any:
    """The target's text config: from given sizes, its folder or hub name, or from how it will be built."""
    given = {size: getattr(options, size) for size in SIZES if getattr(options, size) is not None}
    if options.shape or given:
        sizes = {**dict(zip(SIZES, SHAPES.get(options.shape, ()), strict=False)), **given}
        missing = [f"--{size.replace('_', '-')}" for size in SIZES if size not in sizes]
        if missing:
            raise ValueError(
                f"{', '.join(missing)}: not given. Give every size of the target, or a --shape to start from."
            )
        return _llama(sizes)
    path, build = Path(recipe.target.path).expanduser(), recipe.target.build
    if path.is_dir():
        config = load_text_config(path)
    elif build is not None:
        return _llama({**build.model_dump(), "head_dim": build.hidden_size // build.num_heads})
    else:
        config = _hub_config(recipe.target.path)
    check_supported(config, recipe.target.path)
    return config


def _llama(sizes: Mapping[str, int]) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_kv_heads"],
        head_dim=sizes["head_dim"],
        num_hidden_layers=sizes["num_layers"],
    )


def _weight_bytes(config: Any, dtype: str) -> int:
    """Of a whole target, from its config: the model is built without memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return sum(parameter.numel() for parameter in model.parameters()) * getattr(torch, dtype).itemsize


def _hub_config(name: str) -> Any:
    """config.json of a hub name, without the weights."""
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"target.path = {name!r} is no folder here, and its config could not be fetched from the hub "
            f"({reason}). Say its sizes instead: --shape {' | '.join(SHAPES)}, or --hidden-size and the "
            "others."
        ) from error


def _print_setup(setup: Setup, device: Device, budget: int, console: Console) -> None:
    shape = setup.shape
    _say(
        console,
        f"draft: {shape.num_parameters / 1e6:.0f} M trained parameters, hidden {shape.hidden_size}, "
        f"{shape.num_heads}/{shape.num_kv_heads} heads of {shape.head_dim}, draft vocabulary "
        f"{shape.draft_vocab_size}, K {setup.ttt_steps}",
    )
    _say(
        console,
        f"run: draft_dp x ring x ulysses = {_mesh_text(setup)}, {setup.dtype}, {setup.length} tokens per "
        f"sequence, {setup.slots} slots per rank, {setup.live_slots} of them live",
    )
    _say(console, f"device: {device.name}, {budget / GIB:.1f} GiB per rank for tensors")


def _print_memory(setup: Setup, budget: int, console: Console) -> None:
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
    _say(console, f"peak {memory.peak / GIB:.2f} GiB, in {memory.phase}: {verdict} in {budget / GIB:.1f} GiB")
    host = ", ".join(f"{part} {size / GIB:.2f} GiB" for part, size in memory.host.items() if size)
    _say(console, f"in the host's memory, per rank: {host or 'nothing'}")


def _print_lengths(setup: Setup, budget: int, console: Console) -> None:
    lengths = {
        mode: largest_length(replace(setup, activation=mode), budget)
        for mode in ("keep", "recompute", "offload")
    }
    text = ", ".join(f"{mode} {length}" for mode, length in lengths.items())
    _say(console, f"longest sequence that fits this mesh, in tokens, by train.activation: {text}")


def _print_time(setup: Setup, device: Device, ranks_per_node: int, console: Console) -> None:
    pairs = attention_pairs(setup)
    time, flops = predict_time(setup, device, pairs, ranks_per_node), setup.shape.flops(setup, pairs)
    parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in time.parts.items() if seconds >= 5e-4)
    _say(
        console,
        f"predicted step: {time.seconds:.3f} s, {time.tokens_per_second:.0f} tokens/s, "
        f"{flops.total / 1e12:.1f} TFLOP per rank and sequence; in seconds: {parts}",
    )
    share = (
        "every token is"
        if setup.supervised == 1
        else f"{setup.supervised:.1%} of the tokens, spread evenly, are"
    )
    _say(
        console, f"assumed: one document fills each sequence, {share} supervised, no communication is hidden"
    )
    if setup.target_bytes:
        _say(
            console,
            "the target beside: its weights are counted, its forward is not, neither bytes nor seconds",
        )


def _print_candidates(candidates: Sequence[Candidate], budget: int, console: Console) -> None:
    """The fastest setting of each mesh, the best few of them."""
    if not candidates:
        _say(console, "No mesh of these ranks fits this length with the DeepSpeed files at hand.")
        return
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
    _say(console, f"best as overrides: {_overrides(candidates[0])}")


def _overrides(candidate: Candidate) -> str:
    setup = candidate.setup
    values = {
        "parallel.ulysses": setup.ulysses,
        "parallel.ring": setup.ring,
        "parallel.draft_dp": setup.draft_dp,
        "parallel.zero_group": setup.zero_group,
        "parallel.kv_exchange": setup.kv_exchange,
        "train.activation": setup.activation,
        "deepspeed": candidate.deepspeed,
    }
    return " ".join(f"{key}={value}" for key, value in values.items())


def _mesh_text(setup: Setup) -> str:
    return f"{setup.draft_dp} x {setup.ring} x {setup.ulysses}"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a number from 1 on")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: give a share above 0 and up to 1")
    return value


def _gibibytes(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: give GiB above 0")
    return value


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False)
