"""From rows to documents: a function of the rows and the settings alone, so that any process may run it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from eagle3_ds.config.schema import DataSection
from eagle3_ds.data.chat import ChatTemplate, Conversation
from eagle3_ds.data.findings import Findings
from eagle3_ds.data.shapes import TokenRow, read_row
from eagle3_ds.data.sources import Row
from eagle3_ds.data.token_mask import MaskedTokens, mask_tokens
from eagle3_ds.data.turns import EVENTS as TURN_EVENTS
from eagle3_ds.data.turns import locate_turns

EVENTS = (
    "conversations",
    "bad_rows_dropped",
    "too_long_dropped",
    "truncated",
    "split",
    "tokens_left_out",
    "unsupervised_dropped",
    "token_boundaries_cut",
    *TURN_EVENTS,
)
"""What is counted row by row, under its names in `DataStatistics`."""


class RecipeError(ValueError):
    """What the recipe is to blame for and not the row: no row is dropped for it."""


@dataclass(frozen=True)
class EncodedBatch:
    """The documents of some rows, end to end: int32 [T] token ids, bool [T] mask; int64 [n] lengths, uint64
    [n] hashes of the conversations they come from. `events` counts what happened, by the names in `EVENTS`;
    `findings`: what the rows turned out to be.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray
    events: Counter[str]
    findings: Findings


class TokenisedRow(NamedTuple):
    """A row, the hash of its content, what a user should know of it, and its tokens at full length."""

    row: Row
    digest: int
    notes: tuple[str, ...]
    tokens: MaskedTokens


def _gather(
    ids: Sequence[Sequence[int]],
    masks: Sequence[Sequence[bool]],
    hashes: Sequence[int],
    events: Counter[str],
    findings: Findings,
) -> EncodedBatch:
    return EncodedBatch(
        input_ids=np.fromiter((token for own in ids for token in own), dtype=np.int32),
        loss_mask=np.fromiter((flag for own in masks for flag in own), dtype=bool),
        lengths=np.array([len(own) for own in ids], dtype=np.int64),
        hashes=np.array(hashes, dtype=np.uint64),
        events=events,
        findings=findings,
    )


def _joined(one: EncodedBatch, other: EncodedBatch) -> EncodedBatch:
    one.findings.update(other.findings)
    return EncodedBatch(
        input_ids=np.concatenate([one.input_ids, other.input_ids]),
        loss_mask=np.concatenate([one.loss_mask, other.loss_mask]),
        lengths=np.concatenate([one.lengths, other.lengths]),
        hashes=np.concatenate([one.hashes, other.hashes]),
        events=one.events + other.events,
        findings=one.findings,
    )


class RowEncoder:
    """Reads, renders, tokenises, masks, and fits rows to `data.max_length`.

    `template` may be None when every row is tokenised already. `vocab_size`: rows of the target's embedding.
    """

    def __init__(
        self, tokenizer: Any, template: ChatTemplate | None, section: DataSection, vocab_size: int
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.section = section
        self.vocab_size = vocab_size

    def encode(self, rows: Sequence[Row]) -> EncodedBatch:
        """The documents of these rows; bad rows have none and are told in `findings`.

        Raises RecipeError for what the recipe is to blame for, when it wants bad rows dropped.
        """
        try:
            return self._encode(rows)
        except ValueError as error:
            if isinstance(error, RecipeError) and self.section.on_bad_row == "drop":
                raise
            if len(rows) == 1:
                findings = Findings()
                findings.add_bad(rows[0].place, str(error))
                events = Counter(conversations=1, recipe_refuses=int(isinstance(error, RecipeError)))
                return _gather([], [], [], events, findings)
        # Halves until the bad rows stand alone: the others are encoded in batches as ever.
        middle = len(rows) // 2
        return _joined(self.encode(rows[:middle]), self.encode(rows[middle:]))

    def _encode(self, rows: Sequence[Row]) -> EncodedBatch:
        events: Counter[str] = Counter(conversations=len(rows))
        findings = Findings()
        ids: list[list[int]] = []
        masks: list[list[bool]] = []
        hashes = []
        for row, digest, notes, tokens in self.tokenise(rows, events):
            for note in notes:
                findings.add_note(row.place, note)
            for input_ids, loss_mask in self._fit(tokens, row.place, events):
                ids.append(input_ids)
                masks.append(loss_mask)
                hashes.append(digest)
        return _gather(ids, masks, hashes, events, findings)

    def tokenise(self, rows: Sequence[Row], events: Counter[str]) -> Iterator[TokenisedRow]:
        """Each row's tokens and mask at full length. Raises ValueError for a bad row, with its place."""
        contents = [read_row(row.value(), row.shape, row.place) for row in rows]
        chats = [
            (row.place, content)
            for row, content in zip(rows, contents, strict=True)
            if isinstance(content, Conversation)
        ]
        encoded = iter(self._encode_chats(chats, events))
        for row, content in zip(rows, contents, strict=True):
            if isinstance(content, TokenRow):  # noqa: SIM108 - one line of it would be too long
                tokens = MaskedTokens(content.input_ids, content.loss_mask, cut=False)
            else:
                tokens = next(encoded)
            self._check_vocabulary(tokens.input_ids, row.place)
            notes = (*content.notes, *self._padding_note(content))
            yield TokenisedRow(row, content_hash(content, self.section.seed), notes, tokens)

    def _padding_note(self, content: Conversation | TokenRow) -> tuple[str, ...]:
        """A note on tokens that look like padding. One at the end may be the end of the text."""
        pad = getattr(self.tokenizer, "pad_token_id", None)
        if pad is None or isinstance(content, Conversation):
            return ()
        ids = content.input_ids
        if ids[:1] != [pad] and ids[-2:] != [pad, pad]:
            return ()
        return (
            "rows of tokens begin or end with the padding token, which is taken as text: give "
            "'attention_mask'",
        )

    def _encode_chats(
        self, chats: Sequence[tuple[str, Conversation]], events: Counter[str]
    ) -> list[MaskedTokens]:
        texts, spans = [], []
        for place, conversation in chats:
            assert self.template is not None
            template = self.template.with_arguments(conversation.arguments)
            turns = locate_turns(template, conversation, self.section.supervise, place)
            events.update(turns.events)
            texts.append(turns.text)
            spans.append(turns.spans)
        results = mask_tokens(self.tokenizer, texts, spans, [place for place, _ in chats])
        events["token_boundaries_cut"] += sum(tokens.cut for tokens in results)
        return results

    def _check_vocabulary(self, input_ids: Sequence[int], place: str) -> None:
        if not input_ids:
            raise ValueError(f"{place}: the row has no token: remove it")
        if max(input_ids) >= self.vocab_size:
            raise RecipeError(
                f"{place}: token id {max(input_ids)} lies outside the target's vocabulary of "
                f"{self.vocab_size}: the tokenizer and the target do not belong together"
            )

    def _fit(
        self, tokens: MaskedTokens, place: str, events: Counter[str]
    ) -> Iterator[tuple[list[int], list[bool]]]:
        """Documents of one conversation, each of at most `data.max_length` tokens, by `data.on_too_long`."""
        length, limit, choice = len(tokens.input_ids), self.section.max_length, self.section.on_too_long
        if length <= limit:
            yield tokens.input_ids, tokens.loss_mask
            return
        if choice == "error":
            raise RecipeError(
                f"{place}: the conversation has {length} tokens, more than data.max_length {limit}: raise "
                "data.max_length, or set data.on_too_long to 'split', 'truncate' or 'drop'"
            )
        if choice == "drop":
            events["too_long_dropped"] += 1
            events["tokens_left_out"] += length
            return
        events["truncated" if choice == "truncate" else "split"] += 1
        # Pieces of equal length: a rest of a few tokens would teach nothing.
        pieces = -(-length // limit)
        ends = (
            [0, limit] if choice == "truncate" else [length * piece // pieces for piece in range(pieces + 1)]
        )
        events["tokens_left_out"] += length - ends[-1]
        for start, end in zip(ends, ends[1:], strict=False):
            if any(tokens.loss_mask[start:end]):
                yield tokens.input_ids[start:end], tokens.loss_mask[start:end]
            else:
                events["unsupervised_dropped"] += 1
                events["tokens_left_out"] += end - start


def content_hash(content: Conversation | TokenRow, seed: int) -> int:
    """64 bits of (seed, content): the same conversation always falls on the same side of the split."""
    if isinstance(content, TokenRow):
        parts: list[Any] = [seed, content.input_ids]
    else:
        parts = [seed, content.messages] if content.tools is None else [seed, content.messages, content.tools]
        parts += [dict(content.arguments)] if content.arguments else []
    text = json.dumps(parts, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
