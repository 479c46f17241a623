"""What follows training: evaluating the trained draft with its target, and exporting it."""

from __future__ import annotations

import json
import logging
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from eagle3_ds import __version__
from eagle3_ds.algorithms import algorithm_of
from eagle3_ds.config import Recipe, dump_recipe
from eagle3_ds.data import PreparedData
from eagle3_ds.device.found import detect_accelerator
from eagle3_ds.draft import Draft, VocabularyMap
from eagle3_ds.eval import evaluate_draft, in_process
from eagle3_ds.eval.heldout import heldout_prompts, longest_prompt
from eagle3_ds.export import (
    Card,
    export_speculators,
    export_vllm,
    license_in,
    verify_export,
    write_card,
)
from eagle3_ds.run.draft_embedding import own_embedding
from eagle3_ds.run.eval_file import SERVED, WEIGHTS, read_eval, write_evaluation
from eagle3_ds.targets import load_embedding_and_head, load_target, load_text_config, resolve_path

logger = logging.getLogger(__name__)
MADE_BY = ("torch", "transformers", "deepspeed")
FOLDERS = {"vllm": "draft", "speculators": "draft-speculators"}


def load_draft(recipe: Recipe, weights: str) -> tuple[Draft, VocabularyMap]:
    """The served draft and its vocabulary.

    Args:
        weights: name of the file of its weights in the output folder.

    Raises:
        ValueError: there is no such file: the run has not come that far.
    """
    folder = Path(recipe.output_dir)
    for name in (weights, "vocabulary.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(
                f"output_dir: {folder} has no {name}: no finished training is there. Run `launch` first."
            )
    config = load_text_config(resolve_path(recipe.target.path))
    algorithm = algorithm_of(recipe)
    draft = algorithm.build(algorithm.build_config(config, recipe))
    draft.load_state_dict(load_file(folder / weights))
    draft.eval().requires_grad_(False)
    return draft, VocabularyMap.load(folder / "vocabulary.safetensors")


def evaluate_run(recipe: Recipe) -> dict[str, Any]:
    """Decode held-out prompts speculatively with the trained and the untrained draft, and write eval.json and
    its figures into the cards of exports that are there.

    Raises:
        ValueError: training has not finished, or there is no held-out prompt.
        NotLosslessError: an output differs from that of the target alone.
    """
    trained, vocabulary = load_draft(recipe, WEIGHTS)
    untrained, _ = load_draft(recipe, "draft-initial.safetensors")
    folder = Path(recipe.output_dir)
    target = load_target(recipe.target, recipe.eval.dtype, detect_accelerator())
    prompts = prompts_of_run(recipe, target.config.max_position_embeddings)
    result = evaluate_draft(
        recipe, target, trained, untrained, vocabulary, prompts, embedding=own_embedding(recipe)
    )
    result |= {"simulated_acceptance_length": _last_simulated(folder / "metrics.jsonl")}
    write_evaluation(folder, result)
    write_cards(recipe)
    return result


def write_cards(recipe: Recipe) -> None:
    """Write the cards of the exports that are there anew."""
    folders = {layout: Path(recipe.output_dir) / name for layout, name in FOLDERS.items()}
    there = {layout: folder for layout, folder in folders.items() if folder.is_dir()}
    if there:
        card = card_of_run(recipe)
        for layout, folder in there.items():
            write_card(folder, layout, card)


def card_of_run(recipe: Recipe) -> Card:
    """What the exports of a finished run say of themselves; an evaluation of earlier weights is left out."""
    path, result = resolve_path(recipe.target.path), read_eval(Path(recipe.output_dir))
    return Card(
        target=recipe.target.path,
        is_hub=not Path(recipe.target.path).expanduser().is_dir(),
        license=recipe.export.license or license_in(path),
        algorithm=recipe.draft.algorithm,
        dtype=recipe.target.dtype,
        draft_tokens=recipe.eval.draft_tokens,
        aux_layers=_told_layers(recipe, load_text_config(path).num_hidden_layers),
        data=recipe.data.train or (),
        max_length=recipe.data.max_length,
        recipe=dump_recipe(recipe),
        versions={"eagle3_ds": __version__, **{name: version(name) for name in MADE_BY}},
        evaluation=in_process(result),
        served=result.get(SERVED),
    )


def _told_layers(recipe: Recipe, num_layers: int) -> tuple[int, ...] | None:
    """The captured layers that an export names. Those of the EAGLE-3 rule are left out: servers know the
    rule, and SGLang counts explicit ids differently from vLLM.
    """
    layers = recipe.target.aux_layers
    return None if layers == (2, num_layers // 2, num_layers - 3) else layers


def prompts_of_run(recipe: Recipe, max_positions: int) -> list[list[int]]:
    """The held-out prompts of a run that was prepared, those that its evaluation decodes.

    Raises:
        ValueError: the run was not prepared.
    """
    file = Path(recipe.output_dir) / "prepared.json"
    if not file.is_file():
        raise ValueError(
            f"output_dir: {file.parent} has no prepared.json, which names the held-out data. Run `launch` or "
            "`prepare` first."
        )
    prepared = json.loads(file.read_text())
    data = PreparedData.open(Path(prepared["data"]), prepared["data_fingerprint"])
    longest = longest_prompt(recipe, max_positions)
    return heldout_prompts(data, longest, recipe.eval.num_prompts, recipe.data.seed)


def _last_simulated(metrics: Path) -> float | None:
    """Simulated acceptance length of the last held-out evaluation during training; None without one."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    heldout = [record["heldout"] for record in records if "heldout" in record]
    return heldout[-1].get("acceptance_length") if heldout else None


def export_draft(recipe: Recipe) -> dict[Path, float]:
    """Write the recipe's export formats. Each gets its name only after it was read back and gave the same
    logits.

    Returns:
        {folder of an export: relative error of its logits}.

    Raises:
        ValueError: training has not finished, or an export gives other logits.
    """
    draft, vocabulary = load_draft(recipe, WEIGHTS)
    errors, card = {}, card_of_run(recipe)
    for layout in recipe.export.formats:
        folder = Path(recipe.output_dir) / FOLDERS[layout]
        aside = folder.with_name(f".{folder.name}.unverified")
        shutil.rmtree(aside, ignore_errors=True)
        embedding = _brought_embedding(recipe, layout, draft)
        _write(recipe, layout, draft, vocabulary, embedding, aside)
        error = verify_export(aside, draft, vocabulary, algorithm=recipe.draft.algorithm, embedding=embedding)
        write_card(aside, layout, card, folder.name)
        if folder.exists():
            shutil.rmtree(folder)
        errors[aside.rename(folder)] = error
    return errors


def _brought_embedding(recipe: Recipe, layout: str, draft: Draft) -> Tensor | None:
    """What the draft was given in training, [V, H], for a layout in which it brings it."""
    if not algorithm_of(recipe).layouts[layout].brings_embedding(draft.config):
        return None
    own = own_embedding(recipe)
    return load_embedding_and_head(resolve_path(recipe.target.path))[0] if own is None else own


def _write(
    recipe: Recipe,
    layout: str,
    draft: Draft,
    vocabulary: VocabularyMap,
    embedding: Tensor | None,
    folder: Path,
) -> None:
    path = resolve_path(recipe.target.path)
    target = load_text_config(path)
    aux_layers = _told_layers(recipe, target.num_hidden_layers)
    state, dtype = draft.state_dict(), recipe.export.dtype
    if layout == "vllm":
        export_vllm(
            state,
            draft.config,
            vocabulary,
            folder,
            dtype,
            recipe.data.max_length,
            aux_layers,
            recipe.draft.algorithm,
            embedding,
        )
        return
    assert embedding is not None, "this layout always holds one"
    export_speculators(
        state,
        draft.config,
        vocabulary,
        embedding,
        folder,
        verifier=recipe.target.path,
        verifier_architectures=target.architectures or [],
        dtype=dtype,
        max_position=recipe.data.max_length,
        aux_layers=aux_layers,
        draft_tokens=recipe.eval.draft_tokens,
        algorithm=recipe.draft.algorithm,
    )
