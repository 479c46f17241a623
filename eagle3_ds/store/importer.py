"""Importing the hidden-state files of other trainers: their tokens become rows for `data.train`, their states
fill a hidden-state store.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
from torch import Tensor

from eagle3_ds.store.foreign import ForeignFiles
from eagle3_ds.store.writer import HiddenStateWriter

ROWS_AT_ONCE = 8192
"""How many rows of a sample are copied at a time."""
Finish = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Turns last hidden states [n, Ht], as the files have them, into teacher [n, Ht] after the final norm, and
teacher_token int64 [n].
"""


@dataclass
class ImportedRows:
    """Which samples became rows, and what was left out.

    Attributes:
        samples: {digest of the tokens of a sample's document: number of the sample in the files}.
        rows, tokens: how many rows were written, and how many tokens they have.
        without_states: samples left out because the files lack their hidden states.
        unsupervised: samples left out because no token is supervised.
        padding: rows of padding left out.
    """

    samples: dict[str, int] = field(default_factory=dict)
    rows: int = 0
    tokens: int = 0
    without_states: int = 0
    unsupervised: int = 0
    padding: int = 0

    @property
    def text(self) -> str:
        """What was imported and what was left out, for people."""
        left_out = [
            f"{number:,} {what}"
            for number, what in (
                (self.without_states, "samples without hidden states"),
                (self.unsupervised, "samples without a supervised token"),
                (self.padding, "rows of padding"),
            )
            if number
        ]
        return f"{self.rows:,} rows of {self.tokens:,} tokens; left out: {', '.join(left_out) or 'nothing'}"


def write_rows(
    files: ForeignFiles, path: Path, max_length: int, progress: Iterable[int] | None = None
) -> ImportedRows:
    """Write the samples' tokens and loss masks to `path` as JSON lines. The file appears complete or not at
    all.

    Args:
        max_length: `data.max_length`, at which the prepare stage cuts documents. The digests are of the
            tokens up to there; the rows are written whole.
        progress: the sample numbers, wrapped by a progress bar.

    Raises:
        ValueError: a file is damaged, no sample can teach the draft, or `path` exists with other rows.
    """
    found = ImportedRows()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    with open(aside, "w", encoding="utf-8") as stream:
        for index in range(len(files)) if progress is None else progress:
            sample = files.sample(index)
            if sample is None:
                found.without_states += 1
                continue
            found.padding += sample.padding
            if not sample.loss_mask.any():
                found.unsupervised += 1
                continue
            tokens = sample.token_ids.numpy()
            found.samples[token_digest(tokens[:max_length])] = index
            found.rows, found.tokens = found.rows + 1, found.tokens + len(tokens)
            json.dump({"input_ids": tokens.tolist(), "loss_mask": sample.loss_mask.int().tolist()}, stream)
            stream.write("\n")
    if not found.rows:
        aside.unlink()
        raise ValueError(f"none of the {len(files)} samples of {files.writer} can teach: {found.text}")
    if path.exists() and not filecmp.cmp(path, aside, shallow=False):
        aside.unlink()
        raise ValueError(
            f"{path} exists and holds other rows than these files: name another file in data.train, or "
            "remove it"
        )
    os.replace(aside, path)
    return found


def token_digest(tokens: np.ndarray) -> str:
    """A digest of token ids, integers [L]."""
    return hashlib.blake2b(tokens.astype(np.int64).tobytes(), digest_size=16).hexdigest()


def match_documents(sides: Sequence[datasets.Dataset], rows: ImportedRows) -> dict[int, list[int]]:
    """Find the sample of each prepared document: the one whose first tokens are the document's.

    Args:
        sides: the prepared data sets, training and held-out.

    Returns:
        {number of the sample: ids of its documents}.

    Raises:
        ValueError: a document is not the beginning of any sample.
    """
    documents: dict[int, list[int]] = {}
    for side in sides:
        for row in side.with_format("numpy"):
            sample = rows.samples.get(token_digest(row["input_ids"]))
            if sample is None:
                raise ValueError(
                    f"document {int(row['document_id'])} with {len(row['input_ids'])} tokens is not the "
                    "beginning of an imported sample: its hidden states would be those of another text "
                    "before it. Set data.on_too_long to drop, truncate or error, and let data.train name "
                    "nothing but the imported rows"
                )
            documents.setdefault(sample, []).append(int(row["document_id"]))
    return documents


def fill_store(
    files: ForeignFiles,
    documents: Mapping[int, Sequence[int]],
    writer: HiddenStateWriter,
    finish: Finish,
    progress: Iterable[int] | None = None,
) -> None:
    """Write the hidden states of all documents that the store does not have yet.

    Args:
        documents: {number of the sample: ids of its documents}, from `match_documents`.
        progress: the sample numbers, wrapped by a progress bar.

    Raises:
        ValueError: a file is damaged or has gone, states are not finite, or the disk is full.
    """
    missing = set(writer.missing())
    for index in progress or documents:
        wanted = [document for document in documents[index] if document in missing]
        if not wanted:
            continue
        sample = files.sample(index)
        if sample is None:
            raise ValueError(
                f"the hidden states of sample {index} of {files.writer} vanished: bring the file back and "
                "run again"
            )
        for document in wanted:
            length = writer.lengths[document]
            for start in range(0, length, ROWS_AT_ONCE):
                aux, last = sample.states(start, min(start + ROWS_AT_ONCE, length))
                writer.append(document, aux, *finish(last), start=start)
