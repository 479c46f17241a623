"""Regenerating data: the target answers the prompts of a recipe's data itself."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from eagle3_ds.config import Recipe
from eagle3_ds.data.chat import load_chat_template
from eagle3_ds.data.prepare import recipe_rows
from eagle3_ds.data.regenerate import Generate, Regenerator
from eagle3_ds.data.sources import expand_sources, source_fingerprint
from eagle3_ds.say import progress_bar
from eagle3_ds.targets import Target, load_target, target_fingerprint
from eagle3_ds.topology import detect_accelerator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answering:
    """How the target answers.

    Attributes:
        batch_size: rows that are answered at a time.
        max_new_tokens: tokens of the longest answer.
        temperature: 0 decodes greedily.
        top_p: nucleus sampling takes the likeliest tokens up to this probability.
        seed: random seed of sampling.

    Raises:
        ValueError: a value is out of range. The message names its option.
    """

    batch_size: int = 8
    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("max_new_tokens", 1), ("temperature", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} is {getattr(self, name)}, but must be at least {least}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p is {self.top_p}, but must be above 0 and at most 1.")


def regenerate(recipe: Recipe, output: Path, options: Answering) -> None:
    """Write the target's answers to the prompts of `data.train` to a JSONL file that a recipe can name. If
    the file is there already, the missing answers are added.

    Raises:
        ValueError: answers may exceed the target's context, or the file was written with other settings.
    """
    section = recipe.data
    sources = expand_sources(section.train, "data.train")
    target = load_target(recipe.target, device=detect_accelerator())
    context = target.config.max_position_embeddings
    if options.max_new_tokens >= context:
        raise ValueError(
            f"--max_new_tokens is {options.max_new_tokens}, but the target's context is {context}. Lower it."
        )
    template = load_chat_template(target.tokenizer, section.chat_template, section.chat_template_arguments)
    generate, stops = _generator(target, options)
    weights = target_fingerprint(recipe.target.path, target.aux_layers, recipe.target.dtype)["target_weights"]
    settings = {
        "target": weights,
        "template": hashlib.sha256(repr(template).encode()).hexdigest(),
        "data": [source_fingerprint(source) for source in sources],
        "shape": section.shape,
        "max_conversations": section.max_conversations,
        **asdict(options),
    }
    regenerator = Regenerator(
        target.tokenizer, template, generate, stops, context, options.max_new_tokens, output, settings
    )
    rows = recipe_rows(sources, section, section.max_conversations)
    total, done = section.max_conversations, regenerator.rows
    with progress_bar(total=total, initial=done, desc="answer", unit=" rows") as bar:
        for number in regenerator.run(rows, options.batch_size):
            bar.update(number)
    for line in regenerator.lines():
        logger.info(line)


def _generator(target: Target, options: Answering) -> tuple[Generate, list[int]]:
    """A function that answers a batch of prompts, and the tokens that end an answer.

    Raises:
        ValueError: the target names no such token.
    """
    model, tokenizer = target.model, target.tokenizer
    ends = model.generation_config.eos_token_id
    stops = sorted({*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None})
    if not stops:
        raise ValueError(
            "target.path: neither its generation config nor its tokenizer has an end token, so no answer "
            "would end."
        )
    choice: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        choice = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}

    @torch.inference_mode()
    def generate(prompts: list[list[int]], draw: int) -> list[list[int]]:
        torch.manual_seed(options.seed + draw)
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        # Padded on the left, so that each answer directly follows its prompt.
        ids = torch.tensor([[stops[0]] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)])
        mask = torch.tensor(
            [[0] * pad + [1] * len(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
        )
        output = model.generate(
            input_ids=ids.to(target.device),
            attention_mask=mask.to(target.device),
            max_new_tokens=options.max_new_tokens,
            eos_token_id=stops,
            pad_token_id=stops[0],
            repetition_penalty=1.0,
            **choice,
        )
        return [_up_to_stop(row, stops) for row in output[:, longest:].tolist()]

    return generate, stops


def _up_to_stop(tokens: list[int], stops: Sequence[int]) -> list[int]:
    end = next((place + 1 for place, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:end]
