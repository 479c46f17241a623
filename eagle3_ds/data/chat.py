"""Conversations, checked message by message, and the chat template that renders them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

Span = tuple[int, int]
"""First character and the one after the last, in a rendered conversation."""

GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
BINARY = re.compile(r"[\x00\ud800-\udfff]")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Names that templates know a message's reasoning by; a row may use any of them."""
FOLLOWERS = {
    "start": ("system", "developer", "user"),
    "system": ("developer", "user"),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""Roles that may come after each role."""


@dataclass(frozen=True)
class Conversation:
    """Messages as `validate_messages` returns them, and the JSON schemas of the tools that the prompt
    announces.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


# Messages


def validate_messages(messages: Any, where: str) -> list[dict[str, Any]]:
    """The messages of one row, made uniform; `where` ("file, line n") opens every error.

    An optional system message, then user and assistant in turn, tool messages after the assistant that
    called. At least one assistant message; contents are non-empty strings (an assistant message with
    `tool_calls` may leave it out). Null keys are removed, reasoning is given under every name that templates
    know, and tool-call arguments in JSON text are parsed, as servers do before they render.
    """
    if not isinstance(messages, list):
        raise ValueError(f"{where}: 'messages' is {kind(messages)}, expected a list of messages")
    if not messages:
        raise ValueError(f"{where}: 'messages' is empty: remove the row")
    previous = "start"
    for index, message in enumerate(messages):
        previous = _check_message(message, previous, f"{where}: messages[{index}]")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where}: no assistant message, so there is nothing to learn from: remove the row")
    return [_uniform(message, f"{where}: messages[{index}]") for index, message in enumerate(messages)]


def _check_message(message: Any, previous: str, where: str) -> str:
    """Check one message after one of role `previous`; returns its role."""
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} is {kind(message)}, expected an object with 'role' and 'content'")
    role = message.get("role")
    if not isinstance(role, str):
        raise ValueError(f"{where}.role is {kind(role)}, expected a string: one of {_words(FOLLOWERS)}")
    if role not in FOLLOWERS or role == "start":
        raise ValueError(f"{where}.role is {role!r}, expected one of {_words(FOLLOWERS)}")
    if role not in FOLLOWERS[previous]:
        place = "first" if previous == "start" else f"after {previous!r}"
        raise ValueError(
            f"{where}.role is {role!r} {place}, where only {_words(FOLLOWERS[previous])} may stand: correct "
            "or remove the row"
        )
    content = message.get("content")
    if role == "assistant" and message.get("tool_calls") and not content:
        return role
    check_text(content, f"{where}.content")
    return role


def check_text(value: Any, where: str) -> str:
    """`value` when it is text that a tokenizer can read and not empty; else ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"{where} is {kind(value)}, expected a string: correct or remove the row")
    if not value:
        raise ValueError(f"{where} is empty: remove the message or the row")
    found = BINARY.search(value)
    if found:
        raise ValueError(
            f"{where} is binary data, not text (U+{ord(found.group()):04X} at character {found.start()}): "
            "correct or remove the row"
        )
    return value


def _uniform(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    uniform = {key: value for key, value in message.items() if value is not None}
    for key in REASONING_KEYS:
        if uniform.get(key) == "":
            del uniform[key]
    reasoning = {
        uniform[key]
        for key in REASONING_KEYS
        if key in uniform and check_text(uniform[key], f"{where}.{key}")
    }
    if len(reasoning) > 1:
        raise ValueError(
            f"{where} has different reasoning under several of {_words(REASONING_KEYS)}: keep one of them"
        )
    for text in reasoning:
        uniform |= dict.fromkeys(REASONING_KEYS, text)
    if uniform.get("tool_calls"):
        calls = uniform["tool_calls"]
        if not isinstance(calls, list):
            raise ValueError(f"{where}.tool_calls is {kind(calls)}, expected a list of calls")
        uniform["tool_calls"] = [
            _uniform_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)
        ]
    else:
        uniform.pop("tool_calls", None)
    return uniform


def _uniform_call(call: Any, where: str) -> dict[str, Any]:
    """A call `{"function": {"name", "arguments"}, ...}` or `{"name", "arguments"}`; arguments: an object."""
    if not isinstance(call, Mapping):
        raise ValueError(f"{where} is {kind(call)}, expected an object with 'name' and 'arguments'")
    call = {key: value for key, value in call.items() if value is not None}
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _uniform_call(call["function"], f"{where}.function")}
    check_text(call.get("name"), f"{where}.name")
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parse_json(arguments or "{}", f"{where}.arguments")
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where}.arguments is {kind(arguments)}, expected an object, or JSON text of one")
    return {**call, "arguments": dict(arguments)}


def parse_json(text: str, where: str) -> Any:
    """The value of JSON text within a row."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({error}): correct or remove the row") from error


def _words(names: Any) -> str:
    return ", ".join(repr(name) for name in names if name != "start")


def kind(value: Any) -> str:
    """What `value` is, for an error message."""
    return "missing or null" if value is None else f"a {type(value).__name__}"


# Templates


@dataclass(frozen=True)
class ChatTemplate:
    """A target's chat template and what it is rendered with.

    `tool_text` is the template for conversations with tools: another one only where the tokenizer has both.
    `arguments` are the recipe's `data.chat_template_arguments`. `special` matches the tokenizer's special
    tokens.
    """

    text: str
    tool_text: str
    special_tokens: Mapping[str, Any]
    arguments: Mapping[str, Any]
    special: re.Pattern[str]

    def is_marked(self, tools: Any) -> bool:
        """Whether the template tells the assistant's words by `{% generation %}` marks."""
        return bool(GENERATION_MARK.search(self._template(tools)))

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Any, where: str, prompt: bool = False
    ) -> str:
        """The messages as text; with `prompt` up to where a server lets the model speak.

        Raises ValueError, opened by `where`, when the template raises.
        """
        return self._render(messages, tools, where, add_generation_prompt=prompt)[0]

    def render_marked(
        self, messages: Sequence[Mapping[str, Any]], tools: Any, where: str
    ) -> tuple[str, list[Span]]:
        """The messages as text, and what lies between the template's `{% generation %}` marks."""
        return self._render(messages, tools, where, return_assistant_tokens_mask=True)

    def _template(self, tools: Any) -> str:
        return self.tool_text if tools else self.text

    def _render(
        self, messages: Sequence[Mapping[str, Any]], tools: Any, where: str, **flags: bool
    ) -> tuple[str, list[Span]]:
        try:
            texts, marks = render_jinja_template(
                conversations=[list(messages)],
                tools=tools,
                chat_template=self._template(tools),
                **flags,
                **{**self.special_tokens, **self.arguments},
            )
        except Exception as error:  # a template is a program of its own: it may raise anything
            raise ValueError(
                f"{where}: the chat template raised {type(error).__name__} on the first {len(messages)} "
                f"messages: {error}. Correct or remove the row, or name another template in "
                "data.chat_template"
            ) from error
        return texts[0], marks[0] if marks else []


def load_chat_template(
    tokenizer: Any, path: str | None = None, arguments: Mapping[str, Any] | None = None
) -> ChatTemplate:
    """The template in the file `path`, else the tokenizer's own.

    Raises ValueError when there is none.
    """
    found = tokenizer.chat_template if path is None else _read_template(path)
    named = found if isinstance(found, dict) else {"default": found}
    text = named.get("default")
    if not isinstance(text, str) or not text:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template: write one, or copy that of the "
            "model it was made from, to a file and name the file in data.chat_template"
        )
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    # the longest first: one special token may be the beginning of another
    special = re.compile(
        "|".join(re.escape(name) for name in sorted(names, key=lambda name: (-len(name), name))) or r"(?!)"
    )
    return ChatTemplate(
        text, named.get("tool_use", text), dict(tokenizer.special_tokens_map), dict(arguments or {}), special
    )


def _read_template(path: str) -> str:
    if not Path(path).is_file():
        raise ValueError(
            f"data.chat_template is {path!r}, which is not a file: name a Jinja file, or remove the key"
        )
    return Path(path).read_text(encoding="utf-8")
