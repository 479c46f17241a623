"""The text of a recipe whose keys carry their reasons as comments."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml

WIDTH = 108
_WORD = re.compile(r"[A-Za-z][\w./-]*", flags=re.ASCII)
TOP = ""
"""The section of keys that are in none."""


class Line(NamedTuple):
    """A key of the recipe, its value, and why it has this value; empty where the key says enough."""

    section: str
    key: str
    value: Any
    reason: str = ""


def recipe_text(opening: Sequence[str], lines: Sequence[Line]) -> str:
    """YAML of the lines in their order, those of a section together, below the comments of `opening`."""
    written = [comment for paragraph in opening for comment in _comment(paragraph, "")]
    for section in dict.fromkeys(line.section for line in lines):
        indent = "" if section == TOP else "  "
        written += [f"{section}:"] if section != TOP else []
        for line in lines:
            if line.section == section:
                written += _comment(line.reason, indent) if line.reason else []
                written.append(f"{indent}{line.key}: {_value(line.value)}")
    return "\n".join(written) + "\n"


def recipe_tree(lines: Sequence[Line]) -> Mapping[str, Any]:
    """The same as nested mappings."""
    tree: dict[str, Any] = {}
    for line in lines:
        (tree if line.section == TOP else tree.setdefault(line.section, {}))[line.key] = line.value
    return tree


def _value(value: Any) -> str:
    """A value as YAML: a plain word as it stands, everything else as JSON, which is YAML too."""
    is_word = isinstance(value, str) and _WORD.fullmatch(value) and yaml.safe_load(value) == value
    return value if is_word else json.dumps(value, ensure_ascii=False)


def _comment(text: str, indent: str) -> list[str]:
    plain = " ".join(text.split())  # a line break of a path would end the comment
    return textwrap.wrap(plain, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
