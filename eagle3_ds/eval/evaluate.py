"""Computing eval.json: the acceptance of the trained and of the untrained draft, in total, by guess and by
context length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eagle3_ds.algorithms import algorithm_of
from eagle3_ds.config import EvalSection, Recipe
from eagle3_ds.data.loops import loops, repeated_share
from eagle3_ds.draft import BatchGuesser, Draft, OneByOne, VocabularyMap
from eagle3_ds.eval.batch import batches, texts_can_be_batched
from eagle3_ds.eval.choice import GREEDY, Greedy, Sampled
from eagle3_ds.eval.intervals import interval
from eagle3_ds.eval.lockstep import (
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
from eagle3_ds.eval.speculative import Round
from eagle3_ds.say import progress_bar
from eagle3_ds.targets import Target

NAMES = {"trained": "", "untrained": "_untrained", "ngram": "_ngram"}
"""What makes guesses, and the suffix of its keys in eval.json."""


def evaluate_draft(
    recipe: Recipe,
    target: Target,
    draft: Draft,
    untrained_draft: Draft,
    vocabulary: VocabularyMap,
    prompts: Sequence[Sequence[int]],
    progress: bool = True,
    embedding: Tensor | None = None,
) -> dict[str, Any]:
    """Decode every prompt with the target alone and with the draft, many prompts at once, and judge the
    untrained draft and n-gram look-up by the target's answers; with a temperature, all of it once more with
    drawn tokens. Runs in one process, without collectives.

    Args:
        target: loaded in `eval.dtype`.
        draft, untrained_draft: served drafts, whose attention is not patched. They are moved to the target's
            device and `eval.dtype`.
        prompts: token ids, each up to where the assistant's answer begins.
        embedding: [V, H], the drafts' own; None: they share the target's.

    Returns:
        What eval.json holds. Acceptance length: tokens per forward of the target, its own included. By
        position: for guess k, the share accepted of those reached (`accepted_when_reached`) and of all rounds
        (`accepted`). By context: buckets of `eval.context_buckets`, upper ends included, null the last
        without one, each with a 95% interval. Answers of the target that repeat themselves are counted, and
        the acceptance length is given without them too.

    Raises:
        ValueError: there is no prompt, a prompt is empty, or the target has another dtype.
        NotLosslessError: an output with the draft differs from that of the target alone.
    """
    settings = recipe.eval
    dtype: torch.dtype = getattr(torch, settings.dtype)
    _check(prompts, target, settings.dtype)
    shared = target.embedding if embedding is None else embedding.to(target.device, dtype)
    for model in (draft, untrained_draft):
        model.to(target.device, dtype).eval()
    limits = Limits(settings.max_new_tokens, settings.draft_tokens, target.tokenizer.eos_token_id)
    algorithm = algorithm_of(recipe)
    makers = [
        lambda count, model=model: algorithm.batch_guesser(model, shared, vocabulary, count)
        for model in (draft, untrained_draft)
    ]
    found = _decode_all(target, prompts, makers, limits, lambda group: GREEDY, progress)
    answers = [answer[: limits.max_new_tokens] for answer in found.answers]
    sizes = {
        # Every output of the trained draft was compared with the target's own: a difference raises.
        "lossless": True,
        "prompts": len(prompts),
        "distinct_prompts": len({tuple(prompt) for prompt in prompts}),
        "new_tokens": sum(map(len, answers)),
    }
    result = (
        _figures(found.rounds, settings) | sizes | _loop_figures(answers, found.rounds) | _times(found.clock)
    )
    if settings.temperature:
        drawn = partial(Sampled, settings.temperature, settings.seed)
        sampled = _decode_all(target, prompts, makers, limits, drawn, progress)
        result |= {"temperature": settings.temperature, "lossless_sampled": True}
        result |= _figures(sampled.rounds, settings, "_sampled")
    return result


def _check(prompts: Sequence[Sequence[int]], target: Target, dtype: str) -> None:
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError(
            f"{len(prompts)} prompts, the shortest of {min(map(len, prompts), default=0)} tokens: an "
            "evaluation needs prompts of a token or more. Give more held-out data, or set eval.num_prompts "
            "to 0."
        )
    if target.head.dtype != getattr(torch, dtype):
        raise ValueError(
            f"eval.dtype is {dtype}, the target is in {target.head.dtype}. Load it in eval.dtype."
        )


@dataclass
class _Found:
    """What is known of each prompt after its batch: the target's answer, and the rounds of each draft."""

    answers: list[list[int]]
    rounds: dict[str, list[list[Round]]]
    clock: Clock


def _decode_all(
    target: Target,
    prompts: Sequence[Sequence[int]],
    makers: Sequence[Callable[[int], BatchGuesser]],
    limits: Limits,
    choice_of: Callable[[Sequence[int]], Greedy],
    progress: bool,
) -> _Found:
    """Decode all prompts, batch by batch. `choice_of` gives how the tokens of these prompts are chosen."""
    found = _Found([[] for _ in prompts], {name: [[] for _ in prompts] for name in NAMES}, Clock())
    groups = batches(target, list(map(len, prompts)), limits.max_new_tokens + limits.draft_tokens)
    for group in progress_bar(groups, desc="speculative decoding", disable=not progress, unit="batch"):
        texts = [list(prompts[index]) for index in group]
        _decode(target, texts, group, makers, limits, choice_of(group), found)
    return found


def _decode(
    target: Target,
    prompts: list[list[int]],
    places: Sequence[int],
    makers: Sequence[Callable[[int], BatchGuesser]],
    limits: Limits,
    choice: Greedy,
    found: _Found,
) -> None:
    """Decode one batch, and put what is found at its places.

    Args:
        makers: of the guessers of the trained and of the untrained draft, for a number of texts.
    """
    trained, untrained = (make(len(prompts)) for make in makers)
    if len(prompts) > 1 or texts_can_be_batched(target):
        read = read_prompts(target, prompts, found.clock, choice)
        answers = answer_batch(target, read, limits, found.clock, choice)
        rounds = speculative_batch(target, trained, read, answers, limits, found.clock, choice)
    else:
        answers = [answer_alone(target, prompts[0], limits, found.clock, choice)]
        rounds = [speculative_alone(target, trained, prompts[0], answers[0], limits, found.clock, choice)]
    by_name = {
        "trained": rounds,
        "untrained": judged_by_answers(untrained, prompts, answers, limits),
        "ngram": judged_by_answers(
            OneByOne(lambda text: NgramGuesser(prompts[text][0])), prompts, answers, limits
        ),
    }
    for row, place in enumerate(places):
        found.answers[place] = answers[row].tokens
        for name, of_draft in by_name.items():
            found.rounds[name][place] = of_draft[row]


def _times(clock: Clock) -> dict[str, Any]:
    """Seconds with and without the draft; reading the prompts, which both need, is in both."""
    prompts = clock.seconds.get("prompts", 0.0)
    alone, speculative = (prompts + clock.seconds[name] for name in ("target", "speculative"))
    return {
        "seconds_target_alone": alone,
        "seconds_speculative": speculative,
        "speedup": alone / speculative,
    }


def _joined(rounds: Sequence[Sequence[Round]]) -> list[Round]:
    return [each for of_prompt in rounds for each in of_prompt]


def _loop_figures(answers: Sequence[Sequence[int]], rounds: dict[str, list[list[Round]]]) -> dict[str, Any]:
    """How many of the target's own answers go round in circles, and what is accepted in the others."""
    looping = [loops(answer) for answer in answers]
    kept = {
        name: _joined([more for more, loop in zip(of_draft, looping, strict=True) if not loop])
        for name, of_draft in rounds.items()
    }
    return {
        "looping_prompts": sum(looping),
        "repeated_ngrams": sum(map(repeated_share, answers)) / len(answers),
        "acceptance_length_without_loops": _acceptance_length(kept["trained"]),
        "acceptance_length_untrained_without_loops": _acceptance_length(kept["untrained"]),
        "acceptance_length_ngram_without_loops": _acceptance_length(kept["ngram"]),
    }


def in_process(result: dict[str, Any] | None) -> dict[str, Any] | None:
    """The content of an eval.json if it has the figures of `evaluate_draft`; None where it holds only those
    of a server.
    """
    return result if result is not None and "acceptance_length" in result else None


def loop_warning(result: dict[str, Any]) -> str | None:
    """What to say of an evaluation whose target repeats itself; None where it does not."""
    if not result.get("looping_prompts"):
        return None
    without = result["acceptance_length_without_loops"]
    left = "no other answer is left to judge by" if without is None else f"{without:.2f} without these"
    return (
        f"{result['looping_prompts']} of the target's {result['prompts']} greedy answers go round in circles "
        f"({result['repeated_ngrams']:.0%} of all n-grams are repetitions), which any draft guesses: "
        f"acceptance length {left}. Look at the target, its chat template and the prompts"
    )


def _figures(rounds: dict[str, list[list[Round]]], settings: EvalSection, drawn: str = "") -> dict[str, Any]:
    """The part of eval.json that is computed from the rounds of each prompt, and the settings that it depends
    on. `drawn`: the suffix of rounds whose tokens were drawn.
    """
    figures: dict[str, Any] = {}
    for name, of_name in NAMES.items():
        suffix = of_name + drawn
        of_prompts, joined = rounds[name], _joined(rounds[name])
        figures |= {
            f"acceptance_length{suffix}": _acceptance_length(joined),
            f"acceptance_length{suffix}_interval": interval(of_prompts),
            f"acceptance_by_position{suffix}": _by_position(joined, settings.draft_tokens),
            f"acceptance_by_context{suffix}": _by_context(of_prompts, settings.context_buckets),
            f"target_forwards{suffix}": len(joined),
        }
    return figures | {
        "draft_tokens": settings.draft_tokens,
        "max_new_tokens": settings.max_new_tokens,
        "dtype": settings.dtype,
    }


def _acceptance_length(rounds: Sequence[Round]) -> float | None:
    """Mean number of tokens that a round emits; None without rounds."""
    return sum(each.emitted for each in rounds) / len(rounds) if rounds else None


def _by_position(rounds: Sequence[Round], draft_tokens: int) -> list[dict[str, Any]]:
    rows = []
    for position in range(1, draft_tokens + 1):
        reached = sum(each.reached >= position for each in rounds)
        accepted = sum(each.accepted >= position for each in rounds)
        rows.append(
            {
                "position": position,
                "reached": reached,
                "accepted_when_reached": accepted / reached if reached else None,
                "accepted": accepted / len(rounds) if rounds else None,
            }
        )
    return rows


def _by_context(of_prompts: Sequence[Sequence[Round]], upper_ends: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    lower = 0
    for upper in (*upper_ends, None):
        inside = [
            [each for each in rounds if lower < each.context and (upper is None or each.context <= upper)]
            for rounds in of_prompts
        ]
        rows.append(
            {
                "above": lower,
                "up_to": upper,
                "prompts": sum(map(bool, inside)),
                "rounds": sum(map(len, inside)),
                "acceptance_length": _acceptance_length(_joined(inside)),
                "interval": interval(inside),
            }
        )
        lower = upper or lower
    return rows
