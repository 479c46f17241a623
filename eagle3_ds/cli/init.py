"""`eagle3-ds init`: a recipe that runs, for a target, some conversations and a machine."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import click

from eagle3_ds.cli.plan import COUNT, DEVICES, GIBIBYTES, GPUS_PER_NODE
from eagle3_ds.cli.words import CALLED, PROGRAM, terminal, write


@click.command()
@click.argument("target", metavar="TARGET")
@click.option(
    "--data",
    multiple=True,
    required=True,
    metavar="F",
    help="conversations, as in data.train; may be given several times, e.g. --data chats.jsonl",
)
@click.option(
    "--length",
    type=COUNT,
    metavar="N",
    help="tokens of a pack, e.g. --length 131072 (else by the conversations and the memory)",
)
@click.option("--gpus", type=COUNT, metavar="N", help="ranks of the run, e.g. --gpus 8 (else those here)")
@GPUS_PER_NODE
@click.option(
    "--gpu-memory",
    type=GIBIBYTES,
    metavar="GIB",
    help="memory of a device, e.g. --gpu-memory 80 (else that of those here)",
)
@click.option(
    "--device",
    type=click.Choice(DEVICES),
    help="whose peaks predict the time, e.g. --device A100 (else those here, or H100)",
)
@click.option("--output", metavar="F", help="file to write, e.g. --output my.yaml (else NAME-OF-TARGET.yaml)")
@click.option("--overwrite", is_flag=True, help="replace that file")
def init(
    target: str,
    data: tuple[str, ...],
    length: int | None,
    gpus: int | None,
    gpus_per_node: int,
    gpu_memory: float | None,
    device: str | None,
    output: str | None,
    overwrite: bool,
) -> None:
    """write a recipe that runs for a target, some conversations and a machine, each choice with its reason

    TARGET is the folder of a Hugging Face causal LM, or a hub name, which is downloaded.
    """
    file = Path(output or f"{Path(target).expanduser().resolve().name}.yaml")
    if file.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--output is {file}: a recipe is a .yaml file. Use {file.with_suffix('.yaml')}.")
    if file.is_dir():
        raise ValueError(f"--output is {file}, a folder. Name a file.")
    if file.exists() and not overwrite:
        raise ValueError(f"{file} exists. Replace it by --overwrite, or name another file by --output.")
    from eagle3_ds.run.first_recipe import Wishes, make_first_recipe, write_first_recipe

    wishes = Wishes(target, data, file, length, gpus, gpus_per_node, gpu_memory, device)
    first = make_first_recipe(wishes)
    write_first_recipe(first, file)
    console = terminal()
    for line in first.told:
        write(console, line)
    # launch.sh starts the main job without a word for it.
    start = [os.environ[CALLED]] if CALLED in os.environ else [PROGRAM, "launch"]
    write(console, f"written: {file}; next: {shlex.join([*start, *first.arguments])}")
