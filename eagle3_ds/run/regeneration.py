"""Regenerating data: the target answers the prompts of a recipe's data, in this process or on a server."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from eagle3_ds.config import Recipe, SamplingSection
from eagle3_ds.data.answer_server import AnswerServer
from eagle3_ds.data.chat import ChatTemplate, load_chat_template
from eagle3_ds.data.prepare import recipe_rows
from eagle3_ds.data.regenerate import Generate, Regenerator
from eagle3_ds.data.sources import Row, expand_sources, source_fingerprint
from eagle3_ds.device.found import detect_accelerator
from eagle3_ds.patient_http import PatientClient
from eagle3_ds.say import progress_bar
from eagle3_ds.targets import (
    Target,
    load_target,
    load_text_config,
    load_tokenizer,
    positions,
    resolve_path,
    target_fingerprint,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Serving:
    """A server that answers in the target's place.

    Attributes:
        url: such as http://host:8000.
        model: the name that it serves the target under; None finds the one loaded from `target.path`.
        concurrency: rows that are asked for at a time.
        timeout: seconds to wait for one answer.

    Raises:
        ValueError: a value is out of range. The message names its option.
    """

    url: str
    model: str | None = None
    concurrency: int = 32
    timeout: float = 1800.0

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ValueError(f"--concurrency is {self.concurrency}, but must be at least 1.")
        if not self.timeout > 0:
            raise ValueError(f"--timeout is {self.timeout}, but must be more than 0 seconds.")


def regenerate(recipe: Recipe, output: Path, batch_size: int = 8) -> None:
    """Write the target's answers to the prompts of `data.train` to a JSONL file that a recipe can name. If
    the file is there already, the missing answers are added.

    Args:
        batch_size: rows that are answered at a time.

    Raises:
        ValueError: answers may exceed the target's context, the file was written with other settings, or the
            recipe leaves settings to a server.
    """
    if batch_size < 1:
        raise ValueError(f"--batch_size is {batch_size}, but must be at least 1.")
    for name, value in recipe.sampling.model_dump().items():
        if value is None:
            raise ValueError(
                f"sampling.{name} is null, which leaves it to a server, and none answers here. Set a number, "
                "or name one by --server."
            )
    sources = expand_sources(recipe.data.train, "data.train")
    target = load_target(recipe.target, device=detect_accelerator())
    context = target.config.max_position_embeddings
    _check_room(recipe.sampling, context, "the target's context")
    template = _template(recipe, target.tokenizer)
    generate, stops = _generator(target, recipe.sampling)
    weights = target_fingerprint(recipe.target.path, target.aux_layers, recipe.target.dtype)["target_weights"]
    settings = {"target": weights, **_settings(recipe, sources, template), "batch_size": batch_size}
    regenerator = Regenerator(
        target.tokenizer,
        template,
        generate,
        stops,
        context,
        recipe.sampling.max_new_tokens,
        output,
        settings,
    )
    _show(recipe, regenerator, regenerator.run(_rows(recipe, sources), batch_size))


def regenerate_by_server(recipe: Recipe, output: Path, serving: Serving) -> None:
    """The same by a server that runs the target; of the target, this process needs the config and the
    tokenizer.

    Raises:
        ValueError: the server is no use (the message says why, and what to do), the file was written with
            other settings, or rows failed while `data.on_bad_row` is `error`.
    """
    sources = expand_sources(recipe.data.train, "data.train")
    folder = resolve_path(recipe.target.path, recipe.target.build is not None)
    config, tokenizer = load_text_config(folder), load_tokenizer(recipe.target)
    stops = end_tokens(folder, config, tokenizer)
    client = PatientClient(serving.url, serving.concurrency, serving.timeout)
    server = AnswerServer(client, recipe.sampling, stops, config.vocab_size)
    served = server.connect(serving.model, recipe.target.path, tokenizer)
    logger.info(f"answers come from {served.name!r} at {client.url}, {serving.concurrency} at a time")
    longest = min(length for length in (positions(config), served.context) if length is not None)
    _check_room(recipe.sampling, longest, f"the context of {served.name!r} at {client.url}")
    template = _template(recipe, tokenizer)
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    settings = {
        "served_model": served.name,
        "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest(),
        **_settings(recipe, sources, template),
    }
    seed = recipe.sampling.seed

    def generate(prompts: list[list[int]], draw: int) -> list[list[int]]:
        return [server.answer(prompt, None if seed is None else (seed + draw) % 2**31) for prompt in prompts]

    regenerator = Regenerator(
        tokenizer, template, generate, stops, longest, recipe.sampling.max_new_tokens, output, settings
    )
    is_dropped = recipe.data.on_bad_row == "drop"
    rows = _rows(recipe, sources)
    try:
        _show(recipe, regenerator, regenerator.run_concurrently(rows, serving.concurrency, is_dropped))
    finally:
        client.stop()
    failures = regenerator.failures()
    if failures is not None and not is_dropped:
        raise failures


def _template(recipe: Recipe, tokenizer: Any) -> ChatTemplate:
    return load_chat_template(tokenizer, recipe.data.chat_template, recipe.data.chat_template_arguments)


def _rows(recipe: Recipe, sources: Sequence[str]) -> Iterable[Row]:
    return recipe_rows(sources, recipe.data, recipe.data.max_conversations)


def _settings(recipe: Recipe, sources: Sequence[str], template: ChatTemplate) -> dict[str, Any]:
    """What all answers depend on besides who gives them."""
    return {
        "template": hashlib.sha256(repr(template).encode()).hexdigest(),
        "data": [source_fingerprint(source) for source in sources],
        "shape": recipe.data.shape,
        "max_conversations": recipe.data.max_conversations,
        **recipe.sampling.model_dump(),
    }


def _check_room(sampling: SamplingSection, context: int, what: str) -> None:
    if sampling.max_new_tokens >= context:
        raise ValueError(
            f"sampling.max_new_tokens is {sampling.max_new_tokens}, but {what} is {context}. Lower it."
        )


def _show(recipe: Recipe, regenerator: Regenerator, done: Iterable[int]) -> None:
    """Answer the rows, with a bar of rows and the speed in tokens, and say what came of them."""
    total, before = recipe.data.max_conversations, regenerator.counts["tokens"]
    start = time.monotonic()

    def speed() -> str:
        tokens = regenerator.counts["tokens"] - before
        return f"{tokens / max(time.monotonic() - start, 1e-9):,.0f} tokens/s"

    with progress_bar(total=total, initial=regenerator.rows, desc="answer", unit=" rows") as bar:
        for number in done:
            bar.set_postfix_str(speed(), refresh=False)
            bar.update(number)
    for line in regenerator.lines():
        logger.info(line)
    if regenerator.counts["tokens"] > before:
        logger.info(f"{speed()} in this run")


def end_tokens(folder: Path, config: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer of the target in `folder`, whose weights are not loaded.

    Raises:
        ValueError: the target names no such token.
    """
    return _stops(_generation_ends(folder, config), tokenizer)


def _generation_ends(folder: Path, config: Any) -> Any:
    """End tokens as the generation config beside the weights has them, else the config."""
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(str(folder)).eos_token_id
    return config.eos_token_id


def _stops(ends: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer.

    Raises:
        ValueError: the target names no such token.
    """
    stops = sorted({*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None})
    if not stops:
        raise ValueError(
            "target.path: neither its generation config nor its tokenizer has an end token, so no answer "
            "would end."
        )
    return stops


def _generator(target: Target, sampling: SamplingSection) -> tuple[Generate, list[int]]:
    """A function that answers a batch of prompts, and the tokens that end an answer.

    Raises:
        ValueError: the target names no such token.
    """
    model = target.model
    stops = _stops(model.generation_config.eos_token_id, target.tokenizer)
    choice: dict[str, Any] = {"do_sample": False}
    if sampling.temperature:
        choice = {"do_sample": True, **sampling.model_dump(include={"temperature", "top_p", "top_k"})}

    @torch.inference_mode()
    def generate(prompts: list[list[int]], draw: int) -> list[list[int]]:
        torch.manual_seed((sampling.seed or 0) + draw)
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
            max_new_tokens=sampling.max_new_tokens,
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
