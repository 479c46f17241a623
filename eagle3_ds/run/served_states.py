"""Capture by a server: `target.capture: server`.

Of the target's weights this process reads the final norm and the head alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Container, Iterator
from pathlib import Path

import torch
from torch import Tensor

from eagle3_ds.config import Recipe
from eagle3_ds.data import PreparedData
from eagle3_ds.say import progress_bar
from eagle3_ds.serving.client import ServerClient
from eagle3_ds.serving.fill import Document, fill_store, require_lengths, require_same_head
from eagle3_ds.serving.process import own_server
from eagle3_ds.serving.rows import Expected
from eagle3_ds.store import HiddenStateWriter
from eagle3_ds.targets import choose_aux_layers, load_text_config, resolve_path
from eagle3_ds.targets.end import load_target_end
from eagle3_ds.topology import detect_accelerator

logger = logging.getLogger(__name__)

SERVED = "vLLM extract_hidden_states"
"""The `origin` of hidden states that a server computed."""
SERVER_LOG = Path("logs", "server.log")


def capture_from_server(recipe: Recipe, data: PreparedData, writer: HiddenStateWriter) -> None:
    """Fill the store with what the server gives for the documents that it lacks, and finish it.

    Raises:
        ValueError: the server does not start, cannot be reached, dies or gives rows that are not those of
            the recipe's target and documents; or the disk is full. The same call goes on after the documents
            that are done.
    """
    section = recipe.target
    folder = resolve_path(section.path)
    config = load_text_config(folder)
    layers = choose_aux_layers(config.num_hidden_layers, section.aux_layers)
    expected = Expected(
        layer_ids=(*layers, config.num_hidden_layers),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        dtype=section.dtype,
        weights=writer.fingerprint["target_weights"],
    )
    end = load_target_end(folder, config, getattr(torch, section.dtype), detect_accelerator())

    def finish(last: Tensor) -> tuple[Tensor, Tensor]:
        return end.finish(last, is_normed=False)

    missing = {document: writer.lengths[document] for document in writer.missing()}
    if missing:
        with _client(recipe, folder, expected, writer) as client:
            longest = client.connect()
            require_lengths(missing.values(), longest, client.url)
            require_same_head(client, _documents(data, missing), expected, finish)
            bar = progress_bar(total=sum(missing.values()), desc="capture", unit=" tokens", unit_scale=True)
            with bar:
                concurrency = section.server.concurrency
                fill_store(
                    client, _documents(data, missing), expected, finish, writer, concurrency, bar.update
                )
    writer.finish()


@contextlib.contextmanager
def _client(
    recipe: Recipe, model: Path, expected: Expected, writer: HiddenStateWriter
) -> Iterator[ServerClient]:
    """A client of the recipe's server, or of one that runs as long as the block."""
    section = recipe.target.server
    prefix, limits = writer.path.name, (section.timeout_seconds, section.retries)
    if section.url is not None:
        assert section.folder is not None  # the recipe was checked
        logger.info("hidden states: asked of the server at %s", section.url)
        key = _api_key(section.key_variable)
        yield ServerClient(section.url, Path(section.folder), prefix, *limits, key=key)
        return
    log = Path(recipe.output_dir) / SERVER_LOG
    logger.info("hidden states: starting a server of %s, see %s", model, log)
    longest = max(writer.lengths.values())
    with own_server(section, model, expected.dtype, expected.layer_ids, longest, log) as server:
        yield ServerClient(server.url, server.folder, prefix, *limits, require_alive=server.require_alive)


def _api_key(variable: str | None) -> str | None:
    """The value of the environment variable of this name.

    Raises:
        ValueError: it is not set.
    """
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise ValueError(
            f"target.server.key_variable = {variable!r}: this environment variable is not set. Set it to the "
            "server's API key, or remove key_variable."
        )
    return key


def _documents(data: PreparedData, wanted: Container[int]) -> Iterator[Document]:
    """The wanted documents, in the order of the data."""
    for dataset in (data.train, data.heldout):
        for row in dataset.with_format("numpy"):
            if int(row["document_id"]) in wanted:
                yield int(row["document_id"]), row["input_ids"].tolist()
