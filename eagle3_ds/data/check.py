"""All rows of a recipe's data, judged as a run would judge them, and nothing written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from eagle3_ds.config.schema import DataSection
from eagle3_ds.data.encode import RowEncoder
from eagle3_ds.data.findings import Findings
from eagle3_ds.data.prepare import batches, chat_template, recipe_rows, source_shapes
from eagle3_ds.data.shapes import Shape
from eagle3_ds.data.sources import expand_sources
from eagle3_ds.data.workers import map_batches, usable_cores
from eagle3_ds.say import progress_bar


@dataclass(frozen=True)
class DataCheck:
    """Attributes:
    shapes: the shape of each source's rows.
    events: what happened to rows, by the names in `encode.EVENTS`.
    documents, tokens, supervised: what is left to train on and to hold out.
    findings: all bad rows, and notes on others.
    refusals: why a run would stop, a line each.
    """

    shapes: Mapping[str, Shape | None]
    events: Counter[str]
    documents: int
    tokens: int
    supervised: int
    findings: Findings
    refusals: Sequence[str]


def check_rows(section: DataSection, tokenizer: Any, vocab_size: int) -> DataCheck:
    """Read every row of `data.train` (up to `data.max_conversations`) and `data.heldout`.

    Args:
        vocab_size: rows of the target's embedding.

    Raises:
        ValueError: a source is none or holds rows of no known shape, or there is no chat template.
    """
    sides = {
        "train": (expand_sources(section.train, "data.train"), section.max_conversations),
        "heldout": (expand_sources(section.heldout, "data.heldout"), None),
    }
    shapes = source_shapes([file for files, _ in sides.values() for file in files], section)
    # So that what the recipe is to blame for is collected too, instead of ending the reading.
    every = section.model_copy(update={"on_bad_row": "error"})
    encoder = RowEncoder(tokenizer, chat_template(tokenizer, section, shapes.values()), every, vocab_size)
    events, findings, refusals = Counter[str](), Findings(), list[str]()
    documents = tokens = supervised = 0
    workers = section.workers or usable_cores()
    for side, (files, limit) in sides.items():
        kept = 0
        rows = batches(recipe_rows(files, section, limit))
        bar = progress_bar(desc=f"check {side}", unit=" tokens", unit_scale=True)
        with bar, closing(map_batches(encoder.encode, rows, workers)) as encoded:
            for batch in encoded:
                events.update(batch.events)
                findings.update(batch.findings)
                kept += len(batch.lengths)
                tokens += int(batch.lengths.sum())
                supervised += int(batch.loss_mask.sum())
                bar.update(int(batch.lengths.sum()))
        documents += kept
        if files and not kept:
            refusals.append(f"data.{side}: no row of {', '.join(files)} can be used")
    refusals += _refusals(section, events, findings)
    return DataCheck(shapes, events, documents, tokens, supervised, findings, refusals)


def _refusals(section: DataSection, events: Counter[str], findings: Findings) -> list[str]:
    """Why a run would stop at rows: at any bad one, or at those alone that the recipe is to blame for."""
    if findings.bad_rows and section.on_bad_row == "error":
        return [f"{findings.bad_rows:,} rows are refused (data.on_bad_row: error)"]
    if events["recipe_refuses"]:
        return [
            f"{events['recipe_refuses']:,} rows are refused, which data.on_bad_row: drop does not leave out: "
            "the recipe or the tokenizer is to blame (data.max_length, data.on_too_long)"
        ]
    return []
