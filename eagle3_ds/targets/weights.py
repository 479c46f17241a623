"""Reading the config and single tensors of a target's folder, without loading the model.

Legend: V vocabulary, H hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# The second and third names are of the language model in a vision-language checkpoint.
EMBEDDINGS = (
    "model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
)
HEADS = ("lm_head.weight", "language_model.lm_head.weight")
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def load_text_config(path: str | Path) -> Any:
    """The transformers config of the language model in `path`.

    Raises:
        ValueError: config.json is missing or cannot be read, or is not of a causal language model.
    """
    return load_full_config(path).get_text_config()


def load_full_config(path: str | Path) -> Any:
    """The transformers config in `path` as AutoConfig reads it. That of a vision-language model contains the
    language model's.

    Raises:
        ValueError: config.json is missing or cannot be read, or is not of a causal language model.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(
            f"target.path = {str(path)!r} holds no config.json: it is not a Hugging Face model folder. Name "
            "the folder that save_pretrained wrote."
        )
    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"target.path = {str(path)!r}: transformers cannot read its config.json ({error}). Name the "
            "folder of a model that this version of transformers knows."
        ) from error
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"target.path = {str(path)!r} is a model of the family {config.model_type!r}, which transformers "
            "does not load as a causal language model, not even its text part alone. Save its language "
            "model in a folder of its own and name that."
        )
    return config


def load_embedding_and_head(path: str | Path, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Read the token embedding and the head, and no other weights. Not collective.

    Args:
        dtype: None keeps the stored dtype.

    Returns:
        Embedding and head, [V, H] each, whole, on the CPU. For tied weights both are the same tensor.

    Raises:
        ValueError: there are no safetensors weights, or a tensor is missing from them.
    """
    files = weight_files(path)
    embedding = _read_tensor(path, files, EMBEDDINGS, dtype)
    if not set(HEADS) & set(files) and load_text_config(path).tie_word_embeddings:
        return embedding, embedding
    return embedding, _read_tensor(path, files, HEADS, dtype)


def check_weight_names(path: str | Path) -> None:
    """Raises ValueError when the files in `path` have no embedding or no head, judged by names alone."""
    names = set(weight_files(path))
    is_tied = load_text_config(path).tie_word_embeddings
    for what, wanted in (("embedding", EMBEDDINGS), ("head", () if is_tied else HEADS)):
        if wanted and not names & set(wanted):
            raise ValueError(
                f"target.path = {str(path)!r}: none of its {len(names)} tensors is the {what}, which was "
                f"looked for as {', '.join(wanted)}. Save the model by transformers' save_pretrained, or "
                "name another target."
            )


def weight_files(path: str | Path) -> dict[str, Path]:
    """{tensor name: safetensors file that holds it}, from the index or from the single file.

    Raises:
        ValueError: there are no safetensors weights, or a file that the index names is missing.
    """
    folder = Path(path)
    if (folder / INDEX).is_file():
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        missing = sorted({name for name in weight_map.values() if not (folder / name).is_file()})
        if missing:
            raise ValueError(
                f"target.path = {str(path)!r}: {INDEX} names {', '.join(missing)}, which the folder lacks. "
                "Copy or download the target again."
            )
        return {tensor: folder / name for tensor, name in weight_map.items()}
    if (folder / SINGLE).is_file():
        with safe_open(folder / SINGLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), folder / SINGLE)
    raise ValueError(
        f"target.path = {str(path)!r} holds neither {SINGLE} nor {INDEX}: only safetensors weights are read. "
        "Convert the target with save_pretrained."
    )


def _read_tensor(
    path: str | Path, files: dict[str, Path], names: Sequence[str], dtype: torch.dtype | None
) -> Tensor:
    """The tensor with the first of `names` that the files have."""
    name = next((name for name in names if name in files), None)
    if name is None:
        raise ValueError(
            f"target.path = {str(path)!r} has no tensor {names[0]}: a decoder-only Llama-like model has one. "
            "Name such a model."
        )
    with safe_open(files[name], framework="pt") as file:
        return file.get_tensor(name).to(dtype)
