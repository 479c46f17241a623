"""Conversations about whole projects, whose answers stand far back in the text: the sources of Python's
standard library joined into repositories, with keys planted in them, then questions for a function's source,
a docstring or a key.

An answer is a quotation, so a model that sees its beginning and looks back can go on with it; one that
forgets what is far away cannot. Every conversation depends on its number and its size alone.
"""

from __future__ import annotations

import ast
import random
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from eagle3_ds.data.stdlib_corpus import stdlib_files

MAX_QUOTED, MIN_QUOTED = 700, 80
"""Characters of a definition that is asked for."""
ANSWERED_SHARE = 0.2
"""Of the characters of a conversation, those of its questions and answers, at most."""
KEY_EVERY = 2500
"""Characters of source for each planted key."""
LETTERS = "BCDFGHJKLMNPQRSTVWXZ"
COLOURS = ("amber", "azure", "coral", "ebony", "ivory", "jade", "lilac", "ochre", "pearl", "ruby", "sable")


@dataclass(frozen=True)
class Quotable:
    """A function or class of a module: its lines are `source`."""

    module: str
    name: str
    kind: str
    source: str
    docstring: str | None


@dataclass(frozen=True)
class Module:
    name: str
    text: str
    quotables: tuple[Quotable, ...]


@cache
def modules() -> tuple[Module, ...]:
    """Every module of the standard library that has something to quote."""
    found = []
    for path in stdlib_files():
        with tokenize.open(path) as file:
            text = file.read()
        parts = path.with_suffix("").parts
        start = next(i for i, part in enumerate(parts) if part.startswith("python3"))
        name = "/".join(parts[start + 1 :]) + ".py"
        quotables = tuple(_quotables(name, text))
        if quotables:
            found.append(Module(name, text, quotables))
    return tuple(found)


def _quotables(module: str, text: str) -> Iterator[Quotable]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(text)
    lines = text.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.decorator_list:
            source = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            if MIN_QUOTED <= len(source) <= MAX_QUOTED:
                kind = "class" if isinstance(node, ast.ClassDef) else "function"
                yield Quotable(module, node.name, kind, source, ast.get_docstring(node, clean=False))


def conversation(number: int, characters: int, answered: float = ANSWERED_SHARE) -> dict:
    """Row `{"messages": [...]}` of about so many characters: a repository, then questions about it, none of
    them twice.

    Args:
        answered: share of the characters that are questions and answers, at most.
    """
    rng = random.Random(f"repository {number} of {characters}")
    repository, quotables, keys = _repository(rng, round(characters * (1 - answered)))
    messages = [{"role": "system", "content": repository}]
    left = characters - len(repository)
    turns = [turn for quoted in quotables for turn in _quotations(quoted)] + _key_questions(rng, keys)
    rng.shuffle(turns)
    asked = set[str]()
    for question, answer in turns:
        if question in asked:  # a module may have two definitions of one name, or stand there twice
            continue
        asked.add(question)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        left -= len(question) + len(answer)
        if left <= 0:
            break
    return {"messages": messages}


def _repository(rng: random.Random, characters: int) -> tuple[str, list[Quotable], dict[str, str]]:
    """Pieces of files one after the other, the definitions that stand in them whole, and the planted keys."""
    parts, quotables, keys, left = [], list[Quotable](), dict[str, str](), characters
    while left > 0 or not quotables:
        module = rng.choice(modules())
        # A piece of a long file, so that a short repository is not a file's imports alone.
        room = max(left, MAX_QUOTED * 2)
        start = rng.randrange(max(1, len(module.text) - room // 2))
        start = module.text.rfind("\n", 0, start) + 1
        piece = module.text[start : start + min(room, 6000)]
        piece = piece[: piece.rfind("\n") + 1]
        inside = [q for q in module.quotables if q.source in piece]
        if not inside:
            continue
        text = _with_keys(rng, piece, keys)
        parts.append(f"### {module.name}\n{text}")
        quotables += [q for q in inside if q.source in text]
        left -= len(parts[-1])
    return "\n".join(parts), quotables, keys


def _with_keys(rng: random.Random, text: str, keys: dict[str, str]) -> str:
    lines = text.split("\n")
    for _ in range(max(1, len(text) // KEY_EVERY)):
        name = f"{rng.choice(COLOURS)}-{rng.randrange(10, 100)}"
        if name in keys:
            continue
        keys[name] = "".join(rng.choice(LETTERS) for _ in range(4)) + f"-{rng.randrange(1000, 10000)}"
        lines.insert(rng.randrange(len(lines)), f"# The key of {name} is {keys[name]}.")
    return "\n".join(lines)


def _quotations(quoted: Quotable) -> Iterator[tuple[str, str]]:
    yield f"Show me the {quoted.kind} {quoted.name} of {quoted.module}.", f"```python\n{quoted.source}\n```"
    if quoted.docstring is not None and len(quoted.docstring) >= MIN_QUOTED:
        question = f"What is the docstring of {quoted.name} in {quoted.module}?"
        yield question, f'"""{quoted.docstring}"""'


def _key_questions(rng: random.Random, keys: dict[str, str]) -> list[tuple[str, str]]:
    left, questions = rng.sample(sorted(keys), len(keys)), []
    while left:
        names, left = left[: rng.randint(1, 4)], left[4:]
        answer = "\n".join(f"The key of {name} is {keys[name]}." for name in names)
        questions.append((f"What is the key of {', of '.join(names)}?", answer))
    return questions
