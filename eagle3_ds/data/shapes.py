"""The shapes that a row may come in, and the conversation or the tokens that it means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from eagle3_ds.data.chat import Conversation, check_text, kind, parse_json, validate_messages

Shape = Literal["messages", "sharegpt", "prompt_response", "tokenized"]
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""What ShareGPT data sets write in `from`, as roles. The value of a `function_call` is the call in JSON."""
KNOWN = (
    "'messages' (a list of role / content), 'conversations' (a list of from / value), 'prompt' and "
    "'response', or 'input_ids' and 'loss_mask'"
)


@dataclass(frozen=True)
class TokenRow:
    """A row that was tokenised elsewhere: token ids, and True where the assistant wrote the token."""

    input_ids: list[int]
    loss_mask: list[bool]


def recognise_shape(row: Any, where: str) -> Shape:
    """The shape of a row by its keys. Raises ValueError that shows the keys when it is none that is known."""
    keys = _keys(row, where)
    if {"input_ids", "loss_mask"} <= keys:
        return "tokenized"
    for column in ("messages", "conversations"):
        turns = row.get(column)
        first = turns[0] if isinstance(turns, list) and turns else None
        if isinstance(first, Mapping) and "from" in first:
            return "sharegpt"
        if column == "messages" and turns is not None or isinstance(first, Mapping) and "role" in first:
            return "messages"
    if {"prompt", "response"} <= keys:
        return "prompt_response"
    raise ValueError(
        f"{where}: the row's shape is unknown, its keys are {_show(keys)}. Known are {KNOWN}: rename the "
        "columns"
    )


def read_row(row: Any, shape: Shape, where: str) -> Conversation | TokenRow:
    """What a row of this shape means; `where` ("file, line n") opens every error."""
    keys = _keys(row, where)
    if shape == "tokenized":
        return _read_tokens(_need(row, "input_ids", keys, where), _need(row, "loss_mask", keys, where), where)
    if shape == "messages":
        messages = _need(
            row, "messages" if row.get("messages") is not None else "conversations", keys, where, "messages"
        )
    elif shape == "sharegpt":
        turns = _need(
            row,
            "conversations" if row.get("conversations") is not None else "messages",
            keys,
            where,
            "conversations",
        )
        messages = _after_system(row, _from_sharegpt(turns, where))
    else:
        prompt, response = _need(row, "prompt", keys, where), _need(row, "response", keys, where)
        asked = (
            prompt
            if isinstance(prompt, list)
            else [{"role": "user", "content": check_text(prompt, f"{where}: prompt")}]
        )
        answer = {"role": "assistant", "content": check_text(response, f"{where}: response")}
        messages = _after_system(row, [*asked, answer])
    return Conversation(validate_messages(messages, where), _tools(row.get("tools"), where))


def _keys(row: Any, where: str) -> set[str]:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: the row is {kind(row)}, expected an object with {KNOWN}")
    return {key for key, value in row.items() if value is not None}


def _need(row: Mapping[str, Any], key: str, keys: set[str], where: str, name: str | None = None) -> Any:
    if key not in keys:
        raise ValueError(
            f"{where}: key {name or key!r} is missing (keys present: {_show(keys)}): rename the column, or "
            f"set data.shape to one of {', '.join(get_args(Shape))}"
        )
    return row[key]


def _show(keys: set[str]) -> str:
    return ", ".join(repr(key) for key in sorted(keys)) or "none"


def _after_system(row: Mapping[str, Any], messages: list[Any]) -> list[Any]:
    """The messages, the row's own `system` column before them."""
    return [{"role": "system", "content": row["system"]}, *messages] if row.get("system") else messages


def _from_sharegpt(turns: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(turns, list):
        raise ValueError(f"{where}: 'conversations' is {kind(turns)}, expected a list of from / value")
    messages: list[dict[str, Any]] = []
    for index, turn in enumerate(turns):
        place = f"{where}: conversations[{index}]"
        if not isinstance(turn, Mapping):
            raise ValueError(f"{place} is {kind(turn)}, expected an object with 'from' and 'value'")
        speaker = turn.get("from")
        if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
            raise ValueError(
                f"{place}.from is {speaker!r}, expected one of {', '.join(map(repr, SHAREGPT_ROLES))}"
            )
        role, value = SHAREGPT_ROLES[speaker], turn.get("value")
        if speaker == "function_call":
            call = parse_json(check_text(value, f"{place}.value"), f"{place}.value")
            messages.append({"role": role, "tool_calls": call if isinstance(call, list) else [call]})
        else:
            messages.append({"role": role, "content": value})
    return messages


def _tools(tools: Any, where: str) -> list[dict[str, Any]] | None:
    """The row's `tools`, a list of JSON schemas, or JSON text of one."""
    if isinstance(tools, str):
        tools = parse_json(tools, f"{where}: tools") if tools else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(
            f"{where}: 'tools' is {kind(tools)}, expected a list of JSON schemas, or JSON text of one"
        )
    return [dict(tool) for tool in tools]


def _read_tokens(input_ids: Any, loss_mask: Any, where: str) -> TokenRow:
    # true and false are integers to Python, but in a mask alone: columns that were swapped are noticed
    for name, values, kinds in (("input_ids", input_ids, (int,)), ("loss_mask", loss_mask, (int, bool))):
        if not isinstance(values, list) or not all(type(value) in kinds for value in values):
            raise ValueError(f"{where}: {name!r} is not a list of integers: correct or remove the row")
    if len(input_ids) != len(loss_mask):
        raise ValueError(
            f"{where}: 'input_ids' has {len(input_ids)} entries and 'loss_mask' {len(loss_mask)}: they must "
            "match"
        )
    if not set(loss_mask) <= {0, 1}:
        raise ValueError(
            f"{where}: 'loss_mask' holds {sorted(set(loss_mask) - {0, 1})[0]}, expected 0 and 1 (or false "
            "and true)"
        )
    if not any(loss_mask):
        raise ValueError(
            f"{where}: 'loss_mask' marks no token, so there is nothing to learn from: remove the row"
        )
    if min(input_ids) < 0:
        raise ValueError(f"{where}: 'input_ids' holds {min(input_ids)}: token ids are not negative")
    return TokenRow(input_ids, [bool(flag) for flag in loss_mask])
