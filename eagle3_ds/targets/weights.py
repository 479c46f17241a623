"""Reading the config and single tensors of a target's folder, without loading the model.

Legend: V vocabulary, H hidden size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from eagle3_ds.targets.quiet import ignore_remarks_on_rope
from eagle3_ds.targets.structure import fold_factor, logits_factor

# The last parts of the names that families give to the two tensors, the most frequent first.
EMBEDDINGS = (
    "embed_tokens.weight",
    "embed.weight",
    "embeddings.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "embed_in.weight",
    "wte.weight",
)
HEADS = ("lm_head.weight", "embed_out.weight", "output.weight", "head.weight")
# Embeddings and heads of other parts than the language model's own: of the layers of a target that guess
# further tokens (DeepSeek-V3 writes them behind its decoder's layers), or of the parts that see and hear.
OTHER_PARTS = re.compile(r"(^|\.)(layers|h|blocks|mtp|visual|vision\w*|audio\w*)\.")
PLAIN = {"F64", "F32", "F16", "BF16"}
"""The dtypes, in the names of safetensors, of weights that are not quantized."""
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
    ignore_remarks_on_rope()
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
    """Read the token embedding and the head, and no other weights. Not collective. The body of the target may
    be quantized.

    Args:
        dtype: None keeps the stored dtype.

    Returns:
        Embedding and head, [V, H] each, whole, on the CPU. For tied weights both are the same tensor. Where
        the target's logits are a constant times head x hidden state, the head is times that constant.

    Raises:
        ValueError: there are no safetensors weights; a tensor is missing from them, quantized, or not [V, H];
            or the logits are no constant times head x hidden state.
    """
    files = weight_files(path)
    embedding_name, head_name = _end_names(path, files)
    factor = logits_factor(load_full_config(path), str(path))
    embedding = _read_tensor(files[embedding_name], embedding_name, dtype)
    if head_name == embedding_name:
        return embedding, fold_factor(embedding, factor)
    return embedding, fold_factor(_read_tensor(files[head_name], head_name, dtype), factor)


def check_weight_names(path: str | Path) -> None:
    """Raises ValueError when `load_embedding_and_head` would. Reads names, dtypes and sizes alone."""
    _end_names(path, weight_files(path))


def _end_names(path: str | Path, files: Mapping[str, Path]) -> tuple[str, str]:
    """The names of embedding and head in `files`; the same one for tied weights."""
    full_config = load_full_config(path)
    config = full_config.get_text_config()
    wanted = (config.vocab_size, config.hidden_size)
    embedding = _find(path, files, "embedding", EMBEDDINGS, wanted)
    if embedding is None:
        raise _missing(path, files, "embedding", EMBEDDINGS)
    head = _find(path, files, "head", HEADS, wanted)
    if head is None and not (config.tie_word_embeddings or full_config.tie_word_embeddings):
        raise _missing(path, files, "head", HEADS)
    bias = (head or "").removesuffix("weight") + "bias"
    if head and bias in files:
        raise ValueError(
            f"target.path = {str(path)!r} has a bias in its head ({bias}): the draft is taught from the "
            "product of head and hidden state alone. Choose a target without one."
        )
    return embedding, head or embedding


def _find(
    path: str | Path, files: Mapping[str, Path], what: str, endings: Sequence[str], wanted: tuple[int, int]
) -> str | None:
    """The first name with one of `endings`, held against the shape; None when there is none.

    Raises:
        ValueError: it is quantized, of another shape, or there are several that differ.
    """
    own = [name for name in files if not OTHER_PARTS.search(name)]
    for ending in endings:
        found = [name for name in own if name == ending or name.endswith(f".{ending}")]
        if len(found) > 1:
            raise ValueError(
                f"target.path = {str(path)!r} has several tensors that may be the {what}: "
                f"{', '.join(sorted(found))}. Save its language model alone by save_pretrained, and name it."
            )
        if found:
            _check_end(path, files[found[0]], found[0], what, wanted)
            return found[0]
        packed = re.compile(rf"(^|\.){re.escape(ending.removesuffix('weight'))}(qweight|weight_|weight\.)")
        if of_it := sorted(filter(packed.search, own)):
            raise _quantized(path, what, of_it[0])
    return None


def _check_end(path: str | Path, file: Path, name: str, what: str, wanted: tuple[int, int]) -> None:
    with safe_open(file, framework="pt") as opened:
        tensor = opened.get_slice(name)
        shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
    if dtype not in PLAIN:
        raise _quantized(path, what, f"{name} of {dtype}")
    if shape != wanted:
        raise ValueError(
            f"target.path = {str(path)!r}: its {what} {name} is {list(shape)}, and config.json says "
            f"{list(wanted)} (vocab_size, hidden_size). Name a folder whose config.json belongs to its "
            "weights."
        )


def _quantized(path: str | Path, what: str, found: str) -> ValueError:
    return ValueError(
        f"target.path = {str(path)!r}: its {what} is quantized ({found}), and the draft is taught from a "
        f"plain one. Name a checkpoint whose {what} is not quantized; the rest of it may be."
    )


def _missing(path: str | Path, files: Mapping[str, Path], what: str, endings: Sequence[str]) -> ValueError:
    return ValueError(
        f"target.path = {str(path)!r}: none of its {len(files)} tensors is the {what}; looked for were names "
        f"that end in {', '.join(endings)}. Save the model by transformers' save_pretrained, or name another "
        "target."
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


def _read_tensor(file: Path, name: str, dtype: torch.dtype | None) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name).to(dtype)
