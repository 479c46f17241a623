"""Where the assistant's turns are in a rendered conversation: the characters that a server would have
generated.

A turn starts where the prompt ends that a server would have rendered for it, and ends with the special token
that closes it. Nothing about a template is known beforehand. Two kinds of renders tell everything:

- growing prefixes: the messages before a turn, with the generation prompt, are the server's prompt for that
turn; - disguises: the same messages with all that one of them says replaced by a mark show where its words
are.

What these renders cannot prove is an error, never a guess.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from eagle3_ds.data.chat import REASONING_KEYS, ChatTemplate, Conversation, Span, is_learnt

FIX = (
    "Copy the template to a file, put {% generation %} and {% endgeneration %} around what the assistant "
    "generates, and name the file in data.chat_template"
)
MARK = "Zq7x"


@dataclass(frozen=True)
class Words:
    """Characters [first, last) of a render that one message's own words decide."""

    first: int
    last: int


def locate_turns(
    template: ChatTemplate, conversation: Conversation, supervise: Literal["all", "last"], where: str
) -> tuple[str, list[Span]]:
    """The rendered conversation and the spans in it that the assistant generated, in order.

    Every turn, or the last one alone: its reasoning, words and tool calls as far as the render has them, and
    the special token that ends it; not the generation prompt before, not what the template writes after.
    Templates with `{% generation %}` marks are taken at their word.

    Raises ValueError, opened by `where`, when the template raises or a turn cannot be told from the rest.
    """
    turns = [index for index, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    view = _View(template, conversation, where)
    if supervise == "last":
        turns = turns[-1:]
    turns = [turn for turn in turns if is_learnt(view.messages[turn])]
    if not turns:
        raise ValueError(
            f"{where}: the last assistant message is marked not to be learnt, and data.supervise is 'last': "
            "remove the row, or set data.supervise to 'all'"
        )
    if template.is_marked(conversation.tools):
        return view.text, _marked_spans(view, turns)
    ends: set[str] = set()
    spans = [_turn_span(view, turn, ends) for turn in reversed(turns)]  # the last turn shows how a turn ends
    return view.text, spans[::-1]


class _View:
    """One conversation under its template: its render, and the renders of its variants."""

    def __init__(self, template: ChatTemplate, conversation: Conversation, where: str) -> None:
        self.template = template
        self.messages = conversation.messages
        self.tools = conversation.tools
        self.where = where
        self.text = self.render(self.messages)

    def render(self, messages: Sequence[Mapping[str, Any]], prompt: bool = False) -> str:
        return self.template.render(messages, self.tools, self.where, prompt)

    def words(
        self, text: str, messages: Sequence[Mapping[str, Any]], index: int, prompt: bool = False
    ) -> Words:
        """Where `messages[index]` speaks in `text`, the render of `messages`."""
        mark = unused_mark(text)
        disguised = [*messages[:index], _disguise(messages[index], mark), *messages[index + 1 :]]
        other = self.render(disguised, prompt)
        begin, end = other.find(mark), other.rfind(mark) + len(mark)
        head = _shared_prefix(text, other[:begin]) if begin >= 0 else 0
        tail = _shared_suffix(text, other[end:]) if begin >= 0 else 0
        if begin < 0 or head + tail >= len(text):
            raise ValueError(
                f"{self.where}: the chat template leaves out what messages[{index}] "
                f"({messages[index]['role']}) says: correct or remove the row, or name another template in "
                "data.chat_template"
            )
        closing = self.template.special.search(other, end)
        if (
            closing is not None and closing.start() < len(other) - tail
        ):  # it changed, or what stands before it did
            raise self.unclear(index, "the way its turn ends depends on its words")
        return Words(head, len(text) - tail)

    def unclear(self, index: int, reason: str) -> ValueError:
        return ValueError(
            f"{self.where}: the tokens of messages[{index}] cannot be told from the rest: {reason}. {FIX}"
        )


def unused_mark(text: str) -> str:
    """A word that `text` does not hold."""
    return next(mark for number in itertools.count() if (mark := f"{MARK}{number or ''}") not in text)


def _disguise(message: Mapping[str, Any], mark: str) -> dict[str, Any]:
    """The message with all that it says replaced by `mark`, its structure kept."""
    others = message["role"] != "assistant"  # what they say may be empty, and has its place all the same
    disguised = {
        key: mark if key in ("content", *REASONING_KEYS) and (value or others) else value
        for key, value in message.items()
    }
    if "tool_calls" in message:
        disguised["tool_calls"] = [_disguise_call(call, mark) for call in message["tool_calls"]]
    return disguised


def _disguise_call(call: Mapping[str, Any], mark: str) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _disguise_call(call["function"], mark)}
    if call["arguments"]:  # the name stays: templates write calls of their built-in tools in another way
        return {**call, "arguments": dict.fromkeys(call["arguments"], mark)}
    return {**call, "name": mark}


def _shared_prefix(one: str, other: str) -> int:
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _shared_suffix(one: str, other: str) -> int:
    return len(other) if one.endswith(other) else _shared_prefix(one[::-1], other[::-1])


# Turns of a template without marks


def _turn_span(view: _View, turn: int, ends: set[str]) -> Span:
    words = view.words(view.text, view.messages, turn)
    start, end = _start(view, turn, words), _end(view, turn, words, ends)
    if not start < words.last:
        raise view.unclear(turn, "the prompt for its turn already holds them")
    return start, end


def _start(view: _View, turn: int, words: Words) -> int:
    """Where the server's prompt for this turn ends."""
    text = view.text
    prompt = view.render(view.messages[:turn], prompt=True)
    if text.startswith(prompt):
        start = len(prompt)
    else:
        # Earlier messages are rendered otherwise by now (reasoning dropped, a system message moved on), so
        # that the prompt is compared from the end of the message before.
        here = view.words(text, view.messages, turn - 1).last
        opening = prompt[view.words(prompt, view.messages[:turn], turn - 1, prompt=True).last :]
        if text.startswith(opening, here):
            start = here + len(opening)
        else:
            # The prompt may go on with what this turn was rendered without by now, like an empty block of
            # reasoning.
            start = _answer_start(view, turn)
            if start < here or not opening.startswith(text[here:start]):
                raise view.unclear(
                    turn,
                    "the generation prompt is not how the template renders the beginning of the turn (does "
                    "the one ask for reasoning that the other lacks, or rule it out? "
                    "data.chat_template_arguments may change that)",
                )
    if text[start : words.first].strip():
        _check_generation_prompt(view, turn, prompt)
    return start


def _answer_start(view: _View, turn: int) -> int:
    """Where the turn begins if an answer in its place would begin there too; else -1."""
    mark = unused_mark(view.text)
    answer = {**view.messages[turn], "content": mark}
    before = view.render([*view.messages[:turn], answer, *view.messages[turn + 1 :]]).partition(mark)[0]
    return len(before) if view.text.startswith(before) else -1


def _check_generation_prompt(view: _View, turn: int, prompt: str) -> None:
    """Raises ValueError when the template ignores `add_generation_prompt` though its turns have a header."""
    before = view.messages[:turn]
    if prompt != view.render(before):
        return
    mark = unused_mark(prompt)
    answered = view.render([*before, {"role": "assistant", "content": mark}])
    if not answered.startswith(prompt) or answered[len(prompt) : answered.find(mark)].strip():
        raise view.unclear(
            turn, "the template ignores add_generation_prompt, so nothing says where a server's prompt ends"
        )


def _end(view: _View, turn: int, words: Words, ends: set[str]) -> int:
    """Where the turn's last special token ends: what follows its words both with a message after it and
    without.

    `ends` holds what is proven to end a turn of this conversation, from its words on, and gets what this turn
    proves.
    """
    known = max((end for end in ends if view.text.startswith(end, words.last)), key=len, default=None)
    if known is None:
        followed, alone = _closings(view, turn, words)
        known = _up_to_special(view.template, followed[: _shared_prefix(followed, alone)])
        if known is None:
            # The two may differ in the very token, as where only the last turn of all ends a text.
            known, other = (
                _up_to_special(view.template, closing, first=True) for closing in (followed, alone)
            )
            before = [view.template.special.split(closing, maxsplit=1)[0] for closing in (followed, alone)]
            if known is None or other is None or before[0] != before[1]:
                raise view.unclear(turn, "the template writes no special token that ends the turn")
        ends.add(known)
    closing = view.template.special.findall(known)[-1]
    for key in ("content", *REASONING_KEYS):
        if closing in view.messages[turn].get(key, ""):
            raise ValueError(
                f"{view.where}: messages[{turn}].{key} holds {closing!r}, the token that ends a turn: "
                "correct or remove the row"
            )
    return words.last + len(known)


def _closings(view: _View, turn: int, words: Words) -> tuple[str, str]:
    """What the template writes after the turn's words: with a message after the turn, and without.

    The first is what the conversation itself has there, except where the turn is the last one and writes
    several special tokens, of which some may end not the turn but the whole text.
    """
    rest = view.text[words.last :]
    upto = view.messages[: turn + 1]
    if turn + 1 < len(view.messages):
        alone = view.render(upto)
        last = words.last if alone.startswith(view.text[: words.last]) else view.words(alone, upto, turn).last
        return rest, alone[last:]
    if len(view.template.special.findall(rest)) < 2:
        return rest, rest
    longer = [*upto, _next_message(upto[-1])]
    text = view.render(longer)
    return text[view.words(text, longer, turn).last :], rest


def _next_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message that may follow this one of the assistant."""
    if "tool_calls" not in message:
        return {"role": "user", "content": MARK}
    call = message["tool_calls"][0]
    name = call.get("function", call)["name"]
    return {"role": "tool", "content": MARK, "name": name, "tool_call_id": call.get("id", "")}


def _up_to_special(template: ChatTemplate, closing: str, first: bool = False) -> str | None:
    """`closing` up to its last (or first) special token, at most up to the tokenizer's end token; None
    without any.
    """
    found = list(template.special.finditer(closing))
    ends = [match for match in found if match.group() == template.special_tokens.get("eos_token")]
    match = found[:1] if first else ends[:1] or found[-1:]
    return closing[: match[0].end()] if match else None


# Templates with marks


def _marked_spans(view: _View, turns: list[int]) -> list[Span]:
    """What lies between the marks of these turns."""
    text, marked = view.template.render_marked(view.messages, view.tools, view.where)
    spans = [(start, end) for start, end in marked if start < end]
    assert text == view.text
    for turn in turns:
        last = view.words(text, view.messages, turn).last
        if not any(start < last <= end for start, end in spans):
            raise ValueError(
                f"{view.where}: the {{% generation %}} marks of the chat template leave out "
                f"messages[{turn}]: put them around every assistant message"
            )
    spoken = [index for index, message in enumerate(view.messages) if message["role"] == "assistant"]
    if turns == spoken:
        return spans
    # What is marked belongs to the last turn whose question it does not stand before.
    asked = {turn: view.words(text, view.messages, turn - 1).last if turn else 0 for turn in spoken}
    return [
        span
        for span in spans
        if max((turn for turn in spoken if asked[turn] <= span[0]), default=-1) in turns
    ]
