"""How a draft's config says that its attention has a sliding window."""

from __future__ import annotations

from typing import Any


def window_keys(window: int | None, num_layers: int) -> dict[str, Any]:
    """How a config says that every layer sees `window` keys: servers look at both. Nothing for full
    attention.
    """
    return (
        {}
        if window is None
        else {"sliding_window": window, "layer_types": ["sliding_attention"] * num_layers}
    )


def sliding_window(config: Any) -> int | None:
    """The window of a draft's config; None is full attention.

    Raises:
        ValueError: its layers differ in theirs.
    """
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if window is None or (kinds is not None and set(kinds) == {"full_attention"}):
        return None
    if kinds is None or set(kinds) == {"sliding_attention"}:
        return int(window)
    raise ValueError(
        f"layer_types is {list(kinds)}: all layers of a draft see sliding_window keys here, or all see "
        "everything."
    )
