"""From conversations to tokenised documents, split and counted, cached by content."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets.arrow_writer import ArrowWriter
from safetensors.torch import save_file

from eagle3_ds.config.schema import DataSection, Recipe
from eagle3_ds.data.chat import ChatTemplate, load_chat_template
from eagle3_ds.data.documents import (
    DOCUMENTS_FILE,
    FEATURES,
    PICTURE_FILE,
    TABLES_FILE,
    PreparedData,
    save_statistics,
)
from eagle3_ds.data.encode import EVENTS, EncodedBatch, RowEncoder
from eagle3_ds.data.findings import ENOUGH, Findings
from eagle3_ds.data.packing import fill, pack
from eagle3_ds.data.shapes import Shape
from eagle3_ds.data.sources import Row, expand_sources, open_source, source_fingerprint
from eagle3_ds.data.statistics import DataStatistics, draw_lengths, length_histogram
from eagle3_ds.data.workers import map_batches, usable_cores
from eagle3_ds.say import progress_bar

FORMAT = 4
"""Part of the cache key: raise it whenever the same input would give other documents."""
BATCH = 64
BATCH_BYTES = 1 << 16
"""Conversations per call of the tokenizer, at most: so many, or until they have so many bytes."""
ABANDONED_AFTER = 86400.0
"""Seconds without a write after which a folder that is written aside belongs to a run that was killed."""


def prepare_data(
    recipe: Recipe,
    tokenizer: Any,
    tokenizer_fingerprint: str,
    vocab_size: int | None = None,
    show_progress: bool = True,
) -> PreparedData:
    """Tokenise, split and count the recipe's conversations, or open them where an earlier run left them.

    The folder under `data.cache_dir` is named by the contents of the sources, the tokenizer, the template and
    the settings; it appears whole or not at all. `vocab_size` is the number of rows of the target's embedding
    (default: of the tokenizer). Raises ValueError for bad rows, files and templates, an empty data set, one
    without supervised token, documents longer than `data.max_length` unless `data.on_too_long` says what to
    do, and a full disk.
    """
    place = _place(recipe, tokenizer, tokenizer_fingerprint, vocab_size)
    if not place.path.is_dir():
        encoder = RowEncoder(tokenizer, place.template, recipe.data, place.vocab_size)
        _build(encoder, place.shapes, place.train_files, place.heldout_files, place.path, show_progress)
    data = PreparedData.open(place.path, place.fingerprint)
    # the cache knows contents, and these may have had other names when it was made
    return replace(data, statistics=replace(data.statistics, sources=place.shapes))


def documents_folder(
    recipe: Recipe, tokenizer: Any, tokenizer_fingerprint: str, vocab_size: int | None = None
) -> tuple[Path, str]:
    """The folder that `prepare_data` with these arguments opens or makes, and its fingerprint; nothing is
    written.

    Raises:
        ValueError: a source or the template cannot be used.
    """
    place = _place(recipe, tokenizer, tokenizer_fingerprint, vocab_size)
    return place.path, place.fingerprint


@dataclass(frozen=True)
class _Place:
    """Where the documents of a recipe belong, and what they are made from."""

    path: Path
    fingerprint: str
    train_files: Sequence[str]
    heldout_files: Sequence[str]
    shapes: Mapping[str, Shape | None]
    template: ChatTemplate | None
    vocab_size: int


def _place(recipe: Recipe, tokenizer: Any, tokenizer_fingerprint: str, vocab_size: int | None) -> _Place:
    section = recipe.data
    train_files = expand_sources(section.train, "data.train")
    heldout_files = expand_sources(section.heldout, "data.heldout")
    shared = sorted(set(train_files) & set(heldout_files))
    if shared:
        raise ValueError(
            f"{shared[0]} is both in data.train and in data.heldout: held-out data must be apart. Remove it "
            "from one of them, or leave data.heldout empty for a split of the training data"
        )
    vocab_size = vocab_size or len(tokenizer)
    shapes = source_shapes([*train_files, *heldout_files], section)
    template = chat_template(tokenizer, section, shapes.values())
    fingerprint = _fingerprint(
        section, template, tokenizer_fingerprint, vocab_size, train_files, heldout_files
    )
    path = Path(section.cache_dir) / f"data-{fingerprint[:16]}"
    return _Place(path, fingerprint, train_files, heldout_files, shapes, template, vocab_size)


def source_shapes(sources: Sequence[str], section: DataSection) -> dict[str, Shape | None]:
    """The shape of each source's rows, as the recipe says or as the first row shows; None where there is no
    row.
    """
    given = None if section.shape == "auto" else section.shape
    return {source: open_source(source, given)[0] for source in sources}


def recipe_rows(sources: Sequence[str], section: DataSection, limit: int | None = None) -> Iterator[Row]:
    """The rows of the sources in order, at most `limit`."""
    given = None if section.shape == "auto" else section.shape
    return islice((row for source in sources for row in open_source(source, given)[1]), limit)


def chat_template(
    tokenizer: Any, section: DataSection, shapes: Iterable[Shape | None]
) -> ChatTemplate | None:
    """The template of the recipe or the tokenizer; None when no row of these shapes needs one."""
    if set(shapes) <= {"tokenized", None}:
        return None
    return load_chat_template(tokenizer, section.chat_template, section.chat_template_arguments)


def _build(
    encoder: RowEncoder,
    shapes: Mapping[str, Shape | None],
    train_files: Sequence[str],
    heldout_files: Sequence[str],
    path: Path,
    show_progress: bool,
) -> None:
    """Write the folder aside, then give it its name: an interrupted run leaves no folder that looks whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path.parent)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        aside.chmod(0o755)  # other users may train from the same cache
        _Builder(encoder, shapes, show_progress).build(aside, train_files, heldout_files)
        _publish(aside, path)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ValueError(
            f"data.cache_dir: no space left on the disk of {path.parent} while writing tokenised documents: "
            "free some, or choose another folder. Nothing half-written was kept"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _remove_abandoned(cache: Path) -> None:
    """What killed runs left; another run that is at work, on whatever host, wrote to its folder just now."""
    for folder in cache.glob(".data-*"):
        with suppress(FileNotFoundError):  # it was finished, or removed, meanwhile
            last_write = max(entry.stat().st_mtime for entry in (folder, *folder.iterdir()))
            if time.time() - last_write > ABANDONED_AFTER:
                shutil.rmtree(folder)


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
    section: DataSection,
    template: ChatTemplate | None,
    tokenizer: str,
    vocab_size: int,
    train: Sequence[str],
    heldout: Sequence[str],
) -> str:
    content = {
        "format": FORMAT,
        "train": [source_fingerprint(file) for file in train],
        "heldout": [source_fingerprint(file) for file in heldout],
        "heldout_fraction": None if heldout else section.heldout_fraction,
        "template": None
        if template is None
        else [template.text, template.tool_text, dict(template.special_tokens)],
        "chat_template_arguments": section.chat_template_arguments,
        "shape": section.shape,
        "supervise": section.supervise,
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "max_length": section.max_length,
        "max_conversations": section.max_conversations,
        "on_too_long": section.on_too_long,
        "on_bad_row": section.on_bad_row,
        "seed": section.seed,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def heldout_mask(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """bool [n]: the documents with the smallest hashes (uint64 [n]), at least one when `fraction` > 0 and n >
    1.
    """
    wanted = round(len(hashes) * fraction)
    if fraction > 0.0 and len(hashes) > 1:
        wanted = max(wanted, 1)
    if wanted == 0:
        return np.zeros(len(hashes), dtype=bool)
    return hashes <= np.sort(hashes)[wanted - 1]


def batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows in turn, a long one by itself: what a process gets at once is as long as what others get."""
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row.content) if isinstance(row.content, bytes) else len(repr(row.content))
        if len(batch) == BATCH or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


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

    def __init__(self, encoder: RowEncoder, shapes: Mapping[str, Shape | None], show_progress: bool) -> None:
        self.encoder = encoder
        self.section = encoder.section
        self.shapes = shapes
        self.show_progress = show_progress
        self.events: Counter[str] = Counter()
        self.findings = Findings()
        self.lengths: list[int] = []
        self.supervised: list[int] = []

    def build(self, folder: Path, train_files: Sequence[str], heldout_files: Sequence[str]) -> None:
        """Write the files of `PreparedData` into `folder`."""
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
                f"no training document is left after {len(heldout_documents)} were held out: add "
                f"conversations that differ, or lower data.heldout_fraction ({self.section.heldout_fraction})"
            )
        tables = {"train": torch.from_numpy(train_documents), "heldout": torch.from_numpy(heldout_documents)}
        tables["supervised_counts"] = self._counts(folder, tables["train"])
        tables["required_tokens"] = required_tokens(self.encoder.tokenizer, tables["supervised_counts"])
        save_file(tables, folder / TABLES_FILE)
        (folder / TABLES_FILE).chmod(0o644)  # safetensors leaves it to its owner
        statistics = self._statistics(train_documents, heldout_documents, seen_in_train)
        save_statistics(folder, statistics)
        draw_lengths(statistics, folder / PICTURE_FILE)

    def _write(self, writer: ArrowWriter, files: Sequence[str], limit: int | None, side: str) -> _Side:
        kept = _Side()
        if not files:
            return kept
        before = Counter(self.events)
        rows = recipe_rows(files, self.section, limit)
        workers = self.section.workers or usable_cores()
        progress = progress_bar(
            desc=f"tokenise {side}", unit=" tokens", unit_scale=True, disable=not self.show_progress
        )
        with progress, closing(map_batches(self.encoder.encode, batches(rows), workers)) as encoded:
            for batch in encoded:
                self._write_batch(writer, batch, kept)
                read = self.events["conversations"] - before["conversations"]
                told = {"conversations": read if limit is None else f"{read}/{limit}"}
                if self.findings.bad_rows:
                    told["bad rows"] = self.findings.bad_rows
                progress.set_postfix(told, refresh=False)
                progress.update(int(batch.lengths.sum()) + batch.events["tokens_left_out"])
                if self.section.on_bad_row == "error" and self.findings.bad_rows >= ENOUGH:
                    break
        if self.findings.bad_rows and (self.section.on_bad_row == "error" or not kept.documents):
            raise self.findings.error(self.events["conversations"])
        if not kept.documents:
            self._refuse_empty(files, side, self.events - before)
        return kept

    def _write_batch(self, writer: ArrowWriter, batch: EncodedBatch, kept: _Side) -> None:
        self.events.update(batch.events)
        self.findings.update(batch.findings)
        if not len(batch.lengths):
            return
        numbers = np.arange(len(self.lengths), len(self.lengths) + len(batch.lengths))
        cuts = np.cumsum(batch.lengths)[:-1]
        masks = np.split(batch.loss_mask, cuts)
        writer.write_batch(
            {"input_ids": np.split(batch.input_ids, cuts), "loss_mask": masks, "document_id": numbers}
        )
        self.lengths += batch.lengths.tolist()
        self.supervised += [int(mask.sum()) for mask in masks]
        kept.hashes += batch.hashes.tolist()
        kept.documents += numbers.tolist()

    def _refuse_empty(self, files: Sequence[str], side: str, events: Counter[str]) -> None:
        names, read = ", ".join(files), events["conversations"]
        if read == 0:
            raise ValueError(
                f"data.{side}: the data set is empty, no conversation in {names}: name files that hold rows"
            )
        if events["unsupervised_dropped"]:
            raise ValueError(
                f"data.{side}: no supervised token at all in {read} conversations of {names}: "
                f"{events['unsupervised_dropped']} of them reach data.max_length ({self.section.max_length}) "
                "before the assistant speaks. Raise data.max_length"
            )
        raise ValueError(
            f"data.{side}: all {read} conversations of {names} are longer than data.max_length "
            f"({self.section.max_length}) and were dropped. Raise data.max_length, or set data.on_too_long: "
            "split"
        )

    def _counts(self, folder: Path, train_documents: torch.Tensor) -> torch.Tensor:
        """int64 [V]: how often each token is supervised in the training documents."""
        counts = np.zeros(self.encoder.vocab_size, dtype=np.int64)
        documents = (
            Dataset.from_file(str(folder / DOCUMENTS_FILE))
            .select(train_documents.numpy())
            .with_format("numpy")
        )
        for batch in documents.iter(batch_size=256):
            tokens, mask = np.concatenate(list(batch["input_ids"])), np.concatenate(list(batch["loss_mask"]))
            counts += np.bincount(tokens[mask], minlength=len(counts))
        return torch.from_numpy(counts)

    def _statistics(self, train: np.ndarray, heldout: np.ndarray, seen_in_train: int) -> DataStatistics:
        lengths, supervised = np.array(self.lengths), np.array(self.supervised)
        self.events["bad_rows_dropped"] = self.findings.bad_rows
        packs = pack(lengths[train].tolist(), self.section.max_length, self.section.seed)
        return DataStatistics(
            sources=dict(self.shapes),
            train_documents=len(train),
            heldout_documents=len(heldout),
            heldout_in_train=seen_in_train,
            train_tokens=int(lengths[train].sum()),
            train_supervised_tokens=int(supervised[train].sum()),
            heldout_tokens=int(lengths[heldout].sum()),
            heldout_supervised_tokens=int(supervised[heldout].sum()),
            longest=int(lengths.max()),
            packs=len(packs),
            fill=fill(lengths[train].tolist(), self.section.max_length, packs),
            histogram=length_histogram(lengths[train], supervised[train]),
            notes=self._notes(),
            **{name: self.events[name] for name in EVENTS},
        )

    def _notes(self) -> dict[str, int]:
        """What is told of rows, by sentence; a dropped row by its fault."""
        dropped = {f"dropped as bad: {fault}": len(rows) for fault, (_, rows) in self.findings.faults.items()}
        return dropped | {note: count for note, (count, _) in self.findings.notes.items()}


def required_tokens(tokenizer: Any, supervised_counts: torch.Tensor) -> torch.Tensor:
    """int64 [n], ascending: the tokens that a draft vocabulary must hold however rare they are.

    The tokenizer's named special tokens (end of text among them), and every other special token that the
    assistant generates: those that end its turns and those within them. Reserved tokens that nobody uses are
    not among them.
    """
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    used = {number for number in special if number < len(supervised_counts) and supervised_counts[number]}
    named = {number for number in tokenizer.all_special_ids if number < len(supervised_counts)}
    return torch.tensor(sorted(named | used), dtype=torch.int64)
