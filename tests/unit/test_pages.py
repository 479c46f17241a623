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
from tests.unit.page_commands import OURS, fault_of_span

ROOT = Path(__file__).parents[2]
WRITTEN_NOW = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [ROOT / "CHANGELOG.md", *WRITTEN_NOW]
CHECKED = [
    ROOT / "docs" / name for name in ("glossary.md", "how-it-works.md", "troubleshooting.md", "watching.md")
]
OTHER_OPTIONS = {"--max-model-len"}
"""Of vLLM, in our own messages."""


def prose(text: str) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def spans_of(text: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`\n]+)`", prose(text))


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


def all_options(command: click.Command) -> set[str]:
    below = command.commands.values() if isinstance(command, click.Group) else ()
    own = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return own.union(*(all_options(one) for one in below))


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
    """Options and recipe keys between backticks that do not exist."""
    spans = spans_of(text)
    found: list[str] = []
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
    return found


def faults_of_commands(text: str) -> list[str]:
    """Our commands between backticks that the programs would refuse."""
    spans = [span for span in spans_of(text) if span.partition(" ")[0] in OURS and " " in span]
    return [f"{span}: {fault}" for span in spans if (fault := fault_of_span(span))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page, page.read_text("utf-8")) == []


@pytest.mark.parametrize("page", CHECKED, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text("utf-8")
    assert unknown_messages(text) == []
    assert faults_of_code(text) == []


@pytest.mark.parametrize("page", WRITTEN_NOW, ids=lambda page: page.name)
def test_commands_in_the_text_are_understood(page: Path) -> None:
    assert faults_of_commands(page.read_text("utf-8")) == []


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
    assert len(faults_of_code("`--no-such` `train.stepz: 3`")) == 2
    assert faults_of_code("`--resume auto` `eval.json`") == []
    wrong = "`eagle3-ds planer R` `eagle3-ds plan R --gpu 8` `eagle3-ds plan R train.step=1` "
    wrong += "`python -m benchmarks.none` `python -m judge.exactness --shrt` `pytest tests/none.py` "
    wrong += "`./launch.sh data lose R` `eagle3-ds launch quickstrt` `./launch.sh recipes/none.yaml` "
    wrong += "`./launch.sh R --resume never`"
    assert len(faults_of_commands(wrong)) == len(spans_of(wrong)) == 10
    right = (
        "`eagle3-ds plan R --gpus N train.steps=20` `./launch.sh R --dry-run` `eagle3-ds cache list | prune` "
    )
    right += "`eagle3-ds evaluate` `pytest tests/unit -k pages` `python -m judge.exactness --only TEXT`"
    assert faults_of_commands(right) == []
