"""Hidden states from a server while the draft is trained (`data.hidden_states: stream`): no store on disk.

One rank of each sp group, the first, asks the server for the documents of the packs that follow. The server
writes one file per document into a folder that all ranks see; each rank reads from it the rows of its own
slots and of their halo, and no others. When all have read theirs, the first rank removes the files.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from eagle3_ds.algorithms import algorithm_of
from eagle3_ds.collectives import all_gather_rows
from eagle3_ds.config import Recipe
from eagle3_ds.layout import LocalRows, Rows
from eagle3_ds.serving.ahead import Document, LookAhead
from eagle3_ds.serving.client import LONG_DELAY, SHORT_DELAY, ServerClient, api_key
from eagle3_ds.serving.rows import Expected, RowFile
from eagle3_ds.store import RowFormat
from eagle3_ds.store.rows import as_stored
from eagle3_ds.targets import load_text_config, resolve_path
from eagle3_ds.targets.end import load_target_end
from eagle3_ds.topology import Topology
from eagle3_ds.train.online import HeldRows
from eagle3_ds.train.row_exchange import IntArray
from eagle3_ds.train.spans import plan_spans

ROWS_AT_ONCE = 8192
"""How many last hidden states are normed at a time, as where a store is filled."""


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
        aux_width = (len(self.expected.layer_ids) - 1) * config.hidden_size
        self.layout = RowFormat(aux_width, config.hidden_size, recipe.data.hidden_dtype)
        self._end = load_target_end(path, config, getattr(torch, section.dtype), topology.device)
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
        """The rows of a packed sequence. Collective over the sp group.

        Args:
            documents: document ids.
            token_ids: int64 [L], whole on every rank of the sp group.
            loss_mask: bool [L], whole on every rank of the sp group.
            lengths: the tokens of each document.

        Returns:
            In host memory: `teacher_token` int64 [L], whole; `aux`, this rank's slots of rows
            [L, layers * Ht]; `teacher`, those rows of [L, Ht] that this rank's live slots read.

        Raises:
            ValueError: the server failed, or the rows are not those of these documents.
        """
        places = [self.folder / f"{self._prefix}-{self._turn}-{i}.safetensors" for i in range(len(documents))]
        self._turn += 1
        if self._ahead is not None:
            pack = zip(documents, token_ids.split(list(lengths)), strict=True)
            self._ahead.take([(document, ids.tolist()) for document, ids in pack], places)
        files = [self._open(place) for place in places]
        plan = plan_spans(self.recipe, lengths, loss_mask)
        place, halo = self.topology.place, algorithm_of(self.recipe).supervision(self.recipe).halo
        slots = plan.slots(place.ring_rank, place.ulysses_rank)
        own = slots[slots < plan.length]
        taught = plan.teacher_slots(place.ring_rank, place.ulysses_rank, halo)
        rows = self._read(_Packed(files, lengths), np.sort(own), taught)
        tokens = torch.zeros(len(slots), dtype=torch.int64)
        tokens[: len(own)] = LocalRows(rows.token, own, plan.length)[:]
        tokens = all_gather_rows(tokens.to(self.topology.device), self.topology.sp_group).cpu()
        # The exchange has ended, so every rank of the group has read its rows.
        if self._ahead is not None:
            self._ahead.release(places)
        return tokens[plan.sequence_order[: plan.length]], rows.aux, rows.teacher

    def _read(self, packed: _Packed, own: IntArray, taught: IntArray) -> _Read:
        """Read the rows of the slots `own` and `taught`, int64 and ascending, a tile at a time."""
        read, layout = np.union1d(own, taught), self.layout
        aux = torch.empty(len(own), layout.aux_width, dtype=layout.read_dtype)
        teacher = torch.empty(len(taught), layout.teacher_width, dtype=layout.read_dtype)
        token = torch.empty(len(read), dtype=torch.int64)
        rows = LocalRows(packed, read, len(packed))
        for first in range(0, len(read), ROWS_AT_ONCE):
            tile = read[first : first + ROWS_AT_ONCE]
            hidden = rows[first : first + len(tile)]
            normed, chosen = self._end.finish(hidden[:, -1], is_normed=False)
            token[first : first + len(tile)] = chosen
            for wanted, held, found in ((own, aux, hidden[:, :-1].flatten(1)), (taught, teacher, normed)):
                start, stop = np.searchsorted(wanted, (tile[0], tile[-1] + 1))
                held[start:stop] = self._as_stored(found.cpu()[np.isin(tile, wanted)])
        return _Read(HeldRows(own, aux), HeldRows(taught, teacher), HeldRows(read, token))

    def close(self) -> None:
        """Stop asking the server; its files that nobody needs any more are removed. Not collective."""
        if self._ahead is not None:
            self._ahead.close()

    def _look_ahead(self, url: str) -> LookAhead:
        server = self.recipe.target.server
        client = ServerClient(
            url,
            self.folder,
            self._prefix,
            server.timeout_seconds,
            server.retries,
            key=api_key(server.key_variable),
        )
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

    def _as_stored(self, rows: Tensor) -> Tensor:
        return as_stored(rows, self.layout.dtype, self.layout.teacher_width)


@dataclass(frozen=True)
class _Read:
    """This rank's rows of a pack, by slots of the whole sequence."""

    aux: HeldRows
    teacher: HeldRows
    token: HeldRows


class _Packed:
    """The rows [n, S, Ht] of several files laid end to end; rows are read, and checked, when they are
    sliced.
    """

    def __init__(self, files: Sequence[RowFile], lengths: Sequence[int]) -> None:
        self.files, self.lengths = files, lengths

    def __len__(self) -> int:
        return sum(self.lengths)

    def __getitem__(self, rows: slice) -> Tensor:
        parts, offset = [], 0
        for file, length in zip(self.files, self.lengths, strict=True):
            first, last = max(rows.start - offset, 0), min(rows.stop - offset, length)
            if first < last:
                parts.append(file.rows(first, last))
            offset += length
        return torch.cat(parts) if parts else self.files[0].rows(0, 0)
