"""Decoding prompts speculatively and counting, without the target's own answers to compare with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eagle3_ds.algorithms import algorithm_of
from eagle3_ds.config import Recipe
from eagle3_ds.draft import Draft, VocabularyMap
from eagle3_ds.eval.batch import batches, texts_can_be_batched
from eagle3_ds.eval.lockstep import Clock, Limits, decode_together, read_prompts
from eagle3_ds.eval.speculative import Round, speculative_decode
from eagle3_ds.targets import Target


@torch.no_grad()
def decoded_rounds(
    recipe: Recipe,
    target: Target,
    draft: Draft,
    embedding: Tensor | None,
    vocabulary: VocabularyMap,
    prompts: Sequence[Sequence[int]],
) -> list[Round]:
    """The rounds of a draft after all prompts, greedily, with `eval.max_new_tokens` and `eval.draft_tokens`.

    Args:
        draft: whose attention is not patched. It is moved to the target's device and dtype.
        embedding: [V, H], the draft's own; None: it shares the target's.
    """
    settings, algorithm = recipe.eval, algorithm_of(recipe)
    device, dtype = target.device, target.head.dtype
    draft.to(device, dtype).eval()
    shared = target.embedding if embedding is None else embedding.to(device, dtype)
    limits = Limits(settings.max_new_tokens, settings.draft_tokens, target.tokenizer.eos_token_id)
    sizes = (limits.max_new_tokens, limits.draft_tokens, limits.eos_token_id)
    rounds: list[Round] = []
    for group in batches(target, list(map(len, prompts)), limits.max_new_tokens + limits.draft_tokens):
        texts = [prompts[index] for index in group]
        if texts_can_be_batched(target):
            guesser = algorithm.batch_guesser(draft, shared, vocabulary, len(texts))
            _, found = decode_together(target, guesser, read_prompts(target, texts, Clock()), limits)
            rounds += [each for of_text in found for each in of_text]
        else:
            single = algorithm.guesser(draft, shared, vocabulary)
            rounds += speculative_decode(target, single, texts[0], *sizes)[1]
    return rounds
