"""Real text that every Python installation carries: the standard library's sources, as plain text and as
conversations.

Order and content depend on nothing but the installed library: files are taken by sorted path, choices are
seeded by names. A definition is shown in one conversation only, so a split by conversation keeps held-out
code apart from training code.
"""

from __future__ import annotations

import ast
import hashlib
import random
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
MAX_TURNS = 6
MAX_CHARACTERS = 8000
"""Of one conversation: a few thousand tokens."""
MAX_SOURCE = 4000
MIN_ANSWER = 60


@dataclass(frozen=True)
class Definition:
    """A module, class, function or method. `source` is None when the parts of it are told one by one."""

    kind: str
    name: str
    signature: str
    docstring: str | None
    source: str | None


def stdlib_files() -> list[Path]:
    """The library's Python sources, sorted, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        path for path in root.rglob("*.py") if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    ]
    if not files:
        raise ValueError(
            f"no Python source in the standard library folder {root}: this installation carries none. Use a "
            "regular Python installation, or name JSONL or Parquet files in data.train"
        )
    return sorted(files)


def stdlib_fingerprint() -> str:
    """sha256 over names and contents of `stdlib_files()`."""
    digest = hashlib.sha256()
    root = Path(sysconfig.get_path("stdlib"))
    for path in stdlib_files():
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def stdlib_text(max_bytes: int | None = None) -> Iterator[str]:
    """Whole source files in an order that mixes packages, until their UTF-8 text reaches `max_bytes` (the
    last one is cut).
    """
    files = stdlib_files()
    random.Random("text").shuffle(files)
    left = max_bytes
    for path in files:
        text = _read(path)
        if left is None:
            yield text
            continue
        encoded = text.encode()[:left]
        left -= len(encoded)
        if encoded:
            yield encoded.decode(errors="ignore")  # the cut may split the last character
        if left <= 0:
            return


def stdlib_conversations() -> Iterator[dict]:
    """Rows `{"messages": [...]}` of 1 to 6 questions about one module, its docstrings, signatures and
    sources; modules mixed.
    """
    found = [conversation for path in stdlib_files() for conversation in _module_conversations(path)]
    random.Random("conversations").shuffle(found)
    yield from found


def _read(path: Path) -> str:
    with tokenize.open(path) as file:
        return file.read()


def _module_name(path: Path) -> str:
    parts = list(path.relative_to(sysconfig.get_path("stdlib")).with_suffix("").parts)
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


def _module_conversations(path: Path) -> Iterator[dict]:
    """Group the definitions of one module, in their order, into conversations of 1 to 6 turns and limited
    length.
    """
    module = _module_name(path)
    rng = random.Random(module)
    turns: list[tuple[str, str]] = []
    size, wanted = 0, rng.randint(1, MAX_TURNS)
    for definition in _definitions(module, _read(path)):
        turn = _turn(definition, module, rng)
        if turn is None:
            continue
        length = len(turn[0]) + len(turn[1])
        if turns and (len(turns) == wanted or size + length > MAX_CHARACTERS):
            yield _conversation(module, turns, rng)
            turns, size, wanted = [], 0, rng.randint(1, MAX_TURNS)
        turns.append(turn)
        size += length
    if turns:
        yield _conversation(module, turns, rng)


def _conversation(module: str, turns: list[tuple[str, str]], rng: random.Random) -> dict:
    messages = []
    if rng.random() < 0.5:
        messages.append(
            {"role": "system", "content": f"You answer questions about the Python module {module}."}
        )
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


def _definitions(module: str, text: str) -> Iterator[Definition]:
    """The module itself, then its classes and functions; a class too long to be shown whole is followed by
    its methods.
    """
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # odd escapes in the library's own strings are not the user's business
        tree = ast.parse(text)
    lines = text.splitlines()
    yield Definition("module", module, f"import {module}", ast.get_docstring(tree), None)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield _function(node, "function", node.name, lines)
        elif isinstance(node, ast.ClassDef):
            source = _source(node, lines)
            whole = source is not None and len(source) <= MAX_SOURCE // 2
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            header = f"class {node.name}({bases}):" if bases else f"class {node.name}:"
            yield Definition("class", node.name, header, ast.get_docstring(node), source if whole else None)
            for member in () if whole else node.body:
                if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield _function(member, "method", f"{node.name}.{member.name}", lines)


def _function(
    node: ast.FunctionDef | ast.AsyncFunctionDef, kind: str, name: str, lines: list[str]
) -> Definition:
    word = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    signature = f"{word} {node.name}({ast.unparse(node.args)}){returns}:"
    return Definition(kind, name, signature, ast.get_docstring(node), _source(node, lines))


def _source(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, lines: list[str]) -> str | None:
    """The lines of `node`, decorators included, moved to the left margin; None when too long or too short to
    be asked for.
    """
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    margin = node.col_offset
    block = lines[first - 1 : node.end_lineno]
    text = "\n".join(line[margin:] if not line[:margin].strip() else line for line in block)
    return text if MIN_ANSWER <= len(text) <= MAX_SOURCE else None


def _turn(definition: Definition, module: str, rng: random.Random) -> tuple[str, str] | None:
    """A question about `definition` and its answer, or None when it has nothing worth an answer."""
    name = module if definition.kind == "module" else f"{module}.{definition.name}"
    docstring = definition.docstring[:MAX_SOURCE].rstrip() if definition.docstring else None
    choices = []
    if definition.source is not None:
        source = f"```python\n{definition.source}\n```"
        choices.append((f"Show me the source of the {definition.kind} {name}.", source))
        choices.append((f"How is {name} implemented?", f"This is how `{name}` is written:\n\n{source}"))
    if docstring is not None and len(docstring) >= MIN_ANSWER:
        choices.append((f"What does the {definition.kind} {name} do?", docstring))
        signature = f"```python\n{definition.signature}\n```\n\n{docstring}"
        choices.append((f"What is the signature of {name}, and what is it for?", signature))
    return rng.choice(choices) if choices else None
