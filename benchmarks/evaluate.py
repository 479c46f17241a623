"""`python -m benchmarks.evaluate`: what an evaluation costs, prompt by prompt and in batches, in one run.

The target has the sizes of the quickstart's and random weights, the drafts are fresh: with them nearly every
guess is wrong, the longest case. Before: each prompt is decoded three times alone, by the target, with the
draft, and with the untrained draft. After: `evaluate_draft`. The rounds of both must be the same.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from eagle3_ds.algorithms.eagle3 import DraftModel, build_draft_config
from eagle3_ds.algorithms.eagle3.decoding import Eagle3Guesser
from eagle3_ds.config import DraftSection, EvalSection, TargetBuild, TargetSection
from eagle3_ds.data.stdlib_corpus import stdlib_conversations, stdlib_text
from eagle3_ds.draft import VocabularyMap
from eagle3_ds.eval import decode_alone, evaluate_draft, speculative_decode
from eagle3_ds.targets import Target, build_target, load_target


class Settings:
    """The two sections of a recipe that an evaluation reads."""

    def __init__(self, new_tokens: int) -> None:
        self.draft, self.eval = DraftSection(vocab_size=2048), EvalSection(max_new_tokens=new_tokens)


def one_by_one(
    target: Target, drafts: list[DraftModel], vocabulary: VocabularyMap, prompts: list[list[int]], recipe: Any
) -> list[int]:
    """The number of rounds with each draft."""
    settings, eos, rounds = recipe.eval, target.tokenizer.eos_token_id, [0] * len(drafts)
    for prompt in prompts:
        expected = decode_alone(target, prompt, settings.max_new_tokens, eos)
        for place, draft in enumerate(drafts):
            guesser = Eagle3Guesser(draft, target.embedding, vocabulary)
            _, more = speculative_decode(
                target, guesser, prompt, settings.max_new_tokens, settings.draft_tokens, eos, expected
            )
            rounds[place] += len(more)
    return rounds


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=512, help="of the longest")
    parser.add_argument("--new-tokens", type=int, default=64)
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        section = TargetSection(path=str(Path(folder) / "target"), build=TargetBuild(steps=0))
        chats = (row["messages"] for row in stdlib_conversations())
        build_target(section, stdlib_text(), chats, progress=False)
        target = load_target(section, "float32")
    recipe: Any = Settings(chosen.new_tokens)
    torch.manual_seed(0)
    config = build_draft_config(target.config, recipe.draft)
    drafts = [DraftModel(config).eval().requires_grad_(False) for _ in range(2)]
    vocabulary = VocabularyMap.from_counts(torch.arange(target.config.vocab_size).flip(0), 2048)
    lengths = torch.linspace(chosen.prompt_tokens // 4, chosen.prompt_tokens, chosen.prompts).int().tolist()
    prompts = [torch.randint(10, target.config.vocab_size, (length,)).tolist() for length in lengths]
    start = time.perf_counter()
    before = one_by_one(target, drafts, vocabulary, prompts, recipe)
    middle = time.perf_counter()
    result = evaluate_draft(recipe, target, drafts[0], drafts[1], vocabulary, prompts, progress=False)
    end = time.perf_counter()
    after = [result["target_forwards"], result["target_forwards_untrained"]]
    if before != after:
        raise SystemExit(f"rounds one by one {before}, in batches {after}: they must be the same")
    table = Table("prompts", "new tokens", "rounds", "one by one, s", "in batches, s", "ratio")
    seconds = (middle - start, end - middle)
    table.add_row(
        str(len(prompts)),
        str(result["new_tokens"]),
        str(after),
        *(f"{value:.1f}" for value in seconds),
        f"{seconds[0] / seconds[1]:.1f}",
    )
    Console().print(table)


if __name__ == "__main__":
    main()
