"""Which characters of a rendered conversation come from which part of which message.

A second render shows it, of the same messages with everything that they say replaced by marks: between the
marks stands what the template writes by itself. Laid upon the first render, these stretches leave the words
over. One render tells of all messages, so that the cost grows with the text and not with its square.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from eagle3_ds.data.chat import REASONING_KEYS, Span

Messages = Sequence[Mapping[str, Any]]

THINK = r"(?:think|thinking|thought|reasoning|seed:think)"
REASONING_TAG = rf"(?:</?{THINK}>|\[/?{THINK.upper()}\])"
TAGS = re.compile(rf"(\s*{REASONING_TAG}\s*|\A\s*<\w+>\s*|\s*</\w+>\s*\Z)")
"""What templates look for in words: tags of reasoning, and tags around a whole text."""
MARK = "Zq7x"


class Part(NamedTuple):
    """One thing that a message says: "words", "reasoning", or "call" with its number."""

    message: int
    kind: str
    number: int = 0


@dataclass(frozen=True)
class Words:
    """Where each message speaks in a render, None where nothing of it was looked for or found.

    `left_out`: what the messages say and the render does not have, white space aside.
    """

    spans: Sequence[Span | None]
    left_out: frozenset[Part]


def find_words(render: Callable[[Messages], str], text: str, messages: Messages) -> Words | None:
    """Where the messages speak in `text`, their render.

    None when marks in place of words change what the template writes by itself, or when its stretches fit the
    text in several ways.
    """
    empty = any(map(_is_empty, messages))
    # A message without text has its place all the same, unless the template leaves it out for that.
    for mark_empty in (True, False) if empty else (False,):
        marks = Marks(text, mark_empty)
        skeleton = render([marks.disguise(index, message) for index, message in enumerate(messages)])
        stretches, numbers = marks.split(skeleton)
        values = [marks.values[number] for number in numbers]
        owners = [marks.parts[number].message for number in numbers]
        holes = _fit_by_values(text, stretches, values) or _fit_by_search(text, stretches, owners)
        if holes is not None:
            return _gather(marks, numbers, holes, len(messages))
    return None


def _is_empty(message: Mapping[str, Any]) -> bool:
    return message["role"] != "assistant" and message.get("content") == ""


def find_words_alone(
    render: Callable[[Messages], str], text: str, messages: Messages, index: int, special: re.Pattern[str]
) -> Words | None:
    """The same for one message, from a render where it alone is disguised: all that changes is its words.

    None when the `special` token after its words changes with them.
    """
    marks = Marks(text)
    skeleton = render([*messages[:index], marks.disguise(index, messages[index]), *messages[index + 1 :]])
    spans: list[Span | None] = [None] * len(messages)
    stretches, numbers = marks.split(skeleton)
    if numbers:
        head, tail = shared_prefix(text, stretches[0]), shared_suffix(text, stretches[-1])
        closing = special.search(stretches[-1])
        if closing is not None and closing.start() < len(stretches[-1]) - tail:
            return None
        if head + tail < len(text):
            spans[index] = (head, len(text) - tail)
    return Words(spans, marks.left_out(numbers if spans[index] else ()))


def unused_mark(text: str) -> str:
    """A word that `text` does not hold."""
    return next(mark for number in itertools.count() if (mark := f"{MARK}{number or ''}") not in text)


class Marks:
    """Marks that `text` does not hold, each for one value of a message, of the value's own type.

    `mark_empty`: whether the empty text of a message that is not the assistant's gets a mark too.
    """

    def __init__(self, text: str, mark_empty: bool = False) -> None:
        self.mark_empty = mark_empty
        self.word = unused_mark(text)
        self.number = next(str(digits) for digits in itertools.count(731928) if str(digits) not in text)
        self.pattern = re.compile(rf"{self.word}(\d{{6}})|{self.number}(\d{{6}})(?:\.5)?")
        self.parts: list[Part] = []
        self.values: list[str] = []

    def split(self, skeleton: str) -> tuple[list[str], list[int]]:
        """The stretches around the marks, one more than marks, and the marks' numbers."""
        stretches, numbers, done = [], [], 0
        for match in self.pattern.finditer(skeleton):
            stretches.append(skeleton[done : match.start()])
            numbers.append(int(match[1] or match[2]))
            done = match.end()
        return [*stretches, skeleton[done:]], numbers

    def disguise(self, index: int, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message with all that it says replaced by marks, its structure kept."""
        disguised = dict(message)
        content = message.get("content")
        if self.mark_empty and _is_empty(message):
            disguised["content"] = self._mark("", Part(index, "words"))
        elif isinstance(content, str) and content:
            disguised["content"] = self._text(content, index, message["role"] == "assistant")
        reasoning = [key for key in REASONING_KEYS if message.get(key)]
        if reasoning:
            mark = self._mark(message[reasoning[0]], Part(index, "reasoning"))
            disguised |= dict.fromkeys(reasoning, mark)
        if message.get("tool_calls"):
            disguised["tool_calls"] = [
                self._call(call, Part(index, "call", number))
                for number, call in enumerate(message["tool_calls"])
            ]
        return disguised

    def left_out(self, found: Iterable[int]) -> frozenset[Part]:
        """The parts of which no mark is found, those of white space aside."""
        said = {part for part, value in zip(self.parts, self.values, strict=True) if value.strip()}
        return frozenset(said - {self.parts[number] for number in found})

    def _mark(self, value: str, part: Part) -> str:
        self.parts.append(part)
        self.values.append(value)
        return f"{self.word}{len(self.parts) - 1:06d}"

    def _text(self, content: str, index: int, spoken: bool) -> str:
        """The content with its tags kept: templates cut at them."""
        pieces = TAGS.split(content)
        if not any(piece.strip() for piece in pieces[::2]):
            return self._mark(content, Part(index, "words"))
        closings = [place for place, piece in enumerate(pieces) if place % 2 and re.search(r"[<\[]/", piece)]
        thought = [place for place in closings if re.search(REASONING_TAG, pieces[place])]
        until = max(thought, default=0) if spoken else 0
        return "".join(
            piece
            if place % 2 or not piece.strip()
            else self._mark(piece, Part(index, "reasoning" if place < until else "words"))
            for place, piece in enumerate(pieces)
        )

    def _call(self, call: Mapping[str, Any], part: Part) -> dict[str, Any]:
        if "function" in call:
            return {**call, "function": self._call(call["function"], part)}
        before = len(self.parts)
        arguments = self._value(call.get("arguments"), part)
        if len(self.parts) > before:
            # The name stays: templates write calls of their built-in tools in another way.
            return {**call, "arguments": arguments}
        return {**call, "name": self._mark(call["name"], part)}

    def _value(self, value: Any, part: Part) -> Any:
        if isinstance(value, str) and value:
            return self._mark(value, part)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            digits = int(self.number + self._mark(json.dumps(value), part)[-6:])
            return digits if isinstance(value, int) else digits + 0.5
        if isinstance(value, Mapping):
            return {key: self._value(own, part) for key, own in value.items()}
        return [self._value(own, part) for own in value] if isinstance(value, list) else value


def _fit_by_values(text: str, stretches: Sequence[str], values: Sequence[str]) -> list[Span] | None:
    """Where the marks' values stand in the text, if it is nothing but stretches and values in turn."""
    if not text.startswith(stretches[0]):
        return None
    holes, first = [], len(stretches[0])
    for value, stretch in zip(values, stretches[1:], strict=True):
        for spelling in _spellings(value):
            last = first + len(spelling)
            if text.startswith(spelling, first) and text.startswith(stretch, last):
                break
        else:
            return None
        holes.append((first, last))
        first = last + len(stretch)
    return holes if first == len(text) else None


def _spellings(value: str) -> Iterator[str]:
    """The ways in which templates write a value."""
    yield value
    yield value.strip()
    yield value.lstrip()
    yield value.rstrip()
    yield value.strip("\n")
    yield value.lstrip("\n")
    yield json.dumps(value, ensure_ascii=False)[1:-1]
    yield json.dumps(value)[1:-1]


def _fit_by_search(text: str, stretches: Sequence[str], owners: Sequence[int]) -> list[Span] | None:
    """Where the stretches leave the marks' places, if there is one way to tell the messages apart.

    The stretches as far left as they can stand, and as far right: where both agree, nothing else is possible.
    """
    left = _search(text, stretches)
    if not owners or left is None:
        return left
    mirrored = _search(text[::-1], [stretch[::-1] for stretch in reversed(stretches)])
    assert mirrored is not None
    right = [(len(text) - last, len(text) - first) for first, last in reversed(mirrored)]
    for place in range(1, len(owners)):
        if owners[place - 1] != owners[place] and left[place][0] != right[place][0]:
            return None
    return left


def _search(text: str, stretches: Sequence[str]) -> list[Span] | None:
    if len(stretches) == 1:
        return [] if text == stretches[0] else None
    end = len(text) - len(stretches[-1])
    if not text.startswith(stretches[0]) or not text.endswith(stretches[-1]):
        return None
    holes, first = [], len(stretches[0])
    for stretch in stretches[1:-1]:
        last = text.find(stretch, first, end)
        if last < 0:
            return None
        holes.append((first, last))
        first = last + len(stretch)
    return [*holes, (first, end)] if first <= end else None


def _gather(marks: Marks, numbers: Sequence[int], holes: Sequence[Span], messages: int) -> Words:
    """The holes by message; of a mark that the template writes again, as a tool's name, the first counts."""
    spans: list[Span | None] = [None] * messages
    found: set[int] = set()
    seen: set[int] = set()
    for number, (first, last) in zip(numbers, holes, strict=True):
        if number in seen:
            continue
        seen.add(number)
        part = marks.parts[number]
        if first < last:
            found.add(number)
        known = spans[part.message]
        spans[part.message] = (first, last) if known is None else (min(known[0], first), max(known[1], last))
    return Words(spans, marks.left_out(found))


def shared_prefix(one: str, other: str) -> int:
    """How many characters both begin with."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def shared_suffix(one: str, other: str) -> int:
    """How many characters both end with."""
    return len(other) if one.endswith(other) else shared_prefix(one[::-1], other[::-1])
