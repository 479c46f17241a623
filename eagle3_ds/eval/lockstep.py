"""Many texts decoded together, round by round: by the target alone, speculatively, and from its known answer.

The last needs no forward: a target answers the same with any draft (choice.py), so what a round accepts is
the common start of the guesses and the known answer, and the draft's input is what the target computed for
it. A draft that guesses after prompts which another has proved lossless is judged so.

Legend: A = layers * hidden size of the target.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eagle3_ds.draft import BatchGuesser
from eagle3_ds.eval.batch import Prompt, TargetBatch, read_prompt
from eagle3_ds.eval.choice import GREEDY, Greedy
from eagle3_ds.eval.speculative import (
    NotLosslessError,
    Round,
    decode_alone,
    difference,
    judge,
    speculative_decode,
)
from eagle3_ds.targets import Target, capture_hidden_states


@dataclass
class Answer:
    """What the target alone says after a prompt.

    Attributes:
        tokens: its own tokens, to the end token or a few more than are asked for, because the last round
            of a draft goes beyond.
        aux: [prompt and tokens but the last, A], what it hands to a draft.
    """

    tokens: list[int]
    aux: Tensor


@dataclass
class Clock:
    """Seconds that were measured, by what was done in them."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, start: float) -> None:
        """Add the time since `start`, which is of `time.perf_counter`."""
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Limits:
    """When a text ends, and how many guesses a round has."""

    max_new_tokens: int
    draft_tokens: int
    eos_token_id: int | None

    def ended(self, tokens: Sequence[int], more: int = 0) -> bool:
        """Whether an answer is complete, with `more` tokens than were asked for."""
        return len(tokens) >= self.max_new_tokens + more or bool(tokens and tokens[-1] == self.eos_token_id)

    @property
    def beyond(self) -> int:
        """Tokens that a last round can emit after `max_new_tokens`."""
        return self.draft_tokens


def read_prompts(
    target: Target, prompts: Sequence[Sequence[int]], clock: Clock, choice: Greedy = GREEDY
) -> list[Prompt]:
    """Read prompts one by one. `choice` numbers them as they stand here; what follows must take it too."""
    start = time.perf_counter()
    read = [read_prompt(target, prompt, choice, text) for text, prompt in enumerate(prompts)]
    clock.add("prompts", start)
    return read


@torch.no_grad()
def answer_batch(
    target: Target, prompts: list[Prompt], limits: Limits, clock: Clock, choice: Greedy = GREEDY
) -> list[Answer]:
    """The target alone after all prompts. Afterwards the prompts have their keys and values again.

    The time up to `max_new_tokens` is that of `target`; the tokens beyond are for judging and not counted.
    """
    start, counted = time.perf_counter(), False
    tokens = [[prompt.first] for prompt in prompts]
    states: list[list[Tensor]] = [[prompt.aux] for prompt in prompts]
    batch, live = TargetBatch(target, prompts), list(range(len(prompts)))
    while True:
        if not counted and all(limits.ended(tokens[text]) for text in live):
            clock.add("target", start)
            counted = True
        done = [place for place, text in enumerate(live) if limits.ended(tokens[text], limits.beyond)]
        for place in done:
            prompt = prompts[live[place]]
            prompt.cache = batch.keys_values(place, len(prompt.tokens))
        if done:
            left = [place for place in range(len(live)) if place not in done]
            live = [live[place] for place in left]
            if not live:
                break
            batch.select(left)
        logits, aux = batch.read(torch.tensor([[tokens[text][-1]] for text in live]))
        chosen = choice.tokens(logits, live, [len(tokens[text]) for text in live])
        for text, next_token, state in zip(live, chosen, aux, strict=True):
            tokens[text] += next_token
            states[text].append(state)
    answers = [Answer(new, torch.cat(parts)) for new, parts in zip(tokens, states, strict=True)]
    for prompt, answer in zip(prompts, answers, strict=True):
        prompt.aux = answer.aux[: len(prompt.tokens)]  # the same memory: a long prompt's states exist once
    return answers


@torch.no_grad()
def speculative_batch(
    target: Target,
    guesser: BatchGuesser,
    prompts: list[Prompt],
    answers: Sequence[Answer],
    limits: Limits,
    clock: Clock,
    choice: Greedy = GREEDY,
) -> list[list[Round]]:
    """Decode with draft and target after all prompts, a forward of the target in every round.

    Args:
        guesser: the draft, at the start of the texts, which are numbered as the prompts are.
        answers: of the target alone, to compare with.

    Returns:
        The rounds of each prompt.

    Raises:
        NotLosslessError: an output differs from the target's own.
    """
    start = time.perf_counter()
    outputs, rounds = decode_together(target, guesser, prompts, limits, choice)
    clock.add("speculative", start)
    for text, (prompt, output, answer) in enumerate(zip(prompts, outputs, answers, strict=True)):
        _compare(target, prompt.tokens, output, answer, limits, choice, text)
    return rounds


@torch.no_grad()
def decode_together(
    target: Target,
    guesser: BatchGuesser,
    prompts: list[Prompt],
    limits: Limits,
    choice: Greedy = GREEDY,
) -> tuple[list[list[int]], list[list[Round]]]:
    """As `speculative_batch`, compared with nothing. Returns the new tokens of each prompt too, with those
    that its last round gave beyond `max_new_tokens`.
    """
    new = {text: [prompt.first] for text, prompt in enumerate(prompts)}
    fresh: dict[int, list[int]] = {
        text: [*prompt.tokens[1:], prompt.first] for text, prompt in enumerate(prompts)
    }
    aux: dict[int, Tensor] = {text: prompt.aux for text, prompt in enumerate(prompts)}
    rounds: list[list[Round]] = [[] for _ in prompts]
    batch, live = TargetBatch(target, prompts), list(range(len(prompts)))
    while True:
        left = [place for place, text in enumerate(live) if not limits.ended(new[text])]
        if len(left) < len(live):
            live = [live[place] for place in left]
            if not live:
                break
            batch.select(left)
        guesses = guesser.propose(
            {text: aux[text] for text in live}, {text: fresh[text] for text in live}, limits.draft_tokens
        )
        logits, states = batch.read(torch.tensor([[new[text][-1], *guesses[text]] for text in live]))
        chosen = choice.tokens(logits, live, [len(new[text]) for text in live])
        for text, choices, state in zip(live, chosen, states, strict=True):
            context = len(prompts[text].tokens) + len(new[text])
            fresh[text], result = judge(guesses[text], choices, limits.eos_token_id, context)
            rounds[text].append(result)
            aux[text] = state[: len(fresh[text])]
            new[text] += fresh[text]
        batch.keep([limits.draft_tokens + 1 - len(fresh[text]) for text in live])
    return list(new.values()), rounds


def _compare(
    target: Target,
    prompt: Sequence[int],
    output: Sequence[int],
    answer: Answer,
    limits: Limits,
    choice: Greedy,
    text: int = 0,
) -> None:
    """Raises NotLosslessError if what was decoded speculatively is not the target's answer."""
    expected = answer.tokens[: limits.max_new_tokens]
    found = list(output[: limits.max_new_tokens])
    if found != expected:
        raise NotLosslessError(difference(target, prompt, found, expected, choice, text))


@torch.no_grad()
def judged_by_answers(
    guesser: BatchGuesser, prompts: Sequence[Sequence[int]], answers: Sequence[Answer], limits: Limits
) -> list[list[Round]]:
    """The rounds that a draft has after these prompts, from the target's own answers, without its forwards.

    Args:
        guesser: at the start of the texts, which are numbered as the prompts are.
    """
    known = [1] * len(prompts)
    fresh = {
        text: [*prompt[1:], answer.tokens[0]]
        for text, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    }
    taken, rounds = [0] * len(prompts), [list[Round]() for _ in prompts]
    while True:
        live = [text for text, answer in enumerate(answers) if not limits.ended(answer.tokens[: known[text]])]
        if not live:
            return rounds
        aux: Mapping[int, Tensor] = {
            text: answers[text].aux[taken[text] : taken[text] + len(fresh[text])] for text in live
        }
        guesses = guesser.propose(aux, {text: fresh[text] for text in live}, limits.draft_tokens)
        for text in live:
            taken[text] += len(fresh[text])
            start = known[text]
            choices = answers[text].tokens[start : start + len(guesses[text]) + 1]
            context = len(prompts[text]) + start
            fresh[text], result = judge(guesses[text], choices, limits.eos_token_id, context)
            rounds[text].append(result)
            known[text] += len(fresh[text])


@torch.no_grad()
def answer_alone(
    target: Target, prompt: Sequence[int], limits: Limits, clock: Clock, choice: Greedy = GREEDY
) -> Answer:
    """As `answer_batch`, for one prompt of a target whose texts cannot be batched."""
    start = time.perf_counter()
    tokens = decode_alone(target, prompt, limits.max_new_tokens, limits.eos_token_id, choice)
    clock.add("target", start)
    if tokens[-1] != limits.eos_token_id:
        more = (limits.beyond, limits.eos_token_id, choice, len(tokens))
        tokens += decode_alone(target, [*prompt, *tokens], *more)
    aux, _ = capture_hidden_states(target, torch.tensor([*prompt, *tokens[:-1]]))
    return Answer(tokens, aux)


@torch.no_grad()
def speculative_alone(
    target: Target,
    guesser: BatchGuesser,
    prompt: Sequence[int],
    answer: Answer,
    limits: Limits,
    clock: Clock,
    choice: Greedy = GREEDY,
) -> list[Round]:
    """As `speculative_batch`, for one prompt of a target whose texts cannot be batched."""

    class First:
        def propose(self, aux: Tensor, tokens: Sequence[int], count: int) -> list[int]:
            return guesser.propose({0: aux}, {0: tokens}, count)[0]

    start = time.perf_counter()
    new_tokens = limits.max_new_tokens
    output, rounds = speculative_decode(
        target, First(), prompt, new_tokens, limits.draft_tokens, limits.eos_token_id, choice=choice
    )
    clock.add("speculative", start)
    _compare(target, prompt, output, answer, limits, choice)
    return rounds
