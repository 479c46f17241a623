"""A draft kept fresh inside an RL loop, on a toy that runs on one CPU core in about a minute:

    python examples/rl_loop.py [--iterations 12] [section.key=value ...]

Each iteration the policy answers prompts, its hidden states are captured on the way and the draft learns from
them; then the policy is trained on its better answers, and the draft's new weights are ready for the server.
A real loop differs in where the hidden states come from (the rollout engine) and in how many ranks call
`step` (start them with torchrun or deepspeed).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from eagle3_ds import Rollout, RolloutTrainer, load_recipe
from eagle3_ds.data.stdlib_corpus import stdlib_conversations, stdlib_text
from eagle3_ds.export import vllm_tensors
from eagle3_ds.targets import Target, build_target, capture_hidden_states, load_target

PROMPTS_PER_ITERATION = 6
PROMPT_TOKENS, ANSWER_TOKENS = 48, 48


@dataclass(frozen=True)
class Answer:
    """token_ids int64 [L], the first `prompt` of them the prompt's; a reward."""

    token_ids: Tensor
    prompt: int
    reward: float


def variety(written: Tensor) -> float:
    """The toy's reward of the tokens int64 [n] of an answer: how few of them repeat."""
    return len(written.unique()) / ANSWER_TOKENS


@torch.no_grad()
def answer(
    policy: Target, prompt: Tensor, reward: Callable[[Tensor], float], number: int = 1
) -> list[Answer]:
    """So many sampled answers to one prompt int64 [n]."""
    sampled = policy.model.generate(
        prompt.expand(number, -1), do_sample=True, max_new_tokens=ANSWER_TOKENS, use_cache=True
    )
    # After the token that ends a turn the shorter answers are filled up.
    ends = (sampled[:, len(prompt) :] == policy.tokenizer.eos_token_id).int()
    lengths = len(prompt) + torch.where(ends.any(1), ends.argmax(1) + 1, ends.shape[1])
    texts = [row[:length] for row, length in zip(sampled, lengths.tolist(), strict=True)]
    return [Answer(text, len(prompt), reward(text[len(prompt) :])) for text in texts]


def pack(policy: Target, answers: Sequence[Answer]) -> Rollout:
    """The answers end to end, with what the policy computed for them; a rollout engine would have kept it."""
    states = [capture_hidden_states(policy, one.token_ids) for one in answers]
    masks = [torch.arange(len(one.token_ids)) >= one.prompt for one in answers]
    return Rollout(
        token_ids=torch.cat([one.token_ids for one in answers]),
        loss_mask=torch.cat(masks),
        lengths=tuple(len(one.token_ids) for one in answers),
        aux=torch.cat([aux for aux, _ in states]),
        teacher=torch.cat([teacher for _, teacher in states]),
    )


def improve(policy: Target, optimizer: torch.optim.Optimizer, best: Sequence[Answer]) -> None:
    """One step of the policy on its better answers: rejection sampling, the simplest of policy updates."""
    policy.model.requires_grad_(True)
    for one in best:
        logits = policy.model(one.token_ids[None]).logits[0, one.prompt - 1 : -1]
        (functional.cross_entropy(logits, one.token_ids[one.prompt :]) / len(best)).backward()
    optimizer.step()
    optimizer.zero_grad()
    policy.model.requires_grad_(False)


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Run the loop; returns tau of each iteration: how many tokens a round of drafting would have brought."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args(arguments)
    recipe = load_recipe(Path(__file__).with_suffix(".yaml"), options.overrides)
    build_target(recipe.target, stdlib_text(), (row["messages"] for row in stdlib_conversations()))
    policy = load_target(recipe.target)
    trainer = RolloutTrainer(recipe)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-4)
    texts = (row["messages"][0]["content"] for row in stdlib_conversations())
    prompts = cycle(
        [
            policy.tokenizer(text, return_tensors="pt").input_ids[0, :PROMPT_TOKENS]
            for text in islice(texts, 60)
        ]
    )
    taus = []
    for iteration in range(options.iterations):
        answers = [
            one
            for prompt in islice(prompts, PROMPTS_PER_ITERATION)
            for one in answer(policy, prompt, variety)
        ]
        report = trainer.step(pack(policy, answers))
        improve(policy, optimizer, sorted(answers, key=lambda one: one.reward)[len(answers) // 2 :])
        trainer.update_target(policy.embedding, policy.model.get_output_embeddings().weight)
        weights = vllm_tensors(trainer.state_dict(), trainer.vocabulary)
        taus.append(report.tau)
        print(
            f"iteration {iteration + 1}: reward {sum(one.reward for one in answers) / len(answers):.2f}, "
            f"draft loss {report.loss:.3f}, tau {report.tau:.2f}, {len(weights)} tensors for the server",
            flush=True,
        )
    trainer.save(f"{recipe.output_dir}/checkpoints")
    return taus


if __name__ == "__main__":
    main()
