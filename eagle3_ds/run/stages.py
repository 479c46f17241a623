"""The stages of a run, in order; each reads what the one before left in the output folder, so each can run
alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from eagle3_ds.checkpoint.format import VOCABULARY
from eagle3_ds.config import Recipe
from eagle3_ds.data import PreparedData, prepare_data
from eagle3_ds.data.stdlib_corpus import stdlib_conversations, stdlib_text
from eagle3_ds.draft import VocabularyMap
from eagle3_ds.eval import draw_report
from eagle3_ds.launch.command import LaunchPlan, write_environment_file
from eagle3_ds.launch.ranks import run_ranks
from eagle3_ds.run.finish import evaluate_run, export_draft
from eagle3_ds.run.initial_draft import write_initial_draft
from eagle3_ds.run.states import place_of_states
from eagle3_ds.store import Layout
from eagle3_ds.store.fingerprint import Fingerprint
from eagle3_ds.targets import (
    build_target,
    check_supported,
    choose_aux_layers,
    load_text_config,
    load_tokenizer,
    resolve_path,
    target_fingerprint,
)


@dataclass(frozen=True)
class Documents:
    """The documents of a run, and what their hidden states are and come from."""

    data: PreparedData
    layout: Layout
    fingerprint: Fingerprint


def prepare(recipe: Recipe, console: Console, checkpoint: Path | None = None) -> None:
    """Target, documents, hidden states, draft vocabulary; writes vocabulary.safetensors and prepared.json.

    What earlier runs left in the cache folder is used again when it was made from the same inputs. Weights to
    start from, of a checkpoint or of `train.init_from`, bring the vocabulary that they were trained with.
    """
    section = recipe.target
    if section.build is not None:
        _say(console, f"target: {section.path}")
        build_target(section, stdlib_text(), (row["messages"] for row in stdlib_conversations()))
    documents = tokenise(recipe, console)
    data, fingerprint = documents.data, documents.fingerprint
    if recipe.eval.num_prompts and not data.statistics.heldout_documents:
        raise ValueError(
            f"eval.num_prompts is {recipe.eval.num_prompts}, but no conversation is held out "
            f"(data.heldout_fraction {recipe.data.heldout_fraction}). Raise it, name data.heldout, or set "
            "eval.num_prompts to 0."
        )
    store = place_of_states(recipe, data, documents.layout, fingerprint, console)
    output_dir = Path(recipe.output_dir)
    vocabulary = _vocabulary(recipe, data, console, checkpoint)
    vocabulary.save(output_dir / VOCABULARY)
    covered = data.supervised_counts[vocabulary.t2d].sum() / data.supervised_counts.sum()
    _say(console, f"draft vocabulary: {recipe.draft.vocab_size} tokens, {covered:.1%} of the supervised ones")
    prepared = {
        "data": str(data.path.resolve()),
        "data_fingerprint": data.fingerprint,
        "store": None if store is None else str(store.resolve()),
        "store_fingerprint": dict(fingerprint),
    }
    (output_dir / "prepared.json").write_text(json.dumps(prepared, indent=2) + "\n")


def tokenise(recipe: Recipe, console: Console) -> Documents:
    """The documents of the recipe's data, made now or by an earlier run. The target must be there."""
    section = recipe.target
    folder = resolve_path(section.path)
    config = load_text_config(folder)
    check_supported(config, section.path)
    aux_layers = choose_aux_layers(config.num_hidden_layers, section.aux_layers)
    fingerprint = target_fingerprint(folder, aux_layers, section.dtype)
    data = prepare_data(recipe, load_tokenizer(section), fingerprint["tokenizer"], config.vocab_size)
    for line in data.statistics.lines():
        _say(console, f"data: {line}")
    _say(console, f"data: {data.path}, its lengths drawn in lengths.png")
    layout = Layout(len(aux_layers) * config.hidden_size, config.hidden_size, recipe.data.hidden_dtype)
    return Documents(data, layout, {**fingerprint, "documents": data.fingerprint})


def capture(recipe: Recipe, plan: LaunchPlan, console: Console) -> int:
    """Run the ranks that capture, unless all hidden states are there or none are wanted; returns their exit
    status.
    """
    store = json.loads((Path(recipe.output_dir) / "prepared.json").read_text())["store"]
    if store is None or Path(store).is_dir():
        return 0
    write_environment_file(plan)
    status = run_ranks(plan, console, "capture").status
    if Path(store).is_dir():
        _say(console, f"hidden states: {store}")
    return status


def _vocabulary(
    recipe: Recipe, data: PreparedData, console: Console, checkpoint: Path | None
) -> VocabularyMap:
    if checkpoint is not None:
        return VocabularyMap.load(checkpoint / VOCABULARY)
    if recipe.train.init_from is not None:
        _say(console, f"draft: weights and vocabulary of {recipe.train.init_from}")
        return write_initial_draft(recipe)
    return VocabularyMap.from_counts(data.supervised_counts, recipe.draft.vocab_size, data.required_tokens)


def evaluate(recipe: Recipe, console: Console) -> None:
    """Write eval.json, unless the recipe asks for no prompt."""
    if recipe.eval.num_prompts == 0:
        _say(console, "evaluation: skipped, eval.num_prompts is 0")
        return
    result = evaluate_run(recipe)
    _say(console, f"evaluation: {result['new_tokens']} tokens after {result['prompts']} prompts, lossless")


def export(recipe: Recipe, console: Console) -> None:
    """Write `draft/` and `draft-speculators/`, each read back and compared."""
    for folder, error in export_draft(recipe).items():
        _say(console, f"export: {folder}, relative error of its logits after reloading {error:.2e}")


def report(recipe: Recipe, console: Console) -> None:
    """Draw report.png from metrics.jsonl and, when the draft was evaluated, eval.json."""
    folder = Path(recipe.output_dir)
    metrics, evaluation = folder / "metrics.jsonl", folder / "eval.json"
    if not metrics.is_file():
        raise ValueError(
            f"output_dir: {folder} has no metrics.jsonl, so there is nothing to report. Train first."
        )
    _say(
        console,
        (
            "report: "
            f"{draw_report(metrics, evaluation if evaluation.is_file() else None, folder / 'report.png')}"
        ),
    )


def summary(recipe: Recipe, console: Console) -> None:
    """The run in a few lines."""
    folder = Path(recipe.output_dir)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, last = records[0], records[-1]
    table = Table("what", "first step", "last step", title=f"{len(records)} optimizer steps")
    for name in ("loss", "tau", "tokens_per_s"):
        table.add_row(name, f"{first[name]:.3f}", f"{last[name]:.3f}")
    table.add_row("peak memory, GiB per rank", "", f"{max(last['peak_memory_bytes']) / 2**30:.2f}")
    console.print(table)
    evaluation = folder / "eval.json"
    if evaluation.is_file():
        result = json.loads(evaluation.read_text())
        lengths = [result[name] for name in ("acceptance_length", "acceptance_length_untrained")]
        # None: every text ended before the draft had a say.
        trained, untrained = ("none" if length is None else f"{length:.2f}" for length in lengths)
        _say(
            console,
            f"acceptance length {trained} tokens per forward of the target, untrained {untrained}; "
            f"lossless: {result['lossless']}",
        )
    _say(console, f"everything is in {folder}")


def _say(console: Console, text: str) -> None:
    """Plain text: brackets in a path are not markup."""
    console.print(text, markup=False, highlight=False)
