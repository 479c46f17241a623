"""What is judged: which drafts of which targets, and in which ways each is given to a server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eagle3_ds.algorithms import ALGORITHMS
from tests.served.gptq import quantize_body
from tests.served.pairs import (
    DRAFT_TOKENS,
    LLAMA3,
    NEW_TOKENS,
    VOCABULARY,
    Pair,
    answered_prompts,
    make_pair,
    random_target,
)

Serve = Callable[[Mapping[str, Any], Path], dict[str, Any]]
DRAFT, SPECULATORS, ALONE = "vLLM layout", "speculators layout", "speculators layout alone"


@dataclass(frozen=True)
class Variant:
    """Settings of a draft, and the ways in which vLLM gets it."""

    ways: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    aux_layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Kind:
    """A kind of target.

    Attributes:
        changes: what is not the family's, or our tests', default.
        is_quantized: four bits for every matrix of the body, of which vLLM knows in half precision alone; we
            decode with the same values in float32.
    """

    family: str
    changes: dict[str, Any] = field(default_factory=dict)
    is_quantized: bool = False


# Gemma 4: one layer of full attention has wider heads, which are rotated in part.
WIDE = {"head_dim": 32, "per_layer_config": {"7": {"head_dim": 64}}, "vocab_size_per_layer_input": VOCABULARY}
TARGETS = {
    "llama": Kind("llama", {"rope_parameters": LLAMA3}),
    "tied": Kind("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "four bits": Kind("llama", {"rope_parameters": LLAMA3}, is_quantized=True),
    "qwen3": Kind("qwen3"),
    "qwen3_moe": Kind("qwen3_moe"),
    "gpt_oss": Kind("gpt_oss"),
    "granite": Kind("granite"),
    "gemma4": Kind("gemma4_text", WIDE),
}
MASK_TOKEN = 2
"""Prompts begin at token 3."""
PEAGLE = {"algorithm": "peagle", "mask_token_id": MASK_TOKEN, "ttt_steps": DRAFT_TOKENS}
VARIANTS: dict[tuple[str, str], Variant] = {
    ("llama", "plain"): Variant((DRAFT, SPECULATORS, ALONE)),
    ("llama", "two layers"): Variant((DRAFT, SPECULATORS), {"num_layers": 2}),
    ("llama", "window"): Variant((DRAFT, SPECULATORS), {"sliding_window": 8}),
    ("llama", "eagle 3.1"): Variant((DRAFT, SPECULATORS), {"aux_norm": True, "norm_output": True}),
    ("llama", "other layers"): Variant((DRAFT, SPECULATORS), {}, (1, 3, 6)),
    # The speculators layout cannot say how many layers there are; the export warns of it.
    ("llama", "five layers"): Variant((DRAFT,), {}, (1, 2, 4, 5, 7)),
    # vLLM and speculators have no vocabulary map where the draft guesses every token.
    ("llama", "whole vocabulary"): Variant((DRAFT, SPECULATORS, ALONE), {"vocab_size": VOCABULARY}),
    ("llama", "parallel"): Variant((DRAFT, SPECULATORS, ALONE), PEAGLE),
    ("llama", "parallel, two layers"): Variant((DRAFT, SPECULATORS), {**PEAGLE, "num_layers": 2}),
    ("llama", "parallel, window"): Variant((DRAFT,), {**PEAGLE, "sliding_window": 8}),
    ("llama", "parallel, norms"): Variant(
        (DRAFT,), {**PEAGLE, "aux_norm": True, "norm_before_residual": True}
    ),
    ("tied", "plain"): Variant((DRAFT, ALONE)),
    ("qwen3", "plain"): Variant((DRAFT, SPECULATORS, ALONE)),
    ("qwen3_moe", "plain"): Variant((DRAFT, ALONE)),
    ("gpt_oss", "plain"): Variant((DRAFT, ALONE)),
    ("four bits", "plain"): Variant((DRAFT, ALONE)),
    ("granite", "plain"): Variant((DRAFT, ALONE)),
    ("gemma4", "plain"): Variant((DRAFT, ALONE)),
}
CASES = [(target, draft, way) for (target, draft), variant in VARIANTS.items() for way in variant.ways]


class Bench:
    """Makes each target with its drafts once, and lets one server process judge all that belong to it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pairs: dict[str, dict[str, Pair]] = {}
        self._answers: dict[str, Future[dict[str, Any]]] = {}

    def pairs(self, target: str) -> dict[str, Pair]:
        """The drafts of a target, by the names of `VARIANTS`."""
        if target not in self._pairs:
            path = self._folder / target
            kind = TARGETS[target]
            model = random_target(path, kind.family, **kind.changes)
            if kind.is_quantized:
                quantize_body(model, path)
            texts = answered_prompts(model)
            self._pairs[target] = {
                draft: make_pair(
                    model,
                    path,
                    self._folder / f"{target} {draft}",
                    texts,
                    variant.settings,
                    variant.aux_layers,
                )
                for (of, draft), variant in VARIANTS.items()
                if of == target
            }
        return self._pairs[target]

    def answers(self, target: str, serve: Serve) -> dict[str, Any]:
        """What vLLM found, by "draft, way". The first call starts the servers of all targets, two at a time:
        each has one thread.
        """
        if not self._answers:
            pool = ThreadPoolExecutor(2)
            for name in TARGETS:
                folder = self._folder / f"{name} served"
                folder.mkdir()
                self._answers[name] = pool.submit(serve, self._jobs(name), folder)
            pool.shutdown(wait=False)
        return self._answers[target].result()

    def _jobs(self, target: str) -> dict[str, Any]:
        pairs = self.pairs(target)
        engines = []
        for (of, draft), variant in VARIANTS.items():
            for way in variant.ways if of == target else ():
                pair = pairs[draft]
                model, given = {
                    DRAFT: (pair.target, str(pair.vllm)),
                    SPECULATORS: (pair.target, str(pair.speculators)),
                    ALONE: (pair.speculators, None),
                }[way]
                how = dict(ALGORITHMS[variant.settings.get("algorithm", "eagle3")].served_by_vllm)
                name = f"{draft}, {way}"
                engines.append({"name": name, "model": str(model), "draft": given, "speculative": how})
        return {
            "prompts": next(iter(pairs.values())).prompts,
            "max_new_tokens": NEW_TOKENS,
            "draft_tokens": DRAFT_TOKENS,
            "dtype": "float16" if TARGETS[target].is_quantized else "float32",
            "max_model_len": 256,
            "engines": engines,
        }
