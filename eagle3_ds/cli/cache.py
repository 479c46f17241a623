"""`eagle3-ds cache list | prune`: what lies in `data.cache_dir`, and removing what nobody uses."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from eagle3_ds.cli.words import Commands, Function, terminal, write

if TYPE_CHECKING:
    from pathlib import Path

    from eagle3_ds.run.cache import Entry, Given

SHOWN = 3
"""Runs of an entry that the list names."""


@click.group(cls=Commands, what="action", short_help="what the cache folder holds: cache list | prune")
def cache() -> None:
    """list what lies in `data.cache_dir`, or remove what no recipe uses any more"""


def places(function: Function) -> Function:
    """Recipes with overrides for all of them, and the folder."""
    words = click.argument("words", nargs=-1, metavar="[RECIPE]... [section.key=value]...")
    folder = click.option(
        "--cache-dir", metavar="DIR", help="look there instead of in the recipes' data.cache_dir"
    )
    return words(folder(function))


@cache.command("list")
@places
def list_(words: tuple[str, ...], cache_dir: str | None) -> None:
    """each folder of documents and hidden states: size, tokens, when made and last used, whose, whether whole

    With recipes, their cache folders, and which of them uses what; else name one by --cache-dir.
    """
    from eagle3_ds.run.cache import entries

    given, folders = _given(words, cache_dir)
    for folder in folders:
        _show(folder, entries(folder, given))


@cache.command()
@places
@click.option(
    "--older-than",
    type=click.FloatRange(min=0),
    metavar="DAYS",
    help="only what was last used so many days ago, e.g. --older-than 30",
)
@click.option("--yes", is_flag=True, help="remove it; without this, only say what would go")
def prune(words: tuple[str, ...], cache_dir: str | None, older_than: float | None, yes: bool) -> None:
    """remove what none of the recipes uses, or (--older-than) what was not used for so many days

    With both, what none of them uses and is that old. What a running run holds stays, and so does whatever is
    not recognised.
    """
    from eagle3_ds.run import cache as cached

    given, folders = _given(words, cache_dir)
    console, total = terminal(), 0
    for folder in folders:
        pruning = cached.prune(folder, given, older_than, remove=yes)
        for entry in pruning.removed:
            write(console, f"{'removed' if yes else 'would remove'} {entry.path}: {_told(entry)}")
        for entry, reason in pruning.kept:
            write(console, f"kept {entry.path}: {reason}")
        total += pruning.bytes
    if yes:
        write(console, f"{total:,} bytes removed")
    else:
        write(console, f"{total:,} bytes would go; nothing was removed. Add --yes to remove them.")


def _given(words: Sequence[str], cache_dir: str | None) -> tuple[list[Given], list[Path]]:
    """The recipes among the words, and the cache folders to look into."""
    from pathlib import Path

    from eagle3_ds.config import read_recipe
    from eagle3_ds.run.cache import given_recipe

    names = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    if overrides and not names:
        raise ValueError(f"{overrides[0]} is an override of a recipe, and none is named. Name the recipe.")
    if not names and cache_dir is None:
        raise ValueError(
            "no cache is named: give a recipe, or --cache-dir DIR, e.g. --cache-dir output/cache."
        )
    if cache_dir is not None:
        overrides.append(f"data.cache_dir={cache_dir}")
    given = [given_recipe(name, read_recipe(name, overrides)[0]) for name in names]
    folders = [recipe.cache for recipe in given] or [Path(str(cache_dir))]
    return given, list({folder.resolve(): folder for folder in folders}.values())


def _show(folder: Path, found: Sequence[Entry]) -> None:
    """A line for each folder, and not a table, whose columns a narrow terminal would cut."""
    console = terminal()
    write(console, f"{folder}: {sum(entry.bytes for entry in found if entry.kind):,} bytes")
    for entry in found:
        if entry.kind is None:
            continue
        tokens = "" if entry.tokens is None else f", {entry.tokens:,} tokens"
        dates = f"made {_date(entry.made)}, last used {_date(entry.last_used)}"
        whole = f"NOT whole ({entry.problem})" if entry.problem else "whole"
        size = f"{entry.bytes:,} bytes of {entry.kind}{tokens}"
        write(console, f"{entry.path.name}: {size}, {dates}, {whole}; used by {_users(entry)}")
    for entry in found:
        if entry.kind is None:
            write(console, f"not recognised: {entry.path} ({entry.strange})")


def _users(entry: Entry) -> str:
    running = [f"{use.output_dir} (running)" for use in entry.uses if use.is_held]
    others = [
        str(use.output_dir) if use.output_dir.is_dir() else f"{use.output_dir} (gone)"
        for use in entry.uses
        if not use.is_held
    ]
    runs = [*running, *others]
    more = [f"and {len(runs) - SHOWN} more runs"] if len(runs) > SHOWN else []
    return (
        ", ".join([*(f"recipe {title}" for title in entry.recipes), *runs[:SHOWN], *more]) or "nobody known"
    )


def _told(entry: Entry) -> str:
    users = _users(entry)
    return f"{entry.bytes:,} bytes of {entry.kind}, last used {_date(entry.last_used)}, of {users}"


def _date(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
