"""Checking a configuration with DeepSpeed itself, in one process without a process group, before the ranks
start.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError


def deepspeed_complaints(filled: Mapping[str, Any], keys: Collection[str]) -> list[str]:
    """The errors that the installed DeepSpeed raises for a configuration.

    Args:
        filled: the complete configuration (`fill_deepspeed_config`).
        keys: the top-level keys that the user's JSON has.

    Returns:
        One line for each error, with its key and what to do; empty when DeepSpeed accepts the configuration.
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
    """The error that DeepSpeed raises for a configuration; None when it accepts it."""
    # Without a process group DeepSpeed assumes one rank, and checks train_batch_size against that.
    alone = {**filled, "train_batch_size": filled["gradient_accumulation_steps"]}
    try:
        DeepSpeedConfig(alone)
    except Exception as error:
        # Any exception: for a value that it does not expect, DeepSpeed may fail an assertion, a look-up or a
        # division.
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
