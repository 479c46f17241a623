"""The embedding that the draft of a run reads: the target's, or its own where its hidden size is another."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor

from eagle3_ds.algorithms import algorithm_of
from eagle3_ds.checkpoint.format import let_others_read
from eagle3_ds.config import Recipe
from eagle3_ds.draft import (
    has_own_embedding,
    load_draft_embedding,
    project_embedding,
    save_draft_embedding,
    target_hidden_size,
)
from eagle3_ds.export import load_embedding
from eagle3_ds.targets import load_embedding_and_head, load_text_config, resolve_path

logger = logging.getLogger(__name__)


def write_draft_embedding(recipe: Recipe, goes_on: bool) -> None:
    """Put the draft's own embedding into the output folder, if it has one: made from the target's, or that of
    the draft of `train.init_from`. A run that goes on keeps what it has.

    Raises:
        ValueError: the run goes on, and has none or another one.
    """
    path = resolve_path(recipe.target.path)
    config = algorithm_of(recipe).build_config(load_text_config(path), recipe)
    if not has_own_embedding(config):
        return
    if goes_on:
        load_draft_embedding(recipe.output_dir, (config.vocab_size, config.hidden_size))
        return
    if recipe.train.init_from is not None:
        embedding = load_embedding(recipe.train.init_from)
    else:
        embedding = project_embedding(load_embedding_and_head(path)[0], config.hidden_size)
    let_others_read(save_draft_embedding(embedding, Path(recipe.output_dir)))
    logger.info(
        "draft embedding: %d x %d, the target's rows are %d wide",
        *embedding.shape,
        target_hidden_size(config),
    )


def own_embedding(recipe: Recipe) -> Tensor | None:
    """The draft's own embedding [V, H] from the output folder; None where it shares the target's.

    Raises:
        ValueError: it should have one and has none, or another one.
    """
    config = algorithm_of(recipe).build_config(load_text_config(resolve_path(recipe.target.path)), recipe)
    if not has_own_embedding(config):
        return None
    return load_draft_embedding(recipe.output_dir, (config.vocab_size, config.hidden_size))
