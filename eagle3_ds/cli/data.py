"""`eagle3-ds data`: look at a row as the draft will learn it, or let the target answer a data set's prompts
anew.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm import tqdm

from eagle3_ds.config import Recipe, TargetSection, load_recipe
from eagle3_ds.config.schema import DataSection
from eagle3_ds.data.chat import load_chat_template
from eagle3_ds.data.inspect import as_html, as_text, inspect_document, inspect_row
from eagle3_ds.data.prepare import recipe_rows
from eagle3_ds.data.regenerate import Generate, Regenerator
from eagle3_ds.data.sources import expand_sources, source_fingerprint
from eagle3_ds.run.stages import tokenise
from eagle3_ds.targets import Target, load_target, load_tokenizer, target_fingerprint
from eagle3_ds.topology import detect_accelerator

ACTIONS = {
    "inspect": "show a row of a recipe's data, or of a file, with the tokens marked that the draft "
    "learns from",
    "regenerate": "write the target's own answers to the prompts of a recipe's data, as JSONL that "
    "a recipe reads",
}


def run(arguments: Sequence[str], console: Console) -> int:
    """Run one action; returns the exit status. Raises ValueError for a user's mistake."""
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, ACTIONS))
        lines = [f"  {name:{width}}  {meaning}" for name, meaning in ACTIONS.items()]
        console.print(
            "\n".join(["usage: eagle3-ds data ACTION ...", "", *lines]), markup=False, highlight=False
        )
        return 0 if arguments else 2
    action, *rest = arguments
    if action not in ACTIONS:
        raise ValueError(f"there is no action {action!r}. Actions: {', '.join(ACTIONS)}.")
    options = _parser(action).parse_intermixed_args(rest)
    if action == "inspect":
        _inspect(options, console)
    else:
        _regenerate(load_recipe(options.recipe, options.overrides), options, console)
    return 0


# inspect


def _inspect(options: argparse.Namespace, console: Console) -> None:
    if options.document is not None:
        if not _is_recipe(options.source):
            raise ValueError(
                f"--document counts the documents of a recipe, and {options.source} is none: use --row."
            )
        recipe = load_recipe(options.source, options.overrides)
        data = tokenise(recipe, Console(quiet=True)).data
        inspection = inspect_document(data, load_tokenizer(recipe.target), options.document)
    else:
        section, target = _what_to_inspect(options)
        if options.row < 1:
            raise ValueError(f"--row is {options.row}, but rows are counted from 1.")
        inspection = inspect_row(section, load_tokenizer(target), options.row)
    if options.html is not None:
        Path(options.html).write_text(as_html(inspection), encoding="utf-8")
    else:
        console.print(as_text(inspection, console.is_terminal))
    console.print(inspection.summary, markup=False, highlight=False)


def _is_recipe(source: str) -> bool:
    return Path(source).suffix in (".yaml", ".yml")


def _what_to_inspect(options: argparse.Namespace) -> tuple[DataSection, TargetSection]:
    source = options.source
    if _is_recipe(source):
        if options.target is not None:
            raise ValueError(
                "--target is for a data file; a recipe names its own. Set target.path=... instead."
            )
        recipe = load_recipe(source, options.overrides)
        return recipe.data, recipe.target
    if options.target is None:
        raise ValueError(
            f"{source} does not say whose tokens it becomes: name the target by --target FOLDER, or give a "
            f"recipe, as in `eagle3-ds data inspect recipes/quickstart.yaml data.train='[{source}]'`."
        )
    if options.overrides:
        raise ValueError(
            f"{options.overrides[0]!r} changes a recipe, and {source} is none: give a recipe's path to "
            "override it."
        )
    return DataSection(train=(source,)), TargetSection(path=options.target)


# regenerate


def _regenerate(recipe: Recipe, options: argparse.Namespace, console: Console) -> None:
    for name, least in (("batch_size", 1), ("max_new_tokens", 1), ("temperature", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} is {getattr(options, name)}, but must be at least {least}.")
    if not 0 < options.top_p <= 1:
        raise ValueError(f"--top_p is {options.top_p}, but must be above 0 and at most 1.")
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
    settings = {
        "target": target_fingerprint(recipe.target.path, target.aux_layers, recipe.target.dtype)[
            "target_weights"
        ],
        "template": hashlib.sha256(repr(template).encode()).hexdigest(),
        "data": [source_fingerprint(source) for source in sources],
        "shape": section.shape,
        "max_conversations": section.max_conversations,
        **{
            name: getattr(options, name)
            for name in ("batch_size", "max_new_tokens", "temperature", "top_p", "seed")
        },
    }
    regenerator = Regenerator(
        target.tokenizer,
        template,
        generate,
        stops,
        context,
        options.max_new_tokens,
        Path(options.output),
        settings,
    )
    rows = recipe_rows(sources, section, section.max_conversations)
    with tqdm(total=section.max_conversations, initial=regenerator.rows, desc="answer", unit=" rows") as bar:
        for number in regenerator.run(rows, options.batch_size):
            bar.update(number)
    for line in regenerator.lines():
        console.print(line, markup=False, highlight=False)


def _generator(target: Target, options: argparse.Namespace) -> tuple[Generate, list[int]]:
    """The target's answers to prompts, all at once, and the tokens that end an answer."""
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
        # padded on the left: the answer follows its prompt at once
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


def _parser(action: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"eagle3-ds data {action}", description=ACTIONS[action], allow_abbrev=False
    )
    add = parser.add_argument
    overrides: dict[str, Any] = {"nargs": "*", "metavar": "section.key=value"}
    overrides["help"] = "e.g. data.train='[chats.jsonl]' data.shape=sharegpt"
    if action == "inspect":
        add(
            "source",
            metavar="RECIPE|FILE",
            help="a recipe (.yaml), or a data file, a folder, a hub data set, or 'stdlib'",
        )
        add("overrides", **overrides)
        which = parser.add_mutually_exclusive_group()
        which.add_argument(
            "--row", type=int, default=1, metavar="N", help="which row of the data, from 1, e.g. --row 3"
        )
        document = "a document of a recipe, by the number that messages call it, e.g. --document 17"
        which.add_argument("--document", type=int, metavar="N", help=document)
        add("--html", metavar="F", help="write a page instead of printing, e.g. --html row.html")
        add(
            "--target",
            metavar="T",
            help="with a data file: folder or hub name of the target, e.g. --target Qwen/Qwen3-8B",
        )
        return parser
    add("recipe", help="recipe file, e.g. recipes/quickstart.yaml")
    add("overrides", **overrides)
    add(
        "--output",
        required=True,
        metavar="F",
        help="JSONL file to write or to go on with, e.g. --output answers.jsonl",
    )
    add("--batch_size", type=int, default=8, metavar="N", help="rows answered at once, e.g. --batch_size 32")
    add(
        "--max_new_tokens",
        type=int,
        default=1024,
        metavar="N",
        help="longest answer, e.g. --max_new_tokens 4096",
    )
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy, e.g. --temperature 0.7")
    add("--top_p", type=float, default=1.0, metavar="P", help="nucleus of sampled answers, e.g. --top_p 0.9")
    add("--seed", type=int, default=0, metavar="S", help="of sampled answers, e.g. --seed 1")
    return parser
