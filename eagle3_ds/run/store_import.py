"""Importing the offline hidden states of another trainer, with the checks against the target that are
possible.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from eagle3_ds.config import Recipe
from eagle3_ds.device.found import detect_accelerator
from eagle3_ds.run.import_check import COMPARED_SAMPLES, compare_with_target
from eagle3_ds.run.stages import Documents, tokenise
from eagle3_ds.say import progress_bar
from eagle3_ds.store import HiddenStateStore, HiddenStateWriter
from eagle3_ds.store.fingerprint import store_folder
from eagle3_ds.store.foreign import ForeignFiles, open_foreign
from eagle3_ds.store.importer import fill_store, match_documents, write_rows
from eagle3_ds.targets import (
    choose_aux_layers,
    load_target,
    load_text_config,
    resolve_path,
)
from eagle3_ds.targets.end import TargetEnd, load_target_end

logger = logging.getLogger(__name__)


def import_store(recipe: Recipe, source: Path, hidden_states: Path | None = None, check: bool = True) -> Path:
    """Write the rows of tokens to `data.train`, and a hidden-state store to the folder where `prepare` looks
    for it. An interrupted import continues when it is run again.

    Args:
        recipe: its `data.train` names the .jsonl file to write.
        source: the folder that the other trainer wrote.
        hidden_states: the folder of `hs_*.safetensors`; None: it is inside the data set of speculators.
        check: load the target, and compare some samples with the hidden states that it computes.

    Returns:
        The folder of the store.

    Raises:
        ValueError: the files are damaged or of another target or other layers, or do not fit the recipe.
    """
    rows_file = _rows_file(recipe)
    files = open_foreign(source, hidden_states)
    logger.info("import: %d samples of %s in %s", len(files), files.writer, source)
    folder = resolve_path(recipe.target.path, recipe.target.build is not None)
    config = load_text_config(folder)
    aux_layers = choose_aux_layers(config.num_hidden_layers, recipe.target.aux_layers)
    _check_shape(files, source, config)
    if check:
        target = load_target(recipe.target, device=detect_accelerator())
        for line in compare_with_target(files, target):
            logger.info("checked: %s", line)
        end = TargetEnd(target.model.model.norm, target.head)
        del target
    else:
        _check_layers(files, aux_layers, config.num_hidden_layers)
        end = load_target_end(folder, config, getattr(torch, recipe.target.dtype), detect_accelerator())
    rows = write_rows(files, rows_file, recipe.data.max_length, _progress(range(len(files)), "tokens"))
    logger.info("rows: %s; in %s", rows.text, rows_file)
    documents = tokenise(recipe)
    matches = match_documents((documents.data.train, documents.data.heldout), rows)
    store = _fill(recipe, files, documents, matches, end)
    logger.info("hidden states: %s", store)
    for line in _on_trust(files, aux_layers, check):
        logger.info("taken on trust: %s", line)
    return store


def _fill(
    recipe: Recipe,
    files: ForeignFiles,
    documents: Documents,
    matches: dict[int, list[int]],
    end: TargetEnd,
) -> Path:
    path = store_folder(recipe.data.cache_dir, documents.fingerprint, documents.layout.dtype)
    lengths = documents.data.lengths()
    if path.is_dir():
        store = HiddenStateStore.open(path, documents.fingerprint)
        store.require_documents(lengths)
        logger.info("hidden states: there already, computed by %s", store.origin)
        return path
    writer = HiddenStateWriter(path, lengths, documents.layout, documents.fingerprint, origin=files.writer)
    logger.info("hidden states: %s", writer.size_text)
    fill_store(
        files,
        matches,
        writer,
        lambda last: end.finish(last, files.last_is_normed),
        _progress(list(matches), "hidden states"),
    )
    writer.finish()
    return path


def _rows_file(recipe: Recipe) -> Path:
    named = recipe.data.train or ()
    if len(named) != 1 or not named[0].endswith(".jsonl") or recipe.data.heldout:
        raise ValueError(
            f"data.train is {list(named)} and data.heldout {list(recipe.data.heldout)}: an "
            "import writes its rows of tokens to the one .jsonl file in data.train, and holds out a share "
            "of them. Set data.train='[imported.jsonl]' and data.heldout='[]'"
        )
    return Path(named[0])


def _check_shape(files: ForeignFiles, source: Path, config: Any) -> None:
    """Check the width of the first sample, before the target is loaded or anything is written.

    Raises:
        ValueError: it is not that of the target.
    """
    sample = next(
        (sample for index in range(len(files)) if (sample := files.sample(index)) is not None), None
    )
    if sample is None:
        raise ValueError(
            f"--from {source}: none of the {len(files)} samples has hidden states. Generate them first."
        )
    width = sample.last.shape[1]
    if width != config.hidden_size:
        raise ValueError(
            f"{sample.place} holds hidden states of {width}, the target's are {config.hidden_size} wide: "
            "they were computed by another model. Name that one in target.path."
        )


def _check_layers(files: ForeignFiles, aux_layers: Sequence[int], num_layers: int) -> None:
    """Check the captured layers by what the files record or their writer's default is.

    Raises:
        ValueError: they are not the layers of the recipe.
    """
    written = files.aux_layers(num_layers)
    if tuple(aux_layers) != written:
        raise ValueError(
            f"{files.writer} writes the inputs of layers {list(written)} of a target of {num_layers} layers, "
            f"and the recipe wants those of {list(aux_layers)}. Set target.aux_layers='{list(written)}', or "
            "leave --skip-check out, so that the layers are looked for."
        )


def _on_trust(files: ForeignFiles, aux_layers: Sequence[int], checked: bool) -> list[str]:
    """Notes about what could not be checked."""
    lines = [f"the tokens and masks, as {files.writer} wrote them: no template or tokenizer was applied"]
    if checked:
        return [
            *lines,
            (
                f"that the samples which were not compared with the target are like the {COMPARED_SAMPLES} "
                "that were"
            ),
        ]
    return [
        *lines,
        f"that the hidden states are this target's, of the inputs of its layers {list(aux_layers)}",
    ]


def _progress(numbers: Sequence[int], what: str) -> Any:
    return progress_bar(numbers, desc=what, unit=" samples")
