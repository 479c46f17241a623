"""How long the rows of a data set are, from a sample of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eagle3_ds.config.schema import DataSection
from eagle3_ds.data.encode import RowEncoder
from eagle3_ds.data.findings import Findings
from eagle3_ds.data.prepare import chat_template, recipe_rows, source_shapes
from eagle3_ds.data.shapes import Shape
from eagle3_ds.data.sources import Row, expand_sources

ROWS = 512
"""Rows of a sample."""
BYTES = 2**26
"""Bytes of its rows at which a sample ends, so that rows of 100,000 tokens do not take for ever."""
UNBOUNDED = 2**40


@dataclass(frozen=True)
class DataSample:
    """Attributes:
    shapes: the shape of each source's rows.
    rows: of all sources.
    sampled: of them tokenised.
    lengths: tokens of each good row of the sample, the longest row of all among them.
    supervised: of these tokens, those that the assistant wrote.
    tokens: of all rows, estimated by their bytes.
    findings: bad rows of the sample, and notes.
    """

    shapes: dict[str, Shape | None]
    rows: int
    sampled: int
    lengths: tuple[int, ...]
    supervised: int
    tokens: int
    findings: Findings

    @property
    def supervised_share(self) -> float:
        return self.supervised / sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def tokens_up_to(self, length: int) -> int:
        """Tokens of all rows that have at most `length`, estimated by the share of them in the sample."""
        kept = sum(own for own in self.lengths if own <= length)
        return round(self.tokens * kept / sum(self.lengths))

    def longer_than(self, length: int) -> int:
        """Rows of the sample that have more tokens than `length`."""
        return sum(own > length for own in self.lengths)


def sample_data(sources: Sequence[str], tokenizer: Any, vocab_size: int, seed: int = 0) -> DataSample:
    """Read all rows, and tokenise those of a sample: rows drawn at random, and the one of most bytes.

    Args:
        sources: as in `data.train`.
        vocab_size: rows of the target's embedding.

    Raises:
        ValueError: a source is none, holds rows of no known shape, there is no chat template for them, or no
            row of the sample can be used.
    """
    section = DataSection(train=tuple(sources), max_length=UNBOUNDED)
    files = expand_sources(section.train, "data.train")
    shapes = source_shapes(files, section)
    template = chat_template(tokenizer, section, shapes.values())
    rows, count, all_bytes = _draw(files, section, seed)
    if not count:
        raise ValueError(f"--data: no row in {', '.join(files)}: name files that hold conversations")
    batch = RowEncoder(tokenizer, template, section, vocab_size).encode([row for row, _ in rows])
    if not len(batch.lengths):
        raise batch.findings.error(len(rows))
    tokens_per_byte = int(batch.lengths.sum()) / sum(size for _, size in rows)
    return DataSample(
        shapes=shapes,
        rows=count,
        sampled=len(rows),
        lengths=tuple(int(length) for length in batch.lengths),
        supervised=int(batch.loss_mask.sum()),
        tokens=round(tokens_per_byte * all_bytes),
        findings=batch.findings,
    )


def _draw(files: Sequence[str], section: DataSection, seed: int) -> tuple[list[tuple[Row, int]], int, int]:
    """Rows with their bytes, the longest first, then at random; how many rows there are, and their bytes."""
    generator = random.Random(seed)
    drawn: list[tuple[Row, int]] = []
    longest: tuple[Row, int] | None = None
    count = total = 0
    for row in recipe_rows(files, section):
        one = row, _bytes_of(row)
        count, total = count + 1, total + one[1]
        if longest is None or one[1] > longest[1]:
            longest = one
        if len(drawn) < ROWS:
            drawn.append(one)
        elif (place := generator.randrange(count)) < ROWS:
            drawn[place] = one
    if longest is None:
        return [], 0, 0
    others = [one for one in drawn if one[0] is not longest[0]]
    generator.shuffle(others)
    kept, size = [longest], longest[1]
    for one in others[: ROWS - 1]:
        size += one[1]
        if size > BYTES:
            break
        kept.append(one)
    return kept, count, total


def _bytes_of(row: Row) -> int:
    return len(row.content) if isinstance(row.content, bytes) else len(repr(row.content))
