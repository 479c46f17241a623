"""`eagle3-ds store verify | info | import`: hidden states on disk."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from tqdm import tqdm

from eagle3_ds.cli.store_import import import_store
from eagle3_ds.config import load_recipe
from eagle3_ds.store import HiddenStateStore

ACTIONS = {
    "verify": "recompute every checksum of a store; names the file, tensor and row of any damage",
    "info": "what a store holds and what it was made from",
    "import": "fill a recipe's store from the offline hidden states that SpecForge or speculators wrote",
}


def run(arguments: Sequence[str], console: Console) -> int:
    """Run one action; returns the exit status. Raises ValueError for a user's mistake and for a damaged
    store.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        console.print(_overview(), markup=False, highlight=False)
        return 0 if arguments else 2
    action, *rest = arguments
    if action not in ACTIONS:
        raise ValueError(f"there is no action {action!r}. Actions: {', '.join(ACTIONS)}.")
    options = _parser(action).parse_intermixed_args(rest)
    if action == "verify":
        _verify(options.path, console)
    elif action == "info":
        _info(options.path, console)
    else:
        recipe = load_recipe(options.recipe, options.overrides)
        import_store(recipe, Path(options.source), options.hidden_states, not options.skip_check, console)
    return 0


def _verify(path: str, console: Console) -> None:
    store = HiddenStateStore.open(path)
    store.verify(tqdm(store.shards.values(), desc="verify", unit=" shards"))
    _say(console, f"{path}: {len(store.shards)} shards, {store.num_bytes:,} bytes, every checksum is right")


def _info(path: str, console: Console) -> None:
    store = HiddenStateStore.open(path)
    layout, lengths = store.layout, store.lengths.values()
    table = Table("what", Column("value", overflow="fold"), title=path)
    for name, value in (
        ("documents", f"{len(lengths):,}"),
        ("tokens", f"{sum(lengths):,}"),
        ("longest", f"{max(lengths, default=0):,}"),
        ("shards", f"{len(store.shards):,}"),
        ("bytes", f"{store.num_bytes:,}"),
        ("bytes per token", f"{layout.row_bytes:,}"),
        ("dtype", layout.dtype),
        ("aux", f"{layout.aux_width} wide"),
        ("teacher", f"{layout.teacher_width} wide"),
        ("computed by", store.origin),
        *((f"made from: {field}", value) for field, value in store.fingerprint.items()),
    ):
        table.add_row(name, value)
    console.print(table)


def _parser(action: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"eagle3-ds store {action}", description=ACTIONS[action], allow_abbrev=False
    )
    add = parser.add_argument
    if action != "import":
        add("path", help="folder of the store, e.g. output/cache/hidden-0123456789abcdef")
        return parser
    add("recipe", help="recipe whose data.train names the .jsonl file that the rows of tokens are written to")
    add("overrides", nargs="*", metavar="section.key=value", help="e.g. data.train='[imported.jsonl]'")
    add("--from", dest="source", required=True, metavar="F", help="folder that the other trainer wrote")
    add(
        "--hidden-states",
        type=Path,
        metavar="F",
        help="folder of the hs_*.safetensors, if not inside the data set",
    )
    add("--skip-check", action="store_true", help="do not load the target to compare some samples with it")
    return parser


def _overview() -> str:
    lines = [
        "usage: eagle3-ds store ACTION ...",
        "",
        *(f"  {name:6}  {meaning}" for name, meaning in ACTIONS.items()),
    ]
    return "\n".join([*lines, "", "eagle3-ds store ACTION --help tells an action's options."])


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False)
