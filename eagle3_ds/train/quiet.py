"""Warnings that are DeepSpeed's to heed, kept out of the ranks' logs."""

from __future__ import annotations

import warnings

# torch 2.13 renames two collectives, and DeepSpeed 0.19.8 calls them by their old names: once per rank and
# start, a warning that no user can do anything about stands between the lines that matter.
_RENAMED = ("all_gather_into_tensor", "reduce_scatter_tensor")


def ignore_renamed_collectives() -> None:
    """For the rest of this process, and nothing but these two. Whatever builds an engine calls it."""
    for name in _RENAMED:
        warnings.filterwarnings(
            "ignore", message=rf"`torch\.distributed\.{name}` is deprecated", category=FutureWarning
        )
