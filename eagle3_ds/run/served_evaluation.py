"""Evaluating a draft on the server that uses it: prompts, the server, and where the figures go."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from eagle3_ds.config import Recipe, SamplingSection, as_recipe
from eagle3_ds.data.answer_server import AnswerServer, Served
from eagle3_ds.data.chat import ChatTemplate, load_chat_template
from eagle3_ds.data.long_context import LONGBENCH, longbench_prompts, ruler_prompts
from eagle3_ds.data.prompts import prompt_tokens, read_prompts_file
from eagle3_ds.eval.counters import read_counters
from eagle3_ds.eval.served import measure, prompts_fingerprint
from eagle3_ds.patient_http import PatientClient, ServerGoneError, Words
from eagle3_ds.run.eval_file import add_served
from eagle3_ds.run.finish import prompts_of_run, write_cards
from eagle3_ds.run.regeneration import Serving, end_tokens
from eagle3_ds.targets import load_text_config, load_tokenizer, resolve_path

logger = logging.getLogger(__name__)
HELDOUT, RULER, LONGBENCH_NAME = "held-out data", "ruler", "longbench-v2"


@dataclass(frozen=True)
class Asked:
    """Which prompts a server is asked.

    Attributes:
        sources: JSONL files, ruler:LENGTH[:N] and longbench-v2[:FOLDER][:N]; none: the run's held-out data.
        longest: prompts of more tokens are left out, and counted.
        ignore_eos: every answer goes on to eval.max_new_tokens.
    """

    sources: tuple[str, ...] = ()
    longest: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.longest is not None and self.longest < 1:
            raise ValueError(f"--max_prompt_tokens is {self.longest}, but must be at least 1.")


def evaluate_served(recipe: Recipe | str | Path, serving: Serving, asked: Asked = Asked()) -> dict[str, Any]:
    """Measure acceptance and speed of a running vLLM that drafts, by the length of the prompts, greedily, and
    write them into eval.json under `served`.

    Args:
        recipe: a recipe, or the path of one. Of the target, its config and tokenizer are read.
        serving: the server; its `concurrency` requests are in flight at a time. With 1, the figures have
            intervals.

    Returns:
        The content of `served`.

    Raises:
        ValueError: a name is none of a prompt source, the server is no use (the message says why and what to
            do), or somebody else asked it meanwhile.
    """
    recipe = as_recipe(recipe)
    config = load_text_config(resolve_path(recipe.target.path, recipe.target.build is not None))
    tokenizer = load_tokenizer(recipe.target)
    server, guesses = _connect(recipe, serving, asked, config, tokenizer)
    served, url = server.served, server.client.url
    prompts, left_out = _prompts(recipe, asked, tokenizer, config.max_position_embeddings)
    _check_lengths(prompts, recipe.eval.max_new_tokens, served, url)
    logger.info(f"{len(prompts)} prompts go to {served.name!r} at {url}, {serving.concurrency} at a time")
    figures = measure(server, prompts, recipe.eval.context_buckets, serving.concurrency, asked.ignore_eos)
    if not figures["rounds"]:
        raise ValueError(
            f"--server {url} never asked its draft in {figures['new_tokens']} tokens: nothing can be "
            "said. Raise eval.max_new_tokens, or set --ignore_eos if every answer ends at once."
        )
    result = {
        # The host alone: a URL may tell more than a report should.
        "server": urlsplit(url).hostname,
        "model": served.name,
        "prompts_from": list(asked.sources) or [HELDOUT],
        "prompts_fingerprint": prompts_fingerprint(prompts),
        "prompts_left_out": left_out,
        "concurrency": serving.concurrency,
        "draft_tokens": guesses,
        "max_new_tokens": recipe.eval.max_new_tokens,
        "ignore_eos": asked.ignore_eos,
        "temperature": 0.0,
        "note": _note(serving.concurrency),
        **figures,
    }
    add_served(Path(recipe.output_dir), result)
    write_cards(recipe)
    return result


def _connect(
    recipe: Recipe, serving: Serving, asked: Asked, config: Any, tokenizer: Any
) -> tuple[AnswerServer, int]:
    """The server, found to be a vLLM of the target that speculates, and how many tokens it guesses."""
    folder = resolve_path(recipe.target.path, recipe.target.build is not None)
    stops = [] if asked.ignore_eos else end_tokens(folder, config, tokenizer)
    sizes = (recipe.eval.max_new_tokens, config.vocab_size)
    server = connect(serving, recipe.target.path, tokenizer, stops, *sizes)
    client = server.client
    if server.is_sglang:
        raise ServerGoneError(
            f"--server {client.url} talks like SGLang, and what is measured are counters of vLLM. Name a "
            "vLLM server."
        )
    guesses = len(read_counters(client).accepted_by_position)
    if guesses != recipe.eval.draft_tokens:
        logger.warning(
            f"the server guesses {guesses} tokens in a round, eval.draft_tokens is {recipe.eval.draft_tokens}"
            ": its figures are of other rounds than those of the evaluation in process"
        )
    return server, guesses


def connect(
    serving: Serving, path: str, tokenizer: Any, stops: Sequence[int], new_tokens: int, vocab_size: int
) -> AnswerServer:
    """A server that is found to have the target of `path`, asked greedily for `new_tokens` at most, up to one
    of the tokens `stops`.

    Raises:
        ServerGoneError: it cannot be reached, has another model, or gives no token ids.
    """
    client = PatientClient(serving.url, serving.concurrency, serving.timeout, Words(then="begins anew"))
    sampling = SamplingSection(max_new_tokens=new_tokens, seed=None)
    server = AnswerServer(client, sampling, stops, vocab_size)
    server.connect(serving.model, path, tokenizer)
    return server


def _note(concurrency: int) -> str:
    if concurrency == 1:
        return "prompts were asked one at a time; intervals are a bootstrap over prompts"
    return (
        f"{concurrency} prompts were asked at a time: the server's counters do not tell them apart, so "
        "intervals are null"
    )


def _check_lengths(prompts: Sequence[list[int]], new_tokens: int, served: Served, url: str) -> None:
    if served.context is None:
        return
    too_long = [len(prompt) for prompt in prompts if len(prompt) + new_tokens > served.context]
    if too_long:
        raise ValueError(
            f"{len(too_long)} of {len(prompts)} prompts, the longest of {max(too_long)} tokens, and "
            f"eval.max_new_tokens {new_tokens} do not fit the {served.context} tokens that --server {url} "
            "takes. Start it with a larger --max-model-len, lower eval.max_new_tokens, or leave them out: "
            f"--max_prompt_tokens {max(1, served.context - new_tokens)}."
        )


def _prompts(recipe: Recipe, asked: Asked, tokenizer: Any, longest: int) -> tuple[list[list[int]], int]:
    """The prompts as token ids, and how many were left out for their length."""
    number = recipe.eval.num_prompts
    if not number and not asked.sources:
        raise ValueError(
            "eval.num_prompts is 0, so no held-out prompt is chosen. Raise it, or name prompts by --prompts."
        )
    template: ChatTemplate | None = None
    if recipe.data.chat_template or tokenizer.chat_template:
        template = load_chat_template(
            tokenizer, recipe.data.chat_template, recipe.data.chat_template_arguments
        )
    prompts: list[list[int]] = []
    left_out = 0
    for source in asked.sources:
        found, skipped = _of_source(source, recipe, tokenizer, template, asked.longest)
        prompts, left_out = prompts + found, left_out + skipped
    if not asked.sources:
        prompts = prompts_of_run(recipe, longest)
    kept = [prompt for prompt in prompts if asked.longest is None or len(prompt) <= asked.longest]
    left_out += len(prompts) - len(kept)
    if not kept or not all(kept):
        raise ValueError(
            f"of {len(prompts)} prompts {len(kept)} are left, or one is empty: nothing can be asked. Raise "
            "--max_prompt_tokens, hold out more data, or name other prompts."
        )
    return kept, left_out


def _of_source(
    source: str, recipe: Recipe, tokenizer: Any, template: ChatTemplate | None, longest: int | None
) -> tuple[list[list[int]], int]:
    """The prompts of one source, and how many were left out. A file's rows are all taken."""
    name, *words = source.split(":")
    if Path(source).is_file():
        return read_prompts_file(source, tokenizer, template), 0
    if name not in (RULER, LONGBENCH_NAME):
        raise ValueError(
            f"--prompts is {source!r}, which is no file here and no known set. Name a JSONL file, "
            f"{RULER}:LENGTH[:N] such as {RULER}:32768:8, or {LONGBENCH_NAME}[:FOLDER][:N]."
        )
    tokenize = partial(_of_user, tokenizer, template)
    number, seed = recipe.eval.num_prompts, recipe.data.seed
    if name == RULER:
        if len(words) not in (1, 2) or not all(word.isdecimal() and int(word) for word in words):
            raise ValueError(
                f"--prompts is {source!r}. Write {RULER}:LENGTH or {RULER}:LENGTH:N, tokens of a prompt and "
                f"number of prompts, such as {RULER}:32768:8."
            )
        wanted = int(words[1]) if len(words) == 2 else number
        return ruler_prompts(tokenize, int(words[0]), _at_least_one(wanted, source), seed), 0
    if words and words[-1].isdecimal():
        number = int(words.pop())
    place = ":".join(words) or LONGBENCH
    return longbench_prompts(tokenize, _at_least_one(number, source), seed, longest, place)


def _of_user(tokenizer: Any, template: ChatTemplate | None, text: str) -> list[int]:
    row = {"messages": [{"role": "user", "content": text}]}
    return prompt_tokens(tokenizer, row, "a prompt made here", template)


def _at_least_one(number: int, source: str) -> int:
    if number < 1:
        raise ValueError(
            f"--prompts {source}: of 0 prompts. Write their number behind it, such as {source}:8."
        )
    return number
