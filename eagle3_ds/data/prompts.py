"""Prompts that a file names: rows of `messages`, `prompt` or `input_ids`, one a line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eagle3_ds.data.chat import ChatTemplate, load_chat_template, uniform_messages
from eagle3_ds.data.shapes import uniform_tools


def read_prompts_file(
    path: str | Path, tokenizer: Any, template: ChatTemplate | None = None
) -> list[list[int]]:
    """The prompts of a JSONL file as token ids.

    Args:
        template: what messages are rendered with; None: the tokenizer's own, where it has one.

    Raises:
        ValueError: a line is no JSON object or holds no prompt; the message names it.
    """
    prompts = []
    # Not splitlines: JSON text may hold other characters that end a line for Python.
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            place = f"{path}, row {number}"
            prompts.append(prompt_tokens(tokenizer, _row(line, place), place, template))
    if not prompts:
        raise ValueError(
            f"{path} holds no row. Write a JSON object with messages, prompt or input_ids a line."
        )
    return prompts


def _row(line: str, place: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: not valid JSON ({error}). Write one JSON object a line.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: is no JSON object. Write one a line.")
    return row


def prompt_tokens(
    tokenizer: Any, row: Mapping[str, Any], place: str, template: ChatTemplate | None = None
) -> list[int]:
    """The token ids of a row's prompt. A last message of the assistant is left out: it is what the target is
    asked for.

    Raises:
        ValueError: the row, which `place` names, has none.
    """
    if "input_ids" in row:
        return _checked_ids(row["input_ids"], place)
    if "messages" in row:
        messages = uniform_messages(row["messages"], place)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise ValueError(f"{place}: no message stands before the assistant's. Remove the row.")
        if template is None and tokenizer.chat_template:
            template = load_chat_template(tokenizer)
        if template is not None:
            rendered = template.render(messages, uniform_tools(row.get("tools"), place), place, prompt=True)
            return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])
        text: Any = messages[-1]["content"]
    else:
        text = row.get("prompt")
    if not isinstance(text, str):
        raise ValueError(
            f"{place}: has none of messages, prompt and input_ids, but {sorted(row)}. Give one of them."
        )
    return list(tokenizer(text)["input_ids"])


def _checked_ids(tokens: Any, place: str) -> list[int]:
    if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens):
        raise ValueError(f"{place}: input_ids is no list of token ids. Write whole numbers of 0 or more.")
    if not tokens:
        raise ValueError(f"{place}: input_ids is empty. Remove the row.")
    return tokens
