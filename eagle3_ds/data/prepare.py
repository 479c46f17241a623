"""From conversations to tokenised documents, split and counted, cached by content."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets.arrow_writer import ArrowWriter
from safetensors.torch import save_file
from tqdm.auto import tqdm

from eagle3_ds.config.schema import DataSection, Recipe
from eagle3_ds.data.chat import encode_conversations, read_chat_template, resolve_chat_template, validate_row
from eagle3_ds.data.documents import (
    DOCUMENTS_FILE,
    FEATURES,
    TABLES_FILE,
    DataStatistics,
    PreparedData,
    save_statistics,
)
from eagle3_ds.data.sources import expand_sources, read_rows, source_fingerprint

FORMAT = 1
"""Part of the cache key: raise it whenever the same input would give other documents."""
BATCH = 64
"""Conversations per call of the tokenizer."""


def prepare_data(
    recipe: Recipe,
    tokenizer: Any,
    tokenizer_fingerprint: str,
    vocab_size: int | None = None,
    show_progress: bool = True,
) -> PreparedData:
    """Tokenise, split and count the recipe's conversations, or open them where an earlier run left them.

    The folder under `data.cache_dir` is named by the contents of the sources, the tokenizer, the template and the
    settings; it appears whole or not at all. `vocab_size` is the number of rows of the target's embedding (default:
    of the tokenizer). Raises ValueError for bad rows, files and templates, an empty data set, one without supervised
    token, and documents longer than `data.max_length` unless `data.on_too_long` says what to do.
    """
    section = recipe.data
    template = resolve_chat_template(tokenizer, read_chat_template(section.chat_template))
    train_files = expand_sources(section.train, "data.train")
    heldout_files = expand_sources(section.heldout, "data.heldout")
    shared = sorted(set(train_files) & set(heldout_files))
    if shared:
        raise ValueError(
            f"{shared[0]} is both in data.train and in data.heldout: held-out data must be apart. Remove it from "
            "one of "
            "them, or leave data.heldout empty for a split of the training data"
        )
    vocab_size = vocab_size or len(tokenizer)
    fingerprint = _fingerprint(section, template, tokenizer_fingerprint, vocab_size, train_files, heldout_files)
    path = Path(section.cache_dir) / f"data-{fingerprint[:16]}"
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            builder = _Builder(section, tokenizer, template, vocab_size, show_progress)
            builder.build(aside, train_files, heldout_files)
            _publish(aside, path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return PreparedData.open(path, fingerprint)


def _publish(aside: Path, path: Path) -> None:
    """Give the finished folder its name.

    Another process may have finished the same content first: its folder is as good.
    """
    try:
        os.rename(aside, path)
    except OSError:
        if not path.is_dir():
            raise


def _fingerprint(
    section: DataSection, template: str, tokenizer: str, vocab_size: int, train: Sequence[str], heldout: Sequence[str]
) -> str:
    content = {
        "format": FORMAT,
        "train": [source_fingerprint(file) for file in train],
        "heldout": [source_fingerprint(file) for file in heldout],
        "heldout_fraction": None if heldout else section.heldout_fraction,
        "template": template,
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "max_length": section.max_length,
        "max_conversations": section.max_conversations,
        "on_too_long": section.on_too_long,
        "seed": section.seed,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def conversation_hash(messages: list[dict], seed: int) -> int:
    """64 bits of (seed, content): the same conversation always falls on the same side of the split."""
    text = json.dumps([seed, messages], sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def heldout_mask(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """bool [n]: the documents with the smallest hashes (uint64 [n]), at least one when `fraction` > 0 and n > 1."""
    wanted = round(len(hashes) * fraction)
    if fraction > 0.0 and len(hashes) > 1:
        wanted = max(wanted, 1)
    if wanted == 0:
        return np.zeros(len(hashes), dtype=bool)
    return hashes <= np.sort(hashes)[wanted - 1]


@dataclass
class _Side:
    """What was kept of the training or the held-out sources: hash and document number per row."""

    hashes: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)

    @property
    def numbers(self) -> np.ndarray:
        """int64 [n], the document numbers."""
        return np.array(self.documents, dtype=np.int64)


class _Builder:
    """One run over the sources. Documents are numbered in the order they are written."""

    def __init__(self, section: DataSection, tokenizer: Any, template: str, vocab_size: int, show_progress: bool) -> None:
        self.section = section
        self.tokenizer = tokenizer
        self.template = template
        self.vocab_size = vocab_size
        self.show_progress = show_progress
        self.conversations = self.too_long_dropped = self.truncated = self.unsupervised_dropped = 0
        self.lengths: list[int] = []
        self.supervised: list[int] = []

    def build(self, folder: Path, train_files: Sequence[str], heldout_files: Sequence[str]) -> None:
        """Write the three files of `PreparedData` into `folder`."""
        with ArrowWriter(path=str(folder / DOCUMENTS_FILE), features=FEATURES) as writer:
            train = self._write(writer, train_files, self.section.max_conversations, "train")
            heldout = self._write(writer, heldout_files, None, "heldout")
            writer.finalize()
        seen_in_train = 0
        if heldout_files:
            train_documents, heldout_documents = train.numbers, heldout.numbers
            seen_in_train = int(np.isin(heldout.hashes, train.hashes).sum())
        else:
            mask = heldout_mask(np.array(train.hashes, dtype=np.uint64), self.section.heldout_fraction)
            train_documents, heldout_documents = train.numbers[~mask], train.numbers[mask]
        if not len(train_documents):
            raise ValueError(
                f"no training document is left after {len(heldout_documents)} were held out: add conversations that "
                f"differ, or lower data.heldout_fraction ({self.section.heldout_fraction})"
            )
        tables = {"train": torch.from_numpy(train_documents), "heldout": torch.from_numpy(heldout_documents)}
        tables["supervised_counts"] = self._counts(folder, tables["train"])
        save_file(tables, folder / TABLES_FILE)
        save_statistics(folder, self._statistics(train_documents, heldout_documents, seen_in_train))

    def _write(self, writer: ArrowWriter, files: Sequence[str], limit: int | None, side: str) -> _Side:
        kept = _Side()
        if not files:
            return kept
        rows = islice((row for file in files for row in read_rows(file)), limit)
        before = self.conversations, self.unsupervised_dropped
        progress = tqdm(total=limit, desc=f"tokenise {side}", unit=" conversations", disable=not self.show_progress)
        with progress:
            while batch := list(islice(rows, BATCH)):
                for digest, input_ids, loss_mask in self._encode(batch):
                    document = len(self.lengths)
                    writer.write({"input_ids": input_ids, "loss_mask": loss_mask, "document_id": document})
                    self.lengths.append(len(input_ids))
                    self.supervised.append(sum(loss_mask))
                    kept.hashes.append(digest)
                    kept.documents.append(document)
                progress.update(len(batch))
        if not kept.documents:
            self._refuse_empty(files, side, self.conversations - before[0], self.unsupervised_dropped - before[1])
        return kept

    def _refuse_empty(self, files: Sequence[str], side: str, read: int, unsupervised: int) -> None:
        names = ", ".join(files)
        if read == 0:
            raise ValueError(f"data.{side}: the data set is empty, no conversation in {names}: name files that hold rows")
        if unsupervised:
            raise ValueError(
                f"data.{side}: no supervised token at all in {read} conversations of {names}: {unsupervised} of them "
                f"reach data.max_length ({self.section.max_length}) before the assistant speaks. Raise data.max_length"
            )
        raise ValueError(
            f"data.{side}: all {read} conversations of {names} are longer than data.max_length "
            f"({self.section.max_length}) and were dropped. Raise data.max_length, or set data.on_too_long: truncate"
        )

    def _encode(self, batch: list[tuple[str, Any]]) -> Iterator[tuple[int, list[int], list[bool]]]:
        """(hash, input_ids, loss_mask) of the rows that are kept."""
        places = [place for place, _ in batch]
        conversations = [validate_row(row, place) for place, row in batch]
        encoded = encode_conversations(self.tokenizer, conversations, self.template, places)
        self.conversations += len(batch)
        limit = self.section.max_length
        for place, messages, (input_ids, loss_mask) in zip(places, conversations, encoded, strict=True):
            if len(input_ids) > limit:
                if self.section.on_too_long == "error":
                    raise ValueError(
                        f"{place}: the conversation has {len(input_ids)} tokens, more than data.max_length {limit}: "
                        "raise "
                        "data.max_length, or set data.on_too_long to 'drop' or 'truncate'"
                    )
                if self.section.on_too_long == "drop":
                    self.too_long_dropped += 1
                    continue
                self.truncated += 1
                if not any(loss_mask[:limit]):
                    self.unsupervised_dropped += 1
                    continue
            if max(input_ids) >= self.vocab_size:
                raise ValueError(
                    f"{place}: token id {max(input_ids)} lies outside the target's vocabulary of {self.vocab_size}: "
                    "the "
                    "tokenizer and the target do not belong together"
                )
            yield conversation_hash(messages, self.section.seed), input_ids[:limit], loss_mask[:limit]

    def _counts(self, folder: Path, train_documents: torch.Tensor) -> torch.Tensor:
        """int64 [V]: how often each token is supervised in the training documents."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        documents = Dataset.from_file(str(folder / DOCUMENTS_FILE)).select(train_documents.numpy()).with_format("numpy")
        for batch in documents.iter(batch_size=256):
            tokens, mask = np.concatenate(list(batch["input_ids"])), np.concatenate(list(batch["loss_mask"]))
            counts += np.bincount(tokens[mask], minlength=self.vocab_size)
        return torch.from_numpy(counts)

    def _statistics(self, train: np.ndarray, heldout: np.ndarray, seen_in_train: int) -> DataStatistics:
        lengths, supervised = np.array(self.lengths), np.array(self.supervised)
        return DataStatistics(
            conversations=self.conversations,
            train_documents=len(train),
            heldout_documents=len(heldout),
            too_long_dropped=self.too_long_dropped,
            truncated=self.truncated,
            unsupervised_dropped=self.unsupervised_dropped,
            heldout_in_train=seen_in_train,
            train_tokens=int(lengths[train].sum()),
            train_supervised_tokens=int(supervised[train].sum()),
            heldout_tokens=int(lengths[heldout].sum()),
            heldout_supervised_tokens=int(supervised[heldout].sum()),
            longest=int(lengths.max()),
        )
