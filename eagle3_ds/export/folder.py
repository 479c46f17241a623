"""What both export layouts share: the draft's geometry as config keys, the check that names and shapes are
those of the draft, and writing and reading a folder.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from eagle3_ds.algorithms import ALGORITHMS
from eagle3_ds.attention.rotary import rotary_frequencies, rotary_length
from eagle3_ds.draft import DraftAlgorithm, LayoutForm, VocabularyMap, sliding_window, window_keys

CONFIG, WEIGHTS = "config.json", "model.safetensors"
EMBEDDING = "embed_tokens.weight"
MASK_EMBEDDING, MASK_FILE = "mask_embedding", "mask_embedding.pt"
"""The tensor that servers read from a file of its own, which torch writes, and that file."""
PARTIAL = "partial_rotary_factor"


def geometry(config: LlamaConfig, max_position: int | None) -> dict[str, Any]:
    """The draft's decoder as the keys of a config.json, without `architectures`.

    Servers read the rotary settings from `rope_theta` and `rope_scaling` (transformers 4) or from
    `rope_parameters` (transformers 5): both are written and say the same. `max_position` raises
    `max_position_embeddings` to the length the draft is served at, where that does not change the rotation.
    """
    rope = dict(config.rope_parameters)
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", PARTIAL)}
    # Where a part of each head turns, vLLM and transformers 5 read it in rope_parameters, others beside them.
    partial = {PARTIAL: rope[PARTIAL]} if PARTIAL in rope else {}
    return {
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": _served_positions(config, max_position or 0),
        **_length_keys(config),
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "rope_parameters": rope,
        **partial,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        **window_keys(sliding_window(config), config.num_hidden_layers),
    }


def _served_positions(config: LlamaConfig, wanted: int) -> int:
    """`wanted`, unless a larger number would turn the draft by other angles: some rotary scalings (longrope,
    yarn without an original length) depend on the number itself.
    """
    if wanted <= config.max_position_embeddings:
        return int(config.max_position_embeddings)
    raised = LlamaConfig(**{**config.to_dict(), "max_position_embeddings": wanted})
    cpu = torch.device("cpu")
    own, other = rotary_frequencies(config, cpu), rotary_frequencies(raised, cpu)
    same = torch.equal(own.frequencies, other.frequencies) and own.factor == other.factor
    return wanted if same else int(config.max_position_embeddings)


def _length_keys(config: LlamaConfig) -> dict[str, int]:
    """The length that the draft's rotation was fixed by, where it matters; servers pass over it."""
    depends = config.rope_parameters["rope_type"] in ("dynamic", "longrope")
    return {"rotary_length": rotary_length(config)} if depends else {}


def draft_config(
    keys: Mapping[str, Any], draft_vocab_size: int, more: Mapping[str, Any] | None = None
) -> LlamaConfig:
    """The draft's config from the keys of a config.json that `geometry` or another program made.

    The rotary settings are read from `rope_parameters`, or without it from `rope_theta` and `rope_scaling`.

    Args:
        more: further fields, of the draft's algorithm.
    """
    doubled = {"rope_theta", "rope_scaling", PARTIAL} if keys.get("rope_parameters") else set()
    kept = {key: value for key, value in keys.items() if key not in {"model_type", *doubled}}
    return LlamaConfig(**kept | {"draft_vocab_size": draft_vocab_size} | dict(more or {}))


def check_embedding(embedding: Tensor, config: LlamaConfig) -> None:
    """Raises ValueError when it is not the embedding of a draft of this config."""
    wanted = (config.vocab_size, config.hidden_size)
    if tuple(embedding.shape) != wanted:
        raise ValueError(
            f"the embedding is {list(embedding.shape)}, the draft's config wants {list(wanted)}. Use the "
            "target's, or the draft's own if its hidden size is another."
        )


def algorithm_of_layout(layout: str, keys: Mapping[str, Any]) -> DraftAlgorithm | None:
    """The algorithm of the draft whose config.json in a layout is `keys`; None if it is none's."""
    return next((a for a in ALGORITHMS.values() if a.layouts[layout].recognises(keys)), None)


def algorithm_of_folder(folder: str | Path) -> DraftAlgorithm | None:
    """The algorithm of an exported draft in either layout; None if it is none's."""
    keys, _ = read_folder(folder)
    return algorithm_of_layout("speculators" if "speculators_model_type" in keys else "vllm", keys)


def tensors_here(
    form: LayoutForm, folder: str | Path, tensors: Mapping[str, Tensor], config: LlamaConfig
) -> dict[str, Tensor]:
    """An export's weights by the draft's names.

    Raises:
        ValueError: one is missing. The message names the folder.
    """
    try:
        return form.tensors_here(tensors, config)
    except ValueError as error:
        raise ValueError(f"{str(folder)!r}: {error}. Export it again.") from error


def own_keys(
    form: LayoutForm, folder: str | Path, keys: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What an export says about the draft besides its geometry, as fields of the draft's config.

    Raises:
        ValueError: the export has settings that this draft cannot have. The message names the folder.
    """
    try:
        return form.config_keys(keys, tensors)
    except ValueError as error:
        raise ValueError(f"{str(folder)!r}: {error}. Name another draft.") from error


def check_complete(
    algorithm: DraftAlgorithm, state: Mapping[str, Tensor], config: LlamaConfig, vocabulary: VocabularyMap
) -> None:
    """Check that weights, config and vocabulary belong to one draft.

    Args:
        state: whole weights, by the draft's names.

    Raises:
        ValueError: `state` lacks a tensor, has an unknown one or one of another shape, or the vocabulary map
            has other sizes than the config.
    """
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in algorithm.build(config).state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = [
        f"{name} {found.get(name, 'absent')} instead of {shape}"
        for name, shape in wanted.items()
        if found.get(name) != shape
    ]
    wrong += [f"{name} is unknown" for name in found if name not in wanted]
    if wrong:
        raise ValueError(
            f"these weights are not the draft of this config: {'; '.join(wrong)}. Use weights of the same "
            "recipe."
        )
    if len(vocabulary.d2t) != config.draft_vocab_size or len(vocabulary.t2d) != config.vocab_size:
        raise ValueError(
            f"the vocabulary map is {len(vocabulary.d2t)} of {len(vocabulary.t2d)} tokens, the draft's "
            f"config {config.draft_vocab_size} of {config.vocab_size}. Use the map the draft was trained "
            "with."
        )


def write_folder(
    folder: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    mask_token_id: int | None = None,
) -> Path:
    """Write config and weights under a hidden name, then rename: `folder` appears complete or not at all. A
    mask embedding, of the id `mask_token_id`, gets its own file.

    Raises:
        ValueError: the folder exists already.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(
            f"the export folder {str(folder)!r} exists and is not replaced. Remove it or name another one."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        aside.chmod(0o755)
        (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        weights = {name: tensor.contiguous() for name, tensor in tensors.items()}
        mask = weights.pop(MASK_EMBEDDING, None)
        if mask is not None:
            torch.save({"embedding": mask.clone(), "mask_token_id": mask_token_id}, aside / MASK_FILE)
        save_file(weights, aside / WEIGHTS, {"format": "pt"})
        (aside / WEIGHTS).chmod(0o644)  # safetensors makes it readable by its owner; servers run as others
        os.rename(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return folder


def read_folder(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config.json and all tensors of an export, whole, on the CPU.

    Raises:
        ValueError: one of the two files is missing.
    """
    for name in (CONFIG, WEIGHTS):
        if not (Path(folder) / name).is_file():
            raise ValueError(
                f"{str(folder)!r} holds no {name}: it is not an exported draft. Name the folder of an export."
            )
    tensors = load_file(Path(folder) / WEIGHTS)
    if (Path(folder) / MASK_FILE).is_file():
        # Others write the tensor alone; `weights_only` reads nothing but tensors and plain values.
        stored = torch.load(Path(folder) / MASK_FILE, map_location="cpu", weights_only=True)
        tensors[MASK_EMBEDDING] = (stored["embedding"] if isinstance(stored, dict) else stored).reshape(-1)
    return json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8")), tensors


def cast(state: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The tensors of `state` on the CPU and in `dtype`, of the same shapes."""
    return {name: tensor.detach().to("cpu", getattr(torch, dtype)) for name, tensor in state.items()}
