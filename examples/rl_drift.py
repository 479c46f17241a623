"""What a refreshed draft is worth: the loop of rl_loop.py with a policy that drifts. Minutes on two cores:

    python examples/rl_drift.py [--iterations 12] [section.key=value ...]

The policy answers questions about functions, IN CAPITALS where it is asked to shout, and seldom unasked.
The reward wants capitals always, so that within some iterations it answers in them. One draft stays as it was
when the loop began, trained on what the policy answered then; the other is trained again whenever its
acceptance has fallen. Before each iteration both draft for the policy as it then is, on prompts that neither
loop nor drafts learn from. The figures go to drift.json, and as a picture to drift.png, in `output_dir`.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rl_loop import Answer, answer, improve, pack
from torch import Tensor

from eagle3_ds import Rollout, RolloutTrainer, load_recipe
from eagle3_ds.algorithms import algorithm_of
from eagle3_ds.draft import Draft
from eagle3_ds.eval import evaluate_draft
from eagle3_ds.eval.report import HELDOUT, TRAINED, UNTRAINED
from eagle3_ds.targets import Target, build_target, load_target
from eagle3_ds.train.trigger import FallingAcceptance

VERBS = ("sort", "join", "count", "read", "hash", "open", "filter", "print", "load", "wrap", "walk", "parse")
NOUNS = (
    "list",
    "file",
    "table",
    "string",
    "stream",
    "tree",
    "graph",
    "queue",
    "letter",
    "page",
    "key",
    "path",
)
KINDS = ("copy", "sum", "view", "part", "name", "sign")
COPIES, ASKED, UNASKED = 24, 0.3, 0.1
"""How often the policy has read each chat, and the share of answers in capitals, asked for and not."""
PROMPTS, ANSWERS = 6, 8
"""Prompts of an iteration, and answers to each."""
GOOD = 0.5
"""The policy learns from answers whose reward is above this."""
FIRST_ROLLOUTS, PASSES = 6, 10
"""What the first draft is trained on, and how often; a refresh takes as many steps on one iteration's."""
REFRESH_SECONDS = 60.0
"""The most time for a refresh; on two cores its steps take a few seconds."""
LOW, HIGH, WINDOW = 0.95, 0.99, 30
"""Shares of the first acceptance length where training begins and ends, and the rounds they are judged by."""


@dataclass(frozen=True)
class Point:
    """Before an iteration: both drafts with the policy as it is then.

    Attributes:
        iteration: how many the policy has been trained for.
        stale, refreshed: acceptance lengths: tokens per forward of the policy, greedy; and 95% intervals.
        looping: answers of the policy that go round in circles, which are easy to guess.
        reward: mean of the answers sampled then; null after the last iteration.
        steps: which the refreshed draft then took.
    """

    iteration: int
    stale: float
    stale_interval: tuple[float, float] | None
    refreshed: float
    refreshed_interval: tuple[float, float] | None
    looping: int
    reward: float | None = None
    steps: int = 0


def chats() -> list[list[dict[str, str]]]:
    """A question about each function of a library that is not, and its answer, in an order by chance."""
    draw = random.Random("chats")
    found = []
    for verb, noun in product(VERBS, NOUNS):
        result, kind = draw.choice(NOUNS), draw.choice(KINDS)
        answer_ = f"It {verb}s the {noun}, looks for a {result} in it and returns a {kind} of the {result}."
        found.append(
            [
                {"role": "user", "content": f"What does {verb}_{noun} do?"},
                {"role": "assistant", "content": answer_},
            ]
        )
    draw.shuffle(found)
    return found


def texts(unasked: float) -> Iterator[list[dict[str, str]]]:
    """What the policy is built from: the chats, several times, their answers in capitals where the question
    asks for them, and at the share `unasked` where it does not.
    """
    draw = random.Random("texts")
    for question, said in chats() * COPIES:
        asked = draw.random() < ASKED
        shouted = {**said, "content": said["content"].upper()}
        yield [
            {**question, "content": question["content"] + " Shout!"} if asked else question,
            shouted if asked or draw.random() < unasked else said,
        ]


def questions(policy: Target) -> list[Tensor]:
    """The prompts, int64 [n] each, up to where the answer begins."""
    asked = [
        policy.tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
        for chat in chats()
    ]
    return [policy.tokenizer(text, return_tensors="pt").input_ids[0] for text in asked]


class Loop:
    """Policy, trainer and prompts, and the steps of the loop.

    Args:
        recipe: of the draft; `target.build` of the policy.
        num_heldout: prompts that are kept for measuring.
        unasked: as in `texts`.
    """

    def __init__(self, recipe: Any, num_heldout: int, unasked: float) -> None:
        build_target(recipe.target, (), texts(unasked))
        self.recipe, self.policy = recipe, load_target(recipe.target)
        self.trainer = RolloutTrainer(recipe)
        self.optimizer = torch.optim.AdamW(self.policy.model.parameters(), lr=1e-3)
        prompts = questions(self.policy)
        self.heldout = [prompt.tolist() for prompt in prompts[:num_heldout]]
        self.prompts = cycle(prompts[num_heldout:])

    def reward(self, prompt: Tensor, written: Tensor) -> float:
        """The share of capitals among the letters of an answer; nothing unless it is about what was asked."""
        asked = re.search(r"does (\w+?)_(\w+) do", self.policy.tokenizer.decode(prompt))
        said = self.policy.tokenizer.decode(written)
        if asked is None or not re.match(f"It {asked[1]}s the {asked[2]},", said, re.IGNORECASE):
            return 0.0
        letters = [letter for letter in said if letter.isalpha()]
        return sum(letter.isupper() for letter in letters) / len(letters)

    def groups(self) -> list[list[Answer]]:
        """The policy's answers to the next prompts."""
        return [
            answer(self.policy, prompt, partial(self.reward, prompt), ANSWERS)
            for prompt in islice(self.prompts, PROMPTS)
        ]

    def rollouts(self, groups: Sequence[Sequence[Answer]]) -> list[Rollout]:
        return [pack(self.policy, [one for group in groups for one in group])]

    def draft(self) -> Draft:
        """The trainer's draft, as a server has it."""
        algorithm = algorithm_of(self.recipe)
        draft = algorithm.build(algorithm.build_config(self.policy.config, self.recipe))
        draft.load_state_dict(self.trainer.state_dict())
        return draft

    def train_policy(self, groups: Sequence[Sequence[Answer]]) -> None:
        """A step of the policy on the best answers, where they are good; the trainer gets its new weights."""
        best = [max(group, key=lambda one: one.reward) for group in groups]
        good = [one for one in best if one.reward > GOOD]
        if good:
            improve(self.policy, self.optimizer, good)
        model = self.policy.model
        self.trainer.update_target(self.policy.embedding, model.get_output_embeddings().weight)

    def measure(self, stale: Draft) -> dict[str, Any]:
        """eval.json of the trainer's draft, beside it the stale one as `untrained`."""
        return evaluate_draft(
            self.recipe, self.policy, self.draft(), stale, self.trainer.vocabulary, self.heldout, False
        )


def counts(found: dict[str, Any]) -> tuple[int, int]:
    """Rounds and accepted guesses, as a server counts them."""
    rounds = found["target_forwards"]
    return rounds, round(rounds * sum(row["accepted"] for row in found["acceptance_by_position"]))


def drift(loop: Loop, iterations: int) -> list[Point]:
    """Train the first draft, then run the loop; a point before each iteration and one after the last."""
    first = [pack_ for _ in range(FIRST_ROLLOUTS) for pack_ in loop.rollouts(loop.groups())]
    for _ in range(PASSES):
        for rollout in first:
            loop.trainer.step(rollout)
    stale, trigger, points = loop.draft(), None, list[Point]()
    for iteration in range(iterations + 1):
        found = loop.measure(stale)
        if trigger is None:
            length = found["acceptance_length"]
            trigger = FallingAcceptance(WINDOW, max(1.0, LOW * length), HIGH * length)
        wanted, reward, steps = trigger.observe(*counts(found)), None, 0
        if iteration < iterations:
            groups = loop.groups()
            rewards = [one.reward for group in groups for one in group]
            reward = sum(rewards) / len(rewards)
            if wanted:
                steps = len(loop.trainer.train_for(REFRESH_SECONDS, loop.rollouts(groups) * PASSES))
                trigger.forget()
            loop.train_policy(groups)
        points.append(
            Point(
                iteration,
                found["acceptance_length_untrained"],
                found["acceptance_length_untrained_interval"],
                found["acceptance_length"],
                found["acceptance_length_interval"],
                found["looping_prompts"],
                reward,
                steps,
            )
        )
        tell(points[-1])
    return points


def tell(point: Point) -> None:
    reward = "" if point.reward is None else f", reward {point.reward:.2f}"
    refresh = f", refreshed by {point.steps} steps" if point.steps else ""
    print(
        f"iteration {point.iteration}: acceptance length {point.refreshed:.2f}, stale {point.stale:.2f}, "
        f"{point.looping} answers loop{reward}{refresh}",
        flush=True,
    )


def draw(points: Sequence[Point], prompts: int, png: Path) -> None:
    """Acceptance lengths over the iterations, and the reward that makes the policy drift."""
    figure = Figure(figsize=(11, 4.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    at = [point.iteration for point in points]
    for name, color, marker in (("refreshed", TRAINED, "o"), ("stale", UNTRAINED, "s")):
        left.plot(at, [getattr(point, name) for point in points], color=color, marker=marker, label=name)
        ends = [getattr(point, f"{name}_interval") or (getattr(point, name),) * 2 for point in points]
        left.fill_between(at, *zip(*ends, strict=True), color=color, alpha=0.2, linewidth=0)
    for point in points:
        if point.steps:
            left.axvline(point.iteration, color=TRAINED, linewidth=0.8, linestyle=":")
    left.set(
        xlabel="iterations of the policy (dotted: the draft is trained)",
        ylabel="tokens per forward of the policy",
        ylim=(1, None),
        title=f"Acceptance length on {prompts} held-out prompts, with 95% intervals",
    )
    left.legend(frameon=False)
    rewarded = [point for point in points if point.reward is not None]
    right.plot([p.iteration for p in rewarded], [p.reward for p in rewarded], color=HELDOUT, marker="o")
    right.set(
        xlabel="iterations of the policy", ylabel="mean reward", ylim=(0, None), title="The policy drifts"
    )
    for axis in (left, right):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    figure.savefig(png)


def main(arguments: Sequence[str] | None = None) -> list[Point]:
    """Run the loop and write drift.json and drift.png; returns the points."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument(
        "--unasked",
        type=float,
        default=UNASKED,
        metavar="SHARE",
        help="of answers in capitals that nobody asked for, which the policy begins with; without any it "
        "finds no reward to learn from",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args(arguments)
    recipe = load_recipe(Path(__file__).with_suffix(".yaml"), options.overrides)
    loop = Loop(recipe, recipe.eval.num_prompts, options.unasked)
    points = drift(loop, options.iterations)
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "prompts": len(loop.heldout),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "points": [asdict(point) for point in points],
    }
    (folder / "drift.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    draw(points, len(loop.heldout), folder / "drift.png")
    return points


if __name__ == "__main__":
    main()
