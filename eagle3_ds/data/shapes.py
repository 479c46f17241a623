"""The shapes that a row may come in, and the conversation or the tokens that it means."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from eagle3_ds.data.chat import (
    Conversation,
    check_text,
    kind,
    notes_on,
    parse_json,
    role_of,
    validate_messages,
)

Shape = Literal["messages", "sharegpt", "prompt_response", "alpaca", "tokenized"]
LISTS = ("messages", "conversations")
"""Columns of a list of messages."""
ANSWERS = ("response", "completion")
OUTPUTS = ("output", "response")
SYSTEMS = ("system", "system_prompt")
"""Columns of text that stands before the messages."""
TOOLS = ("tools", "functions")
ARGUMENTS = "chat_template_kwargs"
"""The column of what a row gives to its template, as requests to servers call it."""
RESERVED = frozenset(
    {
        "messages", "conversations", "tools", "documents", "chat_template", "add_generation_prompt",
        "continue_final_message", "return_assistant_tokens_mask", "tokenize",
    }
)  # fmt: skip
"""What a row may not give to the template: preparation decides it."""
MASKS = ("loss_mask", "assistant_masks", "completion_mask")
"""Columns that are 1 where the assistant wrote the token. `labels` says the same: -100 where it did not."""
IGNORED_LABEL = -100
KNOWN = (
    "'messages' (a list of role / content), 'conversations' (a list of from / value), 'prompt' and "
    "'response' or 'completion', 'instruction' and 'output', or 'input_ids' and 'loss_mask' or 'labels'"
)


@dataclass(frozen=True)
class TokenRow:
    """A row that was tokenised elsewhere: token ids, and True where the assistant wrote the token.

    `notes`: what a user should know of it, each a sentence that follows a count.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    notes: tuple[str, ...] = field(default=(), compare=False)


def recognise_shape(row: Any, where: str) -> Shape:
    """The shape of a row by its keys. Raises ValueError that shows the keys when it is none that is known."""
    keys = _keys(row, where)
    found = _shape_of(row, keys)
    if found is None:
        raise ValueError(
            f"{where}: the row's shape is unknown, its keys are {_show(keys)}. Known are {KNOWN}: rename the "
            "columns"
        )
    return found


def _shape_of(row: Mapping[str, Any], keys: set[str]) -> Shape | None:
    """The first shape that the row has."""
    if "input_ids" in keys and keys & {*MASKS, "labels"}:
        return "tokenized"
    for column in LISTS:
        turns = row.get(column)
        first = turns[0] if isinstance(turns, list) and turns else None
        if isinstance(first, Mapping) and "from" in first:
            return "sharegpt"
        if column == "messages" and turns is not None or isinstance(first, Mapping) and "role" in first:
            return "messages"
    if "prompt" in keys and keys & {*ANSWERS}:
        return "prompt_response"
    return "alpaca" if "instruction" in keys and keys & {*OUTPUTS} else None


def read_row(row: Any, shape: Shape, where: str) -> Conversation | TokenRow:
    """What a row of this shape means; `where` ("file, line n") opens every error.

    Columns that say nothing about the conversation are left out, and named in its notes. Raises ValueError
    for a row of another shape and for what its columns cannot mean.
    """
    keys = _keys(row, where)
    read = _Reading(row, keys, where)
    if not set(_wanted(shape)) & keys or {shape, read.own} == {"messages", "sharegpt"}:
        read.refuse_shape(shape)
    if shape == "tokenized":
        return _read_tokens(read)
    messages = _READERS[shape](read)
    before = _system(read, messages)
    tools = uniform_tools(read.first(TOOLS), where)
    arguments = _arguments(read.first((ARGUMENTS,)), where)
    column = next((name for name in LISTS if name in read.used), "messages")
    uniform = validate_messages(messages, where, column, "value" if shape == "sharegpt" else "content")
    notes = dict.fromkeys([*read.left_out(), *notes_on(messages, uniform)])  # each once a row
    return Conversation([*before, *uniform], tools, arguments, tuple(notes))


def _system(read: _Reading, messages: Any) -> list[dict[str, Any]]:
    """The row's own system column as a message, unless the messages open with one."""
    text = read.first(SYSTEMS)
    if not text:
        return []
    opening = messages[0] if isinstance(messages, list) and messages else None
    if not isinstance(opening, Mapping) or opening.get("role") != "system":
        return [_said("system", text, f"{read.where}: system")]
    if opening.get("content") != text:
        read.notes.append("rows have a system column beside another system message: the message counts")
    return []


def _wanted(shape: Shape) -> Sequence[str]:
    """Columns of which a row of this shape has at least one."""
    return {
        "messages": LISTS,
        "sharegpt": LISTS,
        "prompt_response": ("prompt", *ANSWERS),
        "alpaca": ("instruction", *OUTPUTS),
        "tokenized": ("input_ids", *MASKS, "labels"),
    }[shape]


class _Reading:
    """A row while it is read: which of its columns were asked for, and what is to be told of it."""

    def __init__(self, row: Mapping[str, Any], keys: set[str], where: str) -> None:
        self.row = row
        self.keys = keys
        self.where = where
        self.own = _shape_of(row, keys)
        self.used: set[str] = set()
        self.notes: list[str] = []

    def first(self, names: Sequence[str]) -> Any:
        """The value of the first of these columns that the row has; None without any."""
        for name in names:
            if name in self.keys:
                self.used.add(name)
                return self.row[name]
        return None

    def need(self, names: Sequence[str]) -> Any:
        """The same; ValueError without any."""
        if not set(names) & self.keys:
            raise ValueError(
                f"{self.where}: key {' or '.join(map(repr, names))} is missing (keys present: "
                f"{_show(self.keys)}): rename the column, or set data.shape to one of "
                f"{', '.join(get_args(Shape))}"
            )
        return self.first(names)

    def refuse_shape(self, shape: Shape) -> None:
        """Raises ValueError where the row has a known shape, which is not that of its file."""
        if self.own is not None and self.own != shape:
            raise ValueError(
                f"{self.where}: the row is of shape {self.own!r} (keys {_show(self.keys)}), but the file is "
                f"read as {shape!r}, the shape of its first row or of data.shape: put rows of each shape in "
                "a file of their own"
            )

    def left_out(self) -> list[str]:
        """Notes on the row, the columns that nothing asked for among them."""
        unread = self.keys - self.used
        return (
            [*self.notes, f"rows have columns that are not read: {_show(unread)}"] if unread else self.notes
        )


def _keys(row: Any, where: str) -> set[str]:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: the row is {kind(row)}, expected an object with {KNOWN}")
    return {key for key, value in row.items() if value is not None}


def _show(keys: Set[str]) -> str:
    return ", ".join(repr(key) for key in sorted(keys)) or "none"


def _from_messages(read: _Reading) -> Any:
    return read.need(LISTS)


def _from_sharegpt(read: _Reading) -> list[dict[str, Any]]:
    turns = read.need(LISTS[::-1])
    column = next(name for name in LISTS[::-1] if name in read.used)
    if not isinstance(turns, list):
        raise ValueError(f"{read.where}: {column!r} is {kind(turns)}, expected a list of from / value")
    messages: list[dict[str, Any]] = []
    for index, turn in enumerate(turns):
        place = f"{read.where}: {column}[{index}]"
        if not isinstance(turn, Mapping):
            raise ValueError(f"{place} is {kind(turn)}, expected an object with 'from' and 'value'")
        role_of(turn.get("from"), f"{place}.from")
        others = {key: value for key, value in turn.items() if key not in ("from", "value")}
        messages.append({**others, "role": turn["from"].lower(), "content": turn.get("value")})
    return messages


def _from_prompt(read: _Reading) -> list[Any]:
    prompt, answer = read.need(("prompt",)), read.need(ANSWERS)
    asked = prompt if isinstance(prompt, list) else [_said("user", prompt, f"{read.where}: prompt")]
    if isinstance(answer, list):
        return [*asked, *answer]
    name = next(name for name in ANSWERS if name in read.used)
    return [*asked, _said("assistant", answer, f"{read.where}: {name}")]


def _from_alpaca(read: _Reading) -> list[Any]:
    """The instruction, its input below it after an empty line, and the output; before them the history."""
    place = read.where
    asked = check_text(read.need(("instruction",)), f"{place}: instruction")
    more = read.first(("input", "context"))
    asked += "\n\n" + check_text(more, f"{place}: input") if more else ""
    history = read.first(("history",)) or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in history
    ):
        raise ValueError(f"{place}: 'history' is {kind(history)}, expected a list of [question, answer]")
    messages = [
        _said(role, text, f"{place}: history[{index}]")
        for index, pair in enumerate(history)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    answer = _said("assistant", read.need(OUTPUTS), f"{place}: output")
    return [*messages, _said("user", asked, place), answer]


def _said(role: str, text: Any, where: str) -> dict[str, Any]:
    return {"role": role, "content": check_text(text, where)}


_READERS: Mapping[Shape, Callable[[_Reading], Any]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "prompt_response": _from_prompt,
    "alpaca": _from_alpaca,
}


def _arguments(arguments: Any, where: str) -> dict[str, Any]:
    """What the row gives to its template: an object, or JSON text of one."""
    if isinstance(arguments, str):
        arguments = parse_json(arguments or "{}", f"{where}: {ARGUMENTS}")
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping):
        raise ValueError(
            f"{where}: {ARGUMENTS!r} is {kind(arguments)}, expected an object, or JSON text of one"
        )
    reserved = RESERVED & set(arguments)
    if reserved:
        raise ValueError(f"{where}: {ARGUMENTS!r} sets {_show(reserved)}, which no row may set: remove it")
    return dict(arguments)


def uniform_tools(tools: Any, where: str) -> list[dict[str, Any]] | None:
    """The row's tools as servers give them to templates: `{"type": "function", "function": {...}}`.

    The row has a list of JSON schemas, or JSON text of the list or of its members; name and parameters may
    stand in a schema without `function` around them.
    """
    if isinstance(tools, str):
        tools = parse_json(tools, f"{where}: tools") if tools else None
    if not tools:
        return None
    if isinstance(tools, list):
        tools = [
            parse_json(tool, f"{where}: tools[{index}]") if isinstance(tool, str) else tool
            for index, tool in enumerate(tools)
        ]
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(
            f"{where}: 'tools' is {kind(tools)}, expected a list of JSON schemas, or JSON text of one"
        )
    return [_wrapped(tool) for tool in tools]


def _wrapped(tool: Mapping[str, Any]) -> dict[str, Any]:
    if "function" in tool or "name" not in tool or tool.get("type", "function") != "function":
        return dict(tool)
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def _read_tokens(read: _Reading) -> TokenRow:
    where, input_ids, masks = read.where, read.need(("input_ids",)), (*MASKS, "labels")
    loss_mask = read.need(masks)
    name = next(name for name in masks if name in read.used)
    # true and false are integers to Python, but in a mask alone: columns that were swapped are noticed
    _check_integers("input_ids", input_ids, input_ids, where, (int,))
    if name == "labels":
        loss_mask = _mask_of_labels(loss_mask, input_ids, where)
    _check_flags(name, loss_mask, input_ids, where)
    attention = read.first(("attention_mask",))
    if attention is not None:
        input_ids, loss_mask = _without_padding(input_ids, loss_mask, attention, where)
        if len(input_ids) < len(attention):
            read.notes.append("rows have padding by 'attention_mask', which was cut off")
    if not any(loss_mask):
        raise ValueError(
            f"{where}: {name!r} marks no token, so there is nothing to learn from: remove the row"
        )
    if min(input_ids) < 0:
        raise ValueError(f"{where}: 'input_ids' holds {min(input_ids)}: token ids are not negative")
    return TokenRow(input_ids, [bool(flag) for flag in loss_mask], tuple(read.left_out()))


def _check_integers(
    name: str, values: Any, input_ids: Any, where: str, kinds: tuple[type, ...] = (int, bool)
) -> None:
    """Raises ValueError unless the column holds one integer for each token."""
    if not isinstance(values, list) or not all(type(value) in kinds for value in values):
        raise ValueError(f"{where}: {name!r} is not a list of integers: correct or remove the row")
    if len(input_ids) != len(values):
        raise ValueError(
            f"{where}: 'input_ids' has {len(input_ids)} entries and {name!r} {len(values)}: they must match"
        )


def _check_flags(name: str, values: Any, input_ids: list[int], where: str) -> None:
    _check_integers(name, values, input_ids, where)
    if not set(values) <= {0, 1}:
        raise ValueError(
            f"{where}: {name!r} holds {sorted(set(values) - {0, 1})[0]}, expected 0 and 1 (or false and true)"
        )


def _mask_of_labels(labels: Any, input_ids: list[int], where: str) -> list[bool]:
    """True where a label is a token and not -100. Labels are the row's own tokens, not shifted."""
    _check_integers("labels", labels, input_ids, where)
    for place, (label, token) in enumerate(zip(labels, input_ids, strict=True)):
        if label not in (IGNORED_LABEL, token):
            raise ValueError(
                f"{where}: labels[{place}] is {label}, expected {IGNORED_LABEL} or input_ids[{place}], which "
                f"is {token}: labels are not shifted. Write 'loss_mask' instead"
            )
    return [label != IGNORED_LABEL for label in labels]


def _without_padding(
    input_ids: list[int], loss_mask: list[Any], attention: Any, where: str
) -> tuple[list[int], list[Any]]:
    """The tokens that `attention_mask` shows: padding at either end is no context."""
    _check_flags("attention_mask", attention, input_ids, where)
    if not any(attention):
        raise ValueError(f"{where}: 'attention_mask' shows no token: remove the row")
    first, last = attention.index(1), len(attention) - attention[::-1].index(1)
    if not all(attention[first:last]):
        raise ValueError(
            f"{where}: 'attention_mask' hides tokens between others: only padding at the ends can be left "
            "out. Write a row for each stretch"
        )
    if any(loss_mask[:first]) or any(loss_mask[last:]):
        raise ValueError(
            f"{where}: tokens are to be learnt that 'attention_mask' hides: correct or remove the row"
        )
    return input_ids[first:last], loss_mask[first:last]
