"""Reading a YAML file and `section.key=value` overrides into a `Recipe`. An error lists all mistakes."""

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

from eagle3_ds.config.schema import Recipe
from eagle3_ds.config.shipped import find_shipped, names_near, shipped
from eagle3_ds.config.sizes import infer_sizes
from eagle3_ds.config.yaml_strict import parse_yaml, read_text

logger = logging.getLogger(__name__)
RESOLVED = "recipe.resolved.yaml"
"""The recipe of a run, every key written out, in its output folder."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe, and log one line for each key of it that has no value there and gets one here.

    Args:
        path: the YAML file, or the name of a shipped one. A relative `deepspeed` is looked for from the
            working directory, then from this file's folder, then from the folder above that, then among the
            shipped ones; the recipe gets the path where it was found.
        overrides: `section.key=value` each, the value written as in YAML. Later ones win.

    Raises:
        ValueError: the recipe has mistakes. The message lists each with its key, value, rule and fix.
    """
    recipe, told = read_recipe(path, overrides)
    for line in told:
        logger.info("%s", line)
    return recipe


def find_recipe(path: str | Path) -> Path:
    """The file of a recipe that is given by its path, or by its name where it is shipped.

    Raises:
        ValueError: there is none.
    """
    if Path(path).is_file():
        return Path(path)
    found = find_shipped("recipes", path)
    if found is None:
        raise ValueError(
            f"recipe: {path} is not a file, and no recipe of that name is shipped. Give the path of one, or "
            f"a shipped name: {names_near(path, shipped('recipes'))}."
        )
    return found


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Recipe, tuple[str, ...]]:
    """As `load_recipe`, which logs what is returned here beside the recipe: where it was found, if by name,
    and what it leaves to be inferred from the file's name, the target's sizes, or to a shipped file.
    """
    given, path = str(path), find_recipe(path)
    told = [] if path == Path(given) else [f"recipe: {given} is no file here; taken: the shipped {path}"]
    tree = parse_yaml(read_text(path), str(path))
    if not isinstance(tree, dict):
        raise ValueError(
            f"{path}: a recipe is a mapping of sections, not {type(tree).__name__}. See docs/recipe.md."
        )
    for override in overrides:
        _apply_override(tree, override)
    if isinstance(tree.get("deepspeed"), str):
        tree["deepspeed"] = _found_from(tree["deepspeed"], path.parent)
    if "deepspeed" not in tree:
        told.append(
            "inferred: deepspeed = zero2, the shipped JSON: optimizer states and gradients are sharded over "
            "the ranks, the draft's weights, which are small, are whole on each"
        )
    if "output_dir" not in tree:
        tree["output_dir"] = f"output/{path.stem}"
        told.append(f"inferred: output_dir = {tree['output_dir']}, by the name of the recipe")
    told += infer_sizes(tree)
    try:
        # Validated as JSON, because pydantic's strict mode accepts a list for a tuple only in JSON.
        return Recipe.model_validate_json(json.dumps(tree)), tuple(told)
    except ValidationError as error:
        problems = [_explain(detail) for detail in error.errors()]
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


def _found_from(name: str, folder: Path) -> str:
    """`name` where it is a file: from the working directory, from the recipe's folder, or from the folder
    above that one. As it is, where there is none: who reads the file says so.
    """
    places = [Path(name), folder / name, folder.absolute().parent / name]
    found = next((place for place in places if place.is_file()), None)
    return name if found in (None, places[0]) else str(found)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    """Set the key of an override, for example `parallel.ulysses=4`, in `tree`.

    Raises:
        ValueError: the override has another form, or a part of its path is a value and not a section.
    """
    dotted, equals, text = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise ValueError(
            f"override {override!r}: not of the form section.key=value, for example parallel.ulysses=4."
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


def _explain(detail: ErrorDetails) -> str:
    """Describe a pydantic error in one line: key, value, rule and fix."""
    path = ".".join(str(part) for part in detail["loc"]) or "recipe"
    if detail["type"] == "extra_forbidden":
        fields = _section_fields(detail["loc"][:-1])
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
