"""The numbers of eval.json: acceptance of a trained draft and of the same draft untrained, by position and by
context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from eagle3_ds.algorithms import algorithm_of
from eagle3_ds.config import EvalSection, Recipe
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
) -> dict[str, Any]:
    """Decode every prompt three times: the target alone, with the draft, with the untrained draft.

    Args:
        target: loaded in `eval.dtype`.
        draft, untrained_draft: served drafts (attention not patched), moved to the target's device and
            `eval.dtype`.
        prompts: token ids up to where the assistant speaks.

    Returns:
        What eval.json holds. Acceptance length: tokens per forward of the target, its own included. By
        position: for guess k, the share accepted of those reached (`accepted_when_reached`) and of all rounds
        (`accepted`). By context: buckets of `eval.context_buckets`, upper ends included, null the last
        without one.

    Raises:
        ValueError: no prompt, an empty one, or a target in another dtype.
        NotLosslessError: an output differs from the target's own.
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
    rounds: dict[str, list[Round]] = {name: [] for name in drafts}
    new_tokens = 0
    eos = target.tokenizer.eos_token_id
    for model in drafts.values():
        model.to(target.device, dtype).eval()
    for prompt in progress_bar(prompts, desc="speculative decoding", disable=not progress, unit="prompt"):
        expected = greedy_decode(target, prompt, settings.max_new_tokens, eos)
        new_tokens += len(expected)
        for name, model in drafts.items():
            guesser = algorithm_of(recipe).guesser(model, target.embedding, vocabulary)
            _, more = speculative_decode(
                target,
                guesser,
                prompt,
                settings.max_new_tokens,
                settings.draft_tokens,
                eos,
                expected,
            )
            rounds[name] += more
    # lossless: every output above was compared with the target's own, a difference raises
    sizes = {"lossless": True, "prompts": len(prompts), "new_tokens": new_tokens}
    return _figures(rounds["trained"], rounds["untrained"], settings) | sizes


def _figures(trained: Sequence[Round], untrained: Sequence[Round], settings: EvalSection) -> dict[str, Any]:
    """What is counted over rounds, and the settings that it depends on."""
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
    """Mean of the emitted tokens; None when there was no round."""
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
