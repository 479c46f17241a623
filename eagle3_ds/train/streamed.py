"""Hidden states from a server while the draft is trained (`data.hidden_states: stream`): no store on disk.

One rank of each sp group, the first, asks the server for the documents of the packs that follow. The server
writes one file per document into a folder that all ranks see; each rank reads from it the rows of its own
slots and of their halo, and no others. When all have read theirs, the first rank removes the files.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from eagle3_ds.config import Recipe
from eagle3_ds.layout import LocalRows, Rows
from eagle3_ds.serving.ahead import Document, LookAhead
from eagle3_ds.serving.client import LONG_DELAY, SHORT_DELAY, ServerClient, require_key
from eagle3_ds.serving.rows import Expected, RowFile
from eagle3_ds.targets import load_text_config, resolve_path
from eagle3_ds.targets.end import load_target_end
from eagle3_ds.topology import Topology
from eagle3_ds.train.served_spans import SpanReader
from eagle3_ds.train.spans import whole_tokens


def files_of(recipe: Recipe) -> str:
    """How the names of a run's files in the server's folder begin; runs may share the folder."""
    return "stream-" + hashlib.sha256(str(Path(recipe.output_dir).resolve()).encode()).hexdigest()[:12]


class StreamedStates:
    """Has the methods of a hidden-state store, and gives the rows that a store filled by the same server
    would give. The constructor and `states` are collective over the sp group.

    Args:
        url, folder: of the server, and where it writes, as this host sees it.
        weights: the digest of the target's weights.

    Raises:
        ValueError: the server does not answer, or the target's norm or head is not found.
    """

    def __init__(self, recipe: Recipe, topology: Topology, url: str, folder: Path, weights: str) -> None:
        section, path = recipe.target, resolve_path(recipe.target.path)
        config = load_text_config(path)
        self.recipe, self.topology, self.folder = recipe, topology, folder
        self.expected = Expected.of(section, config, weights)
        end = load_target_end(path, config, getattr(torch, section.dtype), topology.device)
        self._reader = SpanReader(recipe, topology, self.expected, end, recipe.data.hidden_dtype)
        self._turn = 0
        self._prefix = f"{files_of(recipe)}-{topology.place.dp_rank}"
        self._ahead: LookAhead | None = None
        if topology.sp_rank == 0:
            self._ahead = self._look_ahead(url)
        if topology.sp_group is not None:
            # Nobody looks for a file before those that an earlier run left are gone.
            dist.barrier(group=topology.sp_group)

    def announce(self, packs: Iterator[Sequence[Document]]) -> None:
        """Say which packs follow, in order; the first rank of the sp group asks for them from now on."""
        if self._ahead is not None:
            self._ahead.announce(packs)

    def require_documents(self, lengths: Mapping[int, int]) -> None:
        """Accept any documents: their hidden states are asked for when they are trained on."""

    def states(
        self, documents: Sequence[int], token_ids: Tensor, loss_mask: Tensor, lengths: Sequence[int]
    ) -> tuple[Tensor, Rows, Rows]:
        """The rows of a packed sequence of these documents. Collective over the sp group; takes and returns
        what `OnlineStates.states` does.

        Raises:
            ValueError: the server failed, or the rows are not those of these documents.
        """
        places = [self.folder / f"{self._prefix}-{self._turn}-{i}.safetensors" for i in range(len(documents))]
        self._turn += 1
        if self._ahead is not None:
            pack = zip(documents, token_ids.split(list(lengths)), strict=True)
            self._ahead.take([(document, ids.tolist()) for document, ids in pack], places)
        files = [self._open(place) for place in places]
        rows = self._reader.read(files, lengths, loss_mask)
        plan, own = rows.plan, rows.own
        place = self.topology.place
        tokens = torch.zeros(len(plan.slots(place.ring_rank, place.ulysses_rank)), dtype=torch.int64)
        tokens[: len(own)] = LocalRows(rows.token, own, plan.length)[:]
        tokens = whole_tokens(tokens.to(self.topology.device), plan, self.topology.sp_group)
        # The exchange has ended, so every rank of the group has read its rows.
        if self._ahead is not None:
            self._ahead.release(places)
        return tokens, rows.aux, rows.teacher

    def close(self) -> None:
        """Stop asking the server; its files that nobody needs any more are removed. Not collective."""
        if self._ahead is not None:
            self._ahead.close()

    def _look_ahead(self, url: str) -> LookAhead:
        server = self.recipe.target.server
        require_key(server.key_variable)
        limits = (server.timeout_seconds, server.retries)
        # What cannot be checked was said when the server was tried.
        client = ServerClient(url, self.folder, self._prefix, *limits, server.key_variable, warns=False)
        client.connect()
        itemsize = getattr(torch, self.expected.dtype).itemsize
        row_bytes = len(self.expected.layer_ids) * self.expected.hidden_size * itemsize + 12
        return LookAhead(client, self.expected, row_bytes, int(server.buffer_gib * 2**30), server.concurrency)

    def _open(self, place: Path) -> RowFile:
        """The file, once the first rank of the group has put it there."""
        server = self.recipe.target.server
        longest = 2 * server.timeout_seconds * (server.retries + 1)
        deadline, delay = time.monotonic() + longest, SHORT_DELAY
        while not place.is_file():
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{place} did not appear in {longest:g} s: all hosts must see the folder of "
                    "target.server.folder, on a file system that they share with the server"
                )
            time.sleep(delay)
            delay = min(2 * delay, LONG_DELAY)
        return RowFile(place, self.expected)
