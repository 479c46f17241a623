"""What a draft's config says beyond the keys of its decoder: the window of its attention, and the captured
hidden states that it reads.
"""

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


def aux_keys(num_layers: int, target_hidden_size: int) -> dict[str, Any]:
    """How a config says which hidden states of the target a slot of the draft reads."""
    return {"num_aux_layers": num_layers, "target_hidden_size": target_hidden_size}


def aux_size(config: Any) -> int:
    """Entries of a slot's captured hidden states, side by side: three of the draft's own width where the
    config says nothing, as those of other programs do.
    """
    return num_aux_layers(config) * int(getattr(config, "target_hidden_size", None) or config.hidden_size)


def num_aux_layers(config: Any) -> int:
    """Captured layers that a slot reads; three where the config says nothing."""
    return int(getattr(config, "num_aux_layers", None) or 3)
