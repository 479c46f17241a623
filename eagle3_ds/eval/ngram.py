"""Prompt look-up decoding: guesses that cost nothing, to compare a draft with.

The longest suffix of up to three tokens that stood in the text before is looked up, and the tokens that
followed it there are proposed (https://github.com/apoorvumang/prompt-lookup-decoding; `ngram` in vLLM).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

LONGEST = 3
"""Tokens of the longest suffix that is looked up."""


class NgramGuesser:
    """A `draft.contract.Guesser` without weights.

    Args:
        first: the text's first token, which belongs to no slot.
    """

    def __init__(self, first: int) -> None:
        self._text = [first]
        # n-gram -> the place after its latest occurrence that has a token after it
        self._after: dict[tuple[int, ...], int] = {}

    def propose(self, aux: Tensor | None, tokens: Sequence[int], count: int) -> list[int]:
        """As `Guesser.propose`, but there may be fewer guesses than `count`, or none."""
        for token in tokens:
            end = len(self._text)
            for size in range(1, min(LONGEST, end) + 1):
                self._after[tuple(self._text[end - size :])] = end
            self._text.append(token)
        for size in range(min(LONGEST, len(self._text)), 0, -1):
            place = self._after.get(tuple(self._text[len(self._text) - size :]))
            if place is not None:
                return self._text[place : place + count]
        return []
