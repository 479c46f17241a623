"""Showing a row of data, or a prepared document, with the tokens that the draft learns from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eagle3_ds.config import Recipe, TargetSection, find_shipped, load_recipe
from eagle3_ds.config.schema import DataSection
from eagle3_ds.data.check import DataCheck, check_rows
from eagle3_ds.data.inspect import Inspection, inspect_document, inspect_row
from eagle3_ds.run.stages import tokenise
from eagle3_ds.targets import load_text_config, load_tokenizer, resolve_path


def inspect_source(
    source: str,
    overrides: Sequence[str] = (),
    target: str | None = None,
    row: int = 1,
    document: int | None = None,
) -> Inspection:
    """Tokenise one row of a recipe's data or of a data file, or look up a prepared document.

    Args:
        source: path of a recipe; or a data file, a folder, a hub data set, or `stdlib`.
        overrides: `section.key=value` each, for a recipe.
        target: folder or hub name of the target, for anything but a recipe.
        row: number of the row, counted from 1.
        document: id of a prepared document of the recipe, instead of a row.

    Raises:
        ValueError: there is no such row or document, or the options do not fit the source.
    """
    if document is not None:
        if not _is_recipe(source):
            raise ValueError(f"--document counts the documents of a recipe, and {source} is none: use --row.")
        recipe = load_recipe(source, overrides)
        return inspect_document(tokenise(recipe).data, load_tokenizer(recipe.target), document)
    section, target_section = _what_to_inspect(source, overrides, target)
    if row < 1:
        raise ValueError(f"--row is {row}, but rows are counted from 1.")
    return inspect_row(section, load_tokenizer(target_section), row)


def check_data_rows(recipe: Recipe) -> DataCheck:
    """Judge every row of the recipe's data, as a run would, and write nothing.

    Raises:
        ValueError: a source, the tokenizer or the chat template cannot be used.
    """
    tokenizer = load_tokenizer(recipe.target)
    config = load_text_config(resolve_path(recipe.target.path, recipe.target.build is not None))
    return check_rows(recipe.data, tokenizer, config.vocab_size)


def _is_recipe(source: str) -> bool:
    """A YAML file, or the name of a shipped recipe where nothing else has that name."""
    if Path(source).suffix in (".yaml", ".yml"):
        return True
    return not Path(source).exists() and find_shipped("recipes", source) is not None


def _what_to_inspect(
    source: str, overrides: Sequence[str], target: str | None
) -> tuple[DataSection, TargetSection]:
    if _is_recipe(source):
        if target is not None:
            raise ValueError(
                "--target is for a data file; a recipe names its own. Set target.path=... instead."
            )
        recipe = load_recipe(source, overrides)
        return recipe.data, recipe.target
    if target is None:
        raise ValueError(
            f"{source} does not say whose tokens it becomes: name the target by --target FOLDER, or give a "
            f"recipe, as in `eagle3-ds data inspect recipes/quickstart.yaml data.train='[{source}]'`."
        )
    if overrides:
        raise ValueError(
            f"{overrides[0]!r} changes a recipe, and {source} is none: give a recipe's path to override it."
        )
    return DataSection(train=(source,)), TargetSection(path=target)
