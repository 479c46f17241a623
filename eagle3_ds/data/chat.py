"""Conversations, checked message by message, and the chat template that renders them."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

Span = tuple[int, int]
"""First character and the one after the last, in a rendered conversation."""

GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
BINARY = re.compile(r"[\x00\ud800-\udfff]")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Names that templates know a message's reasoning by; a row may use any of them."""
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""What data sets call a speaker, as the role that templates know."""
CALLERS = ("function_call", "tool_call")
"""Speakers whose content is a call, or a list of calls, in JSON."""
LEARN_KEYS = ("weight", "train", "loss", "trainable")
"""Keys of a message by which data sets say whether it is learnt: 0 or false where it is context alone."""
USUAL = {
    "start": ("system", "developer", "user"),
    "system": ("developer", "user"),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""Roles that usually come after each role. Servers take any order, so others are told, not refused."""


@dataclass(frozen=True)
class Conversation:
    """Messages as `validate_messages` returns them, and the JSON schemas of the tools that the prompt
    announces.

    `arguments`: what the row itself gives to the template, before the recipe's. `notes`: what a user should
    know of the row, each a sentence that follows a count.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = field(default=(), compare=False)


# Messages


def validate_messages(
    messages: Any, where: str, column: str = "messages", content: str = "content"
) -> list[dict[str, Any]]:
    """The messages of one row, made uniform; `where` ("file, line n") opens every error, and the row calls
    the list `column` and what a message says `content`.

    They become what servers give to a template: roles under their usual names, text parts as one text, null
    keys removed (the content of a message that calls a tool is then empty text), reasoning under every name
    that templates know, calls in the form `{"type": "function", "function": {"name", "arguments"}}` with the
    arguments parsed. `weight` is 0 where a message is context and not learnt, and absent elsewhere. The order
    of roles is left to the template.

    Raises ValueError for what is no conversation, and where no message of the assistant is to be learnt.
    """
    uniform = uniform_messages(messages, where, column, content)
    if uniform[0]["role"] == "assistant":
        uniform[0]["weight"] = 0  # no server can be asked for it: nothing stands before
    spoken = [message for message in uniform if message["role"] == "assistant"]
    if not spoken or spoken == uniform[:1]:
        place = " after the first" if spoken else ""
        raise ValueError(
            f"{where}: no assistant message{place}, so there is nothing to learn from: remove the row"
        )
    if not any(map(is_learnt, spoken)):
        raise ValueError(
            f"{where}: every assistant message is marked not to be learnt ({_words(LEARN_KEYS)}), so there "
            "is nothing to learn from: remove the row"
        )
    return uniform


def uniform_messages(
    messages: Any, where: str, column: str = "messages", content: str = "content"
) -> list[dict[str, Any]]:
    """The messages in the form of `validate_messages`, whoever speaks last and whatever is learnt.

    Raises ValueError for what is no list of messages.
    """
    if not isinstance(messages, list):
        raise ValueError(f"{where}: {column!r} is {kind(messages)}, expected a list of messages")
    if not messages:
        raise ValueError(f"{where}: {column!r} is empty: remove the row")
    return [
        _uniform(message, f"{where}: {column}[{index}]", content) for index, message in enumerate(messages)
    ]


def is_learnt(message: Mapping[str, Any]) -> bool:
    """Whether a uniform message of the assistant is learnt, and not context alone."""
    return bool(message.get("weight", 1))


def _uniform(message: Any, where: str, content: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} is {kind(message)}, expected an object with 'role' and 'content'")
    uniform = {key: value for key, value in message.items() if value is not None}
    speaker = uniform.get("role")
    uniform["role"] = role_of(speaker, f"{where}.role")
    if speaker in CALLERS and "tool_calls" not in uniform:
        calls = _json_or_value(uniform.pop("content", None), f"{where}.{content}")
        uniform["tool_calls"] = calls if isinstance(calls, list) else [calls]
    elif "function_call" in uniform and "tool_calls" not in uniform:
        uniform["tool_calls"] = [uniform.pop("function_call")]
    _unify_calls(uniform, where)
    _unify_content(uniform, f"{where}.{content}")
    _unify_reasoning(uniform, where)
    weights = [_learn_flag(uniform.pop(key), f"{where}.{key}") for key in LEARN_KEYS if key in uniform]
    return uniform if all(weights) or uniform["role"] != "assistant" else uniform | {"weight": 0}


def role_of(speaker: Any, where: str) -> str:
    """The role that a data set's name of a speaker means."""
    if not isinstance(speaker, str):
        raise ValueError(f"{where} is {kind(speaker)}, expected a string: one of {_words(ROLES)}")
    if speaker.lower() not in ROLES:
        raise ValueError(f"{where} is {speaker!r}, expected one of {_words(ROLES)}")
    return ROLES[speaker.lower()]


def _learn_flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool | int | float):
        raise ValueError(f"{where} is {value!r}, expected 0 or 1, false or true: correct or remove it")
    return value != 0


def _unify_content(message: dict[str, Any], where: str) -> None:
    """Text parts become one text. Only what the assistant and the user say must not be empty."""
    content = message.get("content")
    if isinstance(content, list):
        content = _join_parts(content, message, where)
    may_be_empty = message["role"] not in ("user", "assistant") or "tool_calls" in message
    if may_be_empty and (content is None or content == ""):
        message["content"] = ""
    else:
        message["content"] = check_text(content, where)


def _join_parts(parts: Sequence[Any], message: dict[str, Any], where: str) -> str:
    """The text of a list of parts, joined by line breaks as servers do; reasoning goes to the message."""
    texts, thoughts = [], []
    for index, given in enumerate(parts):
        place = f"{where}[{index}]"
        part = {"type": "text", "text": given} if isinstance(given, str) else given
        if not isinstance(part, Mapping):
            raise ValueError(f"{place} is {kind(part)}, expected an object with 'type' and 'text'")
        sort = part.get("type", "text")
        if sort in ("thinking", "reasoning"):
            thoughts.append(check_text(part.get(sort) or part.get("text"), f"{place}.{sort}"))
        elif sort in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise ValueError(
                f"{place} is a part of type {sort!r}, expected type 'text' and a string in 'text': drafts "
                "learn from text alone. Correct or remove the row"
            )
    if thoughts:
        message.setdefault("reasoning_content", "\n".join(thoughts))
    return "\n".join(texts)


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


def _unify_reasoning(message: dict[str, Any], where: str) -> None:
    for key in REASONING_KEYS:
        if message.get(key) == "":
            del message[key]
    reasoning = {
        message[key]
        for key in REASONING_KEYS
        if key in message and check_text(message[key], f"{where}.{key}")
    }
    if len(reasoning) > 1:
        raise ValueError(
            f"{where} has different reasoning under several of {_words(REASONING_KEYS)}: keep one of them"
        )
    for text in reasoning:
        message |= dict.fromkeys(REASONING_KEYS, text)


def _unify_calls(message: dict[str, Any], where: str) -> None:
    calls = _json_or_value(message.pop("tool_calls", None) or [], f"{where}.tool_calls")
    if not isinstance(calls, list):
        raise ValueError(f"{where}.tool_calls is {kind(calls)}, expected a list of calls")
    if calls:
        message["tool_calls"] = [
            _uniform_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)
        ]


def _uniform_call(call: Any, where: str) -> dict[str, Any]:
    """A call in the form that servers give to templates, whether its name stood inside `function` or not."""
    if not isinstance(call, Mapping):
        raise ValueError(f"{where} is {kind(call)}, expected an object with 'name' and 'arguments'")
    call = {key: value for key, value in call.items() if value is not None}
    inner = call.pop("function", None)
    if isinstance(inner, Mapping):
        return {"type": "function", **call, "function": _uniform_function(inner, f"{where}.function")}
    outer = {key: call.pop(key) for key in ("id", "type") if key in call}
    return {**outer, "type": "function", "function": _uniform_function(call, where)}


def _uniform_function(function: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Name and arguments of a call, the arguments an object."""
    function = {key: value for key, value in function.items() if value is not None}
    check_text(function.get("name"), f"{where}.name")
    key = "parameters" if "parameters" in function and "arguments" not in function else "arguments"
    arguments = function.pop(key, {})
    if isinstance(arguments, str):
        arguments = parse_json(arguments or "{}", f"{where}.{key}")
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where}.{key} is {kind(arguments)}, expected an object, or JSON text of one")
    return {**function, "arguments": dict(arguments)}


def notes_on(raw: Sequence[Mapping[str, Any]], uniform: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What a user should know of messages that are taken though they are unusual; `raw` before
    `validate_messages`, `uniform` after.
    """
    roles = ["start", *(message["role"] for message in uniform)]
    for before, role in itertools.pairwise(roles):
        if role not in USUAL[before]:
            place = "first (context, not learnt)" if before == "start" else f"after {before!r}"
            yield f"conversations have {role!r} {place}, left to the chat template"
    for one, message in zip(raw, uniform, strict=True):
        role, spoken = message["role"], message["role"] == "assistant"
        if not message["content"] and not spoken:
            yield f"conversations have an empty {role} message"
        if isinstance(one.get("content"), list) and len(one["content"]) > 1:
            yield "conversations have messages of several parts, joined by line breaks as servers do"
        for key in LEARN_KEYS:
            value = one.get(key)
            if value is not None and not value and spoken:
                yield f"conversations have assistant messages that {key!r} says not to learn: context alone"
            elif value and not spoken:
                yield f"conversations mark {role!r} messages by {key!r}: only the assistant's are learnt"
            elif value and value != 1:
                yield f"conversations have a {key!r} other than 0 and 1: learnt like the others"


def _json_or_value(value: Any, where: str) -> Any:
    return parse_json(check_text(value, where), where) if isinstance(value, str) else value


def parse_json(text: str, where: str) -> Any:
    """The value of JSON text within a row."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({error}): correct or remove the row") from error


def _words(names: Any) -> str:
    return ", ".join(repr(name) for name in names)


def kind(value: Any) -> str:
    """What `value` is, for an error message."""
    return "missing or null" if value is None else f"a {type(value).__name__}"


# Templates


@dataclass(frozen=True)
class ChatTemplate:
    """A target's chat template and what it is rendered with.

    `tool_text` is the template for conversations with tools: another one only where the tokenizer has both.
    `arguments` are the recipe's `data.chat_template_arguments`. `special` matches the tokenizer's special
    tokens, `added` these and the others that it never splits.
    """

    text: str
    tool_text: str
    special_tokens: Mapping[str, Any]
    arguments: Mapping[str, Any]
    special: re.Pattern[str]
    added: re.Pattern[str]

    def with_arguments(self, arguments: Mapping[str, Any]) -> ChatTemplate:
        """This template for a row that brings arguments of its own, which win over the recipe's."""
        return replace(self, arguments={**self.arguments, **arguments}) if arguments else self

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
        text, names = self._template(tools), {**self.special_tokens, **self.arguments}
        if any("tool_calls" in message for message in messages):
            form = _call_form(text, json.dumps(names, sort_keys=True, default=str))
            messages = [form.of(message) for message in messages]
        try:
            texts, marks = render_jinja_template(
                conversations=[list(messages)], tools=tools, chat_template=text, **flags, **names
            )
        except Exception as error:  # a template is a program of its own: it may raise anything
            raise ValueError(
                f"{where}: the chat template raised {type(error).__name__} on the first {len(messages)} "
                f"messages: {error}. Correct or remove the row, or name another template in "
                "data.chat_template"
            ) from error
        return texts[0], marks[0] if marks else []


class _CallForm(NamedTuple):
    """How a template wants a message that calls tools: the arguments as JSON text or as an object, and no
    content or empty text where the message has no words.
    """

    json_text: bool
    no_content: bool

    def of(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """The message in this form."""
        if "tool_calls" not in message or not any(self):
            return message
        content = message["content"] or (None if self.no_content else "")
        calls = [self._call(call) if self.json_text else call for call in message["tool_calls"]]
        return {**message, "content": content, "tool_calls": calls}

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        return {**call, "function": {**function, "arguments": arguments}}


@lru_cache(maxsize=64)
def _call_form(text: str, names: str) -> _CallForm:
    """The first form in which the template writes a call: that of servers, if it can. `names`: JSON of what
    the template is rendered with.
    """
    function = {"name": "probe_name", "arguments": {"probe_key": "probe_value"}}
    call = {"id": "abcdefghi", "type": "function", "function": function}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    forms = [_CallForm(*choice) for choice in itertools.product((False, True), repeat=2)]
    for form in forms:
        with suppress(Exception):  # a template may raise anything
            texts, _ = render_jinja_template(
                conversations=[[form.of(message) for message in messages]],
                chat_template=text,
                **json.loads(names),
            )
            if "probe_name" in texts[0] and "probe_value" in texts[0]:
                return form
    return forms[0]


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
    return ChatTemplate(
        text,
        named.get("tool_use", text),
        dict(tokenizer.special_tokens_map),
        dict(arguments or {}),
        special_pattern(tokenizer),
        _added_pattern(tokenizer),
    )


def special_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Matches the tokenizer's special tokens."""
    added = tokenizer.added_tokens_decoder.values()
    return _any_of({token.content for token in added if token.special} | set(tokenizer.all_special_tokens))


def _added_pattern(tokenizer: Any) -> re.Pattern[str]:
    added = tokenizer.added_tokens_decoder.values()
    return _any_of({token.content for token in added} | set(tokenizer.all_special_tokens))


def _any_of(names: set[str]) -> re.Pattern[str]:
    # the longest first: one token may be the beginning of another
    return re.compile(
        "|".join(re.escape(name) for name in sorted(names, key=lambda name: (-len(name), name))) or r"(?!)"
    )


def _read_template(path: str) -> str:
    if not Path(path).is_file():
        raise ValueError(
            f"data.chat_template is {path!r}, which is not a file: name a Jinja file, or remove the key"
        )
    return Path(path).read_text(encoding="utf-8")
