"""The draft that training starts from, if the recipe names one (`train.init_from`)."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from eagle3_ds.algorithms import algorithm_of
from eagle3_ds.checkpoint.format import INITIAL_WEIGHTS, let_others_read
from eagle3_ds.config import Recipe
from eagle3_ds.draft import VocabularyMap, sliding_window
from eagle3_ds.export import algorithm_of_folder, load_export
from eagle3_ds.targets import load_text_config, resolve_path

# Fields of the draft's config that must be equal, so that the weights compute the same in this run.
GEOMETRY = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "draft_vocab_size", "hidden_act", "rms_norm_eps", "rope_parameters",
)  # fmt: skip


# Those that drafts of some algorithms alone have.
ALGORITHMS_OWN = ("mask_embedding",)


def load_initial_draft(recipe: Recipe) -> tuple[dict[str, Tensor], VocabularyMap]:
    """Read the export that `train.init_from` names.

    Returns:
        Its whole weights in fp32, by the draft's names, and its vocabulary map.

    Raises:
        ValueError: it is no export in a known layout, or of a draft of another algorithm or geometry.
    """
    folder = recipe.train.init_from
    assert folder is not None
    try:
        found = algorithm_of_folder(folder)
        if found is not None and found.name != recipe.draft.algorithm:
            raise ValueError(
                f"the draft in {folder} is one of {found.name}, and draft.algorithm is "
                f"{recipe.draft.algorithm}. Change one of them."
            )
        config, state, vocabulary = load_export(folder)
    except ValueError as error:
        raise ValueError(f"train.init_from: {error}") from error
    target = load_text_config(resolve_path(recipe.target.path))
    algorithm = algorithm_of(recipe)
    wanted, form = algorithm.build_config(target, recipe), algorithm.layouts["vllm"]
    theirs, ours = (
        {key: getattr(c, key) for key in GEOMETRY}
        | {key: getattr(c, key) for key in ALGORITHMS_OWN if hasattr(c, key)}
        | {"sliding_window": sliding_window(c)}
        | form.keys(c)
        for c in (config, wanted)
    )
    differing = [
        f"{key} is {theirs.get(key)} there and {ours.get(key)} here"
        for key in {**ours, **theirs}
        if theirs.get(key) != ours.get(key)
    ]
    if differing:
        raise ValueError(
            f"train.init_from: the draft in {folder} is not of this run's geometry: {'; '.join(differing)}. "
            "Change the draft section or the target, or name another draft."
        )
    return {name: tensor.float() for name, tensor in state.items()}, vocabulary


def write_initial_draft(recipe: Recipe) -> VocabularyMap:
    """Write the weights to the output folder, where every rank reads them; returns the vocabulary map.

    Raises:
        ValueError: `train.init_from` cannot be used.
    """
    state, vocabulary = load_initial_draft(recipe)
    path = Path(recipe.output_dir) / INITIAL_WEIGHTS
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    let_others_read(path)
    return vocabulary
