"""Speculative decoding of one text with a chain of guesses: in each round the draft proposes some
tokens, and the target checks them in one forward.

Slots are those of training: slot i has the target's aux hidden states g_i and the token x_{i+1}, and its
output predicts x_{i+2}. The draft's algorithm makes the guesses (`DraftAlgorithm.guesser`).

Legend: S tokens of a forward, V vocabulary of the target, A = layers * hidden size of the target.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache

from eagle3_ds.draft.contract import Guesser
from eagle3_ds.eval.choice import GREEDY, Greedy
from eagle3_ds.targets import AuxCapture, Target

logger = logging.getLogger(__name__)
PROBE_TOKENS, PROBE_WRONG = 24, 4
"""A text, and the tokens after it that are forgotten, by which a cache is tried."""
CUT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Largest relative error of the logits after forgetting; a state with wrong tokens in it gives 0.1."""
_CUTS: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


class NotLosslessError(RuntimeError):
    """Speculative decoding gave other tokens than the target alone."""


@dataclass(frozen=True)
class Round:
    """One forward of the target that checked `draft_tokens` guesses.

    Attributes:
        context: tokens known before the round.
        reached: guesses that were compared: up to the first wrong one, or up to the end of the text.
        accepted: guesses that were right, before the first wrong one.
        emitted: new tokens: the accepted guesses, and the target's own token unless the text ended before.
    """

    context: int
    reached: int
    accepted: int
    emitted: int


def cache_name(model: nn.Module) -> str:
    """The argument by which a model takes its cache: `cache`, or `past_key_values` as transformers called it
    before, and takes no longer from 5.40 on.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class TargetStream:
    """The target and what it has read: `read` feeds tokens after those, `keep` forgets all but the first.

    A key-value cache is cut back. A target whose cache cannot be (states of linear attention, keys of an
    indexer) reads the text again from its start instead: slower, and the same numbers.
    """

    def __init__(self, target: Target, rereads: bool | None = None) -> None:
        """`rereads`: whether the text is read again each time; None finds out, once per target."""
        self._target = target
        # Made without the model's config: with it, a layer with a sliding window would keep only the window,
        # and the cache could not be cropped.
        self._cache = DynamicCache()
        self._cache_name = cache_name(target.base)
        self._rereads = not cache_can_be_cut(target) if rereads is None else rereads
        self._tokens: list[int] = []

    @property
    def length(self) -> int:
        """Tokens that are known to the target."""
        return len(self._tokens)

    def read(self, tokens: Sequence[int], last_only: bool = False) -> tuple[Tensor, Tensor]:
        """Feed S tokens. Returns logits [S, V] (or [1, V] of the last) and g [S, A]."""
        start = 0 if self._rereads else self.length
        self._tokens += tokens
        fed = torch.tensor([self._tokens[start:]], device=self._target.device)
        base = self._target.base
        with AuxCapture(base, self._target.aux_layers) as capture:
            if self._rereads:
                output = base(input_ids=fed, use_cache=False)
            else:
                positions = torch.arange(start, self.length, device=fed.device)[None]
                output = base(
                    input_ids=fed, position_ids=positions, use_cache=True, **{self._cache_name: self._cache}
                )
            aux = capture.take()[-len(tokens) :]
        hidden = output.last_hidden_state[0, -1 if last_only else -len(tokens) :]
        return functional.linear(hidden, self._target.head), aux

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer that has a cache of its own, [1, Hkv, T, D] each."""
        return [(layer.keys, layer.values) for layer in self._cache.layers]

    def keep(self, length: int) -> None:
        if length < self.length and not self._rereads:
            self._cache.crop(
                length - self.length
            )  # negative: so many tokens less; positive lengths are refused lately
        del self._tokens[length:]


def cache_can_be_cut(target: Target) -> bool:
    """Whether the target forgets tokens as it should when its cache is cut back: tried once per target on a
    short text, and held against reading it from the start.
    """
    if target.model not in _CUTS:
        _CUTS[target.model] = _forgets(target)
        if not _CUTS[target.model]:
            logger.warning(
                "evaluation: the cache of this target (%s) cannot be cut back after a wrong guess, so each "
                "round reads the text again from its start. The figures are the same, the time is longer: "
                "eval.num_prompts and eval.max_new_tokens bound it",
                target.config.model_type,
            )
    return _CUTS[target.model]


@torch.no_grad()
def _forgets(target: Target) -> bool:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(target.config.vocab_size, (PROBE_TOKENS + 2 * PROBE_WRONG,), generator=generator)
    known, wrong, right = text.split([PROBE_TOKENS, PROBE_WRONG, PROBE_WRONG])
    stream = TargetStream(target, rereads=False)
    try:
        stream.read(known.tolist())
        stream.read(wrong.tolist())
        stream.keep(PROBE_TOKENS)
        found, _ = stream.read(right.tolist())
    except Exception as error:  # a family's own code, which may fail in any way where no such cache fits it
        logger.debug("a cache that is cut back: %s: %s", type(error).__name__, error)
        return False
    expected, _ = TargetStream(target, rereads=True).read([*known.tolist(), *right.tolist()])
    expected = expected[-PROBE_WRONG:].float()
    difference = (found.float() - expected).norm() / expected.norm()
    return float(difference) <= CUT_TOLERANCE[target.head.dtype]


@torch.no_grad()
def decode_alone(
    target: Target,
    prompt: Sequence[int],
    max_new_tokens: int,
    eos_token_id: int | None,
    choice: Greedy = GREEDY,
    place: int = 0,
) -> list[int]:
    """Decode with the target alone: the tokens that follow the prompt, up to `max_new_tokens` or to the end
    token, which is included.

    Args:
        choice: of the tokens; this is its text 0.
        place: how many tokens at the end of the prompt were chosen by it already.
    """
    stream, output = TargetStream(target), list[int]()
    tokens = list(prompt)
    while len(output) < max_new_tokens and (not output or output[-1] != eos_token_id):
        logits, _ = stream.read(tokens, last_only=True)
        (tokens,) = choice.tokens(logits[None], [0], [place + len(output)])
        output += tokens
    return output


@torch.no_grad()
def speculative_decode(
    target: Target,
    guesser: Guesser,
    prompt: Sequence[int],
    max_new_tokens: int,
    draft_tokens: int,
    eos_token_id: int | None,
    expected: Sequence[int] | None = None,
    choice: Greedy = GREEDY,
) -> tuple[list[int], list[Round]]:
    """Decode with draft and target: the tokens that follow the prompt, up to `max_new_tokens` or to the end
    token.

    A last round that goes past `max_new_tokens` counts with all its tokens, but the output is cut.

    Args:
        guesser: the draft, at the start of a text.
        draft_tokens: guesses in each round.
        expected: the output of the target alone, to compare with; None compares nothing.
        choice: of the target's tokens; this is its text 0.

    Returns:
        The new tokens, and the rounds.

    Raises:
        NotLosslessError: the output differs from `expected`.
    """
    stream = TargetStream(target)
    logits, aux = stream.read(prompt, last_only=True)
    known = [*prompt, *choice.tokens(logits[None], [0], [0])[0]]
    fresh, rounds = known[1:], list[Round]()
    while len(known) - len(prompt) < max_new_tokens and known[-1] != eos_token_id:
        guesses = guesser.propose(aux, fresh, draft_tokens)
        logits, aux = stream.read([known[-1], *guesses])
        (choices,) = choice.tokens(logits[None], [0], [len(known) - len(prompt)])
        fresh, result = judge(guesses, choices, eos_token_id, len(known))
        rounds.append(result)
        stream.keep(len(known) - 1 + len(fresh))
        aux = aux[: len(fresh)]
        known += fresh
    output = known[len(prompt) :][:max_new_tokens]
    if expected is not None and output != list(expected):
        raise NotLosslessError(difference(target, prompt, output, expected, choice))
    return output, rounds


def judge(guesses: list[int], choices: list[int], eos: int | None, context: int) -> tuple[list[int], Round]:
    """The new tokens of a round, and its figures.

    Args:
        guesses: the draft's tokens.
        choices: the target's: one in place of each guess, and one that follows the last guess; fewer where
            the text ends before.
        context: tokens known before the round.
    """
    right = 0
    while right < min(len(guesses), len(choices)) and guesses[right] == choices[right]:
        right += 1
    fresh = choices[: right + 1]
    if eos in fresh:
        fresh = fresh[: fresh.index(eos) + 1]
    accepted = min(right, len(fresh))
    # The first wrong guess was reached unless the text ended before its place.
    reached = accepted + int(accepted < len(guesses) and len(fresh) > accepted)
    return fresh, Round(context, reached, accepted, len(fresh))


def difference(
    target: Target,
    prompt: Sequence[int],
    output: Sequence[int],
    expected: Sequence[int],
    choice: Greedy = GREEDY,
    text: int = 0,
) -> str:
    """Describe where the two outputs first differ, and by how much the choice prefers the target's token."""
    shorter = min(len(output), len(expected))
    place = next((i for i in range(shorter) if output[i] != expected[i]), shorter)
    if place == shorter:
        given = f"speculative decoding gave {len(output)} tokens, the target alone {len(expected)}"
        return f"{given}; the shorter agree."
    logits, _ = TargetStream(target).read([*prompt, *expected[:place]], last_only=True)
    scores = choice.scores(logits, text, place)[0]
    gap = float(scores[expected[place]] - scores[output[place]])
    return (
        f"speculative decoding is not lossless: new token {place} (after a prompt of {len(prompt)}) is "
        f"{output[place]}, the target alone gives {expected[place]}, which scores {gap:.3g} higher in "
        f"{logits.dtype}. A gap of the size of the dtype's rounding comes from the different batch shape: "
        "set eval.dtype to float32. A larger one is an error."
    )
