"""Conversations: checked, and turned into token ids with a mask over the assistant's tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
FOLLOWERS = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""Roles that may come after each role."""


def resolve_chat_template(tokenizer: Any, chat_template: str | None = None) -> str:
    """The Jinja text to use: `chat_template` (a template, not a path) or the tokenizer's own.

    Raises ValueError when there is none, or when it has no `{% generation %}` marks to tell the assistant's tokens by.
    """
    template = chat_template if chat_template is not None else tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    fix = (
        "copy the target's template to a file, put {% generation %} and {% endgeneration %} around the assistant's "
        "content and name the file in data.chat_template"
    )
    if not template:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no chat template: {fix}")
    if not GENERATION_MARK.search(template):
        origin = "data.chat_template" if chat_template is not None else f"of the tokenizer {tokenizer.name_or_path!r}"
        raise ValueError(
            f"the chat template ({origin}) has no {{% generation %}} marks, so no assistant mask can be made from it: {fix}"
        )
    return template


def read_chat_template(path: str | None) -> str | None:
    """Text of the template file a recipe names in `data.chat_template`; None stays None."""
    if path is None:
        return None
    if not Path(path).is_file():
        raise ValueError(f"data.chat_template is {path!r}, which is not a file: name a Jinja file, or remove the key")
    return Path(path).read_text(encoding="utf-8")


def validate_row(row: Any, where: str) -> list[dict]:
    """The messages of one row, unset keys removed; `where` ("file, row n") opens every error.

    A row is `{"messages": [{"role": ..., "content": ...}, ...]}`: an optional system message, then user and assistant
    in turn, tool messages after the assistant that called. At least one assistant message; contents are non-empty
    strings (an assistant message that carries `tool_calls` may leave it out).
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: the row is {_kind(row)}, expected an object with the key 'messages'")
    if "messages" not in row:
        keys = ", ".join(repr(key) for key in row) or "none"
        raise ValueError(f"{where}: key 'messages' is missing (keys present: {keys}): rename the column with the conversation")
    messages = row["messages"]
    if not isinstance(messages, list):
        raise ValueError(f"{where}: 'messages' is {_kind(messages)}, expected a list of messages")
    if not messages:
        raise ValueError(f"{where}: 'messages' is empty: remove the row")
    previous = "start"
    for index, message in enumerate(messages):
        previous = _validate_message(message, previous, f"{where}: messages[{index}]")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where}: no assistant message, so there is nothing to learn from: remove the row")
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _validate_message(message: Any, previous: str, where: str) -> str:
    """Check one message after one of role `previous`; returns its role."""
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} is {_kind(message)}, expected an object with 'role' and 'content'")
    role = message.get("role")
    if not isinstance(role, str):
        raise ValueError(f"{where}.role is {_kind(role)}, expected a string: one of {_words(FOLLOWERS)}")
    if role not in FOLLOWERS or role == "start":
        raise ValueError(f"{where}.role is {role!r}, expected one of {_words(FOLLOWERS)}")
    if role not in FOLLOWERS[previous]:
        place = "first" if previous == "start" else f"after {previous!r}"
        raise ValueError(f"{where}.role is {role!r} {place}, where only {_words(FOLLOWERS[previous])} may stand")
    content = message.get("content")
    if role == "assistant" and message.get("tool_calls") and not content:
        return role
    if not isinstance(content, str):
        raise ValueError(f"{where}.content is {_kind(content)}, expected a string")
    if not content:
        raise ValueError(f"{where}.content is empty: remove the message or the row")
    return role


def _words(roles: Any) -> str:
    return ", ".join(repr(role) for role in roles if role != "start")


def _kind(value: Any) -> str:
    return "missing or null" if value is None else f"a {type(value).__name__}"


def encode_conversations(
    tokenizer: Any,
    conversations: Sequence[list[dict]],
    chat_template: str | None = None,
    where: Sequence[str] | None = None,
) -> list[tuple[list[int], list[bool]]]:
    """Token ids and assistant mask of each conversation, one call for all so that the tokenizer uses every core.

    Raises ValueError, opened by `where[i]`, when the template marks fewer stretches of tokens than there are
    assistant messages: such a mask would leave answers out, or (a tokenizer that drops the marked characters) run on
    into the user's words.
    """
    template = resolve_chat_template(tokenizer, chat_template)
    encoded = tokenizer.apply_chat_template(
        list(conversations),
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    results = []
    for index, messages in enumerate(conversations):
        input_ids = list(encoded["input_ids"][index])
        loss_mask = [bool(flag) for flag in encoded["assistant_masks"][index]]
        turns = sum(message["role"] == "assistant" for message in messages)
        stretches = sum(flag and not before for before, flag in zip([False, *loss_mask], loss_mask, strict=False))
        if stretches < turns:
            place = where[index] if where is not None else f"conversation {index}"
            raise ValueError(
                f"{place}: the chat template marks {stretches} stretches of assistant tokens for {turns} assistant "
                "messages: "
                "put its {% generation %} marks around every assistant message"
            )
        results.append((input_ids, loss_mask))
    return results


def encode_conversation(tokenizer: Any, messages: list[dict], chat_template: str | None = None) -> tuple[list[int], list[bool]]:
    """Token ids and assistant mask, both of the same length, of one conversation.

    Errors as in `encode_conversations`.
    """
    return encode_conversations(tokenizer, [messages], chat_template)[0]
