"""Computing eval.json: the acceptance of the trained and of the untrained draft, in total, by guess and by
context length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eagle3_ds.algorithms import algorithm_of
from eagle3_ds.config import EvalSection, Recipe
from eagle3_ds.data.loops import loops, repeated_share
from eagle3_ds.draft import Draft, VocabularyMap
from eagle3_ds.eval.speculative import Round, greedy_decode, speculative_decode
from eagle3_ds.say import progress_bar
from eagle3_ds.targets import Target


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
    """Decode every prompt three times: with the target alone, with the draft, and with the untrained draft.
    Runs in one process, without collectives.

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
        without one. Answers of the target that repeat themselves are counted, and the acceptance length is
        given without them too.

    Raises:
        ValueError: there is no prompt, a prompt is empty, or the target has another dtype.
        NotLosslessError: an output differs from that of the target alone.
    """
    settings = recipe.eval
    dtype: torch.dtype = getattr(torch, settings.dtype)
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError(
            f"{len(prompts)} prompts, the shortest of {min(map(len, prompts), default=0)} tokens: an "
            "evaluation needs prompts of a token or more. Give more held-out data, or set eval.num_prompts "
            "to 0."
        )
    if target.head.dtype != dtype:
        raise ValueError(
            f"eval.dtype is {settings.dtype}, the target is in {target.head.dtype}. Load it in eval.dtype."
        )
    drafts = {"trained": draft, "untrained": untrained_draft}
    rounds: dict[str, list[list[Round]]] = {name: [] for name in drafts}
    answers: list[list[int]] = []
    eos = target.tokenizer.eos_token_id
    shared = target.embedding if embedding is None else embedding.to(target.device, dtype)
    for model in drafts.values():
        model.to(target.device, dtype).eval()
    for prompt in progress_bar(prompts, desc="speculative decoding", disable=not progress, unit="prompt"):
        expected = greedy_decode(target, prompt, settings.max_new_tokens, eos)
        answers.append(expected)
        for name, model in drafts.items():
            guesser = algorithm_of(recipe).guesser(model, shared, vocabulary)
            _, more = speculative_decode(
                target,
                guesser,
                prompt,
                settings.max_new_tokens,
                settings.draft_tokens,
                eos,
                expected,
            )
            rounds[name].append(more)
    # lossless: every output above was compared with the target's own, a difference raises
    sizes = {"lossless": True, "prompts": len(prompts), "new_tokens": sum(map(len, answers))}
    trained, untrained = (_joined(rounds[name]) for name in drafts)
    return _figures(trained, untrained, settings) | sizes | _loop_figures(answers, rounds)


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
    }


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


def _figures(trained: Sequence[Round], untrained: Sequence[Round], settings: EvalSection) -> dict[str, Any]:
    """The part of eval.json that is computed from the rounds, and the settings that it depends on."""
    return {
        "acceptance_length": _acceptance_length(trained),
        "acceptance_length_untrained": _acceptance_length(untrained),
        "acceptance_by_position": _by_position(trained, settings.draft_tokens),
        "acceptance_by_position_untrained": _by_position(untrained, settings.draft_tokens),
        "acceptance_by_context": _by_context(trained, settings.context_buckets),
        "acceptance_by_context_untrained": _by_context(untrained, settings.context_buckets),
        "target_forwards": len(trained),
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


def _by_context(rounds: Sequence[Round], upper_ends: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    lower = 0
    for upper in (*upper_ends, None):
        inside = [
            each for each in rounds if lower < each.context and (upper is None or each.context <= upper)
        ]
        rows.append(
            {
                "above": lower,
                "up_to": upper,
                "rounds": len(inside),
                "acceptance_length": _acceptance_length(inside),
            }
        )
        lower = upper or lower
    return rows
