"""`eagle3-ds serve-check`: whether an export serves as it was trained, by a real vLLM."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from eagle3_ds.cli.words import log_level, telling_recipe, terminal, write

if TYPE_CHECKING:
    from eagle3_ds.run.serve_check import Check, Report


@click.command("serve-check")
@click.argument("recipe", required=False, metavar="[RECIPE]")
@click.argument("overrides", nargs=-1, metavar="[section.key=value]...")
@click.option("--target", metavar="T", help="instead of a recipe: the target, e.g. --target Qwen/Qwen3-8B")
@click.option("--draft", metavar="D", help="... and the export of its draft, e.g. --draft output/draft")
@click.option("--prompts", metavar="F", help="... and a JSONL of messages, prompt or input_ids")
@click.option(
    "--server",
    metavar="S",
    default="vllm",
    help="vllm, which is started, or the URL of a vLLM or SGLang that runs with the draft, e.g. --server "
    "http://host:8000 (its key, if it wants one: the environment variable OPENAI_API_KEY)",
)
@click.option(
    "--plain-server",
    metavar="URL",
    help="... and of one without it, whose answers are then the target's own: nothing is decoded here",
)
@click.option("--model", metavar="NAME", help="the URL's name of the target, if it is not the target's path")
@click.option("--timeout", type=float, metavar="S", help="seconds to wait for an answer of it (else 1800)")
@click.option("--python", metavar="P", help="a Python that has it, e.g. --python vllm/bin/python")
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 1),
    default=0.02,
    metavar="X",
    help="how far its acceptance length may be from ours, relative, e.g. --tolerance 0 (else 0.02)",
)
@log_level
def serve_check(
    recipe: str | None,
    overrides: tuple[str, ...],
    target: str | None,
    draft: str | None,
    prompts: str | None,
    server: str,
    plain_server: str | None,
    model: str | None,
    timeout: float | None,
    python: str | None,
    tolerance: float,
    log_level: str | None,
) -> int:
    """a real vLLM loads the export: answers, acceptance and speed against our own decoding

    The exit status is 0 only if every layout loads, the speculators one alone too, and gives the target's own
    answers and accepts what our decoding accepts. With --server URL: if that server does.
    """
    if (recipe is None) != (target is not None and draft is not None) or (recipe and (target or draft)):
        raise click.UsageError("give a RECIPE, or --target T and --draft D")
    asked = {"plain_server": plain_server, "model": model, "timeout": timeout}
    _check_server(server, python, asked)
    if recipe is None:
        from eagle3_ds.run.serve_check import check_of_folders

        assert target is not None and draft is not None
        ready = _ready(server, python, tolerance, asked)
        check = check_of_folders(target, draft, prompts, 128, 7, "float32")
        return ready(check, Path(tempfile.mkdtemp(prefix="serve-check-")))
    if prompts is not None:
        raise click.UsageError("--prompts goes with --target and --draft: a recipe has held-out prompts")
    with telling_recipe(recipe, overrides, log_level) as loaded:
        from eagle3_ds.run.serve_check import check_of_run

        ready = _ready(server, python, tolerance, asked)
        return ready(check_of_run(loaded), Path(loaded.output_dir))


def _check_server(server: str, python: str | None, asked: Mapping[str, Any]) -> None:
    """Refuse words that do not go together."""
    if "://" in server:
        if python is not None:
            raise click.UsageError("--python is for a vLLM that is started here, and --server is a URL")
        return
    if server != "vllm":
        raise click.UsageError(f"--server is {server!r}. Write vllm, or a URL such as http://host:8000")
    given = [name for name, value in asked.items() if value is not None]
    if given:
        raise click.UsageError(f"--{given[0].replace('_', '-')} is for a server that runs: --server URL")


def _ready(
    server: str, python: str | None, tolerance: float, asked: Mapping[str, Any]
) -> Callable[[Check, Path], int]:
    """What will be done with a check and a folder; a wrong option is refused before the check is read."""
    from eagle3_ds.run.serve_check import run_check, server_python

    if server == "vllm":
        there = server_python(python)

        def started(check: Check, folder: Path) -> int:
            return _show(run_check(check, there, tolerance, folder), check)

        return started
    from eagle3_ds.run.regeneration import Serving
    from eagle3_ds.run.running_server import check_running

    waits = {} if asked["timeout"] is None else {"timeout": asked["timeout"]}
    running = Serving(server, asked["model"], 1, **waits)
    url = asked["plain_server"]
    plain = None if url is None else Serving(url, asked["model"], 1, **waits)

    def asking(check: Check, folder: Path) -> int:
        return _show(check_running(check, running, plain, tolerance), None)

    return asking


def _show(report: Report, started: Check | None) -> int:
    """Write the table and what failed. `started`: what a server was started for; None: it ran already."""
    from eagle3_ds.run.serve_check import sglang_command

    console = terminal()
    console.print(_table(report, "vLLM" if started else "a running server"))
    for served in report.ways:
        if served.note:
            write(console, f"{served.way} {served.note}")
    for warning in report.warnings:
        write(console, f"vLLM warns: {warning}")
    if report.log is not None:
        write(console, f"vLLM's log: {report.log}")
    sglang = None if started is None else sglang_command(started)
    if sglang is not None:
        write(console, f"SGLang, which was not started: {sglang}")
    for failure in report.failures:
        write(console, f"failed: {failure}")
    write(console, "does not serve as trained" if report.failures else "serves as trained")
    return 1 if report.failures else 0


def _table(report: Report, server: str) -> object:
    from rich.table import Table

    columns = ("served", "tokens/s", "acceptance length", "ours", "accepted by position (ours)")
    table = Table(*columns, title=f"{server}, one prompt at a time")
    for served in report.ways:
        speed = "" if served.tokens_per_second is None else f"{served.tokens_per_second:.1f}"
        lengths = [f"{length:.3f}" for length in served.acceptance_length or ()] or ["", ""]
        places = " ".join(f"{theirs:.3f} ({ours:.3f})" for theirs, ours in served.accepted)
        table.add_row(served.way, speed, *lengths, places)
    return table
