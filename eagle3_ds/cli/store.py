"""`eagle3-ds store verify | info | import`: hidden states on disk."""

from __future__ import annotations

from pathlib import Path

import click

from eagle3_ds.cli.words import Commands, log_level, recipe_words, telling_recipe, terminal, write
from eagle3_ds.say import progress_bar


@click.group(cls=Commands, what="action", short_help="hidden states on disk: store verify | info | import")
def store() -> None:
    """verify, describe or import hidden states"""


@store.command()
@click.argument("path")
def verify(path: str) -> None:
    """recompute every checksum of a store; names the file, tensor and row of any damage

    PATH is the folder of the store, e.g. output/cache/hidden-0123456789abcdef.
    """
    from eagle3_ds.store import HiddenStateStore

    found = HiddenStateStore.open(path)
    found.verify(progress_bar(found.shards.values(), desc="verify", unit=" shards"))
    size = f"{len(found.shards)} shards, {found.num_bytes:,} bytes"
    write(terminal(), f"{path}: {size}, every checksum is right")


@store.command()
@click.argument("path")
def info(path: str) -> None:
    """what a store holds and what it was made from

    PATH is the folder of the store, e.g. output/cache/hidden-0123456789abcdef.
    """
    from rich.table import Column, Table

    from eagle3_ds.store import HiddenStateStore

    found = HiddenStateStore.open(path)
    layout, lengths = found.layout, found.lengths.values()
    table = Table("what", Column("value", overflow="fold"), title=path)
    for name, value in (
        ("documents", f"{len(lengths):,}"),
        ("tokens", f"{sum(lengths):,}"),
        ("longest", f"{max(lengths, default=0):,}"),
        ("shards", f"{len(found.shards):,}"),
        ("bytes", f"{found.num_bytes:,}"),
        ("bytes per token", f"{layout.row_bytes:,}"),
        ("dtype", layout.dtype),
        ("aux", f"{layout.aux_width} wide"),
        ("teacher", f"{layout.teacher_width} wide"),
        ("computed by", found.origin),
        *((f"made from: {field}", value) for field, value in found.fingerprint.items()),
    ):
        table.add_row(name, value)
    terminal().print(table)


@store.command("import")
@recipe_words
@click.option("--from", "source", required=True, metavar="F", help="folder that the other trainer wrote")
@click.option(
    "--hidden-states", metavar="F", help="folder of the hs_*.safetensors, if not inside the data set"
)
@click.option("--skip-check", is_flag=True, help="do not load the target to compare some samples with it")
@log_level
def import_(
    recipe: str,
    overrides: tuple[str, ...],
    source: str,
    hidden_states: str | None,
    skip_check: bool,
    log_level: str | None,
) -> None:
    """fill a recipe's store from the offline hidden states that SpecForge or speculators wrote

    RECIPE is one whose data.train names the .jsonl file that the rows of tokens are written to, e.g.
    data.train='[imported.jsonl]'.
    """
    with telling_recipe(recipe, overrides, log_level) as loaded:
        from eagle3_ds.run.store_import import import_store

        folder = None if hidden_states is None else Path(hidden_states)
        import_store(loaded, Path(source), folder, not skip_check)
