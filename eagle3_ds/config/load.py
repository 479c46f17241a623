"""Reading a recipe's files and `section.key=value` overrides into a `Recipe`. An error lists all mistakes."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from eagle3_ds.config.files import (
    BASE,
    RecipeFile,
    files_with,
    find_deepspeed,
    find_recipe,
    merge_files,
    read_files,
)
from eagle3_ds.config.schema import Recipe
from eagle3_ds.config.sizes import infer_guesses, infer_sizes
from eagle3_ds.config.yaml_strict import parse_yaml

logger = logging.getLogger(__name__)
RESOLVED = "recipe.resolved.yaml"
"""The recipe of a run, every key written out, in its output folder."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe, and log one line for each key of it that has no value there and gets one here.

    Args:
        path: the YAML file, or the name of a shipped one. Its `base`, if it has one, is another recipe whose
            keys count where this one and its overrides have none: a path from this file's folder, or the
            name of a shipped one. A relative `deepspeed` is looked for from the working directory, then from
            the folder of the file in which it stands, then from the folder above that, then among the
            shipped ones; the recipe gets the path where it was found.
        overrides: `section.key=value` each, the value written as in YAML. Later ones win.

    Raises:
        ValueError: the recipe has mistakes. The message lists each with its key, value, rule and fix.
    """
    recipe, told = read_recipe(path, overrides)
    for line in told:
        logger.info("%s", line)
    return recipe


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Recipe, tuple[str, ...]]:
    """As `load_recipe`, which logs what is returned here beside the recipe: where it and its bases were
    found, if by name, and what it leaves to be inferred from the file's name, the target's sizes, or
    to a shipped file.
    """
    given, path = str(path), find_recipe(path)
    told = [] if path == Path(given) else [f"recipe: {given} is no file here; taken: the shipped {path}"]
    files, taken = read_files(path)
    told += taken
    tree = merge_files(files)
    overridden = [_apply_override(tree, override) for override in overrides]
    if ("deepspeed",) in overridden and isinstance(tree["deepspeed"], str):
        tree["deepspeed"] = find_deepspeed(tree["deepspeed"], path.parent)
    if "deepspeed" not in tree:
        told.append(
            "inferred: deepspeed = zero2, the shipped JSON: optimizer states and gradients are sharded over "
            "the ranks, the draft's weights, which are small, are whole on each"
        )
    if "output_dir" not in tree:
        tree["output_dir"] = f"output/{path.stem}"
        told.append(f"inferred: output_dir = {tree['output_dir']}, by the name of the recipe")
    told += infer_sizes(tree)
    told += infer_guesses(tree)
    try:
        # Validated as JSON, because pydantic's strict mode accepts a list for a tuple only in JSON.
        return Recipe.model_validate_json(json.dumps(tree)), tuple(told)
    except ValidationError as error:
        problems = [_explain(detail) + _place(detail, files, overridden) for detail in error.errors()]
        number = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ValueError("\n  ".join([f"{path}: {number} in the recipe:", *problems])) from error


def as_recipe(recipe: Recipe | str | Path) -> Recipe:
    """`recipe` itself, or for a path the recipe that `load_recipe` reads there.

    Raises:
        ValueError: the recipe at the path has mistakes.
    """
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every key written out. `load_recipe` reads an equal recipe from it."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def title_of(recipe: Recipe) -> str:
    """A run in one line: its folder, algorithm, target and mesh."""
    mesh = recipe.parallel
    replicas = "" if mesh.draft_dp is None else f"draft_dp {mesh.draft_dp} x "
    return (
        f"{Path(recipe.output_dir).name}: {recipe.draft.algorithm} draft of {recipe.target.path}, up to "
        f"{recipe.data.max_length:,} tokens, mesh {replicas}ring {mesh.ring} x ulysses {mesh.ulysses}"
    )


def _apply_override(tree: dict[str, Any], override: str) -> tuple[str, ...]:
    """Set the key of an override, for example `parallel.ulysses=4`, in `tree`, and return its path there.

    Raises:
        ValueError: the override has another form, names a base, or a part of its path is a value and not a
            section.
    """
    dotted, equals, text = override.partition("=")
    keys = tuple(dotted.split("."))
    if not equals or not all(keys):
        raise ValueError(
            f"override {override!r}: not of the form section.key=value, for example parallel.ulysses=4."
        )
    if keys[0] == BASE:
        raise ValueError(
            f"override {override!r}: a base counts less than the file that names it, and an override counts "
            f"more. Write `{BASE}` into the recipe."
        )
    node = tree
    for depth, key in enumerate(keys[:-1]):
        if node.get(key) is None:
            node[key] = {}
        if not isinstance(node[key], dict):
            prefix = ".".join(keys[: depth + 1])
            raise ValueError(f"override {override!r}: {prefix} is a value ({node[key]!r}), not a section.")
        node = node[key]
    node[keys[-1]] = parse_yaml(text, f"override {override!r}")
    return keys


def _explain(detail: ErrorDetails) -> str:
    """Describe a pydantic error in one line: key, value, rule and fix."""
    path = ".".join(str(part) for part in detail["loc"]) or "recipe"
    if detail["type"] == "extra_forbidden":
        fields = [*_section_fields(detail["loc"][:-1]), *([BASE] if len(detail["loc"]) == 1 else [])]
        close = difflib.get_close_matches(str(detail["loc"][-1]), fields, n=1)
        fix = f"Did you mean `{close[0]}`?" if close else f"Known keys here: {', '.join(fields)}."
        return f"{path}: unknown key. {fix}"
    if detail["type"] == "missing":
        return f"{path}: required and not given. Add it; docs/recipe.md says what it means."
    if detail["type"] == "value_error":
        return f"{path}: {detail['msg'].removeprefix('Value error, ')}"
    rule = detail["msg"].removeprefix("Input should be ")
    value = json.dumps(detail["input"])
    return f"{path}: the value is {value}, but it should be {rule}. Change it in the recipe."


def _place(detail: ErrorDetails, files: Sequence[RecipeFile], overridden: Sequence[tuple[str, ...]]) -> str:
    """Where to look for a mistake, in words, if that is not the recipe's own file alone."""
    location = detail["loc"]
    if any(location[: len(keys)] == keys for keys in overridden):
        return ""
    places = files_with(files, location)
    is_section = isinstance(detail["input"], dict)
    if not is_section:
        places = places[:1]  # the others' values are replaced by this one's
    if places in ([], [files[0].path]):
        return ""
    what = f"The keys of {'.'.join(map(str, location)) or 'the recipe'} stand" if is_section else "It stands"
    return f" {what} in {' and '.join(map(str, places))}."


def _section_fields(location: Sequence[int | str]) -> list[str]:
    """The keys of the recipe's section at `location`."""
    section: type[BaseModel] = Recipe
    for part in location:
        field = section.model_fields[str(part)]
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next(kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel))
    return list(section.model_fields)


def recipe_differences(old: Recipe, new: Recipe) -> list[str]:
    """One line `section.key: old -> new` for each key whose value differs."""
    return _differences(old.model_dump(mode="json"), new.model_dump(mode="json"), "")


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str) -> list[str]:
    found: list[str] = []
    for key in {**old, **new}:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return found
