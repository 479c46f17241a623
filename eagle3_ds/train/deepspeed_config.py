"""DeepSpeed's own judgement of a configuration, without a process group: in one process, before any rank
starts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from deepspeed.monitor.utils import check_comet_availability, check_tb_availability, check_wandb_availability
from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError

# What a monitor's rank asks for when it starts, and the package it names.
_MONITORS: Mapping[str, tuple[Callable[[], None], str]] = {
    "tensorboard": (check_tb_availability, "tensorboard"),
    "wandb": (check_wandb_availability, "wandb"),
    "comet": (check_comet_availability, "comet_ml>=3.41.0"),
}


def deepspeed_complaints(filled: Mapping[str, Any], keys: Collection[str]) -> list[str]:
    """What the installed DeepSpeed says against a filled configuration, each line with its key and the fix.

    `keys` are the user's. Empty when DeepSpeed takes all of it.
    """
    error = _refusal(filled)
    if error is None:
        return [line for name in _MONITORS if (line := _missing_package(filled, name))]
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


def _missing_package(filled: Mapping[str, Any], name: str) -> str | None:
    check, package = _MONITORS[name]
    if not filled.get(name, {}).get("enabled", False):
        return None
    try:
        # It prints what it raises.
        with redirect_stdout(StringIO()):
            check()
    except ImportError as error:
        return (
            f"`{name}.enabled` is true, but its package cannot be imported here ({error}). Install it "
            f'(pip install "{package}"), or set it to false.'
        )
    return None
