"""The files of a recipe: its own, and the bases that it stands on.

A recipe with the key `base` takes over the keys of another recipe, which may have a base itself. Mappings are
merged key by key, the recipe's own keys before those of its base; lists and values replace.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eagle3_ds.config.shipped import find_shipped, names_near, shipped
from eagle3_ds.config.yaml_strict import parse_yaml, read_text

BASE = "base"
"""The key that names the base. It is no setting: a recipe that was read has it no more."""


class RecipeFile(NamedTuple):
    """A file of a recipe, and the keys that stand in it, without `base`."""

    path: Path
    tree: dict[str, Any]


def find_recipe(name: str | Path, folder: Path = Path(), asked_by: str = "recipe") -> Path:
    """The file of a recipe that is given by its path, from `folder` if relative, or by its name where it is
    shipped.

    Raises:
        ValueError: there is none. The message begins with `asked_by`.
    """
    if _is_file(folder / name):
        return folder / name
    found = find_shipped("recipes", name)
    if found is None:
        raise ValueError(
            f"{asked_by}: {folder / name} is not a file, and no recipe of that name is shipped. Give the "
            f"path of one, or a shipped name: {names_near(name, shipped('recipes'))}."
        )
    return found


def find_deepspeed(name: str, folder: Path) -> str:
    """`name` where it is a file: from the working directory, from the folder of the file in which it stands,
    or from the folder above that one. As it is, where there is none: who reads the file says so.
    """
    places = [Path(name), folder / name, folder.absolute().parent / name]
    found = next((place for place in places if _is_file(place)), None)
    return name if found in (None, places[0]) else str(found)


def read_files(path: Path) -> tuple[list[RecipeFile], list[str]]:
    """The recipe's own file, then its base, the base of that, and so on; and a line for each base that was
    taken from the shipped recipes. A `deepspeed` that is a file is replaced by the path where it was found.

    Raises:
        ValueError: a file is no mapping in strict YAML, its base is not found, or the bases form a circle.
    """
    files: list[RecipeFile] = []
    told: list[str] = []
    while True:
        tree = _read_tree(path)
        has_base, name = BASE in tree, tree.pop(BASE, None)
        if isinstance(tree.get("deepspeed"), str):
            tree["deepspeed"] = find_deepspeed(tree["deepspeed"], path.parent)
        files.append(RecipeFile(path, tree))
        if not has_base:
            return files, told
        base = _find_base(name, path)
        if base != path.parent / name:
            told.append(f"{path}: its base {name} is no file beside it; taken: the shipped {base}")
        read = [file.path.resolve() for file in files]
        if base.resolve() in read:
            circle = [file.path for file in files[read.index(base.resolve()) :]] + [base]
            raise ValueError(
                f"{files[0].path}: the bases form a circle: {' -> '.join(map(str, circle))}. Remove `{BASE}` "
                "from one of these files, or let it name another recipe."
            )
        path = base


def merge_files(files: Sequence[RecipeFile]) -> dict[str, Any]:
    """The keys of all files, those of an earlier one before those of a later one; a copy.

    Raises:
        ValueError: a mapping of a file holds itself, as an alias of YAML can make it.
    """
    tree: dict[str, Any] = {}
    for file in reversed(files):
        try:
            tree = _merge(tree, file.tree)
        except RecursionError as error:
            raise ValueError(
                f"{file.path}: nested far deeper than any recipe. Look for an alias inside its own anchor."
            ) from error
    return tree


def files_with(files: Sequence[RecipeFile], location: Sequence[int | str]) -> list[Path]:
    """The files in which the key at `location` stands, that whose value counts first."""
    return [file.path for file in files if _stands_in(file.tree, location)]


def _is_file(path: Path) -> bool:
    """False also for a name that no file can have."""
    try:
        return path.is_file()
    except OSError:  # longer than the file system takes
        return False


def _read_tree(path: Path) -> dict[str, Any]:
    tree = parse_yaml(read_text(path), str(path))
    if not isinstance(tree, dict):
        raise ValueError(
            f"{path}: a recipe is a mapping of sections, not {type(tree).__name__}. See docs/recipe.md."
        )
    return tree


def _find_base(name: object, path: Path) -> Path:
    """The file that the `base` of the recipe at `path` means."""
    if not (isinstance(name, str) and name):
        raise ValueError(
            f"{path}: {BASE}: the value is {json.dumps(name, default=str)}, but it should be the path of a "
            "recipe, from this file's folder, or the name of a shipped one. Change it, or remove the key."
        )
    return find_recipe(name, path.parent, f"{path}: {BASE}")


def _merge(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A new mapping with the keys of both, `own` before `base`, at every depth."""
    merged = dict(base)
    for key, value in own.items():
        under = base.get(key)
        merged[key] = (
            _merge(under if isinstance(under, dict) else {}, value) if isinstance(value, dict) else value
        )
    return merged


def _stands_in(tree: Mapping[str, Any], location: Sequence[int | str]) -> bool:
    node: Any = tree
    for part in location:
        if not isinstance(node, dict):
            break  # the rest is an item of a list, or a kind of value that was tried
        if part not in node:
            return False
        node = node[part]
    return True
