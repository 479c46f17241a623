"""Ways to damage a file: its bytes, or the values of the JSON or YAML in it. Pure functions of a generator's
state.
"""

from __future__ import annotations

import json
from random import Random
from typing import Any

# What trips parsers: encodings, anchors and tags of YAML, numbers that are none, depth.
FRAGMENTS = (
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", "\u2028".encode(), "\u202e".encode(), b"\r\n", b"\t", b"#", b":",
    b"- ", b"{", b"]", b'"', b"'", b"&a *a", b"<<: *a", b"!!python/object/apply:os.system [true]", b"NaN",
    b"-Infinity", b"1e999", b"9" * 400, b"null", b"true", b"{{ 7 * 7 }}", b"../../etc/passwd", b"[" * 3000,
    b'{"a":' * 3000, b"\\ud800", b"%s%n", b"$(true)", b"-oProxyCommand=true", b"=", b"@",
)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", " ", "0", "null", "\0", "\ud800", "é" * 300, "../x", "/dev/null", "-x", "a\nb", [], [[]], [None], {},
    {"a": {}}, [0] * 50, "x" * 5000,
)  # fmt: skip


def damage_bytes(content: bytes, chance: Random) -> bytes:
    """One to three changes: a bit, a span left out or doubled, a fragment put in, two lines exchanged, the
    end cut off.
    """
    for _ in range(chance.randint(1, 3)):
        content = chance.choice((_flip, _leave_out, _double, _put_in, _exchange_lines, _cut_off))(
            content, chance
        )
    return content


def damage_values(value: Any, chance: Random) -> Any:
    """A copy of a tree of JSON values with one to three of them replaced, removed, renamed or added."""
    value = _copy(value)
    for _ in range(chance.randint(1, 3)):
        holders = list(_holders(value))
        if not holders:
            break
        holder = chance.choice(holders)
        change = chance.choice((_replace, _replace, _replace, _remove, _rename, _add))
        change(holder, chance)
    return value


def _span(content: bytes, chance: Random) -> tuple[int, int]:
    start = chance.randrange(len(content) + 1)
    return start, min(len(content), start + chance.randint(1, 40))


def _flip(content: bytes, chance: Random) -> bytes:
    if not content:
        return content
    place = chance.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]


def _leave_out(content: bytes, chance: Random) -> bytes:
    start, stop = _span(content, chance)
    return content[:start] + content[stop:]


def _double(content: bytes, chance: Random) -> bytes:
    start, stop = _span(content, chance)
    return content[:stop] + content[start:]


def _put_in(content: bytes, chance: Random) -> bytes:
    place = chance.randrange(len(content) + 1)
    return content[:place] + chance.choice(FRAGMENTS) + content[place:]


def _exchange_lines(content: bytes, chance: Random) -> bytes:
    lines = content.split(b"\n")
    first, second = (chance.randrange(len(lines)) for _ in range(2))
    lines[first], lines[second] = lines[second], lines[first]
    return b"\n".join(lines)


def _cut_off(content: bytes, chance: Random) -> bytes:
    return content[: chance.randrange(len(content) + 1)]


def _copy(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _holders(value: Any) -> Any:
    """Every list and mapping in a tree that is not empty."""
    if isinstance(value, (dict, list)) and value:
        yield value
        for child in value.values() if isinstance(value, dict) else value:
            yield from _holders(child)


def _key(holder: Any, chance: Random) -> Any:
    return chance.choice(list(holder)) if isinstance(holder, dict) else chance.randrange(len(holder))


def _replace(holder: Any, chance: Random) -> None:
    holder[_key(holder, chance)] = chance.choice(ODD_VALUES)


def _remove(holder: Any, chance: Random) -> None:
    del holder[_key(holder, chance)]


def _rename(holder: Any, chance: Random) -> None:
    if isinstance(holder, dict):
        key = _key(holder, chance)
        holder[chance.choice([key + "s", key.upper(), "", "__class__"])] = holder.pop(key)


def _add(holder: Any, chance: Random) -> None:
    if isinstance(holder, dict):
        holder[chance.choice(["extra", "0", "format", "path"])] = chance.choice(ODD_VALUES)
    else:
        holder.insert(chance.randrange(len(holder) + 1), chance.choice([*ODD_VALUES, holder[0]]))
