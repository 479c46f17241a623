"""The stages of a run. Each reads the files that the one before wrote to the output folder, so each can be
run alone. Messages go through `logging`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle3_ds.algorithms import algorithm_of
from eagle3_ds.checkpoint.format import VOCABULARY, write_durably
from eagle3_ds.config import RESOLVED, Recipe, as_recipe, dump_recipe, title_of
from eagle3_ds.data import PreparedData, prepare_data
from eagle3_ds.data.corpora import CORPORA
from eagle3_ds.data.prepare import documents_folder
from eagle3_ds.device.found import detect_accelerator
from eagle3_ds.draft import VocabularyMap
from eagle3_ds.eval import draw_report, loop_warning
from eagle3_ds.eval.heldout import prompts_during
from eagle3_ds.eval.served_picture import curves, warnings_of_comparison
from eagle3_ds.export import check_push, push_folder
from eagle3_ds.launch.command import LaunchPlan, write_environment_file
from eagle3_ds.launch.ranks import run_ranks
from eagle3_ds.run.cache_uses import in_use
from eagle3_ds.run.checks import check_data, check_target_structure
from eagle3_ds.run.draft_embedding import write_draft_embedding
from eagle3_ds.run.eval_file import read_eval
from eagle3_ds.run.finish import evaluate_run, export_draft
from eagle3_ds.run.states import place_of_states
from eagle3_ds.store import RowFormat
from eagle3_ds.store.fingerprint import Fingerprint, store_folder
from eagle3_ds.targets import (
    beyond_positions,
    build_target,
    check_supported,
    choose_aux_layers,
    load_full_config,
    load_text_config,
    load_tokenizer,
    no_known_server,
    positions,
    resolve_path,
    target_fingerprint,
)
from eagle3_ds.train.initial_draft import write_initial_draft

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Documents:
    """The documents of a run, what their hidden states are and come from, and what to warn of."""

    data: PreparedData
    layout: RowFormat
    fingerprint: Fingerprint
    warnings: tuple[str, ...] = ()


def prepare(recipe: Recipe | str | Path, checkpoint: Path | None = None) -> None:
    """Make what training reads: the target if it is to be built, documents, hidden states and the draft
    vocabulary. Writes recipe.resolved.yaml, vocabulary.safetensors, prepared.json and, for a draft of another
    hidden size than the target's, draft-embedding.safetensors to `output_dir`.

    Documents and hidden states in the cache folder are used again if they were made from the same inputs. If
    training starts from a checkpoint or from `train.init_from`, the draft vocabulary is taken from there.
    With `target.capture: parallel`, the ranks of `train` capture the hidden states instead.

    Args:
        recipe: a recipe, or the path of one.
        checkpoint: folder of the checkpoint that training will continue from; None for a new run.

    Raises:
        ValueError: target, data or initial draft do not fit the recipe, or the disk is too small.
    """
    recipe = as_recipe(recipe)
    with in_use(recipe) as use:
        use.preparing()
        use.names(_prepare(recipe, checkpoint))


def _prepare(recipe: Recipe, checkpoint: Path | None) -> list[Path]:
    """Does what `prepare` says; returns what it left or found in the cache folder."""
    check_data(recipe)
    save_resolved(recipe)
    section = recipe.target
    if section.build is not None:
        logger.info("target: %s", section.path)
        corpus = CORPORA[section.build.text]
        conversations = (row["messages"] for row in corpus.conversations())
        build_target(section, corpus.texts(), conversations, device=detect_accelerator())
    check_target_structure(recipe)
    for note in algorithm_of(recipe).notes(load_text_config(resolve_path(section.path)), recipe):
        logger.info("draft: %s", note)
    documents = tokenise(recipe)
    data, fingerprint = documents.data, documents.fingerprint
    if recipe.eval.num_prompts and not data.statistics.heldout_documents:
        raise ValueError(
            f"eval.num_prompts is {recipe.eval.num_prompts}, but no conversation is held out "
            f"(data.heldout_fraction {recipe.data.heldout_fraction}). Raise it, name data.heldout, or set "
            "eval.num_prompts to 0."
        )
    if recipe.eval.during:
        # The ranks choose them again: here a lack of them is told before one starts.
        prompts_during(recipe, data, load_text_config(resolve_path(section.path)).max_position_embeddings)
    store = place_of_states(recipe, data, documents.layout, fingerprint)
    output_dir = Path(recipe.output_dir)
    vocabulary = _vocabulary(recipe, data, checkpoint)
    vocabulary.save(output_dir / VOCABULARY)
    write_draft_embedding(recipe, goes_on=checkpoint is not None)
    covered = data.supervised_counts[vocabulary.t2d].sum() / data.supervised_counts.sum()
    logger.info(
        "draft vocabulary: %d tokens, %s of the supervised ones", recipe.draft.vocab_size, f"{covered:.1%}"
    )
    algorithm = algorithm_of(recipe)
    draft_config = algorithm.build_config(load_text_config(resolve_path(section.path)), recipe)
    for warning in algorithm.warnings_of_text(draft_config, data.supervised_counts):
        logger.warning("%s", warning)
    prepared = {
        "data": str(data.path.resolve()),
        "data_fingerprint": data.fingerprint,
        "store": None if store is None else str(store.resolve()),
        "store_fingerprint": dict(fingerprint),
        "warnings": list(documents.warnings),
    }
    (output_dir / "prepared.json").write_text(json.dumps(prepared, indent=2) + "\n")
    return [path for path in (data.path, store) if path is not None]


def tokenise(recipe: Recipe) -> Documents:
    """The documents of the recipe's data, made now or by an earlier run. A target that is to be built must
    have been built.

    Raises:
        ValueError: the target is missing, or the data are not usable.
    """
    section = recipe.target
    config, aux_layers, fingerprint = _target_read(recipe)
    warning = beyond_positions(recipe.data.max_length, positions(config))
    strange = no_known_server(load_full_config(resolve_path(section.path)))
    warnings = tuple(told for told in (warning, strange) if told)
    for line in warnings:
        logger.warning("%s", line)
    data = prepare_data(recipe, load_tokenizer(section), fingerprint["tokenizer"], config.vocab_size)
    for line in data.statistics.lines():
        logger.info("data: %s", line)
    logger.info("data: %s, its lengths drawn in lengths.png", data.path)
    layout = RowFormat(len(aux_layers) * config.hidden_size, config.hidden_size, recipe.data.hidden_dtype)
    return Documents(data, layout, {**fingerprint, "documents": data.fingerprint}, warnings)


def places_in_cache(recipe: Recipe) -> tuple[Path, Path]:
    """The folders of a recipe's documents and of the store of their hidden states, whether they exist or not.
    Nothing is written; the data are read once.

    Raises:
        ValueError: the target is missing, or a source of the data cannot be used.
    """
    config, _, fingerprint = _target_read(recipe)
    tokenizer = load_tokenizer(recipe.target)
    folder, documents = documents_folder(recipe, tokenizer, fingerprint["tokenizer"], config.vocab_size)
    made_from = {**fingerprint, "documents": documents}
    return folder, store_folder(recipe.data.cache_dir, made_from, recipe.data.hidden_dtype)


def _target_read(recipe: Recipe) -> tuple[Any, Sequence[int], dict[str, str]]:
    """The target's text config, the layers whose inputs are captured, and what documents and hidden states
    depend on.
    """
    section = recipe.target
    folder = resolve_path(section.path, section.build is not None)
    config = load_text_config(folder)
    check_supported(config, section.path)
    aux_layers = choose_aux_layers(config.num_hidden_layers, section.aux_layers)
    return config, aux_layers, target_fingerprint(folder, aux_layers, section.dtype)


def save_resolved(recipe: Recipe) -> None:
    """Write recipe.resolved.yaml to the output folder, and make the folder if necessary."""
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / RESOLVED, dump_recipe(recipe))


def capture(recipe: Recipe, plan: LaunchPlan) -> int:
    """Run the ranks that capture hidden states, unless they are complete already or not wanted.

    Returns:
        The exit status of the ranks; 0 when nothing was run.
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
    """Decode held-out prompts speculatively with the trained and the untrained draft, and write eval.json.

    Args:
        recipe: the recipe of a run whose training has finished, or its path.

    Returns:
        The content of eval.json; empty when `eval.num_prompts` is 0.

    Raises:
        ValueError: training has not finished, or there is no held-out prompt.
        NotLosslessError: an output differs from that of the target alone.
    """
    recipe = as_recipe(recipe)
    if recipe.eval.num_prompts == 0:
        logger.info("evaluation: skipped, eval.num_prompts is 0")
        return {}
    result = evaluate_run(recipe)
    logger.info("evaluation: %d tokens after %d prompts, lossless", result["new_tokens"], result["prompts"])
    warning = loop_warning(result)
    if warning is not None:
        logger.warning("evaluation: %s", warning)
    return result


def export(recipe: Recipe | str | Path, push: str | None = None, private: bool = False) -> list[Path]:
    """Write the trained draft in the formats of `export.formats`: `draft/` for vLLM and SGLang,
    `draft-speculators/` for speculators. Each gets its name only after it was read back and gave the same
    logits.

    Args:
        recipe: the recipe of a run whose training has finished, or its path.
        push: `owner/name` on the Hugging Face hub that the first format of `export.formats` is uploaded to; a
            second one to `owner/name-speculators` or `owner/name-vllm`.
        private: make these repositories private.

    Returns:
        The folders, one for each format.

    Raises:
        ValueError: training has not finished, an export gives other logits, or the hub refuses.
    """
    recipe = as_recipe(recipe)
    names = [] if push is None else [push, *(f"{push}-{layout}" for layout in recipe.export.formats[1:])]
    for name in names:
        check_push(name)
    errors = export_draft(recipe)
    for folder, error in errors.items():
        logger.info("export: %s, relative error of its logits after reloading %.2e", folder, error)
    for name, folder in zip(names, errors, strict=False):
        logger.info("export: %s is at %s", folder, push_folder(folder, name, private))
    return list(errors)


def report(recipe: Recipe, compare: Sequence[str | Path] = ()) -> Path:
    """Draw report.png from metrics.jsonl, and from eval.json if there is one; returns its path.

    Args:
        compare: output folders of other runs, whose acceptance against context is drawn beside.

    Raises:
        ValueError: nothing was trained in `output_dir`, or a folder of `compare` has no acceptance.
    """
    folder = Path(recipe.output_dir)
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise ValueError(
            f"output_dir: {folder} has no metrics.jsonl, so there is nothing to report. Train first."
        )
    picture = folder / "report.png"
    prepared = folder / "prepared.json"
    warnings = json.loads(prepared.read_text()).get("warnings", []) if prepared.is_file() else []
    own, compared = read_eval(folder), _evaluations(compare)
    warnings += warnings_of_comparison(own, compared)
    told = draw_report(metrics, own or None, picture, warnings, title_of(recipe), compared)
    for line in warnings:
        logger.warning("report: %s", line)
    logger.info("report: %s", told)
    return picture


def check_compared(folders: Sequence[str | Path]) -> None:
    """Raises ValueError for a folder that has no acceptance to draw beside a run's."""
    curves({}, _evaluations(folders))


def is_trained(recipe: Recipe) -> bool:
    """Whether there are metrics to draw a report of."""
    return (Path(recipe.output_dir) / "metrics.jsonl").is_file()


def _evaluations(folders: Sequence[str | Path]) -> dict[str, dict[str, Any]]:
    """What the eval.json of other runs say, by a name for each that tells them apart."""
    names = [Path(folder).resolve().name for folder in folders]
    found = {}
    for folder, name in zip(folders, names, strict=True):
        result = read_eval(Path(folder))
        if not result:
            raise ValueError(
                f"--compare {folder} has no eval.json of its weights. Name the output_dir of a run that was "
                "evaluated."
            )
        found[name if names.count(name) == 1 else str(folder)] = result
    return found
