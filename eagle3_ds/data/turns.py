"""Where the assistant's turns are in a rendered conversation: the characters that a server would have
generated.

A turn starts where the prompt ends that a server would have rendered for it, and ends with the special token
that closes it. Nothing about a template is known beforehand. Two kinds of renders tell everything:

- prompts: the messages before a turn, with the generation prompt, are the server's prompt for that turn;
- disguises: the same messages with all that they say replaced by marks show where whose words are.

Turns that begin, or end, with the same characters in the same surroundings are proven by one of them, so that
a conversation takes a handful of renders however many turns it has. What these renders cannot prove is an
error, never a guess.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from eagle3_ds.data.chat import REASONING_KEYS, ChatTemplate, Conversation, Span, is_learnt
from eagle3_ds.data.disguise import (
    MARK,
    REASONING_TAG,
    THINK,
    Messages,
    Part,
    Words,
    find_words,
    find_words_alone,
    shared_prefix,
    unused_mark,
)

FIX = (
    "Copy the template to a file, put {% generation %} and {% endgeneration %} around what the assistant "
    "generates, and name the file in data.chat_template"
)
NO_REASONING = re.compile(rf"(?:<{THINK}>\s*)?(?:</{THINK}>\s*)?\Z")
"""What a prompt ends with that opens reasoning, or rules it out."""
EMPTY_REASONING = re.compile(rf"\s*(?:<{THINK}>\s*)?</{THINK}>\s*")
EVENTS = (
    "reasoning_not_rendered",
    "words_not_rendered",
    "calls_not_rendered",
    "context_not_rendered",
    "prompts_not_met",
    "ends_not_marked",
    "ends_not_rendered",
)
"""What is counted of a conversation, under its names in `DataStatistics`."""


@dataclass(frozen=True)
class Turns:
    """The rendered conversation, the spans in it that the assistant generated, in order, and counts of
    `EVENTS`.
    """

    text: str
    spans: list[Span]
    events: Counter[str]


def locate_turns(
    template: ChatTemplate, conversation: Conversation, supervise: Literal["all", "last"], where: str
) -> Turns:
    """The conversation as text, and where the assistant speaks.

    Every turn, or the last one alone: its reasoning, words and tool calls as far as the render has them, and
    the special token that ends it; not the generation prompt before, not what the template writes after.
    Templates with `{% generation %}` marks are taken at their word, and what they lack is counted.

    Raises ValueError, opened by `where`, when the template raises, leaves a turn out, when a turn cannot be
    told from the rest, or says the token that ends turns.
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
    for turn in turns:
        view.check_said(turn)
    events = _not_rendered(view)
    if template.is_marked(conversation.tools):
        marked = _marked_spans(view, turns, events)
        _check_ends_unsaid(view, turns, set())
        return Turns(view.text, marked, events)
    finder = _Finder(view)
    spans = [finder.span(turn) for turn in reversed(turns)]  # the last turn shows how a turn ends
    _check_ends_unsaid(view, turns, {template.added.findall(end)[-1] for end in finder.ends})
    events["ends_not_rendered"] = finder.unended
    events["prompts_not_met"] = int(turns[-1] in finder.not_met)
    return Turns(view.text, spans[::-1], events)


class _Render:
    """Messages under their template: the text, and where each of them speaks in it."""

    def __init__(self, view: _View, messages: Messages, prompt: bool = False) -> None:
        self.view = view
        self.messages = messages
        self.prompt = prompt
        self.text = self.again(messages)
        self._all: Words | None = None
        self._searched = False
        self._alone: dict[int, Words] = {}

    def again(self, messages: Messages) -> str:
        """The text of other messages in these messages' place."""
        return self.view.template.render(messages, self.view.tools, self.view.where, self.prompt)

    def span(self, index: int) -> Span | None:
        """Where `messages[index]` speaks; None where nothing of it is in the text."""
        return self._words(index).spans[index]

    def left_out(self) -> set[Part]:
        """What the messages say and the text does not have."""
        return {part for index in range(len(self.messages)) for part in self._words(index).left_out}

    def before(self, index: int) -> tuple[int, int] | None:
        """The last message before this one that is in the text, and where its words end."""
        for earlier in reversed(range(index)):
            span = self.span(earlier)
            if span is not None:
                return earlier, span[1]
        return None

    def after(self, index: int) -> int:
        """Where the words of the next message begin that are in the text; else the text's end."""
        spans = (self.span(later) for later in range(index + 1, len(self.messages)))
        return next((span[0] for span in spans if span is not None), len(self.text))

    def _words(self, index: int) -> Words:
        if not self._searched:
            self._all, self._searched = find_words(self.again, self.text, self.messages), True
        if self._all is not None:
            return self._all
        # The template looks at the words, so that they are disguised one message at a time.
        if index not in self._alone:
            special = self.view.template.special
            words = find_words_alone(self.again, self.text, self.messages, index, special)
            if words is None:
                raise self.view.unclear(index, "the way its turn ends depends on its words")
            self._alone[index] = words
        return self._alone[index]


class _View:
    """One conversation under its template, and the errors about it."""

    def __init__(self, template: ChatTemplate, conversation: Conversation, where: str) -> None:
        self.template = template
        self.messages = conversation.messages
        self.tools = conversation.tools
        self.where = where
        self.whole = _Render(self, self.messages)
        self.text = self.whole.text

    def check_said(self, turn: int) -> None:
        """Raises ValueError when nothing of what the turn says is in the text."""
        span = self.whole.span(turn)
        if span is None or span[0] == span[1]:
            raise ValueError(
                f"{self.where}: the chat template leaves out what messages[{turn}] "
                f"({self.messages[turn]['role']}) says: correct or remove the row, or name another "
                "template in data.chat_template"
            )

    def unclear(self, index: int, reason: str) -> ValueError:
        return ValueError(
            f"{self.where}: the tokens of messages[{index}] cannot be told from the rest: {reason}. {FIX}"
        )


def _not_rendered(view: _View) -> Counter[str]:
    """How many of the messages' parts the template leaves out, by their kind."""
    events: Counter[str] = Counter()
    kinds = {"reasoning": "reasoning", "words": "words", "call": "calls"}
    context: set[int] = set()
    for part in view.whole.left_out():
        message = view.messages[part.message]
        if message["role"] == "assistant" and is_learnt(message):
            events[f"{kinds[part.kind]}_not_rendered"] += 1
        elif part.kind != "reasoning":  # that of earlier turns is left out by many a template
            context.add(part.message)
    events["context_not_rendered"] = len(context)
    return events


def _check_ends_unsaid(view: _View, turns: Iterable[int], ends: set[str]) -> None:
    """Raises ValueError when a turn says a token that ends turns: a server would have stopped there."""
    eos = view.template.special_tokens.get("eos_token")
    tokens = ends | ({eos} if isinstance(eos, str) and eos else set())
    for turn in turns:
        message = view.messages[turn]
        said = [(key, message.get(key)) for key in ("content", *REASONING_KEYS, "tool_calls")]
        for key, value in said:
            for text in _texts(value):
                token = next((token for token in tokens if token in text), None)
                if token is not None:
                    raise ValueError(
                        f"{view.where}: messages[{turn}].{key} holds {token!r}, the token that ends a turn: "
                        "correct or remove the row"
                    )


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value of JSON, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, own in value.items():
            yield str(key)
            yield from _texts(own)
    elif isinstance(value, list):
        for own in value:
            yield from _texts(own)


# Turns of a template without marks


class _Finder:
    """Where turns begin and end, and what is proven of that.

    `ends`: from its first special token on, what ends a turn; `not_met`: turns that stand without all that
    the server's prompt would have written before them; `unended`: how many turns of calls have no special
    token at their end.
    """

    def __init__(self, view: _View) -> None:
        self.view = view
        self.ends: set[str] = set()
        self.not_met: set[int] = set()
        self.unended = 0
        self._starts: dict[tuple[str, str], tuple[int, bool]] = {}
        self._opener = _opener(view)

    def span(self, turn: int) -> Span:
        """The characters of the turn."""
        start = self._start(turn)
        span = self.view.whole.span(turn)
        assert span is not None
        if not start < span[1]:
            raise self.view.unclear(turn, "the prompt for its turn already holds them")
        return start, self._end(turn, span[1])

    def _start(self, turn: int) -> int:
        """Where the server's prompt for this turn ends."""
        whole = self.view.whole
        span, before = whole.span(turn), whole.before(turn)
        assert span is not None
        here = before[1] if before else 0
        # What ends the message before (a call's number after its result, say) opens no turn.
        special = self.view.template.special.search(whole.text, here, span[0])
        here = special.start() if special else here
        role = self.view.messages[turn - 1]["role"] if turn else ""
        key = (role, _without_ids(whole.text[here : span[0]], self.view.messages[turn]))
        if key not in self._starts:
            start, met = self._proven_start(turn, span[0])
            self._starts[key] = (start - here, met)
        length, met = self._starts[key]
        if not met:
            self.not_met.add(turn)
        return here + length

    def _proven_start(self, turn: int, first: int) -> tuple[int, bool]:
        """Where the prompt for this turn ends, and whether all of the prompt is there."""
        view, text = self.view, self.view.text
        prompt = _Render(view, view.messages[:turn], prompt=True)
        start, met = len(prompt.text), True
        if not text.startswith(prompt.text):
            # Earlier messages are rendered otherwise by now (reasoning dropped, a system message moved on),
            # so that the prompt is compared from the end of the message before.
            before = view.whole.before(turn)
            asked = prompt.span(before[0]) if before else None
            here, opening = (before[1], prompt.text[asked[1] :]) if before and asked else (0, prompt.text)
            start = here + len(opening)
            if not text.startswith(opening, here):
                start, met = self._start_without_reasoning(turn, here, opening, first), False
        if text[start:first].strip():
            self._check_generation_prompt(turn, prompt.text)
        return start, met

    def _start_without_reasoning(self, turn: int, here: int, opening: str, first: int) -> int:
        """Where a turn begins whose prompt asks for reasoning, or rules it out, that the text lacks."""
        text = self.view.text
        header = NO_REASONING.sub("", opening, count=1)
        start = here + len(header)
        if header == opening or not text.startswith(header, here) or start > first:
            raise self._unlike(turn)
        empty = EMPTY_REASONING.match(text, start)
        if empty:
            return min(empty.end(), first)
        if re.match(rf"\s*{REASONING_TAG}", text[start : start + 99]):
            raise self._unlike(turn)
        return start

    def _unlike(self, turn: int) -> ValueError:
        return self.view.unclear(
            turn,
            "the generation prompt is not how the template renders the beginning of the turn (does the one "
            "ask for reasoning that the other lacks, or rule it out? data.chat_template_arguments may change "
            "that)",
        )

    def _check_generation_prompt(self, turn: int, prompt: str) -> None:
        """Raises ValueError when the template ignores `add_generation_prompt` although its turns have a
        header.
        """
        view, before = self.view, self.view.messages[:turn]
        if prompt != view.whole.again(before):
            return
        mark = unused_mark(prompt)
        answered = view.whole.again([*before, {"role": "assistant", "content": mark}])
        if not answered.startswith(prompt) or answered[len(prompt) : answered.find(mark)].strip():
            raise view.unclear(
                turn,
                "the template ignores add_generation_prompt, so nothing says where a server's prompt ends",
            )

    def _end(self, turn: int, last: int) -> int:
        """Where the special token ends that closes the turn, whose words end at `last`: it follows them both
        with a message after the turn and without.
        """
        text, after = self.view.text, self.view.whole.after(turn)
        tokens = self.view.template.special
        if tokens.search(text, last, after) is None and "tool_calls" in self.view.messages[turn]:
            # Some templates hand a call over by tokens that the tokenizer does not call special.
            tokens = self.view.template.added
            self.unended += 1
        opening = tokens.search(text, last, after)
        known = [end for end in self.ends if opening and text.startswith(end, opening.start())]
        if opening and known:
            return opening.start() + max(map(len, known))
        closing = self._proven_closing(turn, last, tokens)
        first = tokens.search(closing)
        assert first is not None
        self.ends.add(closing[first.start() :])
        return last + len(closing)

    def _proven_closing(self, turn: int, last: int, tokens: re.Pattern[str]) -> str:
        """What stands from the turn's words to the end of the last of these tokens that is the turn's."""
        template = self.view.template
        followed, alone = (self._up_to_header(closing) for closing in self._closings(turn, last, tokens))
        found = _up_to_token(template, tokens, followed[: shared_prefix(followed, alone)])
        if found is None:
            # The two may differ in the very token, as where only the last turn of all ends a text.
            found, other = (
                _up_to_token(template, template.special, closing, first=True) for closing in (followed, alone)
            )
            before = [template.special.split(closing, maxsplit=1)[0] for closing in (followed, alone)]
            if found is None or other is None or before[0] != before[1]:
                raise self.view.unclear(turn, "the template writes no special token that ends the turn")
        return found

    def _closings(self, turn: int, last: int, tokens: re.Pattern[str]) -> tuple[str, str]:
        """What the template writes after the turn's words: with a message after the turn, and without.

        The first is what the conversation itself has there, except where the turn is the last one and writes
        several special tokens, of which some may end not the turn but the whole text, or none.
        """
        view = self.view
        rest = view.text[last : view.whole.after(turn)]
        upto = view.messages[: turn + 1]
        if turn + 1 < len(view.messages):
            return rest, self._closing_in(_Render(view, upto), turn, last)
        if tokens is view.template.special and len(tokens.findall(rest)) < 2:
            return rest, rest
        return self._closing_in(_Render(view, [*upto, _next_message(upto[-1])]), turn, last), rest

    def _closing_in(self, render: _Render, turn: int, last: int) -> str:
        """What another render has after the words of the same turn."""
        if render.text.startswith(self.view.text[:last]):
            return render.text[last:]
        span = render.span(turn)
        if span is None:
            raise self.view.unclear(turn, "the template leaves it out where the conversation ends with it")
        return render.text[span[1] :]

    def _up_to_header(self, closing: str) -> str:
        """`closing` without the header of a message that follows."""
        return closing if self._opener is None else closing.partition(self._opener)[0]


def _without_ids(text: str, message: Mapping[str, Any]) -> str:
    """The text with the numbers of the message's calls blotted out: some templates write them first."""
    for call in message.get("tool_calls", ()):
        name = call.get("id")
        if isinstance(name, str) and name:
            text = text.replace(name, "#" * len(name))
    return text


def _opener(view: _View) -> str | None:
    """The special token that opens a message: the first of the text, if it stands before all words.

    Templates that write their generation prompt whether asked or not have it after the last turn too.
    """
    named = {view.template.special_tokens.get(name) for name in ("bos_token", "eos_token")}
    first = view.whole.after(-1)
    found = (match.group() for match in view.template.special.finditer(view.text, 0, first))
    return next((token for token in found if token not in named), None)


def _next_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message that may follow this one of the assistant."""
    if "tool_calls" not in message:
        return {"role": "user", "content": MARK}
    call = message["tool_calls"][0]
    name = call.get("function", call)["name"]
    return {"role": "tool", "content": MARK, "name": name, "tool_call_id": call.get("id", "")}


def _up_to_token(
    template: ChatTemplate, tokens: re.Pattern[str], closing: str, first: bool = False
) -> str | None:
    """`closing` up to the last (or first) of these tokens, at most up to the tokenizer's end token; None
    without any.
    """
    found = list(tokens.finditer(closing))
    ends = [match for match in found if match.group() == template.special_tokens.get("eos_token")]
    match = found[:1] if first else ends[:1] or found[-1:]
    return closing[: match[0].end()] if match else None


# Templates with marks


def _marked_spans(view: _View, turns: Sequence[int], events: Counter[str]) -> list[Span]:
    """What lies between the marks of these turns."""
    text, marked = view.template.render_marked(view.messages, view.tools, view.where)
    spans = [(start, end) for start, end in marked if start < end]
    assert text == view.text
    for turn in turns:
        said = view.whole.span(turn)
        assert said is not None
        own = spans[bisect_left(spans, said[1], key=lambda span: span[1]) :][:1]
        if not own or not own[0][0] < said[1]:
            raise ValueError(
                f"{view.where}: the {{% generation %}} marks of the chat template leave out "
                f"messages[{turn}]: put them around every assistant message"
            )
        # A draft that never sees the end of a turn goes on when the target has stopped.
        events["ends_not_marked"] += view.template.special.search(text, said[1], own[0][1]) is None
    spoken = [index for index, message in enumerate(view.messages) if message["role"] == "assistant"]
    if turns == spoken:
        return spans
    # What is marked belongs to the last turn whose question it does not stand before.
    befores = {turn: view.whole.before(turn) for turn in spoken}
    asked = {turn: before[1] if before else 0 for turn, before in befores.items()}
    return [
        span
        for span in spans
        if max((turn for turn in spoken if asked[turn] <= span[0]), default=-1) in turns
    ]
