"""Silencing warnings that only a change of DeepSpeed could end."""

from __future__ import annotations

import warnings

# torch 2.13 renamed two collectives that DeepSpeed 0.19.8 calls by their old names: each rank would log a
# warning at every start.
_RENAMED = ("all_gather_into_tensor", "reduce_scatter_tensor")


def ignore_renamed_collectives() -> None:
    """Silence these two warnings, and no others, for the rest of this process. Whatever builds an engine
    calls it.
    """
    for name in _RENAMED:
        warnings.filterwarnings(
            "ignore", message=rf"`torch\.distributed\.{name}` is deprecated", category=FutureWarning
        )
