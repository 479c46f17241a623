"""The layout that vLLM and SGLang load: the first layer is called `midlayer`, the token map goes along as
`d2t` and `t2d`.

The embedding is left out: both servers share the target's, which is what the draft was trained with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from transformers import LlamaConfig

from eagle3_ds.draft import VocabularyMap
from eagle3_ds.export.folder import cast, check_complete, draft_config, geometry, read_folder, write_folder

ARCHITECTURE = "LlamaForCausalLMEagle3"
FIRST_HERE, FIRST_THERE = "layers.0.", "midlayer."
AUX_LAYERS = "eagle_aux_hidden_state_layer_ids"


def export_vllm(
    model_state: Mapping[str, Tensor],
    config: LlamaConfig,
    vocabulary: VocabularyMap,
    folder: str | Path,
    dtype: str = "bfloat16",
    max_position: int | None = None,
    aux_layers: Sequence[int] | None = None,
) -> Path:
    """Write the draft in the vLLM / SGLang layout.

    Args:
        model_state: the draft's weights, in our names.
        config: the draft's, from `build_draft_config`.
        dtype: name of the dtype of the stored weights.
        max_position: length the draft is to be served at, if longer than its config's.
        aux_layers: only when they are not the rule's (2, n // 2, n - 3): the servers know the rule.

    Raises:
        ValueError: weights, config and vocabulary do not belong together, or the folder exists.
    """
    check_complete(model_state, config, vocabulary)
    keys = geometry(config, max_position) | {
        "architectures": [ARCHITECTURE],
        "draft_vocab_size": config.draft_vocab_size,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if aux_layers is not None:
        keys[AUX_LAYERS] = list(aux_layers)
        # vLLM counts the layer whose input is taken, as we do; SGLang the one whose output is taken, one less
        keys["eagle_config"] = {"use_aux_hidden_state": True, AUX_LAYERS: [layer - 1 for layer in aux_layers]}
    return write_folder(folder, keys, vllm_tensors(model_state, vocabulary, dtype))


def vllm_tensors(
    model_state: Mapping[str, Tensor], vocabulary: VocabularyMap, dtype: str = "bfloat16"
) -> dict[str, Tensor]:
    """The draft's weights under the names that vLLM and SGLang load, on the CPU: what a running server is
    handed.
    """
    tensors = {_there(name): tensor for name, tensor in cast(model_state, dtype).items()}
    return tensors | {"d2t": vocabulary.d2t.cpu(), "t2d": vocabulary.t2d.cpu()}


def load_vllm(folder: str | Path) -> tuple[LlamaConfig, dict[str, Tensor], VocabularyMap]:
    """The config, the weights in our names, and the vocabulary map of an export.

    Raises:
        ValueError: not such an export, or one that is incomplete.
    """
    keys, tensors = read_folder(folder)
    if keys.get("architectures") != [ARCHITECTURE] or not {"d2t", "t2d"} <= tensors.keys():
        raise ValueError(
            f"{str(folder)!r} is no draft in the vLLM layout: architectures is {keys.get('architectures')}, "
            f"expected [{ARCHITECTURE!r}], with the tensors d2t and t2d. Name the folder of such an export."
        )
    vocabulary = VocabularyMap(tensors.pop("d2t"), tensors.pop("t2d"))
    config = draft_config(keys, keys["draft_vocab_size"])
    state = {_here(name): tensor for name, tensor in tensors.items()}
    check_complete(state, config, vocabulary)
    return config, state, vocabulary


def _there(name: str) -> str:
    return FIRST_THERE + name.removeprefix(FIRST_HERE) if name.startswith(FIRST_HERE) else name


def _here(name: str) -> str:
    return FIRST_HERE + name.removeprefix(FIRST_THERE) if name.startswith(FIRST_THERE) else name
