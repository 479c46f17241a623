"""The keys of a draft's config for the window of its attention and for the captured states that it reads."""

from __future__ import annotations

from typing import Any


def window_keys(window: int | None, num_layers: int) -> dict[str, Any]:
    """The config keys for a window of `window` keys in every layer; none for full attention (None). Servers
    read both keys, the size and the type of each layer.
    """
    return (
        {}
        if window is None
        else {"sliding_window": window, "layer_types": ["sliding_attention"] * num_layers}
    )


def sliding_window(config: Any) -> int | None:
    """The window of a draft's config; None for full attention.

    Raises:
        ValueError: some layers have a window and others have not.
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
    """The config keys for the hidden states that a slot reads: those of `num_layers` layers of a target of
    width `target_hidden_size`.
    """
    return {"num_aux_layers": num_layers, "target_hidden_size": target_hidden_size}


def aux_size(config: Any) -> int:
    """A: entries of a slot's captured hidden states, concatenated. Configs of other programs do not have
    these keys; they mean three layers of the draft's own width.
    """
    return num_aux_layers(config) * target_hidden_size(config)


def target_hidden_size(config: Any) -> int:
    """Ht, the target's hidden size; the draft's own if the config does not say."""
    return int(getattr(config, "target_hidden_size", None) or config.hidden_size)


def has_own_embedding(config: Any) -> bool:
    """Whether the draft has another hidden size than the target, whose embedding it then cannot share."""
    return target_hidden_size(config) != config.hidden_size


def num_aux_layers(config: Any) -> int:
    """How many captured layers a slot reads; three if the config does not say."""
    return int(getattr(config, "num_aux_layers", None) or 3)
