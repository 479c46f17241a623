"""Filling a hidden-state store from a server: many documents asked for at once, written one after the other.

Legend: n tokens of a document, H hidden size of the target, V its vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice

import torch
from torch import Tensor

from eagle3_ds.serving.client import ServerClient
from eagle3_ds.serving.rows import Expected, ServedRows
from eagle3_ds.store import HiddenStateWriter

Finish = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Turns last hidden states [n, H] before the final norm into teacher [n, H] after it, and its tokens [n]."""
Document = tuple[int, Sequence[int]]
"""The id of a document, and its token ids."""
ROWS_AT_ONCE = 8192
"""How many last hidden states are normed at a time."""
PROBES, PROBE_TOKENS = 8, 64
"""How many beginnings of documents are asked for before the capture, and how long they are."""


def require_lengths(lengths: Iterable[int], longest: int, url: str) -> None:
    """Raises ValueError when documents leave the server no room for the one token that it answers."""
    beyond = [length for length in lengths if length + 1 > longest]
    if beyond:
        raise ValueError(
            f"{len(beyond)} documents have more tokens than the server at {url} takes (the longest "
            f"{max(beyond)}, "
            f"its --max-model-len is {longest} with the token that it answers). Start it with "
            "--max-model-len "
            f"{max(beyond) + 1} at least, or lower data.max_length."
        )


def require_same_head(
    client: ServerClient, documents: Iterable[Document], expected: Expected, finish: Finish
) -> None:
    """Ask for the beginnings of some documents, and compare the tokens that the server chooses with ours.

    A server of another model is found by this where it cannot read its own weights' digest. Rounding may
    change the token where two are equally likely, so half of them must agree.

    Raises:
        ValueError: fewer agree, or the rows are not of the recipe's target.
    """
    agreed, asked = 0, 0
    for _, token_ids in islice(documents, PROBES):
        served = client.rows(token_ids[:PROBE_TOKENS], expected)
        if served.token is not None:
            agreed += int(finish(served.last[-1:])[1].item() == served.token)
            asked += 1
    if 2 * agreed < asked:
        raise ValueError(
            f"after {asked} texts the server chose the tokens of target.path's norm and head {agreed} "
            "times: it "
            "runs another model. Serve the model of target.path."
        )


def fill_store(
    client: ServerClient,
    documents: Iterable[Document],
    expected: Expected,
    finish: Finish,
    writer: HiddenStateWriter,
    concurrency: int,
    told: Callable[[int], object] = lambda tokens: None,
) -> None:
    """Write documents to the store as the server gives them.

    A document is written whole in one piece: after an interruption it is there or it is not, and no row of it
    is written twice.

    Args:
        concurrency: how many documents are asked for at once.
        told: called with the number of tokens of each document that is done.

    Raises:
        ValueError: of the server or of the store; the documents before it are on disk.
    """
    try:
        for document, served in _in_flight(client, documents, expected, concurrency):
            finished = [finish(last) for last in served.last.split(ROWS_AT_ONCE)]
            teacher, token = (torch.cat(parts) for parts in zip(*finished, strict=True))
            writer.append(document, served.aux, teacher, token)
            told(len(token))
    finally:
        client.stop()
        writer.flush()


def _in_flight(
    client: ServerClient, documents: Iterable[Document], expected: Expected, concurrency: int
) -> Iterator[tuple[int, ServedRows]]:
    """The rows of documents in the order in which they come."""
    source = iter(documents)
    asked: dict[Future[ServedRows], int] = {}
    threads = ThreadPoolExecutor(concurrency, thread_name_prefix="served")
    try:
        while True:
            while len(asked) < concurrency and (following := next(source, None)) is not None:
                asked[threads.submit(_named_rows, client, *following, expected)] = following[0]
            if not asked:
                return
            for future in wait(asked, return_when=FIRST_COMPLETED).done:
                yield asked.pop(future), future.result()
    finally:
        client.stop()
        threads.shutdown(cancel_futures=True)


def _named_rows(
    client: ServerClient, document: int, token_ids: Sequence[int], expected: Expected
) -> ServedRows:
    try:
        return client.rows(token_ids, expected)
    except ValueError as error:
        raise ValueError(f"document {document}: {error}") from error
