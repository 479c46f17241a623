"""The stages of a run, in order; each reads what the one before left in the output folder, so each can run
alone. What they have to say goes through `logging`.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle3_ds.checkpoint.format import VOCABULARY
from eagle3_ds.config import Recipe, as_recipe, dump_recipe
from eagle3_ds.data import PreparedData, prepare_data
from eagle3_ds.data.stdlib_corpus import stdlib_conversations, stdlib_text
from eagle3_ds.draft import VocabularyMap
from eagle3_ds.eval import draw_report, loop_warning
from eagle3_ds.launch.command import LaunchPlan, write_environment_file
from eagle3_ds.launch.ranks import run_ranks
from eagle3_ds.run.checks import RESOLVED, check_data, check_target_structure
from eagle3_ds.run.finish import evaluate_run, export_draft
from eagle3_ds.run.initial_draft import write_initial_draft
from eagle3_ds.run.states import place_of_states
from eagle3_ds.store import RowFormat
from eagle3_ds.store.fingerprint import Fingerprint
from eagle3_ds.targets import (
    beyond_positions,
    build_target,
    check_supported,
    choose_aux_layers,
    load_text_config,
    load_tokenizer,
    positions,
    resolve_path,
    target_fingerprint,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Documents:
    """The documents of a run, what their hidden states are and come from, and what to warn of."""

    data: PreparedData
    layout: RowFormat
    fingerprint: Fingerprint
    warnings: tuple[str, ...] = ()


def prepare(recipe: Recipe | str | Path, checkpoint: Path | None = None) -> None:
    """Make what training reads: target, documents, hidden states, draft vocabulary; writes
    recipe.resolved.yaml, vocabulary.safetensors and prepared.json to `output_dir`.

    What earlier runs left in the cache folder is used again when it was made from the same inputs. Weights to
    start from, of a checkpoint or of `train.init_from`, bring the vocabulary that they were trained with.
    With `target.capture: parallel` the hidden states are left to the ranks of `train`.

    Args:
        recipe: a recipe, or the path of one.
        checkpoint: folder of the one that training will go on from; None for a fresh start.

    Raises:
        ValueError: a target, data or a draft that the recipe does not fit, or a disk that is too small.
    """
    recipe = as_recipe(recipe)
    check_data(recipe)
    save_resolved(recipe)
    section = recipe.target
    if section.build is not None:
        logger.info("target: %s", section.path)
        build_target(section, stdlib_text(), (row["messages"] for row in stdlib_conversations()))
    check_target_structure(recipe)
    documents = tokenise(recipe)
    data, fingerprint = documents.data, documents.fingerprint
    if recipe.eval.num_prompts and not data.statistics.heldout_documents:
        raise ValueError(
            f"eval.num_prompts is {recipe.eval.num_prompts}, but no conversation is held out "
            f"(data.heldout_fraction {recipe.data.heldout_fraction}). Raise it, name data.heldout, or set "
            "eval.num_prompts to 0."
        )
    store = place_of_states(recipe, data, documents.layout, fingerprint)
    output_dir = Path(recipe.output_dir)
    vocabulary = _vocabulary(recipe, data, checkpoint)
    vocabulary.save(output_dir / VOCABULARY)
    covered = data.supervised_counts[vocabulary.t2d].sum() / data.supervised_counts.sum()
    logger.info(
        "draft vocabulary: %d tokens, %s of the supervised ones", recipe.draft.vocab_size, f"{covered:.1%}"
    )
    prepared = {
        "data": str(data.path.resolve()),
        "data_fingerprint": data.fingerprint,
        "store": None if store is None else str(store.resolve()),
        "store_fingerprint": dict(fingerprint),
        "warnings": list(documents.warnings),
    }
    (output_dir / "prepared.json").write_text(json.dumps(prepared, indent=2) + "\n")


def tokenise(recipe: Recipe) -> Documents:
    """The documents of the recipe's data, made now or by an earlier run. The target must be there."""
    section = recipe.target
    folder = resolve_path(section.path)
    config = load_text_config(folder)
    check_supported(config, section.path)
    warning = beyond_positions(recipe.data.max_length, positions(config))
    warnings = () if warning is None else (warning,)
    for line in warnings:
        logger.warning("%s", line)
    aux_layers = choose_aux_layers(config.num_hidden_layers, section.aux_layers)
    fingerprint = target_fingerprint(folder, aux_layers, section.dtype)
    data = prepare_data(recipe, load_tokenizer(section), fingerprint["tokenizer"], config.vocab_size)
    for line in data.statistics.lines():
        logger.info("data: %s", line)
    logger.info("data: %s, its lengths drawn in lengths.png", data.path)
    layout = RowFormat(len(aux_layers) * config.hidden_size, config.hidden_size, recipe.data.hidden_dtype)
    return Documents(data, layout, {**fingerprint, "documents": data.fingerprint}, warnings)


def save_resolved(recipe: Recipe) -> None:
    """Write recipe.resolved.yaml to the output folder, which is made when it is not there."""
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESOLVED).write_text(dump_recipe(recipe), encoding="utf-8")


def capture(recipe: Recipe, plan: LaunchPlan) -> int:
    """Run the ranks that capture, unless all hidden states are there or none are wanted; returns their exit
    status.
    """
    store = json.loads((Path(recipe.output_dir) / "prepared.json").read_text())["store"]
    if store is None or Path(store).is_dir():
        return 0
    write_environment_file(plan)
    status = run_ranks(plan, "capture").status
    if Path(store).is_dir():
        logger.info("hidden states: %s", store)
    return status


def _vocabulary(recipe: Recipe, data: PreparedData, checkpoint: Path | None) -> VocabularyMap:
    if checkpoint is not None:
        return VocabularyMap.load(checkpoint / VOCABULARY)
    if recipe.train.init_from is not None:
        logger.info("draft: weights and vocabulary of %s", recipe.train.init_from)
        return write_initial_draft(recipe)
    return VocabularyMap.from_counts(data.supervised_counts, recipe.draft.vocab_size, data.required_tokens)


def evaluate(recipe: Recipe | str | Path) -> dict[str, Any]:
    """Decode held-out prompts speculatively, with the trained and the untrained draft; writes eval.json.

    Args:
        recipe: of a finished run, or the path of one.

    Returns:
        What eval.json holds; empty when the recipe asks for no prompt (`eval.num_prompts` 0).

    Raises:
        ValueError: no finished training, or no held-out prompt.
        NotLosslessError: an output differs from the target's own.
    """
    recipe = as_recipe(recipe)
    if recipe.eval.num_prompts == 0:
        logger.info("evaluation: skipped, eval.num_prompts is 0")
        return {}
    result = evaluate_run(recipe)
    logger.info("evaluation: %d tokens after %d prompts, lossless", result["new_tokens"], result["prompts"])
    _warn_of_loops("evaluation", result)
    return result


def _warn_of_loops(stage: str, result: dict[str, Any]) -> None:
    warning = loop_warning(result)
    if warning is not None:
        logger.warning("%s: %s", stage, warning)


def export(recipe: Recipe | str | Path) -> list[Path]:
    """Write the trained draft in the recipe's formats: `draft/` for vLLM and SGLang, `draft-speculators/`.

    Each is read back, and takes its name only when it gives the same logits.

    Args:
        recipe: of a finished run, or the path of one.

    Returns:
        The folders, one per format.

    Raises:
        ValueError: no finished training, or an export that gives other logits.
    """
    errors = export_draft(as_recipe(recipe))
    for folder, error in errors.items():
        logger.info("export: %s, relative error of its logits after reloading %.2e", folder, error)
    return list(errors)


def report(recipe: Recipe) -> Path:
    """Draw report.png from metrics.jsonl and, when the draft was evaluated, eval.json; returns its path.

    Raises:
        ValueError: nothing was trained in `output_dir`.
    """
    folder = Path(recipe.output_dir)
    metrics, evaluation = folder / "metrics.jsonl", folder / "eval.json"
    if not metrics.is_file():
        raise ValueError(
            f"output_dir: {folder} has no metrics.jsonl, so there is nothing to report. Train first."
        )
    picture = folder / "report.png"
    prepared = folder / "prepared.json"
    warnings = json.loads(prepared.read_text()).get("warnings", []) if prepared.is_file() else []
    told = draw_report(metrics, evaluation if evaluation.is_file() else None, picture, warnings)
    for line in warnings:
        logger.warning("report: %s", line)
    logger.info("report: %s", told)
    if evaluation.is_file():
        _warn_of_loops("report", json.loads(evaluation.read_text()))
    return picture


@dataclass(frozen=True)
class Summary:
    """A finished run in a few numbers.

    Attributes:
        steps: optimizer steps.
        first, last: their records in metrics.jsonl.
        peak_bytes: of memory, of the rank that needed most.
        evaluation: what eval.json holds; None when the draft was not evaluated.
    """

    steps: int
    first: dict[str, Any]
    last: dict[str, Any]
    peak_bytes: int
    evaluation: dict[str, Any] | None


def summary(recipe: Recipe) -> Summary:
    """What metrics.jsonl and eval.json say of a run, in short."""
    folder = Path(recipe.output_dir)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluation = folder / "eval.json"
    result = json.loads(evaluation.read_text()) if evaluation.is_file() else None
    return Summary(len(records), records[0], records[-1], max(records[-1]["peak_memory_bytes"]), result)
