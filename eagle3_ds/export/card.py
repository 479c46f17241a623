"""What an export says of itself: `README.md`, a model card, and `serve.md`, the commands that serve it."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from eagle3_ds.algorithms import ALGORITHMS
from eagle3_ds.export.vllm import sglang_note

CARD, COMMANDS = "README.md", "serve.md"
NOT_IN_SGLANG = {
    "dflash": "SGLang has DFlash drafts (DFLASH), but lets them share the target's head and vocabulary. This "
    "draft has a head of its own, so it is for vLLM.",
}
"""Why SGLang cannot serve drafts of an algorithm, by its name."""


@dataclass(frozen=True)
class Card:
    """What both files say.

    Attributes:
        target: hub name or folder; `is_hub` tells which.
        license: an identifier as the hub has them; None: none is stated.
        dtype: that in which the target gave the hidden states, and is to be served.
        draft_tokens: guesses per round.
        aux_layers: captured layers, where they are not the rule's.
        data: as the recipe names it; max_length: tokens of the longest text trained on.
        recipe: the whole recipe as YAML.
        versions: {package: version} of those that made it.
        evaluation: the content of eval.json; None before the evaluation.
        served: what a running server measured, as in eval.json; None where none was asked.
    """

    target: str
    is_hub: bool
    license: str | None
    algorithm: str
    dtype: str
    draft_tokens: int
    aux_layers: Sequence[int] | None
    data: Sequence[str]
    max_length: int
    recipe: str
    versions: Mapping[str, str] = field(default_factory=dict)
    evaluation: Mapping[str, Any] | None = None
    served: Mapping[str, Any] | None = None


def write_card(folder: str | Path, layout: str, card: Card, name: str | None = None) -> None:
    """Write both files into an export, in place of older ones, each whole.

    Args:
        layout: "vllm" or "speculators".
        name: what the commands call the export; None is the folder's own name.
    """
    folder = Path(folder)
    called = name or folder.name
    for file, text in ((CARD, card_text(layout, card)), (COMMANDS, commands_text(layout, card, called))):
        aside = folder / f".{file}"
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, folder / file)


def vllm_words(target: str, draft: str, dtype: str, draft_tokens: int, algorithm: str) -> list[str]:
    """vLLM's command: the target with the draft beside it, in either layout."""
    way = dict(ALGORITHMS[algorithm].served_by_vllm)
    speculative = {**way, "model": draft, "num_speculative_tokens": draft_tokens}
    return ["vllm", "serve", target, "--dtype", dtype, "--speculative-config", json.dumps(speculative)]


def sglang_words(target: str, draft: str, dtype: str, draft_tokens: int) -> list[str]:
    """SGLang's command for the vLLM layout: a chain of guesses, as the draft was evaluated."""
    return [
        *("python", "-m", "sglang.launch_server", "--model-path", target, "--dtype", dtype),
        *("--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", draft),
        *("--speculative-num-steps", str(draft_tokens), "--speculative-eagle-topk", "1"),
        *("--speculative-num-draft-tokens", str(draft_tokens + 1)),
    ]


def commands_text(layout: str, card: Card, draft: str) -> str:
    """serve.md: what to type for this draft and its target."""
    sizes = (card.target, draft, card.dtype, card.draft_tokens)
    lines = [
        f"# Serving this draft of `{card.target}`",
        f"`{draft}` is this folder: give its path, or its name on the hub.",
        "",
        "## vLLM",
        *_shell(vllm_words(*sizes, card.algorithm)),
    ]
    if layout == "speculators":
        lines += [
            "This layout names its target and its number of guesses itself, so that it can be served alone:",
            *_shell(["vllm", "serve", draft, "--dtype", card.dtype]),
            "",
            "## SGLang",
            "SGLang reads the other layout: export it with `vllm` in `export.formats`."
            if ALGORITHMS[card.algorithm].served_by_sglang
            else _not_sglang(card.algorithm),
        ]
        return "\n".join(lines) + "\n"
    if not ALGORITHMS[card.algorithm].served_by_sglang:
        lines += ["", "## SGLang", _not_sglang(card.algorithm)]
        return "\n".join(lines) + "\n"
    lines += ["", "## SGLang", *_shell(sglang_words(*sizes)), "No SGLang was run by those who wrote this."]
    note = None if card.aux_layers is None else sglang_note(card.aux_layers)
    if note is not None:
        lines += ["", f"Captured layers are {list(card.aux_layers or ())}. {note[0].upper()}{note[1:]}."]
    return "\n".join(lines) + "\n"


def _shell(words: Sequence[str]) -> list[str]:
    return ["```", shlex.join(words), "```"]


def card_text(layout: str, card: Card) -> str:
    """README.md: a header in YAML, which the hub reads, and what a reader wants to know."""
    header: dict[str, Any] = {} if card.license is None else {"license": card.license}
    header |= {"base_model": card.target} if card.is_hub else {}
    by_sglang = ["sglang"] if ALGORITHMS[card.algorithm].served_by_sglang else []
    servers = ["vllm", *by_sglang] if layout == "vllm" else ["vllm", "speculators"]
    header |= {"pipeline_tag": "text-generation", "tags": ["speculative-decoding", card.algorithm, *servers]}
    licensed = "No license is stated." if card.license is None else f"License: {card.license}."
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).rstrip(),
        "---",
        f"# A draft of {card.target} for speculative decoding ({card.algorithm})",
        f"It guesses tokens that `{card.target}` then checks: answers are the target's own, only sooner. How "
        f"to serve it is in [{COMMANDS}]({COMMANDS}). {licensed}",
        "",
        "## Evaluation",
        *_figures(card.evaluation),
        *([] if card.served is None else _served_figures(card.served)),
        "",
        "## Training",
        f"Data: {', '.join(card.data)}; texts of up to {card.max_length:,} tokens. Made by "
        f"{', '.join(f'{package} {version}' for package, version in card.versions.items())}, by this recipe:",
        "```yaml",
        card.recipe.rstrip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _not_sglang(algorithm: str) -> str:
    return NOT_IN_SGLANG.get(algorithm, f"SGLang is not known to serve drafts of {algorithm}.")


def _figures(evaluation: Mapping[str, Any] | None) -> list[str]:
    if evaluation is None:
        return ["It was not evaluated."]
    if evaluation["acceptance_length"] is None:
        return ["Every answer ended before the draft was asked: nothing can be said."]
    shares = [f"{row['accepted']:.3f}" for row in evaluation["acceptance_by_position"]]
    contexts = [row for row in evaluation["acceptance_by_context"] if row["rounds"]]
    looping = evaluation.get("looping_prompts") or 0
    loops = (
        [f"{looping} of the target's answers go round in circles, which any draft guesses."]
        if looping
        else []
    )
    return [
        f"Greedy decoding after {evaluation['prompts']} held-out prompts, {evaluation['new_tokens']} tokens, "
        f"{evaluation['draft_tokens']} guesses per round, {evaluation['dtype']}: "
        f"**{evaluation['acceptance_length']:.2f} tokens per forward of the target** (1 without a draft; "
        f"{evaluation['acceptance_length_untrained']:.2f} before training).",
        *loops,
        "",
        "| guess | " + " | ".join(map(str, range(1, len(shares) + 1))) + " |",
        "|---" * (len(shares) + 1) + "|",
        "| accepted, share of rounds | " + " | ".join(shares) + " |",
        "",
        "| tokens of context | rounds | tokens per forward |",
        "|---|---|---|",
        *(f"| {_bucket(row)} | {row['rounds']} | {row['acceptance_length']:.2f} |" for row in contexts),
    ]


def _served_figures(served: Mapping[str, Any]) -> list[str]:
    """What a server's counters said, by lengths of prompts."""
    at_once = "one at a time" if served["concurrency"] == 1 else f"{served['concurrency']} at a time"
    return [
        "",
        "### On a vLLM server",
        f"{served['prompts']} prompts ({', '.join(served['prompts_from'])}), {at_once}, greedily, "
        f"{served['new_tokens']} tokens, {served['draft_tokens']} guesses per round: "
        f"**{served['acceptance_length']:.2f} tokens per forward of the target**, "
        f"{served['tokens_per_second']:.1f} tokens/s with the reading of the prompts.",
        "",
        "| tokens of the prompt | prompts | tokens per forward | tokens/s of one answer, without reading |",
        "|---|---|---|---|",
        *(
            f"| {_bucket(row)} | {row['prompts']} | {_number(row['acceptance_length'])} "
            f"| {_number(row.get('decoding_tokens_per_second'))} |"
            for row in served["acceptance_by_context"]
            if row["prompts"]
        ),
    ]


def _bucket(row: Mapping[str, Any]) -> str:
    return f"above {row['above']}" + ("" if row["up_to"] is None else f", up to {row['up_to']}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def license_in(folder: str | Path) -> str | None:
    """The license that a model's own card states, as the hub reads it; None where none is stated."""
    card = Path(folder) / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if not text.startswith("---"):
        return None
    try:
        header = yaml.safe_load(text.split("---")[1])
    except yaml.YAMLError:  # a card of others, which is only looked at
        return None
    found = header.get("license") if isinstance(header, dict) else None
    return found if isinstance(found, str) else None
