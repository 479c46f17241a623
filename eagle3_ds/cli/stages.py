"""`eagle3-ds prepare | evaluate | export | report`: one stage of a run alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from eagle3_ds.cli.words import log_level, recipe_words, telling_recipe, terminal, write


@click.command()
@recipe_words
@log_level
def prepare(recipe: str, overrides: tuple[str, ...], log_level: str | None) -> None:
    """build the target if asked, tokenise the data, capture hidden states"""
    with telling_recipe(recipe, overrides, log_level) as loaded:
        from eagle3_ds.run import stages

        stages.prepare(loaded)


compare_option = click.option(
    "--compare",
    multiple=True,
    metavar="DIR",
    help="another run's output_dir, whose acceptance against context the report draws beside; repeatable",
)


@click.command()
@recipe_words
@click.option(
    "--server",
    metavar="URL",
    help="measure a running vLLM that drafts instead, e.g. --server http://host:8000 (its key, if it wants "
    "one: the environment variable OPENAI_API_KEY)",
)
@click.option("--model", metavar="NAME", help="the server's name of the target, if it is not target.path")
@click.option(
    "--prompts",
    multiple=True,
    metavar="P",
    help="instead of held-out data: a JSONL of messages, prompt or input_ids, ruler:LENGTH[:N] or "
    "longbench-v2[:FOLDER][:N]; repeatable, e.g. --prompts ruler:32768:8",
)
@click.option(
    "--concurrency",
    type=int,
    metavar="N",
    help="prompts that the server is asked at a time, e.g. --concurrency 8 (else 1, which gives intervals)",
)
@click.option("--timeout", type=float, metavar="S", help="seconds to wait for an answer (else 1800)")
@click.option("--max_prompt_tokens", type=int, metavar="N", help="leave longer prompts out, and say how many")
@click.option("--ignore_eos", is_flag=True, help="let every answer go on to eval.max_new_tokens")
@compare_option
@log_level
def evaluate(
    recipe: str,
    overrides: tuple[str, ...],
    server: str | None,
    model: str | None,
    prompts: tuple[str, ...],
    concurrency: int | None,
    timeout: float | None,
    max_prompt_tokens: int | None,
    ignore_eos: bool,
    compare: tuple[str, ...],
    log_level: str | None,
) -> None:
    """speculative decoding with the trained and the untrained draft of a finished run; with --server: its
    acceptance and speed on a running vLLM, by context
    """
    for_server: dict[str, Any] = {"model": model, "timeout": timeout, "concurrency": concurrency}
    for_prompts = {"prompts": prompts, "max_prompt_tokens": max_prompt_tokens, "ignore_eos": ignore_eos}
    given = [name for name, value in {**for_server, **for_prompts, "compare": compare}.items() if value]
    if server is None and given:
        raise click.UsageError(f"--{given[0]} is for a server. Name it by --server URL, or leave this out")
    with telling_recipe(recipe, overrides, log_level) as loaded:
        from eagle3_ds.run import stages

        if server is None:
            stages.evaluate(loaded)
            return
        from eagle3_ds.run.regeneration import Serving
        from eagle3_ds.run.served_evaluation import Asked, evaluate_served

        stages.check_compared(compare)
        known = {name: value for name, value in for_server.items() if value is not None}
        serving = Serving(server, **{"concurrency": 1, **known})
        result = evaluate_served(loaded, serving, Asked(prompts, max_prompt_tokens, ignore_eos))
        _show_served(result)
        if stages.is_trained(loaded):
            stages.report(loaded, compare)
        elif compare:
            write(terminal(), "no report was drawn: output_dir has no metrics.jsonl of a training")


def _show_served(result: Mapping[str, Any]) -> None:
    """The figures of a server as a table."""
    from rich.table import Table

    console = terminal()
    title = f"{result['model']} on {result['server']}, {result['concurrency']} at a time"
    columns = ("prompt tokens", "prompts", "rounds", "acceptance length", "95% interval", "by position")
    table = Table(*columns, "tokens/s", "decoding tokens/s", "first token, s", title=title)
    for row in [*result["acceptance_by_context"], result]:
        if not row["prompts"]:
            continue
        name = "all" if row is result else f"<= {row['up_to']}" if row["up_to"] else f"> {row['above']}"
        interval = row["interval"]
        table.add_row(
            name,
            str(row["prompts"]),
            str(row["rounds"]),
            _figure(row["acceptance_length"], 3),
            "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}",
            " ".join(_figure(place["accepted"], 3) for place in row["acceptance_by_position"]),
            _figure(row["tokens_per_second"], 1),
            _figure(row["decoding_tokens_per_second"], 1),
            _figure(row["first_token_seconds"], 3),
        )
    console.print(table)
    if result["prompts_left_out"]:
        write(console, f"{result['prompts_left_out']} prompts were left out for their length")
    write(console, result["note"])


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


@click.command()
@recipe_words
@click.option(
    "--push",
    metavar="OWNER/NAME",
    help="upload to the Hugging Face hub as well, e.g. --push me/llama-eagle3; the second of export.formats "
    "goes to OWNER/NAME-speculators or OWNER/NAME-vllm",
)
@click.option("--private", is_flag=True, help="with --push: into private repositories")
@log_level
def export(
    recipe: str, overrides: tuple[str, ...], push: str | None, private: bool, log_level: str | None
) -> None:
    """write the trained draft of a finished run for vLLM / SGLang and speculators; with --push: upload it"""
    if private and push is None:
        raise click.UsageError("--private is for an upload. Name a repository by --push, or leave it out")
    with telling_recipe(recipe, overrides, log_level) as loaded:
        from eagle3_ds.run import stages

        stages.export(loaded, push, private)


@click.command()
@recipe_words
@compare_option
@log_level
def report(recipe: str, overrides: tuple[str, ...], compare: tuple[str, ...], log_level: str | None) -> None:
    """draw report.png of a run from its metrics.jsonl and eval.json"""
    with telling_recipe(recipe, overrides, log_level) as loaded:
        from eagle3_ds.run import stages

        stages.report(loaded, compare)
