"""`eagle3-ds data`: look at a row as the draft will learn it, or let the target answer a data set's prompts
anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from eagle3_ds.cli.words import Commands, log_level, recipe_words, telling_recipe, terminal, write

if TYPE_CHECKING:
    from rich.text import Text

    from eagle3_ds.data.inspect import Inspection


@click.group(
    cls=Commands, what="action", short_help="look at rows, or answer prompts anew: data inspect | regenerate"
)
def data() -> None:
    """look at a row of the data, or let the target answer the prompts of a data set anew"""


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

    RECIPE|FILE is a recipe (.yaml), or a data file, a folder, a hub data set, or 'stdlib'.
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
@click.option(
    "--output",
    required=True,
    metavar="F",
    help="JSONL file to write or to go on with, e.g. --output answers.jsonl",
)
@click.option(
    "--batch_size", type=int, default=8, metavar="N", help="rows answered at once, e.g. --batch_size 32"
)
@click.option(
    "--max_new_tokens", type=int, default=1024, metavar="N", help="longest answer, e.g. --max_new_tokens 4096"
)
@click.option(
    "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy, e.g. --temperature 0.7"
)
@click.option(
    "--top_p", type=float, default=1.0, metavar="P", help="nucleus of sampled answers, e.g. --top_p 0.9"
)
@click.option("--seed", type=int, default=0, metavar="S", help="of sampled answers, e.g. --seed 1")
@log_level
def regenerate(
    recipe: str,
    overrides: tuple[str, ...],
    output: str,
    batch_size: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    log_level: str | None,
) -> None:
    """write the target's own answers to the prompts of a recipe's data, as JSONL that a recipe reads"""
    with telling_recipe(recipe, overrides, log_level) as loaded:
        from eagle3_ds.run.regeneration import Answering
        from eagle3_ds.run.regeneration import regenerate as answer

        answer(loaded, Path(output), Answering(batch_size, max_new_tokens, temperature, top_p, seed))


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
