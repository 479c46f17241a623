"""From characters to tokens: a mask over token ids, proven token by token."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from eagle3_ds.data.chat import Span, special_pattern


@dataclass(frozen=True)
class MaskedTokens:
    """Token ids and, for each, whether it is supervised.

    `cut`: a token of the text as a whole would have run across an end of a span, so that the pieces were
    tokenised apart, which is how a server's prompt and its answer come about.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    cut: bool


def mask_tokens(
    tokenizer: Any, texts: Sequence[str], spans: Sequence[Sequence[Span]], places: Sequence[str]
) -> list[MaskedTokens]:
    """Tokenise each text and mark the tokens of its spans (ascending, apart), one call for all: tokenizers
    are parallel.

    Each text is tokenised whole and in the pieces that the spans cut it into. Where both give the same
    tokens, every end of a span is proven to be an end of a token. Raises ValueError, opened by the text's
    place, when no way proves it.
    """
    pieces = [_cut(text, own) for text, own in zip(texts, spans, strict=True)]
    encoded = iter(_encode(tokenizer, [*texts, *(piece for own in pieces for piece, _ in own)]))
    wholes = [next(encoded) for _ in texts]
    results = []
    for text, own, whole, place in zip(texts, pieces, wholes, places, strict=True):
        parts = [next(encoded) for _ in own]
        flags = [flag for _, flag in own]
        joined = [token for part in parts for token in part]
        if joined == whole:
            results.append(MaskedTokens(whole, _flags([len(part) for part in parts], flags), cut=False))
            continue
        counts = _count_in_place(tokenizer, text, [piece for piece, _ in own], whole)
        if counts is not None:
            results.append(MaskedTokens(whole, _flags(counts, flags), cut=False))
        elif _decode(tokenizer, joined) == _decode(tokenizer, whole):
            results.append(MaskedTokens(joined, _flags([len(part) for part in parts], flags), cut=True))
        else:
            raise ValueError(
                f"{place}: a token runs across the beginning or the end of what the assistant says, and the "
                "tokenizer does not give the same text when they are tokenised apart: remove the row, or "
                "name a template in data.chat_template that puts a special token there"
            )
    return results


def _cut(text: str, spans: Sequence[Span]) -> list[tuple[str, bool]]:
    """The text in pieces, none empty, True for those of the spans."""
    pieces, done = [], 0
    for start, end in spans:
        pieces += [(text[done:start], False), (text[start:end], True)]
        done = end
    return [(piece, flag) for piece, flag in [*pieces, (text[done:], False)] if piece]


def _flags(counts: Sequence[int], flags: Sequence[bool]) -> list[bool]:
    return [flag for count, flag in zip(counts, flags, strict=True) for _ in range(count)]


def _count_in_place(tokenizer: Any, text: str, pieces: Sequence[str], whole: list[int]) -> list[int] | None:
    """Tokens of each piece, for a tokenizer that reads the beginning of a text in a way of its own (a space
    put before it, say).

    Each piece is read behind what stands before it from the last special token on, where tokenizers begin
    anew. None where that does not give the tokens of the text as a whole.
    """
    anchors = [0, *(match.start() for match in special_pattern(tokenizer).finditer(text))]
    ends = list(accumulate(map(len, pieces)))
    starts = [0, *ends[:-1]]
    openings = [anchors[bisect_left(anchors, start) - 1] if start else 0 for start in starts]
    windows = zip(openings, starts, ends, strict=True)
    encoded = _encode(tokenizer, [text[o:end] for o, start, last in windows for end in (start, last)])
    counts, found = [], []
    for before, through in zip(encoded[::2], encoded[1::2], strict=True):
        if through[: len(before)] != before:
            return None
        counts.append(len(through) - len(before))
        found += through[len(before) :]
    return counts if found == whole else None


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    # templates write the special tokens themselves; verbose would warn of texts longer than the target's
    # context
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _decode(tokenizer: Any, input_ids: list[int]) -> str:
    return tokenizer.decode(input_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
