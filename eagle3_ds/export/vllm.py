"""The layout that vLLM and SGLang load: the first layer is called `midlayer`, and the tensors `d2t` and `t2d`
map between the draft's and the target's vocabulary, where these differ.

EAGLE-3's embedding is left out: both servers share the target's, which is what the draft was trained with. A
draft of another hidden size than the target's brings its own, and so does one that has learned rows of it.

The two servers count captured layers differently, and each reads its own key (docs/targets.md): vLLM the one
at the top, the layers whose inputs are taken; SGLang the one in `eagle_config`, the layers whose outputs are.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from transformers import LlamaConfig

from eagle3_ds.algorithms import ALGORITHMS
from eagle3_ds.algorithms.eagle3.exported import AUX_LAYERS
from eagle3_ds.draft import VOCABULARY, VocabularyMap, target_hidden_size
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

# The first id by which the SGLang of May 2026 tells that ids name outputs, for DeepSeek-like targets.
OUTPUTS_BEGIN = 1
logger = logging.getLogger(__name__)


def export_vllm(
    model_state: Mapping[str, Tensor],
    config: LlamaConfig,
    vocabulary: VocabularyMap,
    folder: str | Path,
    dtype: str = "bfloat16",
    max_position: int | None = None,
    aux_layers: Sequence[int] | None = None,
    algorithm: str = "eagle3",
    embedding: Tensor | None = None,
) -> Path:
    """Write the draft in the layout of vLLM and SGLang; returns the folder.

    Args:
        model_state: the draft's weights, in our names.
        config: the draft's.
        dtype: name of the dtype of the stored weights.
        max_position: length the draft is to be served at, if longer than its config's.
        aux_layers: the layers whose inputs the draft takes; only when they are not the rule's
            (2, n // 2, n - 3): the servers know the rule.
        algorithm: the draft's, as the recipe calls it.
        embedding: [V, H], what the draft was given in training, for one that brings it
            (`LayoutForm.brings_embedding`); None for others.

    Raises:
        ValueError: weights, config, vocabulary and embedding do not belong together, or the folder exists.
    """
    form = ALGORITHMS[algorithm].layouts["vllm"]
    check_complete(ALGORITHMS[algorithm], model_state, config, vocabulary)
    _check_brought(form.brings_embedding(config), embedding, config)
    layer_keys = form.layer_keys(config, aux_layers)
    keys = geometry(config, max_position) | {
        **form.decoder_keys(config),
        "architectures": [form.architecture],
        "draft_vocab_size": config.draft_vocab_size,
        "dtype": dtype,
        "torch_dtype": dtype,
        **form.keys(config),
        **layer_keys,
    }
    if aux_layers is not None and layer_keys:
        tell_layers(aux_layers)
    tensors = cast(form.tensors_there(model_state, config, embedding), dtype) | vocabulary.exported()
    return write_folder(folder, keys, tensors, getattr(config, "mask_token_id", None))


def _check_brought(brings: bool, embedding: Tensor | None, config: LlamaConfig) -> None:
    """Raises ValueError unless there is an embedding exactly where the draft's export holds one."""
    if brings != (embedding is not None):
        raise ValueError(
            f"the draft's hidden size is {config.hidden_size}, the target's {target_hidden_size(config)}: a "
            "draft brings an embedding of its own where they differ or where it has learned rows of it, and "
            "only there. " + ("Give it." if embedding is None else "Leave it out.")
        )
    if embedding is not None:
        check_embedding(embedding, config)


def sglang_layers(aux_layers: Sequence[int]) -> list[int]:
    """The layers whose outputs are the inputs of `aux_layers`: SGLang's ids of the same states."""
    return [layer - 1 for layer in aux_layers]


def tell_layers(aux_layers: Sequence[int]) -> None:
    """Say which ids each server reads; a warning where SGLang's own versions disagree about them."""
    inputs, outputs = list(aux_layers), sglang_layers(aux_layers)
    logger.info(
        "export: the draft takes the inputs of layers %s; vLLM reads them so (%s), SGLang as outputs "
        "of layers %s (eagle_config)",
        inputs,
        AUX_LAYERS,
        outputs,
    )
    note = sglang_note(aux_layers)
    if note is not None:
        logger.warning("export: %s", note)


def sglang_note(aux_layers: Sequence[int]) -> str | None:
    """What a user of SGLang must know of a draft of these layers; None where all its versions agree."""
    inputs, outputs = list(aux_layers), sglang_layers(aux_layers)
    if outputs[0] < 0:
        return "layer 0 has no layer before it, whose output SGLang could take: serve this draft by vLLM"
    if outputs[0] == OUTPUTS_BEGIN:
        return None
    remedy = f"add --json-model-override-args '{sglang_override(inputs)}'"
    if inputs[0] == OUTPUTS_BEGIN:
        remedy = "serve this draft by vLLM: no ids mean these layers there"
    return (
        "for DeepSeek-like targets (DeepSeek, Kimi, GLM-4.7-Flash) SGLang from May 2026 on reads "
        f"ids that do not begin with {OUTPUTS_BEGIN} as inputs; there, {remedy}"
    )


def sglang_override(ids: Sequence[int]) -> str:
    """The value of SGLang's `--json-model-override-args` that has it read these ids."""
    return json.dumps({"eagle_config": {"use_aux_hidden_state": True, AUX_LAYERS: list(ids)}})


def vllm_tensors(
    model_state: Mapping[str, Tensor],
    vocabulary: VocabularyMap,
    dtype: str = "bfloat16",
    algorithm: str = "eagle3",
    config: LlamaConfig | None = None,
    embedding: Tensor | None = None,
) -> dict[str, Tensor]:
    """The draft's weights, cast to `dtype`, and its vocabulary map under the names that vLLM and SGLang load,
    for example to update a running server.

    Args:
        model_state: the draft's whole weights, by its own names.
        config, embedding: the draft's, and what it is given in training, as in `export_vllm`; for drafts that
            bring an embedding, which are not EAGLE-3's of the target's width.

    Returns:
        Tensors on the CPU.

    Raises:
        ValueError: the draft brings an embedding, and none is given.
    """
    form = ALGORITHMS[algorithm].layouts["vllm"]
    if embedding is None and (
        algorithm != "eagle3" or (config is not None and form.brings_embedding(config))
    ):
        raise ValueError(
            f"a {algorithm} draft is served with an embedding of its own: give its config and the embedding "
            "that it was trained with"
        )
    shape = config or LlamaConfig()
    return cast(form.tensors_there(model_state, shape, embedding), dtype) | vocabulary.exported()


def load_vllm(folder: str | Path) -> tuple[LlamaConfig, dict[str, Tensor], VocabularyMap]:
    """The config of an export, its whole weights by the draft's names, and its vocabulary map, on the CPU.
    `load_embedding` reads the embedding of a draft that has its own.

    Raises:
        ValueError: the folder is no export in this layout, or it is incomplete.
    """
    keys, tensors = read_folder(folder)
    algorithm = algorithm_of_layout("vllm", keys)
    vocabulary = VocabularyMap.of_export(tensors, keys.get("draft_vocab_size", 0), keys.get("vocab_size", -1))
    if algorithm is None or vocabulary is None:
        known = [a.layouts["vllm"].architecture for a in ALGORITHMS.values()]
        raise ValueError(
            f"{str(folder)!r} is no draft in the vLLM layout: architectures is {keys.get('architectures')}, "
            f"expected {known}, with the tensors d2t and t2d unless the draft has the "
            "target's whole vocabulary. Name the folder of such an export."
        )
    tensors = {name: tensor for name, tensor in tensors.items() if name not in VOCABULARY}
    form = algorithm.layouts["vllm"]
    config = draft_config(keys, keys["draft_vocab_size"], own_keys(form, folder, keys, tensors))
    if form.brings_embedding(config):
        if EMBEDDING not in tensors:
            raise ValueError(
                f"{str(folder)!r} is a draft with an embedding of its own and has no {EMBEDDING}. "
                "Export it again."
            )
        check_embedding(tensors[EMBEDDING], config)
    elif EMBEDDING in tensors:
        raise ValueError(
            f"{str(folder)!r} is a draft that shares its target's embedding and has {EMBEDDING} too. Remove "
            "the tensor, or name another draft."
        )
    state = tensors_here(form, folder, tensors, config)
    check_complete(algorithm, state, config, vocabulary)
    return config, state, vocabulary
