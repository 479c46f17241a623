"""What a recipe may leave out: `draft.vocab_size` and `data.max_length`, which its target bounds, and
`eval.draft_tokens`, which its draft says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

VOCABULARY = 32000
"""Tokens of the draft's vocabulary: as many as the authors' EAGLE-3 draft of Llama 3.1 has."""
LENGTH = 4096
"""Tokens of a pack. Not the target's positions, which may be 131,072: a pack is what a draft_dp group holds
and trains on at once, so it decides memory and the number of optimizer steps, which nobody would look for
behind the name of a target. A conversation that is longer is an error unless `data.on_too_long` says else.
"""


TTT_STEPS, BLOCK_SIZE = 7, 8
"""Guesses that EAGLE-3 and P-EAGLE train, and inputs of DFlash's block: seven guesses too."""


class _Size(NamedTuple):
    """A key of the recipe that may be left out, and what of the target bounds it."""

    section: str
    key: str
    most: int
    of_target: str
    meaning: str


SIZES = (
    _Size("draft", "vocab_size", VOCABULARY, "vocab_size", "the most frequent supervised tokens"),
    _Size("data", "max_length", LENGTH, "max_position_embeddings", "tokens of a pack"),
)


def infer_sizes(tree: dict[str, Any]) -> list[str]:
    """Set in `tree` what of `SIZES` it leaves out: the usual number, or the target's where that is smaller.

    The target's is read from `target.build`, or from config.json of the folder `target.path`. Of a hub name
    nothing is read, so that a recipe says the same before and after the download.

    Returns:
        A line for each key that was set.
    """
    target, told = tree.get("target"), []
    known = _sizes_of(target) if isinstance(target, dict) else {}
    for section, key, most, of_target, meaning in SIZES:
        keys = tree.setdefault(section, {})
        if not isinstance(keys, dict) or key in keys:
            continue  # what is no mapping is refused with the rest of the recipe
        own = known.get(of_target)
        keys[key] = most if own is None else min(most, own)
        bound = (
            f"the target's own {of_target} is not known here"
            if own is None
            else f"all of the target's {of_target}"
            if own <= most
            else f"of the target's {of_target} of {own}"
        )
        told.append(f"inferred: {section}.{key} = {keys[key]}, {meaning}; {bound}")
    return told


def infer_guesses(tree: dict[str, Any]) -> list[str]:
    """Set `eval.draft_tokens` in `tree`, where it is left out, to the guesses that the draft is trained for.

    Returns:
        A line, where the number is not the usual one.
    """
    draft, settings = tree.get("draft", {}), tree.setdefault("eval", {})
    if not isinstance(draft, dict) or not isinstance(settings, dict) or "draft_tokens" in settings:
        return []
    is_block = draft.get("algorithm") == "dflash"
    key, usual, less = ("block_size", BLOCK_SIZE, 1) if is_block else ("ttt_steps", TTT_STEPS, 0)
    size = draft.get(key, usual)
    if type(size) is not int or size <= less:
        return []  # refused with the rest of the recipe
    settings["draft_tokens"] = size - less
    if size == usual:
        return []
    return [f"inferred: eval.draft_tokens = {size - less}, as many guesses as draft.{key} trains"]


def _sizes_of(target: Mapping[str, Any]) -> dict[str, int]:
    """The positive sizes of the target that a recipe names, by the names in config.json."""
    build, path = target.get("build"), target.get("path")
    if isinstance(build, dict):
        # Built here, or found here as it was built: the sizes are those of the recipe either way.
        found = {"vocab_size": build.get("vocab_size"), "max_position_embeddings": build.get("max_positions")}
    else:
        found = _config_of(path) if isinstance(path, str) else {}
    return {
        name: size for name, size in found.items() if type(size) is int and size > 0 and name in _OF_TARGET
    }


_OF_TARGET = {size.of_target for size in SIZES}


def _config_of(path: str) -> dict[str, Any]:
    """config.json of a local target, its text part where that is apart; empty where there is none. Whoever
    loads the target says what is wrong with it.
    """
    try:
        file = Path(path).expanduser() / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):
        return {}
    text = config.get("text_config", config) if isinstance(config, dict) else {}
    return text if isinstance(text, dict) else {}
