"""Asking a server ahead of the training for the documents that it will need, as far as a buffer allows.

One process of each draft_dp group holds a `LookAhead`. The files that it has asked for wait in the folder
where the server writes, until the pack that they belong to is trained on.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from eagle3_ds.serving.client import ServerClient
from eagle3_ds.serving.rows import Expected

Document = tuple[int, Sequence[int]]
"""The id of a document, and its token ids."""


@dataclass(frozen=True)
class _Pack:
    """Documents that were asked for together, and where the file of each will be."""

    documents: tuple[int, ...]
    files: tuple[Path, ...]
    asked: tuple[Future[None], ...]
    num_bytes: int


class LookAhead:
    """Documents of the packs that follow, asked for in order.

    Args:
        row_bytes: bytes of one token's hidden states in a file.
        limit: bytes that files may take. One pack is always asked for, however large it is.
        concurrency: documents that are asked for at once.
    """

    def __init__(
        self, client: ServerClient, expected: Expected, row_bytes: int, limit: int, concurrency: int
    ) -> None:
        self.client, self.expected, self.row_bytes, self.limit = client, expected, row_bytes, limit
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="stream")
        self._following: Iterator[Sequence[Document]] = iter(())
        self._next: Sequence[Document] | None = None
        self._ahead: deque[_Pack] = deque()
        self._taken: dict[Path, int] = {}
        self._serial = 0

    def announce(self, packs: Iterator[Sequence[Document]]) -> None:
        """Say which packs will be taken, in order; they are asked for from now on."""
        self._following = packs
        self._fill()

    def take(self, pack: Sequence[Document], places: Sequence[Path]) -> None:
        """Wait for the files of a pack and move them to `places`, one for each document. A pack that was not
        announced, or that comes before its turn, is asked for now.

        Raises:
            ValueError: the server failed, or gave other rows than those of a document.
        """
        documents = tuple(document for document, _ in pack)
        is_next = bool(self._ahead) and self._ahead[0].documents == documents
        found = self._ahead.popleft() if is_next else self._ask(pack)
        for document, file, asked, place in zip(documents, found.files, found.asked, places, strict=True):
            try:
                asked.result()
            except ValueError as error:
                raise ValueError(f"document {document}: {error}") from error
            file.replace(place)
        self._taken[places[0]] = found.num_bytes

    def release(self, places: Sequence[Path]) -> None:
        """Remove the files that `take` put to `places`, after every rank has read its rows of them."""
        for place in places:
            place.unlink()
        del self._taken[places[0]]
        self._fill()

    def close(self) -> None:
        """Stop asking, and remove every file that was not taken."""
        self.client.stop()
        self._threads.shutdown(cancel_futures=True)
        for file in [*(file for pack in self._ahead for file in pack.files), *self._taken]:
            with contextlib.suppress(OSError):
                file.unlink()

    def _fill(self) -> None:
        """Ask for packs until the buffer is full."""
        while True:
            if self._next is None:
                self._next = next(self._following, None)
            if self._next is None or (self._held and self._held + self._bytes(self._next) > self.limit):
                return
            self._ahead.append(self._ask(self._next))
            self._next = None

    @property
    def _held(self) -> int:
        return sum(pack.num_bytes for pack in self._ahead) + sum(self._taken.values())

    def _bytes(self, pack: Sequence[Document]) -> int:
        return sum(len(token_ids) for _, token_ids in pack) * self.row_bytes

    def _ask(self, pack: Sequence[Document]) -> _Pack:
        folder, prefix = self.client.folder, self.client.prefix
        files = tuple(folder / f"{prefix}-ahead-{self._serial}-{i}.safetensors" for i in range(len(pack)))
        self._serial += 1
        asked = tuple(
            self._threads.submit(self.client.file, token_ids, self.expected, file)
            for (_, token_ids), file in zip(pack, files, strict=True)
        )
        return _Pack(tuple(document for document, _ in pack), files, asked, self._bytes(pack))
