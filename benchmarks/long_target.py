"""A small target that uses far context: a Llama trained in stages, short texts first, on repositories and
questions about them (long_corpus.py) and on copies of random tokens (long_lookup.py).

It begins with weights that can look back (long_start.py), and training keeps and sharpens that: every step
has rows that nothing else predicts. Each stage is a number of steps at one length; the training writes its
whole state now and then and goes on from there. Answers weigh most in the loss: they are quotations.

Short rows are stretched: their positions jump at a few places, so that a row of 512 tokens asks for what
stands 16,000 positions back (Zhu et al., "PoSE", 2023, section 3). Long rows cost too much for more than a
few steps, and a target that had learnt at short distances alone lost what it could do at long ones.

Legend: B rows of a step, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from benchmarks.long_corpus import conversation
from benchmarks.long_lookup import copied_row
from benchmarks.long_start import wire_lookup
from eagle3_ds.config import TargetBuild
from eagle3_ds.say import progress_bar
from eagle3_ds.targets.build import model_config, train_tokenizer

CHARACTERS_PER_TOKEN = 2.6
"""Of the corpus under a tokenizer of 2,048 tokens, rather fewer than it has: a row is filled from its end."""
ANSWERED = 0.4
"""Share of a row's characters that are questions and answers."""
TEXT_WEIGHT = 0.3
"""In the loss, of a token that is not of an answer; an answer's is 1."""
ROPE_THETA = 10_000_000.0
"""Angles slow enough for the longest stage, from the first one on."""
TOKENIZER_CONVERSATIONS, TOKENIZER_CHARACTERS = 1500, 4000
FIRST_ROW, FIRST_HELDOUT = 100_000, 10_000_000
"""Numbers of the conversations that are learnt and that are held out."""
WARMUP_STEPS, LAST_SHARE = 50, 0.1
"""Of each stage: a linear warm-up, then a cosine to this share of its learning rate."""
SAVE_EVERY = 50
"""Steps between states that are written, and of the losses that are noted."""
TOKENS_AT_ONCE = 16_384
"""Rows of a step are read together up to so many tokens."""
JUMPS = 3
"""Of a stretched row's positions, at most."""
TEXT, ANSWER, FRESH, COPY = range(4)
"""What a token is: of a text, of an answer in it; random, or copied. No loss is of the random ones."""
NOTED = {"answers": ANSWER, "text": TEXT, "copies": COPY}
STATE, RECORD = "training.pt", "long_target.json"


@dataclass(frozen=True)
class Stage:
    """Steps at one length. `texts` and `copies` rows of `length` tokens each are one step; the positions of a
    row end anywhere up to `reach`, where that is more than `length`.
    """

    length: int
    texts: int
    copies: int
    steps: int
    learning_rate: float
    reach: int = 0


def sizes(max_positions: int) -> TargetBuild:
    """The shape of the target: 6.2 million parameters."""
    return TargetBuild(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=704,
        num_layers=7,
        num_heads=4,
        num_kv_heads=2,
        max_positions=max_positions,
    )


def train(
    folder: Path, build: TargetBuild, stages: Sequence[Stage], device: torch.device, progress: bool = True
) -> dict[str, Any]:
    """Train the target into `folder`, or go on with it; a finished one is left as it is.

    Returns:
        What is known of the training, as in long_target.json: stages, and of each 50 steps the losses (nats)
        of tokens in answers, of the other tokens of texts, and of copied tokens.

    Raises:
        ValueError: a target of other stages or sizes is there.
    """
    record = {"build": build.model_dump(), "stages": [asdict(stage) for stage in stages]}
    if (folder / RECORD).is_file():
        found: dict[str, Any] = json.loads((folder / RECORD).read_text())
        _check_same({key: found[key] for key in record}, record, folder)
        return found
    folder.mkdir(parents=True, exist_ok=True)
    training = _Training(folder, build, record, device)
    total = sum(stage.steps for stage in stages)
    with progress_bar(total=total, desc="training the target", disable=not progress, unit="step") as bar:
        bar.update(training.step)
        first = 0
        for stage in stages:
            while first <= training.step < first + stage.steps:
                told = training.take_step(stage, training.step - first)
                bar.set_postfix_str(f"{stage.length} tokens, {told}", refresh=False)
                bar.update()
            first += stage.steps
    training.model.eval().save_pretrained(folder)
    record |= {"parameters": training.model.num_parameters(), "losses": training.losses}
    _write_whole(folder / RECORD, json.dumps(record, indent=1).encode())
    (folder / STATE).unlink(missing_ok=True)
    return record


def _check_same(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    if found != wanted:
        raise ValueError(
            f"{folder} holds a target of other sizes or stages. Remove it, or name another --output."
        )


def _write_whole(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}")
    aside.write_bytes(content)
    os.replace(aside, path)


class _Training:
    """The model in the middle of its training, and its optimizer."""

    def __init__(
        self, folder: Path, build: TargetBuild, record: dict[str, Any], device: torch.device
    ) -> None:
        self._folder, self._record = folder, record
        self.step, self._number = 0, FIRST_ROW
        self.losses: list[dict[str, float]] = []
        self._sums: list[list[float]] = []
        self.tokenizer = _tokenizer(folder, build)
        config = model_config(build, self.tokenizer)
        config.rope_parameters = {"rope_type": "default", "rope_theta": ROPE_THETA}
        self.model = transformers.LlamaForCausalLM(config).float().train()
        wire_lookup(self.model, build.seed)
        self.model.to(device)
        embedding = self.model.model.embed_tokens.weight
        matrices = [p for p in self.model.parameters() if p.dim() > 1 and p is not embedding]
        others = [p for p in self.model.parameters() if p.dim() <= 1 or p is embedding]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95))
        if (folder / STATE).is_file():
            self._load()

    def take_step(self, stage: Stage, step: int) -> str:
        """Step `step` of a stage. Returns its losses, to be shown."""
        for group in self._optimizer.param_groups:
            group["lr"] = stage.learning_rate * _schedule(step, stage.steps)
        ids, kinds = self._batch(stage)
        places = torch.stack(
            [stretched(self._number + row, stage.length, stage.reach) for row in range(len(ids))]
        )
        weights = torch.tensor([TEXT_WEIGHT, 1.0, 0.0, 1.0])[kinds]
        found = torch.empty(kinds.shape)
        for rows in torch.arange(len(ids)).split(max(1, TOKENS_AT_ONCE // stage.length)):
            losses = token_losses(self.model, ids[rows], places[rows])
            shares = (weights[rows] / weights.sum()).to(losses.device)
            (losses * shares).sum().backward()
            found[rows] = losses.detach().cpu()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        told = {name: float(found[kinds == kind].mean()) for name, kind in NOTED.items()}
        self._sums.append(list(told.values()))
        self.step += 1
        if self.step % SAVE_EVERY == 0 or step + 1 == stage.steps:
            means = [sum(part) / len(part) for part in zip(*self._sums, strict=True)]
            row = {"step": self.step, "length": stage.length}
            self.losses.append(row | dict(zip(NOTED, means, strict=True)))
            self._sums = []
            self._save()
        return ", ".join(f"{name} {loss:.2f}" for name, loss in told.items())

    def _batch(self, stage: Stage) -> tuple[Tensor, Tensor]:
        """The rows of a step, int64 [B, T + 1], and what each token but the first is, int64 [B, T]."""
        ids, kinds = [], []
        for _ in range(stage.texts):
            row, answered = self._text(stage.length)
            ids.append(row)
            kinds.append([ANSWER if each else TEXT for each in answered])
        for _ in range(stage.copies):
            row, told = copied_row(
                self._number, stage.length, self.model.config.vocab_size, first_token(self.tokenizer)
            )
            self._number += 1
            ids.append(row)
            kinds.append([COPY if each else FRESH for each in told])
        return torch.tensor(ids), torch.tensor(kinds)[:, 1:]

    def _text(self, length: int) -> tuple[list[int], list[int]]:
        """`length` + 1 tokens and which of them are of answers: a conversation without its beginning, so that
        its questions are in it.
        """
        while True:
            row = render(self.tokenizer, self._number, round(length * CHARACTERS_PER_TOKEN), ANSWERED)
            self._number += 1
            if len(row[0]) > length:
                return row[0][-length - 1 :], row[1][-length - 1 :]

    def _save(self) -> None:
        state = {
            "record": self._record,
            "step": self.step,
            "number": self._number,
            "losses": self.losses,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }
        aside = self._folder / f".{STATE}"
        torch.save(state, aside)
        os.replace(aside, self._folder / STATE)

    def _load(self) -> None:
        state = torch.load(self._folder / STATE, weights_only=True)
        _check_same(state["record"], self._record, self._folder)
        self.step, self._number, self.losses = state["step"], state["number"], state["losses"]
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])


def _tokenizer(folder: Path, build: TargetBuild) -> Any:
    if not (folder / "tokenizer.json").is_file():
        texts = [
            conversation(number, TOKENIZER_CHARACTERS, ANSWERED)["messages"]
            for number in range(TOKENIZER_CONVERSATIONS)
        ]
        train_tokenizer(build, texts).save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def first_token(tokenizer: Any) -> int:
    """The first id that is no special token's: of a built tokenizer, all below it are."""
    return 1 + int(max(tokenizer.all_special_ids))


def render(tokenizer: Any, number: int, characters: int, answered: float) -> tuple[list[int], list[int]]:
    """The ids of a conversation, and 1 where a token is of an answer."""
    messages = conversation(number, characters, answered)["messages"]
    rendered = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return rendered["input_ids"], rendered["assistant_masks"]


def stretched(number: int, length: int, reach: int) -> Tensor:
    """Positions of a row of `length` tokens, int64 [length]: they jump at up to JUMPS places and end anywhere
    up to `reach`, as often near as far. Without jumps where `reach` is no more than `length`.

    Args:
        number: the row depends on it and on the sizes alone.
    """
    places = torch.arange(length)
    if reach <= length:
        return places
    rng = random.Random(f"positions {number} of {length} to {reach}")
    skipped = round(math.exp(rng.uniform(0, math.log(reach - length))))
    cuts = sorted(rng.randint(0, skipped) for _ in range(JUMPS - 1))
    for jump in [after - before for before, after in pairwise([0, *cuts, skipped])]:
        places[rng.randrange(1, length) :] += jump
    return places


def token_losses(model: Any, ids: Tensor, places: Tensor | None = None) -> Tensor:
    """Cross entropy of each token but the first, in nats, on the model's device: int64 [B, T + 1] -> fp32
    [B, T]. Where gradients are wanted, matrix products are in bf16.

    Args:
        places: positions of all tokens but the last, int64 [B, T]. None: 0 to T - 1.
    """
    ids = ids.to(model.device)
    places = None if places is None else places.to(model.device)
    ids_read = ids[:, :-1]
    # A mask, though it hides nothing: without one transformers takes a jump for the start of a document.
    shown = torch.ones_like(ids_read)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=torch.is_grad_enabled()):
        logits = model(input_ids=ids_read, position_ids=places, attention_mask=shown, use_cache=False).logits
    losses = functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(ids.shape[0], -1)


def _schedule(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / min(WARMUP_STEPS, max(1, steps // 5)))
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return warm * (LAST_SHARE + (1 - LAST_SHARE) * cosine)


@torch.no_grad()
def loss_by_position(
    model: Any, tokenizer: Any, length: int, edges: Sequence[int], count: int
) -> list[dict[str, Any]]:
    """The loss of held-out texts of `length` tokens, all tokens by where they stand: up to each edge."""
    sums = {edge: [0.0, 0] for edge in edges}
    for ids, _ in heldout(tokenizer, length, count):
        losses = token_losses(model, torch.tensor([ids]))[0]
        for first, edge in zip((0, *edges), edges, strict=False):
            part = losses[first:edge]
            sums[edge][0] += float(part.sum())
            sums[edge][1] += len(part)
    return [{"to": edge, "tokens": number, "loss": total / number} for edge, (total, number) in sums.items()]


@torch.no_grad()
def loss_by_context(
    model: Any, tokenizer: Any, length: int, shown: Sequence[int], count: int
) -> list[dict[str, Any]]:
    """The loss of held-out conversations' last answers, which quote anything before them, when the model sees
    as many tokens before the answer as `shown` says, and no more.
    """
    texts = [(ids, *last_answer(mask)) for ids, mask in heldout(tokenizer, length, count)]
    found = []
    for most in shown:
        total, number = 0.0, 0
        for ids, start, end in texts:
            losses = token_losses(model, torch.tensor([ids[max(0, start - most) : end]]))[0]
            total += float(losses[-(end - start) :].sum())
            number += end - start
        found.append({"context": most, "tokens": number, "loss": total / number})
    return found


def heldout(tokenizer: Any, length: int, count: int) -> Iterator[tuple[list[int], list[int]]]:
    """Held-out conversations of nine tenths of `length` to `length` tokens: ids, and 1 where of an answer."""
    yield from fitting(tokenizer, length, count, FIRST_HELDOUT, 0.2)


def fitting(
    tokenizer: Any, length: int, count: int, first: int, answered: float
) -> Iterator[tuple[list[int], list[int]]]:
    """Conversations from number `first` on whose tokens are nine tenths of `length` to `length`: ids, and 1
    where a token is of an answer.
    """
    characters, number, found = length * CHARACTERS_PER_TOKEN, first, 0
    while found < count:
        ids, mask = render(tokenizer, number, round(characters), answered)
        number += 1
        if 0.9 * length <= len(ids) <= length:
            found += 1
            yield ids, mask
        else:  # a little towards the length that is wanted
            characters *= (0.95 * length / len(ids)) ** 0.2


def last_answer(mask: Sequence[int]) -> tuple[int, int]:
    """Where the last answer of a conversation begins and ends."""
    end = max(place for place, of_answer in enumerate(mask) if of_answer) + 1
    start = max((place for place in range(end) if not mask[place]), default=-1) + 1
    return start, end
