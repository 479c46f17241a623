"""Speculative decoding: lossless with any draft, caches that forget guesses, counts as told, the picture."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.text import Text
from torch import nn

from eagle3_ds.algorithms.eagle3 import DraftModel, build_draft_config
from eagle3_ds.algorithms.eagle3.decoding import Eagle3Guesser
from eagle3_ds.config import DraftSection, EvalSection, TargetSection
from eagle3_ds.draft import DraftCache, VocabularyMap
from eagle3_ds.eval import (
    NotLosslessError,
    Round,
    decode_alone,
    draw_report,
    evaluate_draft,
    speculative_decode,
)
from eagle3_ds.eval.evaluate import _by_context, _by_position
from eagle3_ds.eval.report import _figure, _mean
from eagle3_ds.eval.speculative import TargetStream, cache_can_be_cut, cache_name, judge
from eagle3_ds.targets import Target, capture_hidden_states, load_target
from tests.unit.tiny_families import AUX_LAYERS, family_config, other_config, random_model
from tests.unit.tiny_target import build_tiny_target

ROOT = Path(__file__).parents[2]
PROMPT_97 = [60, 70, 80, 90, 3, 5, 7, 11, 13]
PROMPT = [260, 70, 80, 90, 100, 3, 5, 7, 11, 13]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = build_tiny_target(tmp_path_factory.mktemp("eval") / "tiny")
    return load_target(TargetSection(path=str(folder)), dtype="float32")


@pytest.fixture(scope="module", params=[1, 2])
def draft(target: Target, request: pytest.FixtureRequest) -> DraftModel:
    torch.manual_seed(1)
    draft = DraftModel(
        build_draft_config(target.config, DraftSection(vocab_size=64, num_layers=request.param))
    )
    for parameter in draft.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # guesses that depend on the input
    return draft.eval()


@pytest.fixture(scope="module")
def vocabulary(target: Target) -> VocabularyMap:
    output = decode_alone(target, PROMPT, 40, None)
    return VocabularyMap.from_counts(
        torch.bincount(torch.tensor(output), minlength=target.config.vocab_size), 64
    )


class Renamed(nn.Module):
    def forward(self, input_ids: object, cache: object = None) -> None: ...


class Before(nn.Module):
    def forward(self, input_ids: object, past_key_values: object = None) -> None: ...


class Anything(nn.Module):
    def forward(self, input_ids: object, **others: object) -> None: ...


@pytest.mark.parametrize(
    ("model", "name"),
    [(Renamed(), "cache"), (Before(), "past_key_values"), (Anything(), "past_key_values")],
)
def test_the_cache_goes_by_the_name_that_the_model_knows(model: nn.Module, name: str) -> None:
    assert cache_name(model) == name


def test_a_cached_forward_is_not_warned_of(target: Target, recwarn: pytest.WarningsRecorder) -> None:
    TargetStream(target).read(PROMPT)
    assert not [warning for warning in recwarn if "past_key_values" in str(warning.message)]


def test_greedy_equals_decoding_without_a_cache(target: Target) -> None:
    known = list(PROMPT)
    for _ in range(20):
        known.append(int(target.model(input_ids=torch.tensor([known])).logits[0, -1].argmax()))
    assert decode_alone(target, PROMPT, 20, None) == known[len(PROMPT) :]
    ended = known[: known.index(known[len(PROMPT) + 4], len(PROMPT)) + 1]
    assert decode_alone(target, PROMPT, 20, ended[-1]) == ended[len(PROMPT) :]


def test_target_stream_after_a_rejection_equals_one_forward(target: Target) -> None:
    stream = TargetStream(target)
    _, first = stream.read(PROMPT)
    stream.read([1, 2, 3, 4])
    stream.keep(len(PROMPT) + 1)
    logits, second = stream.read([9, 8])
    tokens = torch.tensor([*PROMPT, 1, 9, 8])
    aux, teacher = capture_hidden_states(target, tokens)
    torch.testing.assert_close(first, aux[: len(PROMPT)], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(second, aux[-2:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits, teacher[-2:] @ target.head.T, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gpt_oss"])
def test_target_stream_is_cut_back_beyond_a_sliding_window(family: str) -> None:
    config = family_config(family)
    target = Target(random_model(config), None, config, AUX_LAYERS)
    stream, prompt = TargetStream(target), list(range(20))
    stream.read(prompt)
    stream.read([1, 2, 3, 4])
    stream.keep(21)
    logits, aux = stream.read([9, 8])
    expected, teacher = capture_hidden_states(target, torch.tensor([*prompt, 1, 9, 8]))
    torch.testing.assert_close(aux, expected[-2:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits, teacher[-2:] @ target.head.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["minimax", "qwen3_next", "falcon_h1", "jamba", "deepseek_v32"])
def test_a_target_whose_cache_cannot_be_cut_back_reads_again(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Hybrid, linear and indexer caches: lossless, with guesses right and wrong, and told once."""
    config = other_config(family)
    target = Target(random_model(config), None, config, AUX_LAYERS)
    expected = decode_alone(target, PROMPT_97, 12, None)

    class Guesses:
        """Right twice, then wrong."""

        def __init__(self) -> None:
            self.seen = list(PROMPT_97[:1])

        def propose(self, aux: torch.Tensor, tokens: Sequence[int], count: int) -> list[int]:
            assert len(aux) == len(tokens)
            self.seen += tokens
            known = len(self.seen) - len(PROMPT_97)
            return [*expected[known : known + 2], 1, 2][:count]

    output, rounds = speculative_decode(target, Guesses(), PROMPT_97, 12, 4, None, expected)
    known = list(PROMPT_97)
    for _ in range(12):
        known.append(
            int((capture_hidden_states(target, torch.tensor(known))[1] @ target.head.T)[-1].argmax())
        )
    assert output == expected == known[len(PROMPT_97) :] and len(rounds) < 12
    assert caplog.text.count("cannot be cut back") == 1 and not cache_can_be_cut(target)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "qwen3_moe"])
def test_a_cache_of_keys_and_values_can_be_cut_back(family: str) -> None:
    config = family_config(family)
    assert cache_can_be_cut(Target(random_model(config), None, config, AUX_LAYERS))


def test_proposals_do_not_depend_on_earlier_guesses(
    target: Target, draft: DraftModel, vocabulary: VocabularyMap
) -> None:
    aux, _ = capture_hidden_states(target, torch.tensor(PROMPT))
    following = [*PROMPT[1:], 42]
    stepwise = Eagle3Guesser(draft, target.embedding, vocabulary)
    stepwise.propose(aux[:4], following[:4], 5)
    stepwise.propose(aux[4:7], following[4:7], 3)
    whole = Eagle3Guesser(draft, target.embedding, vocabulary).propose(aux, following, 6)
    assert stepwise.propose(aux[7:], following[7:], 6) == whole
    assert set(whole) <= set(vocabulary.draft_to_target.tolist())


def test_guesses_follow_the_served_semantics(
    target: Target, draft: DraftModel, vocabulary: VocabularyMap
) -> None:
    """Slot i: g_i and x_{i+1} at position i; guess k: own output and own guess at position i + k."""
    aux, _ = capture_hidden_states(target, torch.tensor(PROMPT))
    tokens = [*PROMPT[1:], 42]
    guesses = Eagle3Guesser(draft, target.embedding, vocabulary).propose(aux, tokens, 3)
    hidden = draft.project_aux(aux)
    for k in range(3):
        # all slots again without a cache: verified ones from the target, then one more per guess
        embeds = target.embedding[torch.tensor(tokens + guesses[:k])]
        output = draft.decode(
            embeds, hidden, torch.arange(len(embeds)), DraftCache(draft.config.num_hidden_layers)
        )
        assert int(vocabulary.draft_to_target[draft.logits(output)[-1].argmax()]) == guesses[k]
        hidden = torch.cat((hidden, output[-1:]))


@pytest.mark.parametrize("window", [1, 4, 60])
def test_a_served_draft_with_a_window_sees_so_many_keys(target: Target, window: int) -> None:
    """In one call and cache by cache; what is further back changes nothing, what is nearer does."""
    config = build_draft_config(
        target.config, DraftSection(vocab_size=64, sliding_window=window, ttt_steps=1)
    )
    torch.manual_seed(1)
    draft = DraftModel(config).eval()
    for parameter in draft.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    embeds, hidden = torch.randn(2, 12, config.hidden_size)
    positions = torch.arange(12)
    whole = draft.decode(embeds, hidden, positions, DraftCache(1))
    cache = DraftCache(1)
    pieces = [
        draft.decode(embeds[part], hidden[part], positions[part], cache)
        for part in (slice(5), slice(5, 6), slice(6, 12))
    ]
    torch.testing.assert_close(torch.cat(pieces), whole)
    first = max(0, 12 - window)
    torch.testing.assert_close(
        draft.decode(embeds[first:], hidden[first:], positions[first:], DraftCache(1))[-1], whole[-1]
    )
    if window > 1:
        shorter = draft.decode(
            embeds[first + 1 :], hidden[first + 1 :], positions[first + 1 :], DraftCache(1)
        )
        assert (shorter[-1] - whole[-1]).norm() > 1e-3 * whole[-1].norm()


@pytest.mark.parametrize("draft_tokens", [1, 4])
def test_any_draft_is_lossless(
    target: Target, draft: DraftModel, vocabulary: VocabularyMap, draft_tokens: int
) -> None:
    expected = decode_alone(target, PROMPT, 30, None)
    output, rounds = speculative_decode(
        target, Eagle3Guesser(draft, target.embedding, vocabulary), PROMPT, 30, draft_tokens, None, expected
    )
    assert output == expected
    assert 1 + sum(each.emitted for each in rounds) >= 30
    assert [each.context for each in rounds][0] == len(PROMPT) + 1


def test_an_oracle_is_accepted_up_to_its_mistakes(
    target: Target, draft: DraftModel, vocabulary: VocabularyMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = decode_alone(target, PROMPT, 60, None)
    seen: list[int] = []

    def propose(self: Eagle3Guesser, aux: torch.Tensor, tokens: list[int], count: int) -> list[int]:
        assert len(aux) == len(tokens)
        seen.extend(tokens)
        known = len(seen) - len(PROMPT) + 1
        assert seen == [*PROMPT[1:], *expected[:known]]
        guesses = expected[known : known + count]
        guesses[2] = (guesses[2] + 1) % target.config.vocab_size
        return guesses

    monkeypatch.setattr(Eagle3Guesser, "propose", propose)
    output, rounds = speculative_decode(
        target, Eagle3Guesser(draft, target.embedding, vocabulary), PROMPT, 31, 5, None, expected[:31]
    )
    assert output == expected[:31]
    assert {(each.reached, each.accepted, each.emitted) for each in rounds} == {(3, 2, 3)}


def test_a_difference_is_told_with_its_place_and_gap(
    target: Target, draft: DraftModel, vocabulary: VocabularyMap
) -> None:
    wrong = decode_alone(target, PROMPT, 12, None)
    wrong[5] = (wrong[5] + 1) % target.config.vocab_size
    with pytest.raises(
        NotLosslessError, match=r"new token 5 \(after a prompt of 10\) is \d+, the target alone gives"
    ):
        speculative_decode(
            target, Eagle3Guesser(draft, target.embedding, vocabulary), PROMPT, 12, 3, None, wrong
        )


@pytest.mark.parametrize(
    ("guesses", "choices", "eos", "fresh", "reached", "accepted"),
    [
        ([1, 2, 3], [1, 2, 3, 4], None, [1, 2, 3, 4], 3, 3),
        ([1, 2, 3], [1, 9, 3, 4], None, [1, 9], 2, 1),
        ([1, 2, 3], [7, 2, 3, 4], None, [7], 1, 0),
        ([1, 2, 3], [1, 2, 3, 4], 2, [1, 2], 2, 2),
        ([1, 2, 3], [1, 2, 3, 4], 4, [1, 2, 3, 4], 3, 3),
        ([1, 2, 3], [1, 5, 3, 4], 5, [1, 5], 2, 1),
    ],
)
def test_judging_a_round(
    guesses: list[int], choices: list[int], eos: int | None, fresh: list[int], reached: int, accepted: int
) -> None:
    assert judge(guesses, choices, eos, 20) == (fresh, Round(20, reached, accepted, len(fresh)))


def test_counts_by_position_and_context() -> None:
    rounds = [Round(10, 1, 0, 1), Round(20, 2, 2, 3), Round(21, 2, 1, 2), Round(500, 1, 1, 1)]
    first, second = _by_position(rounds, 2)
    assert (first["reached"], first["accepted_when_reached"], first["accepted"]) == (4, 0.75, 0.75)
    assert (second["reached"], second["accepted_when_reached"], second["accepted"]) == (2, 0.5, 0.25)
    assert [
        (row["up_to"], row["rounds"], row["acceptance_length"])
        for row in _by_context([rounds[:1], rounds[1:]], (20, 40))
    ] == [
        (20, 2, 2.0),
        (40, 1, 2.0),
        (None, 1, 1.0),
    ]


class StandInRecipe:
    """The two sections that an evaluation reads."""

    draft = DraftSection()
    eval = EvalSection(max_new_tokens=10, draft_tokens=3, context_buckets=(16, 64))


def test_evaluation_and_picture(
    target: Target, draft: DraftModel, vocabulary: VocabularyMap, tmp_path: Path
) -> None:
    recipe: Any = StandInRecipe()
    untrained = DraftModel(draft.config)
    result = evaluate_draft(
        recipe, target, draft, untrained, vocabulary, [PROMPT, PROMPT[:3]], progress=False
    )
    assert result["lossless"] is True and result["prompts"] == 2
    documented = (ROOT / "docs/recipe.md").read_text().partition("What `eval.json`")[2].partition("\n## ")[0]
    assert set(result) <= set(re.findall(r"`(\w+)`", documented))
    assert 1.0 <= result["acceptance_length"] <= 4.0 and 1.0 <= result["acceptance_length_untrained"] <= 4.0
    assert [row["position"] for row in result["acceptance_by_position"]] == [1, 2, 3]
    record = {"loss": 3.0, "step_loss": [2.0, 1.0], "step_accuracy": [0.5, 0.25]}
    lines = [json.dumps(record | {"step": step, "loss": 3 / step}) for step in (1, 2, 3)]
    lines.append(json.dumps(record | {"step": 4, "heldout": record}))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with_eval = draw_report(tmp_path / "metrics.jsonl", result, tmp_path / "a.png")
    without = draw_report(tmp_path / "metrics.jsonl", None, tmp_path / "b.png")
    assert with_eval.stat().st_size > without.stat().st_size > 1000
    drawn = _figure([json.loads(line) for line in lines], result, "a title")
    words = {text.get_text() for text in drawn.findobj(Text)}
    context = result["acceptance_by_context"][0]
    assert f"≤ 16\n2 prompts\n{context['rounds']} rounds" in words and "0" in words
    assert any(word.startswith("a title\nevaluated on 2 held-out prompts, ") for word in words)
    assert {f"n-gram look-up {_mean(result, '_ngram')}", f"trained {_mean(result, '')}"} <= words
    # An eval.json of an earlier version has no look-up and no interval, and is drawn all the same.
    older = {key: value for key, value in result.items() if not re.search("ngram|interval|speed", key)}
    assert not any(
        "look-up" in text.get_text() for text in _figure([record | {"step": 1}], older).findobj(Text)
    )
    warned = draw_report(tmp_path / "metrics.jsonl", None, tmp_path / "w.png", ["too long " * 40, "too many"])
    assert warned.stat().st_size > without.stat().st_size
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no line"):
        draw_report(tmp_path / "metrics.jsonl", None, tmp_path / "c.png")


def test_evaluation_refusals(target: Target, draft: DraftModel, vocabulary: VocabularyMap) -> None:
    recipe: Any = StandInRecipe()
    for prompts in ([], [PROMPT, []]):
        with pytest.raises(ValueError, match="the shortest of 0 tokens"):
            evaluate_draft(recipe, target, draft, draft, vocabulary, prompts, progress=False)
    recipe.eval = EvalSection(dtype="bfloat16")
    with pytest.raises(ValueError, match=r"eval.dtype is bfloat16, the target is in torch.float32"):
        evaluate_draft(recipe, target, draft, draft, vocabulary, [PROMPT], progress=False)
