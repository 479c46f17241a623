"""DeepSpeed's own judgement of a configuration, without a process group: in one process, before any rank
starts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError


def deepspeed_complaints(filled: Mapping[str, Any], keys: Collection[str]) -> list[str]:
    """What the installed DeepSpeed says against a filled configuration, each line with its key and the fix.

    `keys` are the user's. Empty when DeepSpeed takes all of it.
    """
    error = _refusal(filled)
    if error is None:
        return []
    owned = {key: value for key, value in filled.items() if key not in keys}
    found = [
        line
        for key in keys
        if (alone := _refusal({**owned, key: filled[key]})) is not None
        for line in _lines(key, alone)
    ]
    return found or _lines("", error)


def _refusal(filled: Mapping[str, Any]) -> Exception | None:
    """The error that DeepSpeed raises when it reads a configuration; None when it takes it."""
    # Without a process group DeepSpeed counts one rank, and checks the batch against that.
    alone = {**filled, "train_batch_size": filled["gradient_accumulation_steps"]}
    try:
        DeepSpeedConfig(alone)
    except Exception as error:
        # Whatever it is: DeepSpeed asserts, looks up and divides where a user's value is not what it expects.
        return error
    return None


def _lines(key: str, error: Exception) -> list[str]:
    fix = "Change it, or remove it for DeepSpeed's own."
    if not isinstance(error, ValidationError):
        reason = " ".join(str(error).split()) or type(error).__name__
        return [
            f"`{key}`: DeepSpeed refuses it: {reason}. {fix}" if key else f"DeepSpeed refuses it: {reason}"
        ]
    lines = []
    for detail in error.errors():
        places = [str(place) for place in detail["loc"]]
        path = ".".join(places if places[:1] == [key] else [key, *places])
        value = f" {detail['input']!r}" if not isinstance(detail["input"], Mapping) else ""
        lines.append(f"`{path}`: DeepSpeed refuses{value or ' it'}: {detail['msg']}. {fix}")
    return lines
