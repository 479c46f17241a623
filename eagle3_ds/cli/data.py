"""`eagle3-ds data`: look at a row as the draft will learn it, judge all rows, or let the target answer a data
set's prompts anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from eagle3_ds.cli.words import Commands, Function, log_level, recipe_words, telling_recipe, terminal, write

if TYPE_CHECKING:
    from rich.text import Text

    from eagle3_ds.data.inspect import Inspection

SAMPLING = (
    ("max_new_tokens", int, "longest answer, e.g. --max_new_tokens 4096"),
    ("temperature", float, "0 is greedy, e.g. --temperature 0.7"),
    ("top_p", float, "nucleus of sampled answers, e.g. --top_p 0.9"),
    ("top_k", int, "draw from the likeliest so many tokens; 0: from all, e.g. --top_k 20"),
    ("seed", int, "of sampled answers, e.g. --seed 1"),
)


@click.group(
    cls=Commands,
    what="action",
    short_help="show, judge or answer rows: data inspect | check | regenerate",
)
def data() -> None:
    """look at a row of the data, judge all rows, or let the target answer the prompts of a data set anew"""


@data.command()
@click.argument("source", metavar="RECIPE|FILE")
@click.argument("overrides", nargs=-1, metavar="[section.key=value]...")
@click.option("--row", type=int, metavar="N", help="which row of the data, from 1, e.g. --row 3 (else 1)")
@click.option(
    "--document",
    type=int,
    metavar="N",
    help="a document of a recipe, by the number that messages call it, e.g. --document 17",
)
@click.option("--html", metavar="F", help="write a page instead of printing, e.g. --html row.html")
@click.option(
    "--target",
    metavar="T",
    help="with a data file: folder or hub name of the target, e.g. --target Qwen/Qwen3-8B",
)
def inspect(
    source: str,
    overrides: tuple[str, ...],
    row: int | None,
    document: int | None,
    html: str | None,
    target: str | None,
) -> None:
    """show a row of a recipe's data, or of a file, with the tokens marked that the draft learns from

    RECIPE|FILE is a recipe (.yaml), or a data file, a folder, a hub data set, 'stdlib' or 'exercises'.
    """
    from eagle3_ds.data.inspect import as_html
    from eagle3_ds.run.inspection import inspect_source

    if row is not None and document is not None:
        raise ValueError("--row and --document both say what to show. Keep one of them.")
    found = inspect_source(source, overrides, target, 1 if row is None else row, document)
    console = terminal()
    if html is not None:
        Path(html).write_text(as_html(found), encoding="utf-8")
    else:
        console.print(as_text(found, console.is_terminal))
    write(console, found.summary)


@data.command()
@recipe_words
@log_level
def check(recipe: str, overrides: tuple[str, ...], log_level: str | None) -> int:
    """judge every row of a recipe's data as a run would: all bad rows, by what is wrong; writes nothing

    The exit status is 1 when the run would stop at them.
    """
    with telling_recipe(recipe, overrides, log_level) as loaded:
        from eagle3_ds.data.findings import note_lines
        from eagle3_ds.run.inspection import check_data_rows

        found = check_data_rows(loaded)
    console, counts = terminal(), found.events
    for source, shape in found.shapes.items():
        write(console, f"{source}: {'no row' if shape is None else f'shape {shape}'}")
    for fault in found.findings.all_faults():
        write(console, fault)
    for line in note_lines({note: count for note, (count, _) in found.findings.notes.items()}):
        write(console, f"note: {line}")
    for name in ("too_long_dropped", "truncated", "split", "unsupervised_dropped"):
        if counts[name]:
            write(console, f"{name.replace('_', ' ')}: {counts[name]:,}")
    write(
        console,
        f"{counts['conversations']:,} rows, {found.findings.bad_rows:,} of them bad: {found.documents:,} "
        f"documents of {found.tokens:,} tokens, {found.supervised:,} of them learnt from",
    )
    for refusal in found.refusals:
        write(console, f"a run would stop: {refusal}")
    return 1 if found.refusals else 0


def sampling_options(function: Function) -> Function:
    """The recipe's `sampling` section as options, which win over it."""
    for name, kind, meaning in reversed(SAMPLING):
        option = click.option(
            f"--{name}", type=kind, metavar=name[0].upper(), help=f"{meaning} (else sampling.{name})"
        )
        function = option(function)
    return function


@data.command()
@recipe_words
@click.option(
    "--output",
    required=True,
    metavar="F",
    help="JSONL file to write or to go on with, e.g. --output answers.jsonl",
)
@click.option(
    "--batch_size", type=int, metavar="N", help="rows answered at once, e.g. --batch_size 32 (else 8)"
)
@click.option(
    "--server",
    metavar="URL",
    help="an OpenAI-compatible server that runs the target, e.g. --server http://host:8000 (its key, if it "
    "wants one: the environment variable OPENAI_API_KEY)",
)
@click.option(
    "--model",
    metavar="NAME",
    help="the server's name of the target, if it is not target.path, e.g. --model qwen",
)
@click.option(
    "--concurrency",
    type=int,
    metavar="N",
    help="rows that the server is asked for at a time, e.g. --concurrency 128 (else 32)",
)
@click.option(
    "--timeout",
    type=float,
    metavar="S",
    help="seconds to wait for an answer, e.g. --timeout 7200 (else 1800)",
)
@sampling_options
@log_level
def regenerate(
    recipe: str,
    overrides: tuple[str, ...],
    output: str,
    batch_size: int | None,
    server: str | None,
    model: str | None,
    concurrency: int | None,
    timeout: float | None,
    log_level: str | None,
    **sampling: float | None,
) -> None:
    """write the target's own answers to the prompts of a recipe's data, as JSONL that a recipe reads"""
    for_server: dict[str, Any] = {"model": model, "concurrency": concurrency, "timeout": timeout}
    given = {name: value for name, value in for_server.items() if value is not None}
    if server is None and given:
        raise ValueError(
            f"--{next(iter(given))} is for a server. Name it by --server URL, or leave this out."
        )
    if server is not None and batch_size is not None:
        raise ValueError("--batch_size is for answers without a server. With --server, set --concurrency.")
    more = [f"sampling.{name}={value}" for name, value in sampling.items() if value is not None]
    with telling_recipe(recipe, overrides, log_level, *more) as loaded:
        from eagle3_ds.run import regeneration

        if server is None:
            regeneration.regenerate(loaded, Path(output), 8 if batch_size is None else batch_size)
        else:
            serving = regeneration.Serving(url=server, **given)
            regeneration.regenerate_by_server(loaded, Path(output), serving)


def as_text(inspection: Inspection, colour: bool) -> Text:
    """For a terminal. Without colour the supervised stretches stand between >>> and <<<."""
    from rich.text import Text

    text = Text()
    for piece, supervised in inspection.pieces:
        if colour:
            text.append(piece, style="black on green" if supervised else "dim")
        else:
            text.append(f">>>{piece}<<<" if supervised else piece)
    return text
