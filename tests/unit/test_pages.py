"""What the pages say exists: links and their anchors, quoted messages, commands, options and recipe keys."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import click
import pytest

from eagle3_ds.cli.main import commands
from eagle3_ds.config import Recipe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
CHECKED = [
    ROOT / "docs" / name for name in ("glossary.md", "how-it-works.md", "troubleshooting.md", "watching.md")
]
OTHER_OPTIONS = {"--max-model-len"}
"""Of vLLM, in our own messages."""


def prose(text: str) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(text), flags=re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.add(next(s for n in range(99) if (s := f"{slug}-{n}" if n else slug) not in found))
    return found


def broken_links(page: Path, text: str) -> list[str]:
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        there = target.exists()
        if not there or (anchor and anchor not in anchors(text if not name else target.read_text("utf-8"))):
            wrong.append(link)
    return wrong


@cache
def literals() -> tuple[str, ...]:
    """All texts of the package, a NUL where a value is put in."""
    found = []
    for path in (ROOT / "eagle3_ds").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "\0" for p in node.values]
                found.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[sdg]", "\0", node.value))
    return tuple(found)


def unknown_messages(text: str) -> list[str]:
    """Quoted fragments that no text of the package holds; `...` stands for values."""
    quoted = re.findall(r"^\s*> (.+)$", text, flags=re.MULTILINE)
    wrong = []
    for fragment in quoted:
        pieces = [piece.strip() for piece in fragment.split("...") if piece.strip()]
        pattern = re.compile(".*\0.*".join(map(re.escape, pieces)), re.DOTALL)
        if not pieces or not any(pattern.search(literal) for literal in literals()):
            wrong.append(fragment)
    return wrong


def options_of(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def all_options(command: click.Command) -> set[str]:
    below = command.commands.values() if isinstance(command, click.Group) else ()
    return options_of(command).union(*(all_options(one) for one in below))


def fault_of_command(line: str) -> str | None:
    """What is wrong with a command of ours; None for one that is right or somebody else's."""
    words = line.split()
    if words[0] == "./launch.sh":
        words = ["eagle3-ds", *([] if words[1] in commands.commands else ["launch"]), *words[1:]]
    if words[:2] == ["python", "-m"]:
        path = ROOT / words[2].replace(".", "/")
        return None if path.with_suffix(".py").is_file() else f"no module {words[2]}"
    if words[0] == "python":
        return None if (ROOT / words[1]).is_file() else f"no file {words[1]}"
    if words[0] != "eagle3-ds":
        return None
    command: click.Command = commands
    rest = words[1:]
    while isinstance(command, click.Group):
        if not rest or rest[0] not in command.commands:
            return f"no command {' '.join(words)}"
        command, rest = command.commands[rest[0]], rest[1:]
    unknown = {word for word in rest if word.startswith("--")} - options_of(command)
    keys = {word.partition("=")[0] for word in rest if "=" in word} - recipe_keys()
    return f"{line}: unknown {sorted(unknown | keys)}" if unknown or keys else None


@cache
def recipe_keys() -> frozenset[str]:
    def below(section, prefix):
        for name, field in section.model_fields.items():
            yield f"{prefix}{name}"
            kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
            for kind in kinds:
                if hasattr(kind, "model_fields"):
                    yield from below(kind, f"{prefix}{name}.")

    return frozenset(below(Recipe, ""))


def faults_of_code(text: str) -> list[str]:
    """Commands, options and recipe keys, in blocks or between backticks, that do not exist."""
    blocks = re.findall(r"^```\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", prose(text))
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    starts = ("eagle3-ds ", "./launch.sh ", "python ")
    found = [fault_of_command(line) for line in (*lines, *(s for s in spans if s.startswith(starts)))]
    sections = {
        name for name, field in Recipe.model_fields.items() if hasattr(field.annotation, "model_fields")
    }
    for span in spans:
        name = re.split(r"[ :=]", span)[0]
        if name.startswith("--") and name not in all_options(commands) | OTHER_OPTIONS:
            found.append(f"no option {name}")
        dotted = re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", name) and name.partition(".")[0] in sections
        # eval.json is a file of a run.
        if dotted and name not in recipe_keys() | {"eval.json"}:
            found.append(f"no recipe key {name}")
    return [fault for fault in found if fault]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page, page.read_text("utf-8")) == []


@pytest.mark.parametrize("page", CHECKED, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text("utf-8")
    assert unknown_messages(text) == []
    assert faults_of_code(text) == []


def test_every_symptom_quotes_or_commands() -> None:
    """Each section of the page has something to run first, and is in the table at the top."""
    text = CHECKED[2].read_text("utf-8")
    head, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    assert len(sections) >= 11 and head.count("](#") == len(sections)
    assert all("Look first" in section and "```\n" in section for section in sections)
    assert len(re.findall(r"^\s*> ", text, flags=re.MULTILINE)) > 40


def test_these_checks_can_fail() -> None:
    page = CHECKED[0]
    assert broken_links(page, "[a](nowhere.md) [b](#none) [c](recipe.md#none) [d](recipe.md)\n# x") == [
        "nowhere.md",
        "#none",
        "recipe.md#none",
    ]
    assert unknown_messages("> the server never asked its mother\n> waited ... s in ...") == [
        "the server never asked its mother"
    ]
    wrong = "```\neagle3-ds planer R\neagle3-ds plan R --gpu 8\neagle3-ds plan R train.step=1\n```\n"
    wrong += "`--no-such` `train.stepz: 3` `python -m benchmarks.none` `./launch.sh data lose R`"
    assert len(faults_of_code(wrong)) == 7
    right = "```\neagle3-ds plan R --gpus 8 train.steps=1\n```\n`--resume auto` `eval.json` "
    right += "`./launch.sh R --dry-run`"
    assert faults_of_code(right) == []
