"""Prompts that are decoded together: the same rounds and guesses as one by one, for every family of targets;
what a target without batches falls back to; intervals and n-gram look-up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from eagle3_ds.algorithms import ALGORITHMS
from eagle3_ds.algorithms.eagle3 import DraftModel, build_draft_config
from eagle3_ds.algorithms.eagle3 import decoding as eagle3_decoding
from eagle3_ds.config import DraftSection
from eagle3_ds.draft import BatchGuesser, Guesser, OneByOne, VocabularyMap
from eagle3_ds.eval import NotLosslessError, Round, decode_alone, speculative_decode
from eagle3_ds.eval import batch as batch_module
from eagle3_ds.eval.batch import TargetBatch, batches, read_prompt, texts_can_be_batched
from eagle3_ds.eval.intervals import interval
from eagle3_ds.eval.lockstep import (
    Answer,
    Clock,
    Limits,
    answer_alone,
    answer_batch,
    judged_by_answers,
    read_prompts,
    speculative_alone,
    speculative_batch,
)
from eagle3_ds.eval.ngram import NgramGuesser
from eagle3_ds.targets import Target
from tests.unit.tiny_families import AUX_LAYERS, FAMILIES, family_config, other_config, random_model

GENERATOR = torch.Generator().manual_seed(3)
PROMPTS = [torch.randint(3, 97, (n,), generator=GENERATOR).tolist() for n in (9, 1, 30, 14, 17)]
NEW, GUESSES = 18, 4


def family_target(family: str) -> Target:
    config = family_config(family) if family in FAMILIES else other_config(family)
    return Target(random_model(config), None, config, AUX_LAYERS)


def random_draft(target: Target, layers: int = 1, window: int | None = None) -> DraftModel:
    section = DraftSection(vocab_size=64, num_layers=layers, sliding_window=window, ttt_steps=GUESSES)
    torch.manual_seed(1)
    draft = DraftModel(build_draft_config(target.config, section)).eval()
    for parameter in draft.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return draft.requires_grad_(False)


class Helped:
    """A draft whose first guesses are put right, sometimes more of them and sometimes fewer, so that rounds
    differ. It notes what the draft itself said.
    """

    def __init__(self, guesser: Guesser, answer: Sequence[int]) -> None:
        self._guesser, self._answer, self._known = guesser, answer, 0
        self.said: list[list[int]] = []

    def propose(self, aux: torch.Tensor, tokens: Sequence[int], count: int) -> list[int]:
        guesses = self._guesser.propose(aux, tokens, count)
        self.said.append(guesses)
        self._known += 1 if not self._known else len(tokens)
        right = self._answer[self._known : self._known + (7 * self._known) % (count + 1)]
        return [*right, *guesses[len(right) :]]


class HelpedBatch:
    """The same for a batch."""

    def __init__(self, guesser: BatchGuesser, answers: Sequence[Sequence[int]]) -> None:
        self._guesser = guesser
        self._states: dict[int, torch.Tensor] = {}
        self._guesses: dict[int, list[int]] = {}
        self.texts = [Helped(self.of(text), answer) for text, answer in enumerate(answers)]

    def of(self, text: int) -> Guesser:
        guesses = self._guesses

        class Given:
            def propose(self, aux: torch.Tensor, tokens: Sequence[int], count: int) -> list[int]:
                assert len(aux) == len(tokens)
                return guesses[text]

        return Given()

    def propose(
        self, aux: Mapping[int, torch.Tensor], tokens: Mapping[int, Sequence[int]], count: int
    ) -> dict[int, list[int]]:
        self._guesses.update(self._guesser.propose(aux, tokens, count))
        return {text: self.texts[text].propose(aux[text], new, count) for text, new in tokens.items()}


def vocabulary_of(target: Target) -> VocabularyMap:
    return VocabularyMap.from_counts(torch.arange(target.config.vocab_size), 64)


def one_by_one(
    target: Target, draft: DraftModel, eos: int | None
) -> tuple[list[list[int]], list[list[Round]], list[list[list[int]]]]:
    """Answers, rounds and guesses, by the decoding of single texts."""
    answers, rounds, said = [], [], []
    for prompt in PROMPTS:
        longer = decode_alone(target, prompt, NEW + GUESSES, eos)
        guesser = Helped(
            eagle3_decoding.Eagle3Guesser(draft, target.embedding, vocabulary_of(target)), longer
        )
        _, found = speculative_decode(target, guesser, prompt, NEW, GUESSES, eos, longer[:NEW])
        answers.append(longer)
        rounds.append(found)
        said.append(guesser.said)
    return answers, rounds, said


@pytest.mark.parametrize("family", [*FAMILIES, "deepseek_v3"])
def test_a_batch_gives_the_rounds_and_guesses_of_single_texts(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of unequal lengths, read in pieces; texts that end early; two layers or a window of the
    draft.
    """
    monkeypatch.setattr(batch_module, "PIECE", 8)
    monkeypatch.setattr(eagle3_decoding, "PIECE", 7)
    target = family_target(family)
    assert texts_can_be_batched(target)
    draft = random_draft(target, layers=1 + (family == "qwen3"), window=6 if family == "mistral" else None)
    # A token in the middle of an answer ends the texts that come to it.
    eos = decode_alone(target, PROMPTS[0], NEW, None)[7]
    answers, rounds, said = one_by_one(target, draft, eos)
    limits, clock = Limits(NEW, GUESSES, eos), Clock()
    read = read_prompts(target, PROMPTS, clock)
    found = answer_batch(target, read, limits, clock)
    assert [answer.tokens for answer in found] == answers
    make = ALGORITHMS["eagle3"].batch_guesser
    helped = [
        HelpedBatch(make(draft, target.embedding, vocabulary_of(target), len(PROMPTS)), answers)
        for _ in range(2)
    ]
    assert speculative_batch(target, helped[0], read, found, limits, clock) == rounds
    assert judged_by_answers(helped[1], PROMPTS, found, limits) == rounds
    for batch in helped:
        assert [text.said for text in batch.texts] == said
    assert len({each.accepted for of_prompt in rounds for each in of_prompt}) > 2
    assert set(clock.seconds) == {"prompts", "target", "speculative"}


@pytest.mark.parametrize("family", ["minimax", "qwen3_next", "falcon_h1", "deepseek_v32"])
def test_a_target_whose_cache_cannot_be_cut_is_decoded_alone(family: str) -> None:
    target = family_target(family)
    assert not texts_can_be_batched(target)
    assert batches(target, [9, 8, 7], 10) == [[0], [1], [2]]
    draft, limits, clock = random_draft(target), Limits(6, GUESSES, None), Clock()
    make = ALGORITHMS["eagle3"].batch_guesser
    prompt = PROMPTS[0]
    longer = decode_alone(target, prompt, 6 + GUESSES, None)
    single = Helped(eagle3_decoding.Eagle3Guesser(draft, target.embedding, vocabulary_of(target)), longer)
    _, rounds = speculative_decode(target, single, prompt, 6, GUESSES, None, longer[:6])
    answer = answer_alone(target, prompt, limits, clock)
    assert answer.tokens == longer
    helped = [
        HelpedBatch(make(draft, target.embedding, vocabulary_of(target), 1), [longer]) for _ in range(2)
    ]
    assert speculative_alone(target, helped[0], prompt, answer, limits, clock) == rounds
    assert judged_by_answers(helped[1], [prompt], [answer], limits) == [rounds]


def test_angles_that_depend_on_the_longest_text_forbid_a_batch() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config = family_config("llama", rope_parameters=rope)
    assert not texts_can_be_batched(Target(random_model(config), None, config, AUX_LAYERS))


@pytest.mark.parametrize("fault", ["attention_mask", "position_ids"])
def test_a_target_that_passes_over_the_padding_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = family_target("qwen3")
    forward = type(target.base).forward

    def forgetful(self: Any, **arguments: Any) -> Any:
        if len(arguments["input_ids"]) > 1:
            arguments.pop(fault, None)
        return forward(self, **arguments)

    monkeypatch.setattr(type(target.base), "forward", forgetful)
    assert not texts_can_be_batched(target)


def test_a_difference_is_found_in_a_batch() -> None:
    target = family_target("llama")
    draft, limits, clock = random_draft(target), Limits(NEW, GUESSES, None), Clock()
    read = read_prompts(target, PROMPTS, clock)
    answers = answer_batch(target, read, limits, clock)
    answers[3].tokens[5] = (answers[3].tokens[5] + 1) % 97
    guesser = ALGORITHMS["eagle3"].batch_guesser(draft, target.embedding, vocabulary_of(target), len(PROMPTS))
    with pytest.raises(NotLosslessError, match=r"new token 5 \(after a prompt of 14\)"):
        speculative_batch(target, guesser, read, answers, limits, clock)


def test_texts_of_a_batch_are_kept_selected_and_given_back() -> None:
    target = family_target("gemma3_text")
    prompts = [read_prompt(target, prompt) for prompt in PROMPTS]
    before = [[keys.clone() for keys, _ in prompt.cache] for prompt in prompts]
    batch = TargetBatch(target, prompts)
    assert all(not prompt.cache for prompt in prompts)
    batch.read(torch.full((5, 3), 7))
    batch.keep([3, 0, 2, 1, 3])
    batch.select([3, 0, 4])
    for place, text in enumerate((3, 0, 4)):
        given = batch.keys_values(place, len(PROMPTS[text]))
        for (keys, _), expected in zip(given, before[text], strict=True):
            torch.testing.assert_close(keys, expected)


def test_batches_hold_texts_of_like_length_within_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    target = family_target("llama")
    monkeypatch.setattr(batch_module, "BATCH_TOKENS", 100)
    found = batches(target, [5, 300, 20, 21, 5, 22, 4], 4)
    assert found == [[1], [5, 3, 2], [0, 4, 6]]
    monkeypatch.setattr(batch_module, "BATCH_TEXTS", 2)
    assert batches(target, [5, 5, 5], 1) == [[0, 1], [2]]


def test_an_interval_covers_what_prompts_differ_by() -> None:
    same = [[Round(9, 2, 1, 2)] * 4] * 6
    assert interval(same) == [2.0, 2.0] and interval(same[:1]) is None and interval([[], same[0]]) is None
    one, four = [Round(9, 1, 0, 1)] * 10, [Round(9, 3, 3, 4)] * 10
    few, many = interval([one, four]), interval([one, four] * 50)
    assert few == [1.0, 4.0] and many is not None and 1.9 < many[0] < 2.5 < many[1] < 3.1
    # Rounds are weighed, not prompts: 10 tokens in 10 rounds and 4 in one.
    assert interval([one, [Round(9, 3, 3, 4)]]) == [1.0, 4.0]
    assert interval([one, four] * 50) == many


def test_look_up_proposes_what_followed_the_longest_suffix() -> None:
    guesser = NgramGuesser(1)
    assert guesser.propose(None, [2, 3, 9, 5, 3], 4) == [9, 5, 3]  # "3" was followed by 9, 5, 3
    assert guesser.propose(None, [7], 4) == []
    assert guesser.propose(None, [8, 2, 3], 2) == [9, 5]  # "2 3" is longer than the later "3 7"
    assert guesser.propose(None, [9], 1) == [5]


def test_look_up_is_judged_like_a_draft() -> None:
    answer = Answer([5, 6, 7, 5, 6, 7, 5, 6, 7, 5], torch.zeros(12, 1))
    (rounds,) = judged_by_answers(
        OneByOne(lambda text: NgramGuesser(4)), [[4, 3, 8]], [answer], Limits(8, 2, None)
    )
    assert [(each.context, each.reached, each.accepted, each.emitted) for each in rounds] == [
        (4, 0, 0, 1),
        (5, 0, 0, 1),
        (6, 0, 0, 1),
        (7, 2, 2, 3),
        (10, 2, 2, 3),
    ]
