"""The hidden-state store that a run trains from: its folder, and its capture by a single process or a
server.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from eagle3_ds.config import Recipe
from eagle3_ds.data import PreparedData
from eagle3_ds.device.found import detect_accelerator
from eagle3_ds.run.served_states import SERVED, capture_from_server
from eagle3_ds.say import progress_bar
from eagle3_ds.store import HiddenStateStore, HiddenStateWriter, RowFormat
from eagle3_ds.store.fingerprint import Fingerprint, store_folder
from eagle3_ds.store.writer import CAPTURED
from eagle3_ds.targets import capture_hidden_states, load_target, teacher_tokens

logger = logging.getLogger(__name__)


def place_of_states(
    recipe: Recipe, data: PreparedData, layout: RowFormat, fingerprint: Fingerprint
) -> Path | None:
    """The folder of the run's hidden-state store; None with an online target or a
    stream.

    With `target.capture: single` or `server` the store is complete on return. With `parallel` the folder may
    still be missing: the ranks that `run.stages.capture` starts fill it.

    Raises:
        ValueError: the store is damaged or of other documents, or the disk is too small.
    """
    if recipe.data.hidden_states == "online":
        logger.info("hidden states: computed by the target while the draft is trained")
        return None
    if recipe.data.hidden_states == "stream":
        logger.info("hidden states: asked of a server while the draft is trained")
        return None
    path = store_folder(recipe.data.cache_dir, fingerprint, layout.dtype)
    if path.is_dir():
        HiddenStateStore.open(path, fingerprint).require_documents(data.lengths())
    else:
        origin = SERVED if recipe.target.capture == "server" else CAPTURED
        writer = HiddenStateWriter(path, data.lengths(), layout, fingerprint, origin=origin)
        logger.info("hidden states: %s", writer.size_text)
        if recipe.target.capture == "parallel":
            logger.info("hidden states: many ranks write %s (launch, or eagle3-ds capture)", path)
            return path
        capture = capture_from_server if recipe.target.capture == "server" else _capture_alone
        capture(recipe, data, writer)
    logger.info("hidden states: %s", path)
    return path


def _capture_alone(recipe: Recipe, data: PreparedData, writer: HiddenStateWriter) -> None:
    target = load_target(recipe.target, device=detect_accelerator())
    missing = set(writer.missing())
    documents = [dataset.with_format("numpy") for dataset in (data.train, data.heldout)]
    total = sum(writer.lengths[number] for number in missing)
    try:
        with progress_bar(total=total, desc="capture", unit=" tokens", unit_scale=True) as bar:
            for row in (
                row for dataset in documents for row in dataset if int(row["document_id"]) in missing
            ):
                aux, teacher = capture_hidden_states(target, torch.from_numpy(row["input_ids"]).long())
                writer.append(int(row["document_id"]), aux, teacher, teacher_tokens(teacher, target.head))
                bar.update(len(row["input_ids"]))
    finally:
        writer.flush()  # after an error or Ctrl-C, the next run continues after the documents done so far
    writer.finish()
