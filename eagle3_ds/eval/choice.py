"""How the target's next token comes from its logits: the likeliest, or one that is drawn at a temperature.

A draft guesses its likeliest token x (vLLM's default, `draft_sample_method: greedy`), so speculative sampling
(Leviathan et al. 2023, arXiv 2211.17192) accepts it with the target's probability p(x), and otherwise draws
from p without x, renormalised. Drawing y from p, and accepting x where y = x, is the same: it happens with
p(x), and a y that is not x is distributed as p without x. So a round is judged as in greedy decoding, with
drawn tokens in place of the likeliest ones.

A draw depends on the seed, the prompt and the token's place alone. So a text that is drawn speculatively is,
token for token, what the target alone draws, whatever the draft guesses and whichever texts share a forward.

Legend: B texts, S tokens, V vocabulary of the target.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Greedy:
    """The likeliest token."""

    def scores(self, logits: Tensor, text: int, place: int) -> Tensor:
        """Scores [S, V], whose largest is the token.

        Args:
            logits: [S, V] of S tokens of one text, one after the other.
            text: its number.
            place: new tokens of the text before these.
        """
        return logits

    def tokens(self, logits: Tensor, texts: Sequence[int], places: Sequence[int]) -> list[list[int]]:
        """The S tokens of each text: logits [B, S, V], B numbers of texts, B places."""
        return logits.argmax(dim=-1).tolist()


class Sampled(Greedy):
    """A token drawn from softmax(logits / temperature): the largest of logits / temperature - log E, with E
    exponentially distributed. Two forwards that differ by rounding draw the same, but for near ties.

    Args:
        temperature: above 0.
        seed: 0 or more.
        prompts: of each text, the number that its draws depend on.
    """

    def __init__(self, temperature: float, seed: int, prompts: Sequence[int]) -> None:
        self._temperature, self._seed, self._prompts = temperature, seed, prompts

    def scores(self, logits: Tensor, text: int, place: int) -> Tensor:
        """As `Greedy.scores`, in float64."""
        noise = np.stack(
            [
                np.random.default_rng((self._seed, self._prompts[text], place + s)).standard_exponential(
                    logits.shape[1]
                )
                for s in range(len(logits))
            ]
        )
        return logits.double() / self._temperature - torch.from_numpy(noise).to(logits.device).log()

    def tokens(self, logits: Tensor, texts: Sequence[int], places: Sequence[int]) -> list[list[int]]:
        """As `Greedy.tokens`."""
        rows = zip(logits, texts, places, strict=True)
        return [self.scores(row, text, place).argmax(dim=-1).tolist() for row, text, place in rows]


GREEDY = Greedy()
