"""The layout of the speculators library: its config around the decoder's, our tensor names, and the target's
embedding.

As speculators 0.9 writes it: there is no `model_type`, which transformers would have to know, but an
`auto_map`; vLLM goes by `speculators_config`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from transformers import LlamaConfig

from eagle3_ds.algorithms import ALGORITHMS
from eagle3_ds.draft import VOCABULARY, VocabularyMap
from eagle3_ds.export.folder import (
    EMBEDDING,
    algorithm_of_layout,
    cast,
    check_complete,
    check_embedding,
    draft_config,
    geometry,
    own_keys,
    read_folder,
    tensors_here,
    write_folder,
)


def export_speculators(
    model_state: Mapping[str, Tensor],
    config: LlamaConfig,
    vocabulary: VocabularyMap,
    embedding: Tensor,
    folder: str | Path,
    verifier: str,
    verifier_architectures: Sequence[str],
    dtype: str = "bfloat16",
    max_position: int | None = None,
    aux_layers: Sequence[int] | None = None,
    draft_tokens: int = 5,
    algorithm: str = "eagle3",
) -> Path:
    """Write the draft in the speculators layout; returns the folder. The other arguments are those of
    `export_vllm`.

    Args:
        embedding: [V, H], the target's, or the draft's own if its hidden size is another.
        verifier: name or path of the target; servers fetch it from there. A folder here is written as an
            absolute path, a hub name as it is.
        verifier_architectures: as in the target's config.
        draft_tokens: tokens a server proposes at a time.
        The others as in `export_vllm`.

    Raises:
        ValueError: weights, config, vocabulary and embedding do not belong together, or the folder exists.
    """
    form = ALGORITHMS[algorithm].layouts["speculators"]
    check_complete(ALGORITHMS[algorithm], model_state, config, vocabulary)
    check_embedding(embedding, config)
    keys = {
        "architectures": [form.architecture],
        "speculators_model_type": algorithm,
        "draft_vocab_size": config.draft_vocab_size,
        **form.keys(config),
        "tie_word_embeddings": False,
        "dtype": dtype,
        "torch_dtype": dtype,
        "transformer_layer_config": geometry(config, max_position)
        | {**form.decoder_keys(config), "dtype": dtype, "torch_dtype": dtype},
        "speculators_config": {
            "algorithm": algorithm,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": draft_tokens}],
            "verifier": {
                "name_or_path": _whole_name(verifier),
                "architectures": list(verifier_architectures),
            },
        },
    }
    keys |= form.layer_keys(config, aux_layers)
    tensors = cast(form.tensors_there(model_state, config, embedding), dtype)
    return write_folder(folder, keys, tensors | vocabulary.exported(), getattr(config, "mask_token_id", None))


def load_speculators(folder: str | Path) -> tuple[LlamaConfig, dict[str, Tensor], VocabularyMap, Tensor]:
    """The config of an export, its whole weights by the draft's names, its vocabulary map, and its embedding
    [V, H], on the CPU.

    Raises:
        ValueError: the folder is no export in this layout, or it is incomplete.
    """
    keys, tensors = read_folder(folder)
    algorithm = algorithm_of_layout("speculators", keys)
    layer = keys.get("transformer_layer_config", {})
    vocabulary = VocabularyMap.of_export(
        tensors, keys.get("draft_vocab_size", 0), layer.get("vocab_size", -1)
    )
    if algorithm is None or vocabulary is None or EMBEDDING not in tensors:
        raise ValueError(
            f"{str(folder)!r} is no draft in the speculators layout: speculators_model_type is "
            f"{keys.get('speculators_model_type')!r}, expected one of {sorted(ALGORITHMS)}, with the "
            f"tensors {EMBEDDING} and, unless the draft has the whole vocabulary, d2t and t2d. Name the "
            "folder of such an export."
        )
    tensors = {name: tensor for name, tensor in tensors.items() if name not in VOCABULARY}
    form = algorithm.layouts["speculators"]
    own = own_keys(form, folder, keys, tensors)
    config = draft_config(layer, keys["draft_vocab_size"], own)
    check_embedding(tensors[EMBEDDING], config)
    state = tensors_here(form, folder, tensors, config)
    check_complete(algorithm, state, config, vocabulary)
    return config, state, vocabulary, tensors[EMBEDDING]


def _whole_name(verifier: str) -> str:
    """A name that loaders find from any working directory."""
    folder = Path(verifier).expanduser()
    return str(folder.resolve()) if folder.is_dir() else verifier
