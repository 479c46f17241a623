"""Speculative sampling: the texts are distributed as the target's own, which broken rules do not
reach; they do not depend on the batch; what an evaluation with a temperature tells.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from eagle3_ds.algorithms import ALGORITHMS
from eagle3_ds.algorithms.eagle3 import DraftModel, build_draft_config
from eagle3_ds.config import DraftSection, EvalSection
from eagle3_ds.draft import BatchGuesser, VocabularyMap
from eagle3_ds.eval import NotLosslessError, Round, evaluate_draft, lockstep, speculative_decode
from eagle3_ds.eval.batch import Prompt, read_prompt
from eagle3_ds.eval.choice import GREEDY, Greedy, Sampled
from eagle3_ds.eval.lockstep import (
    Clock,
    Limits,
    answer_alone,
    answer_batch,
    decode_together,
    judged_by_answers,
    read_prompts,
    speculative_alone,
    speculative_batch,
)
from eagle3_ds.targets import Target
from tests.unit.tiny_families import AUX_LAYERS, family_config, other_config, random_model

ROOT = Path(__file__).parents[2]
VOCABULARY, GUESSES, TEMPERATURE = 6, 3, 0.9
PROMPT = [3, 1, 4, 1, 5]
TEXTS, TOKENS = 4000, 3
"""Samples, whose forwards are shared, of 6 * 6 * 6 joint outcomes."""
BOUND = 5.0
"""Standard deviations of chi-square above its mean that are still chance."""


@pytest.fixture(scope="module")
def target() -> Target:
    config = family_config("llama", vocab_size=VOCABULARY)
    model = random_model(config)
    return Target(model, None, config, AUX_LAYERS)


@pytest.fixture(scope="module")
def draft(target: Target) -> DraftModel:
    torch.manual_seed(3)
    section = DraftSection(vocab_size=VOCABULARY, ttt_steps=GUESSES)
    draft = DraftModel(build_draft_config(target.config, section)).eval()
    for parameter in draft.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return draft.requires_grad_(False)


def guesser_of(target: Target, draft: DraftModel, num_texts: int) -> BatchGuesser:
    size = draft.config.draft_vocab_size
    vocabulary = VocabularyMap.from_counts(torch.arange(target.config.vocab_size), size)
    return ALGORITHMS["eagle3"].batch_guesser(draft, target.embedding, vocabulary, num_texts)


@torch.no_grad()
def joint_of(target: Target) -> Tensor:
    """The target's own distribution of the first TOKENS tokens: float64 [VOCABULARY ** TOKENS]."""
    texts = [[*PROMPT, *new] for new in itertools.product(range(VOCABULARY), repeat=TOKENS)]
    logits = target.model(torch.tensor(texts)).logits.double() / TEMPERATURE
    places = torch.arange(len(PROMPT) - 1, len(PROMPT) + TOKENS - 1)
    tokens = torch.tensor(texts)[:, len(PROMPT) :, None]
    return logits[:, places].log_softmax(-1).gather(2, tokens).sum((1, 2)).exp()


def drawn(target: Target, draft: DraftModel, kind: type[Sampled] = Sampled) -> tuple[Tensor, list[Round]]:
    """How often each joint outcome was decoded speculatively, and the first round of each text."""
    choice = kind(TEMPERATURE, 7, range(TEXTS))
    limits, guesser = Limits(TOKENS, GUESSES, None), guesser_of(target, draft, TEXTS)
    outputs, rounds = decode_together(target, guesser, copies(target, choice), limits, choice)
    cells = torch.tensor([output[:TOKENS] for output in outputs]) @ VOCABULARY ** torch.arange(TOKENS).flip(0)
    return cells.bincount(minlength=VOCABULARY**TOKENS).double(), [of_text[0] for of_text in rounds]


@torch.no_grad()
def copies(target: Target, choice: Sampled) -> list[Prompt]:
    """The prompt as often as there are texts, read once, each with the first token that is its own."""
    read = read_prompt(target, PROMPT)
    logits = target.model(torch.tensor([PROMPT])).logits[:, -1:].expand(TEXTS, -1, -1)
    first = choice.tokens(logits, range(TEXTS), [0] * TEXTS)
    return [Prompt(PROMPT, token, read.aux, list(read.cache)) for (token,) in first]


def excess(counts: Tensor, probabilities: Tensor) -> float:
    """Chi-square, in its standard deviations above its mean; outcomes expected less than 5 times are one."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    assert len(counts) > 50
    freedom = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


def test_texts_are_distributed_as_the_targets_own(target: Target, draft: DraftModel) -> None:
    probabilities = joint_of(target)
    assert float(probabilities.sum()) == pytest.approx(1.0)
    counts, first = drawn(target, draft)
    assert abs(excess(counts, probabilities)) < BOUND
    accepted = sum(round_.accepted > 0 for round_ in first)
    assert 0.2 < accepted / len(first) < 0.8  # both ways of a round were gone


def test_a_guess_is_accepted_as_often_as_the_target_gives_it(target: Target, draft: DraftModel) -> None:
    """Of the first guess, whose probability the target says: a binomial count."""
    choice = Sampled(TEMPERATURE, 3, range(TEXTS))
    read = copies(target, choice)
    guesser = guesser_of(target, draft, TEXTS)
    slots = {text: [*PROMPT[1:], prompt.first] for text, prompt in enumerate(read)}
    guesses = guesser.propose({text: prompt.aux for text, prompt in enumerate(read)}, slots, GUESSES)
    texts = torch.tensor([[*PROMPT, prompt.first] for prompt in read])
    p = (target.model(texts).logits[:, -1].double() / TEMPERATURE).softmax(-1)
    chance = p.gather(1, torch.tensor([[guesses[text][0]] for text in range(TEXTS)]))
    limits = Limits(TOKENS, GUESSES, None)
    _, rounds = decode_together(target, guesser_of(target, draft, TEXTS), read, limits, choice)
    accepted = sum(of_text[0].accepted > 0 for of_text in rounds)
    spread = math.sqrt(float((chance * (1 - chance)).sum()))
    assert abs(accepted - float(chance.sum())) < 4 * spread


def generous(
    guesses: list[int], choices: list[int], eos: int | None, context: int
) -> tuple[list[int], Round]:
    """Accepts the first guess whatever the target says."""
    return judge(guesses, [*guesses[:1], *choices[1:]], eos, context)


judge = lockstep.judge


class SameNoise(Sampled):
    """Every place of a text is drawn with the same numbers."""

    def scores(self, logits: Tensor, text: int, place: int) -> Tensor:
        return torch.cat([super(SameNoise, self).scores(row[None], text, 0) for row in logits])


class Warmer(Sampled):
    """A quarter warmer than it says."""

    def __init__(self, temperature: float, seed: int, prompts: Sequence[int]) -> None:
        super().__init__(1.25 * temperature, seed, prompts)


@pytest.mark.parametrize("broken", ["generous", "same noise", "warmer"])
def test_a_broken_rule_gives_another_distribution(
    broken: str, target: Target, draft: DraftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    if broken == "generous":
        monkeypatch.setattr(lockstep, "judge", generous)
    kind = {"generous": Sampled, "same noise": SameNoise, "warmer": Warmer}[broken]
    counts, _ = drawn(target, draft, kind)
    assert excess(counts, joint_of(target)) > BOUND


def decoded(target: Target, draft: DraftModel, prompts: dict[int, list[int]]) -> dict[int, Any]:
    """Answer and rounds of these prompts, which are decoded together."""
    choice, limits, clock = Sampled(0.8, 5, list(prompts)), Limits(9, GUESSES, 2), Clock()
    read = read_prompts(target, list(prompts.values()), clock, choice)
    answers = answer_batch(target, read, limits, clock, choice)
    guesser = guesser_of(target, draft, len(prompts))
    rounds = speculative_batch(target, guesser, read, answers, limits, clock, choice)
    guesser = guesser_of(target, draft, len(prompts))
    assert judged_by_answers(guesser, list(prompts.values()), answers, limits) == rounds
    return {
        number: (answer.tokens, of_text)
        for number, answer, of_text in zip(prompts, answers, rounds, strict=True)
    }


def test_a_text_depends_on_its_seed_and_not_on_its_batch(target: Target, draft: DraftModel) -> None:
    prompts = {0: PROMPT, 1: PROMPT, 2: PROMPT[:2], 3: [*PROMPT, *PROMPT]}
    together = decoded(target, draft, prompts)
    assert together[0] != together[1], "a prompt that comes twice is drawn twice"
    for number, prompt in prompts.items():
        assert decoded(target, draft, {number: prompt})[number] == together[number]
        choice, limits = Sampled(0.8, 5, [number]), Limits(9, GUESSES, 2)
        alone = answer_alone(target, prompt, limits, Clock(), choice)
        assert alone.tokens == together[number][0]
        guesser = guesser_of(target, draft, 1)
        found = speculative_alone(target, guesser, prompt, alone, limits, Clock(), choice)
        assert found == together[number][1]


def test_a_target_whose_cache_cannot_be_cut_is_sampled_too() -> None:
    config = other_config("qwen3_next", vocab_size=16)
    target = Target(random_model(config), None, config, AUX_LAYERS)
    torch.manual_seed(1)
    draft = DraftModel(build_draft_config(config, DraftSection(vocab_size=16, ttt_steps=GUESSES))).eval()
    choice, limits = Sampled(1.0, 0, [4]), Limits(6, GUESSES, None)
    alone = answer_alone(target, PROMPT, limits, Clock(), choice)
    assert (
        len(alone.tokens) == 6 + GUESSES
        and alone.tokens != answer_alone(target, PROMPT, limits, Clock()).tokens
    )
    speculative_alone(target, guesser_of(target, draft, 1), PROMPT, alone, limits, Clock(), choice)
    with pytest.raises(NotLosslessError, match=r"new token \d \(after a prompt of 5\)"):
        other = Sampled(1.0, 2, [4])
        speculative_alone(target, guesser_of(target, draft, 1), PROMPT, alone, limits, Clock(), other)


def test_a_temperature_near_zero_is_greedy_and_no_number_overflows() -> None:
    logits = torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(0))
    cold = Sampled(1e-300, 0, [0, 1]).tokens(logits, [0, 1], [0, 9])
    assert cold == GREEDY.tokens(logits, [0, 1], [0, 9])
    assert Sampled(1.0, 0, [0, 1]).tokens(logits, [0, 1], [0, 9]) != cold


class StandIn:
    draft = DraftSection()
    eval = EvalSection(max_new_tokens=8, draft_tokens=GUESSES, temperature=1.0, seed=3)


def test_an_evaluation_tells_both(target: Target, draft: DraftModel) -> None:
    class Tokens:
        eos_token_id = None

    told = Target(target.model, Tokens(), target.config, target.aux_layers)
    vocabulary = VocabularyMap.from_counts(torch.arange(VOCABULARY), VOCABULARY)
    recipe: Any = StandIn()
    untrained = DraftModel(draft.config)
    arguments = (told, draft, untrained, vocabulary, [PROMPT, PROMPT, PROMPT[:2]], False)
    found = evaluate_draft(recipe, *arguments)
    recipe.eval = recipe.eval.model_copy(update={"temperature": 0.0})
    greedy = evaluate_draft(recipe, *arguments)
    assert {key: found[key] for key in greedy if "second" not in key and key != "speedup"} == {
        key: greedy[key] for key in greedy if "second" not in key and key != "speedup"
    }
    more = set(found) - set(greedy)
    assert more == {"temperature", "lossless_sampled"} | {
        f"{key}{name}_sampled{end}"
        for name in ("", "_untrained", "_ngram")
        for key, end in [
            ("acceptance_length", ""), ("acceptance_length", "_interval"), ("acceptance_by_position", ""),
            ("acceptance_by_context", ""), ("target_forwards", ""),
        ]
    }  # fmt: skip
    documented = (ROOT / "docs/recipe.md").read_text().partition("What `eval.json`")[2].partition("\n## ")[0]
    assert set(found) <= set(re.findall(r"`(\w+)`", documented))
    assert len(found["acceptance_by_position_untrained_sampled"]) == GUESSES
    assert 1.0 <= found["acceptance_length_sampled"] <= GUESSES + 1


def test_what_no_temperature_is() -> None:
    for wrong in ({"temperature": -1.0}, {"temperature": math.inf}, {"temperature": math.nan}, {"seed": -1}):
        with pytest.raises(ValidationError):
            EvalSection.model_validate(wrong)


def test_one_text_alone_is_sampled_as_in_a_batch(target: Target, draft: DraftModel) -> None:
    single = ALGORITHMS["eagle3"].guesser(
        draft, target.embedding, VocabularyMap.from_counts(torch.arange(VOCABULARY), VOCABULARY)
    )
    choice: Greedy = Sampled(0.8, 5, [0])
    output, rounds = speculative_decode(target, single, PROMPT, 9, GUESSES, 2, choice=choice)
    tokens, expected = decoded(target, draft, {0: PROMPT})[0]
    assert (output, rounds) == (tokens[: len(output)], expected)
