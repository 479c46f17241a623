"""Recipes, JSON and Python as pages write them, held against what reads them. No Python of a page is run."""

from __future__ import annotations

import ast
import builtins
import inspect
import json
import tempfile
import textwrap
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from eagle3_ds.config import Recipe, load_recipe
from tests.unit.watched_run import QUICKSTART

READERS_OWN = frozenset(
    {
        "aux", "draft_so_far", "lengths", "llm", "loss_mask", "policy_embedding",
        "policy_head", "rollouts", "server", "teacher", "token_ids", "version", "vocabulary",
    }
)  # fmt: skip
"""Names in the Python of pages that the reader's program has."""


def faults_of_recipe(text: str) -> list[str]:
    """What is wrong with a recipe; with some sections of one, when they are put over the quickstart's."""
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return [str(error)]
    if not isinstance(tree, dict):
        return [f"{text!r} is no mapping of sections"]
    required = {name for name, field in Recipe.model_fields.items() if field.is_required()}
    if not required - {"output_dir"} <= set(tree):
        base = yaml.safe_load(QUICKSTART.read_text("utf-8"))
        # A target that is built here is the quickstart's own.
        del base["target"]["build"]
        tree = _merged(base, tree)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree), "utf-8")
        try:
            load_recipe(path)
        except ValueError as error:
            return [str(error)]
    return []


def _merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    found = dict(base)
    for key, value in more.items():
        below = found.get(key)
        found[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return found


def faults_of_json(text: str) -> list[str]:
    """What is wrong with JSON, or with the lines of a JSONL."""
    try:
        json.loads(text)
    except ValueError:
        try:
            for line in text.splitlines():
                json.loads(line)
        except ValueError as error:
            return [f"{line} is no JSON: {error}"]
    return []


def faults_of_python(text: str) -> list[str]:
    """What is wrong with Python: its syntax, names that nobody gives, imports that lead nowhere, attributes
    and arguments that what it imports from eagle3_ds does not have.
    """
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        return [str(error)]
    reader = _Reader()
    reader.visit(tree)
    return reader.faults


class _Reader(ast.NodeVisitor):
    """Goes through statements in their order and knows of each name what was imported under it, or the class
    of its value, where that can be told.
    """

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.known: dict[str, object] = {}
        """What an expression that is this name is: something imported."""
        self.values: dict[str, type] = {}
        """The class of the value of this name."""
        self.given = set(READERS_OWN) | set(vars(builtins))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            try:
                import_module(alias.name)
            except ImportError as error:
                self.faults.append(str(error))
            self.given.add((alias.asname or alias.name).partition(".")[0])

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            name = alias.asname or alias.name
            self.given.add(name)
            try:
                self.known[name] = getattr(import_module(str(node.module)), alias.name)
            except (ImportError, AttributeError) as error:
                self.faults.append(str(error))

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        kind = self._class_of(node.value)
        for target in node.targets:
            self.visit(target)
            if isinstance(target, ast.Name):
                self.values.pop(target.id, None)
                if kind is not None:
                    self.values[target.id] = kind

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.target)
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self.given.add(node.id)
        elif node.id not in self.given:
            self.faults.append(f"nothing gives the name {node.id}")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        owner = self._class_of(node.value)
        if owner is not None and node.attr not in _attributes(owner):
            self.faults.append(f"{owner.__name__} has no {node.attr}")

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        called = self._object(node.func)
        is_starred = any(isinstance(word, ast.Starred) for word in node.args)
        if not callable(called) or is_starred or any(word.arg is None for word in node.keywords):
            return
        of_self = [None] if isinstance(node.func, ast.Attribute) else []
        try:
            inspect.signature(called).bind(
                *of_self, *node.args, **{str(word.arg): word.value for word in node.keywords}
            )
        except TypeError as error:
            self.faults.append(f"{ast.unparse(node)}: {error}")

    def _object(self, node: ast.expr) -> object:
        """What an expression is: something imported, or a method of a known class; else None."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self._class_of(node.value)
            return None if owner is None else getattr(owner, node.attr, None)
        return None

    def _class_of(self, node: ast.expr) -> type | None:
        """Of the value of an expression, where it can be told."""
        if isinstance(node, ast.Name):
            return self.values.get(node.id)
        if not isinstance(node, ast.Call):
            return None
        called = self._object(node.func)
        if isinstance(called, type):
            return called
        if not inspect.isfunction(called):
            return None
        kind = get_type_hints(called).get("return")
        return kind if isinstance(kind, type) and kind.__module__.startswith("eagle3_ds") else None


def _attributes(owner: type) -> set[str]:
    """Names that an object of a class has: those of the class, and what its methods set."""
    found = set(dir(owner)).union(*(getattr(base, "__annotations__", ()) for base in owner.__mro__))
    for base in owner.__mro__:
        if base.__module__.startswith("eagle3_ds"):
            found |= {
                node.attr
                for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base))))
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            }
    return found
