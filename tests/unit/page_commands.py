"""Command lines as pages write them, held against the parsers that will read them. Nothing is run."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import click
import pytest
from _pytest.config import get_config
from _pytest.config.argparsing import Parser

from eagle3_ds.cli.main import commands
from eagle3_ds.config import load_recipe
from eagle3_ds.config.shipped import find_shipped
from tests.unit.watched_run import QUICKSTART

ROOT = Path(__file__).parents[2]
OURS = ("./launch.sh", "eagle3-ds", "python", "pytest")
OTHER_PROGRAMS = frozenset(
    {"[", "exit", "ls", "mkdocs", "pip", "scontrol", "sed", "source", "tail", "trap", "vllm", "wait"}
)
"""What pages call beside our own programs; a page that calls another one is to be read by a person first."""
OTHER_MODULES = frozenset({"vllm.entrypoints.openai.api_server"})
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*")
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)


def with_options(text: str) -> str:
    """With each `[--option X]` that may be left out, the first of `[--a X | --b Y]`, and without
    `[section.key=value ...]`.
    """
    without = re.sub(r"\[section\.key=value[^]]*\]", "", text)
    return re.sub(r"\[(--[^]|]*)[^]]*\]", r"\1", without)


def calls(script: str) -> Iterator[list[str]]:
    """The words of each command of a script, with the variables put in that it sets itself."""
    values: dict[str, str] = {}
    for line in with_options(script).replace("\\\n", " ").splitlines():
        words: list[str] = []
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        for word in [*lexer, ";"]:
            if word[0] in "|&;" or word == ">":
                if words and words[0] != ">":
                    yield words
                words = [">"] if word == ">" else []
                continue
            filled = re.sub(r"\$\{?(\w+)\}?", lambda found: values.get(found[1], found[0]), word)
            set_here = None if words else ASSIGNMENT.fullmatch(filled)
            if set_here:
                values[set_here[1]] = set_here[2]
            else:
                words.append(filled)


def faults_of_script(script: str) -> list[str]:
    """What is wrong with a script: its syntax, as bash reads it, else its commands."""
    read = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    if read.returncode:
        return read.stderr.splitlines()
    faults: list[str] = []
    for words in calls(script):
        fault = fault_of_words(words)
        if fault is not None:
            faults.append(f"{shlex.join(words)}: {fault}")
    return faults


def fault_of_span(span: str) -> str | None:
    """What is wrong with one of our commands between backticks, which may leave out what it must be given."""
    first = with_options(span).partition(" |")[0]
    return next((fault for words in calls(first) if (fault := fault_of_words(words, False))), None)


def fault_of_words(words: Sequence[str], is_whole: bool = True) -> str | None:
    """What is wrong with a command; None for one that is right or one of `OTHER_PROGRAMS`.

    Args:
        is_whole: whether required arguments must be there.
    """
    program, *rest = words
    try:
        if program == "./launch.sh" and rest[:1] == ["test"]:
            return _fault_of_tests(rest[1:])
        if program == "./launch.sh" and not (rest and (rest[0] in commands.commands or rest[0][0] == "-")):
            return _fault_of_ours(["launch", *(word for word in rest if word != "--no-install")], is_whole)
        if program in ("./launch.sh", "eagle3-ds"):
            return _fault_of_ours([word for word in rest if word != "--no-install"], is_whole)
        if program == "pytest":
            return _fault_of_tests(rest)
        if program == "python":
            return _fault_of_python(rest)
    except (ValueError, click.ClickException) as error:
        return str(error) or type(error).__name__
    if "/" in program and not program.startswith("/"):
        return None if os.access(ROOT / program, os.X_OK) else "no program of this repository"
    if program not in OTHER_PROGRAMS:
        return f"{program} is none of ours, and not among OTHER_PROGRAMS"
    return next((fault for word in rest if (fault := _fault_of_json(word))), None)


def parsed(words: Sequence[str], is_whole: bool = True) -> dict[str, Any]:
    """The arguments and options of `eagle3-ds` by name, as the command gets them.

    Raises:
        click.ClickException: there is no such command or option, or a value is none of the option's.
    """
    command: click.Command = commands
    rest = list(words)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        _, below, rest = command.resolve_command(click.Context(command), rest)
        assert below is not None
        command = below
    if isinstance(command, click.Group) and not rest:
        if is_whole:
            raise click.UsageError(f"{command.name} is a group of commands, and none of them is named")
        return {}
    if not is_whole:
        # A number whose value is left to the reader.
        rest = ["1" if PLACEHOLDER.fullmatch(word) else word for word in rest]
    try:
        with redirect_stdout(io.StringIO()), command.make_context(command.name, rest) as context:
            return context.params
    except click.exceptions.Exit:
        return {}
    except (click.MissingParameter, click.exceptions.NoArgsIsHelpError):
        if is_whole:
            raise
        return {}


def _fault_of_ours(words: Sequence[str], is_whole: bool) -> str | None:
    given = parsed(words, is_whole)
    recipes = [word for key in ("recipe", "source") if (word := given.get(key))]
    overrides = list(given.get("overrides") or ())
    for word in given.get("words") or ():
        (overrides if "=" in word else recipes).append(word)
    for recipe in recipes:
        load_recipe(_readable(recipe), overrides)
    return None


def _readable(recipe: str) -> Path:
    """The file of a recipe that is shipped; for the reader's own that of the quickstart."""
    if recipe.startswith("recipes/"):
        return ROOT / recipe
    is_readers = recipe.endswith((".yaml", ".jsonl")) or recipe == "1" or PLACEHOLDER.match(recipe)
    return QUICKSTART if is_readers else find_shipped("recipes", recipe) or Path(recipe)


@cache
def _parser_of_pytest() -> Parser:
    """With the options of the plugins that are installed, as the program has them."""
    config = get_config([])
    config.pluginmanager.load_setuptools_entrypoints("pytest11")
    return config._parser


def _fault_of_tests(words: Sequence[str]) -> str | None:
    """By the options of pytest and its plugins, and the paths of tests."""
    try:
        named = vars(_parser_of_pytest().parse(list(words)))["file_or_dir"]
    except pytest.UsageError as error:
        return str(error)
    missing = [path for path in named if not (ROOT / path.partition("::")[0]).exists()]
    return f"there is no {missing}" if missing else None


def _fault_of_python(words: Sequence[str]) -> str | None:
    if words[:1] != ["-m"]:
        return None if (ROOT / words[0]).is_file() else f"there is no file {words[0]}"
    name, arguments = words[1], list(words[2:])
    if name in OTHER_MODULES:
        return None
    path = ROOT / f"{name.replace('.', '/')}.py"
    if not path.is_file():
        return f"there is no module {name}"
    if "parse_args(arguments)" not in path.read_text("utf-8"):
        return f"{name} is no program with arguments"
    return _fault_of_arguments(name, arguments)


def _fault_of_arguments(module: str, arguments: list[str]) -> str | None:
    """By the `ArgumentParser` that the module's `main` makes; it ends there."""
    parse = argparse.ArgumentParser.parse_args

    def only_parse(parser: argparse.ArgumentParser, given: Sequence[str] | None = None) -> None:
        parse(parser, given)
        raise SystemExit(0)

    told = io.StringIO()
    try:
        with mock.patch.object(argparse.ArgumentParser, "parse_args", only_parse), redirect_stderr(told):
            import_module(module).main(arguments)
    except SystemExit as end:
        return told.getvalue().strip().splitlines()[-1] if end.code else None
    return f"main of {module} parsed nothing"


def _fault_of_json(word: str) -> str | None:
    if not re.match(r"[{\[]\S", word):
        return None
    # D and T stand for a path that the reader puts in.
    try:
        json.loads(re.sub(r": ([A-Z])\b", r': "\1"', word))
    except ValueError as error:
        return f"{word} is no JSON: {error}"
    return None
