"""Silencing what transformers says of configs whose makers alone could change them."""

from __future__ import annotations

import logging

_LOGGER = "transformers.modeling_rope_utils"
_OF_THE_MAKERS = (
    # Qwen's cards say factor 4 for 40,960 positions extended from 32,768: the factor is what counts, and is
    # what is trained and served with.
    "The explicitly set RoPE scaling factor (config.rope_parameters['factor'] = ",
    # Phi-3 has the positions before and after extension, and no factor.
    "This model config has set a `rope_parameters['original_max_position_embeddings']` field, to be used ",
)


def ignore_remarks_on_rope() -> None:
    """Silence these two remarks, and no others, for the rest of this process: each rank would log them at
    every start. Whatever reads a target's config calls it.
    """
    # A logger keeps a filter once, however often it is added.
    logging.getLogger(_LOGGER).addFilter(_is_heard)


def _is_heard(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_OF_THE_MAKERS)
