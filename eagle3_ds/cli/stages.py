"""`eagle3-ds prepare | evaluate | export | report`: one stage of a run alone."""

from __future__ import annotations

import click

from eagle3_ds.cli.words import log_level, recipe_words, telling_recipe


@click.command()
@recipe_words
@log_level
def prepare(recipe: str, overrides: tuple[str, ...], log_level: str | None) -> None:
    """build the target if asked, tokenise the data, capture hidden states"""
    with telling_recipe(recipe, overrides, log_level) as loaded:
        from eagle3_ds.run import stages

        stages.prepare(loaded)


@click.command()
@recipe_words
@log_level
def evaluate(recipe: str, overrides: tuple[str, ...], log_level: str | None) -> None:
    """speculative decoding with the trained and the untrained draft of a finished run"""
    with telling_recipe(recipe, overrides, log_level) as loaded:
        from eagle3_ds.run import stages

        stages.evaluate(loaded)


@click.command()
@recipe_words
@log_level
def export(recipe: str, overrides: tuple[str, ...], log_level: str | None) -> None:
    """write the trained draft of a finished run for vLLM / SGLang and speculators"""
    with telling_recipe(recipe, overrides, log_level) as loaded:
        from eagle3_ds.run import stages

        stages.export(loaded)


@click.command()
@recipe_words
@log_level
def report(recipe: str, overrides: tuple[str, ...], log_level: str | None) -> None:
    """draw report.png of a run from its metrics.jsonl and eval.json"""
    with telling_recipe(recipe, overrides, log_level) as loaded:
        from eagle3_ds.run import stages

        stages.report(loaded)
