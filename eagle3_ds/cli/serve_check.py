"""`eagle3-ds serve-check`: whether an export serves as it was trained, by a real vLLM."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

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
@click.option("--server", type=click.Choice(["vllm"]), default="vllm", help="the server that is started")
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
    python: str | None,
    tolerance: float,
    log_level: str | None,
) -> int:
    """a real vLLM loads the export: answers, acceptance and speed against our own decoding

    The exit status is 0 only if every layout loads, the speculators one alone too, and gives the target's own
    answers and accepts what our decoding accepts.
    """
    if (recipe is None) != (target is not None and draft is not None) or (recipe and (target or draft)):
        raise click.UsageError("give a RECIPE, or --target T and --draft D")
    if recipe is None:
        from eagle3_ds.run.serve_check import check_of_folders, server_python

        assert target is not None and draft is not None
        there = server_python(python)
        check = check_of_folders(target, draft, prompts, 128, 7, "float32")
        return _show(check, there, tolerance, Path(tempfile.mkdtemp(prefix="serve-check-")))
    if prompts is not None:
        raise click.UsageError("--prompts goes with --target and --draft: a recipe has held-out prompts")
    with telling_recipe(recipe, overrides, log_level) as loaded:
        from eagle3_ds.run.serve_check import check_of_run, server_python

        there = server_python(python)
        return _show(check_of_run(loaded), there, tolerance, Path(loaded.output_dir))


def _show(check: Check, python: str, tolerance: float, folder: Path) -> int:
    """Run it, and write the table and what failed."""
    from eagle3_ds.run.serve_check import run_check, sglang_command

    report, console = run_check(check, python, tolerance, folder), terminal()
    console.print(_table(report))
    for served in report.ways:
        if served.note:
            write(console, f"{served.way} {served.note}")
    for warning in report.warnings:
        write(console, f"vLLM warns: {warning}")
    write(console, f"vLLM's log: {report.log}")
    sglang = sglang_command(check)
    if sglang is not None:
        write(console, f"SGLang, which was not started: {sglang}")
    for failure in report.failures:
        write(console, f"failed: {failure}")
    write(console, "does not serve as trained" if report.failures else "serves as trained")
    return 1 if report.failures else 0


def _table(report: Report) -> object:
    from rich.table import Table

    columns = ("served", "tokens/s", "acceptance length", "ours", "accepted by position (ours)")
    table = Table(*columns, title="vLLM, one prompt at a time")
    for served in report.ways:
        speed = "" if served.tokens_per_second is None else f"{served.tokens_per_second:.1f}"
        lengths = [f"{length:.3f}" for length in served.acceptance_length or ()] or ["", ""]
        places = " ".join(f"{theirs:.3f} ({ours:.3f})" for theirs, ours in served.accepted)
        table.add_row(served.way, speed, *lengths, places)
    return table
