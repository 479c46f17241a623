"""From rows to documents: a function of the rows and the settings alone, so that any process may run it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eagle3_ds.config.schema import DataSection
from eagle3_ds.data.chat import ChatTemplate, Conversation
from eagle3_ds.data.shapes import TokenRow, read_row
from eagle3_ds.data.sources import Row
from eagle3_ds.data.token_mask import MaskedTokens, mask_tokens
from eagle3_ds.data.turns import locate_turns

EVENTS = (
    "conversations",
    "too_long_dropped",
    "truncated",
    "split",
    "tokens_left_out",
    "unsupervised_dropped",
    "token_boundaries_cut",
    "reasoning_not_rendered",
)
"""What is counted row by row, under its names in `DataStatistics`."""


@dataclass(frozen=True)
class EncodedBatch:
    """The documents of some rows, end to end: int32 [T] token ids, bool [T] mask; int64 [n] lengths, uint64
    [n] hashes of the conversations they come from. `events` counts what happened, by the names in `EVENTS`.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray
    events: Counter[str]


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
        """The documents of these rows. Raises ValueError for a bad row, with its place."""
        events: Counter[str] = Counter(conversations=len(rows))
        ids: list[list[int]] = []
        masks: list[list[bool]] = []
        hashes = []
        for row, digest, tokens in self.tokenise(rows, events):
            for input_ids, loss_mask in self._fit(tokens, row.place, events):
                ids.append(input_ids)
                masks.append(loss_mask)
                hashes.append(digest)
        return EncodedBatch(
            input_ids=np.fromiter((token for own in ids for token in own), dtype=np.int32),
            loss_mask=np.fromiter((flag for own in masks for flag in own), dtype=bool),
            lengths=np.array([len(own) for own in ids], dtype=np.int64),
            hashes=np.array(hashes, dtype=np.uint64),
            events=events,
        )

    def tokenise(self, rows: Sequence[Row], events: Counter[str]) -> Iterator[tuple[Row, int, MaskedTokens]]:
        """(row, hash of its content, tokens and mask at full length) of each row."""
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
            yield row, content_hash(content, self.section.seed), tokens

    def _encode_chats(
        self, chats: Sequence[tuple[str, Conversation]], events: Counter[str]
    ) -> list[MaskedTokens]:
        texts, spans = [], []
        for place, conversation in chats:
            assert self.template is not None
            text, own = locate_turns(self.template, conversation, self.section.supervise, place)
            events["reasoning_not_rendered"] += sum(
                message["reasoning_content"].strip() not in text
                for message in conversation.messages
                if "reasoning_content" in message
            )
            texts.append(text)
            spans.append(own)
        results = mask_tokens(self.tokenizer, texts, spans, [place for place, _ in chats])
        events["token_boundaries_cut"] += sum(tokens.cut for tokens in results)
        return results

    def _check_vocabulary(self, input_ids: Sequence[int], place: str) -> None:
        if not input_ids:
            raise ValueError(f"{place}: the row has no token: remove it")
        if max(input_ids) >= self.vocab_size:
            raise ValueError(
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
            raise ValueError(
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
    text = json.dumps(parts, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
