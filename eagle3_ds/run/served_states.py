"""Hidden states from a server, `target.capture: server`: into a store, or while the draft is trained.

Of the target's weights this process reads the final norm and the head alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Container, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from eagle3_ds.config import Recipe
from eagle3_ds.data import PreparedData
from eagle3_ds.device.found import detect_accelerator
from eagle3_ds.say import progress_bar
from eagle3_ds.serving.client import ServerClient, require_key
from eagle3_ds.serving.fill import Document, fill_store, require_lengths, require_same_head
from eagle3_ds.serving.process import own_server
from eagle3_ds.serving.rows import Expected
from eagle3_ds.store import HiddenStateWriter
from eagle3_ds.targets import load_text_config, resolve_path
from eagle3_ds.targets.end import load_target_end
from eagle3_ds.train.streamed import files_of

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
    expected = Expected.of(section, config, writer.fingerprint["target_weights"])
    end = load_target_end(folder, config, getattr(torch, section.dtype), detect_accelerator())

    def finish(last: Tensor) -> tuple[Tensor, Tensor]:
        return end.finish(last, is_normed=False)

    missing = {document: writer.lengths[document] for document in writer.missing()}
    if missing:
        with _client(recipe, folder, expected, writer.path.name, max(missing.values())) as client:
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
def streaming(recipe: Recipe, num_hosts: int) -> Iterator[None]:
    """While the block runs, there is the server that `data.hidden_states: stream` asks; the ranks find it in
    prepared.json. It is tried with some documents first. Nothing is done for other recipes.

    Raises:
        ValueError: as `capture_from_server`; or the ranks are on several hosts, which a server that this run
            starts does not reach.
    """
    if recipe.data.hidden_states != "stream":
        yield
        return
    if num_hosts > 1 and recipe.target.server.url is None:
        raise ValueError(
            f"target.server.url is null and the ranks are on {num_hosts} hosts: a server that the run starts "
            "is reached from its own host alone. Start one (docs/hidden-states.md), name its URL and folder."
        )
    file = Path(recipe.output_dir) / "prepared.json"
    prepared = json.loads(file.read_text())
    data = PreparedData.open(Path(prepared["data"]), prepared["data_fingerprint"])
    lengths = data.lengths()
    folder = resolve_path(recipe.target.path)
    config = load_text_config(folder)
    expected = Expected.of(recipe.target, config, prepared["store_fingerprint"]["target_weights"])
    with _client(recipe, folder, expected, f"{files_of(recipe)}-tried", max(lengths.values())) as client:
        require_lengths(lengths.values(), client.connect(), client.url)
        dtype = getattr(torch, recipe.target.dtype)
        end = load_target_end(folder, config, dtype, detect_accelerator())
        finish = partial(end.finish, is_normed=False)
        require_same_head(client, _documents(data, lengths), expected, finish)
        del end, finish
        where = {"url": client.url, "folder": str(client.folder.resolve())}
        file.write_text(json.dumps({**prepared, "server": where}, indent=2) + "\n")
        logger.info("hidden states: asked of %s while the draft is trained", client.url)
        yield


@contextlib.contextmanager
def _client(
    recipe: Recipe, model: Path, expected: Expected, prefix: str, longest: int
) -> Iterator[ServerClient]:
    """A client of the recipe's server, or of one for `longest` tokens that runs as long as the block."""
    section = recipe.target.server
    limits = (section.timeout_seconds, section.retries)
    if section.url is not None:
        assert section.folder is not None  # the recipe was checked
        logger.info("hidden states: asked of the server at %s", section.url)
        require_key(section.key_variable)
        yield ServerClient(section.url, Path(section.folder), prefix, *limits, section.key_variable)
        return
    log = Path(recipe.output_dir) / SERVER_LOG
    logger.info("hidden states: starting a server of %s, see %s", model, log)
    with own_server(section, model, expected.dtype, expected.layer_ids, longest, log) as server:
        yield ServerClient(server.url, server.folder, prefix, *limits, require_alive=server.require_alive)


def _documents(data: PreparedData, wanted: Container[int]) -> Iterator[Document]:
    """The wanted documents, in the order of the data."""
    for dataset in (data.train, data.heldout):
        for row in dataset.with_format("numpy"):
            if int(row["document_id"]) in wanted:
                yield int(row["document_id"]), row["input_ids"].tolist()
