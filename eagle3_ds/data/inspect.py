"""A row or a prepared document as the draft will learn it: its tokens as text, the supervised ones marked."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

from eagle3_ds.config.schema import DataSection
from eagle3_ds.data.documents import PreparedData
from eagle3_ds.data.encode import RowEncoder
from eagle3_ds.data.loops import loops, repeated_share
from eagle3_ds.data.prepare import chat_template, recipe_rows
from eagle3_ds.data.sources import expand_sources
from eagle3_ds.data.token_mask import MaskedTokens

STYLES = """
body { font: 15px/1.5 ui-monospace, monospace; max-width: 72em; margin: 2em auto; color: #666 }
pre { white-space: pre-wrap; overflow-wrap: anywhere }
mark { background: #cfe8d5; color: #111; border-radius: 2px }
"""


@dataclass(frozen=True)
class Inspection:
    """One row or prepared document, and which it is.

    `pieces`: text, and whether its tokens are supervised; end to end they are the whole document.
    """

    what: str
    tokens: MaskedTokens
    pieces: list[tuple[str, bool]]

    @property
    def summary(self) -> str:
        total, supervised = len(self.tokens.input_ids), sum(self.tokens.loss_mask)
        turns = sum(flag for _, flag in self.pieces)
        cut = "; a token that ran across an end of a turn was cut" if self.tokens.cut else ""
        return (
            f"{self.what}: {total:,} tokens, {supervised:,} of them supervised "
            f"({supervised / total:.1%}) in {turns} stretches{cut}{self._loops()}"
        )

    def _loops(self) -> str:
        """A warning where supervised stretches repeat themselves."""
        flagged = groupby(
            zip(self.tokens.input_ids, self.tokens.loss_mask, strict=True), lambda pair: pair[1]
        )
        stretches = [[token for token, _ in pairs] for flag, pairs in flagged if flag]
        looping = [tokens for tokens in stretches if loops(tokens)]
        if not looping:
            return ""
        share = max(map(repeated_share, looping))
        return (
            f"; warning: {len(looping)} of {len(stretches)} stretches go round in circles (up to {share:.0%} "
            "of the n-grams are repetitions), which teaches the draft nothing else"
        )


def inspect_row(section: DataSection, tokenizer: Any, number: int) -> Inspection:
    """Row `number`, counted from 1 over the sources of `data.train`, before anything is cut to
    `data.max_length`.

    Raises ValueError for a bad row, and when there are fewer rows.
    """
    sources = expand_sources(section.train, "data.train")
    row = next(islice(recipe_rows(sources, section), number - 1, None), None)
    if row is None:
        raise ValueError(
            f"--row is {number}, but {', '.join(sources)} hold fewer rows: ask for a smaller number"
        )
    encoder = RowEncoder(tokenizer, chat_template(tokenizer, section, [row.shape]), section, len(tokenizer))
    ((_, _, _, tokens),) = encoder.tokenise([row], Counter())
    return Inspection(f"{row.place}, shape {row.shape}", tokens, list(text_pieces(tokenizer, tokens)))


def inspect_document(data: PreparedData, tokenizer: Any, number: int) -> Inspection:
    """Document `number` as it is trained on, by which the messages of capture and training call it.

    Raises ValueError when there is none of that number.
    """
    for side, documents in (("training", data.train), ("held out", data.heldout)):
        numbers = list(documents["document_id"])
        if number in numbers:
            document = documents[numbers.index(number)]
            tokens = MaskedTokens(document["input_ids"], document["loss_mask"], cut=False)
            return Inspection(f"document {number}, {side}", tokens, list(text_pieces(tokenizer, tokens)))
    raise ValueError(
        f"--document is {number}, but the documents are 0 to {len(data.train) + len(data.heldout) - 1}"
    )


def text_pieces(tokenizer: Any, tokens: MaskedTokens) -> Iterable[tuple[str, bool]]:
    """The text of each stretch of tokens with one mask value, as it reads in its place, and that value."""
    done, last = "", len(tokens.input_ids) - 1
    for place, flag in enumerate(tokens.loss_mask):
        if place == last or tokens.loss_mask[place + 1] != flag:
            # decoded from the beginning: tokenizers of sentence pieces drop the space at the beginning of a
            # text
            text = tokenizer.decode(
                tokens.input_ids[: place + 1], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            yield text[len(done) :], flag
            done = text


def as_html(inspection: Inspection) -> str:
    """A page of its own, which loads nothing."""
    pieces = (
        f"<mark>{html.escape(text)}</mark>" if flag else html.escape(text) for text, flag in inspection.pieces
    )
    summary = html.escape(inspection.summary)
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f"<title>{summary}</title>\n<style>{STYLES}</style>\n"
        f"<p>{summary}; supervised tokens are <mark>marked</mark></p>\n"
        f"<pre>{''.join(pieces)}</pre>\n</html>\n"
    )
