"""Finding and loading the frozen target."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from eagle3_ds.config import TargetSection
from eagle3_ds.targets.families import check_supported
from eagle3_ds.targets.structure import (
    check_logits,
    check_modules,
    find_decoder,
    fold_factor,
    logits_factor,
)
from eagle3_ds.targets.weights import load_full_config, load_text_config, weight_files

FEWEST_LAYERS = 7
"""The smallest n for which 2, n // 2 and n - 3 are three different layers."""
SAMPLE_BYTES = 2**20
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model")


@dataclass(frozen=True)
class Target:
    """A frozen causal LM in eval mode. `config` is its text config."""

    model: Any
    tokenizer: Any
    config: Any
    aux_layers: tuple[int, ...]
    logits_factor: float = 1.0

    @property
    def base(self) -> Any:
        """The decoder without its head; of a vision-language model the language model alone."""
        return find_decoder(self.model)

    @property
    def embedding(self) -> Tensor:
        """The token embedding [V, H], on the model's device."""
        return self.model.get_input_embeddings().weight

    @cached_property
    def head(self) -> Tensor:
        """The head [V, H], on the model's device, such that head x hidden state is the model's logits: times
        `logits_factor`, in a tensor of its own where that is not 1. Made once: the target is frozen.
        """
        return fold_factor(self.model.get_output_embeddings().weight, self.logits_factor)

    @property
    def device(self) -> torch.device:
        return self.embedding.device


def load_target(
    section: TargetSection, dtype: str | None = None, device: torch.device | str = "cpu"
) -> Target:
    """Load the whole target, frozen and in eval mode. Not collective.

    Args:
        dtype: name of a torch dtype; None takes `section.dtype`.

    Raises:
        ValueError: a missing folder, one that is no Hugging Face model, an unsupported family, too few
            layers, modules that are not where a capture looks, a head with a bias, logits that are no
            constant positive number times head x hidden state, or no tokenizer.
    """
    path = resolve_path(section.path, section.build is not None)
    config = load_text_config(path)
    check_supported(config, section.path)
    aux_layers = choose_aux_layers(config.num_hidden_layers, section.aux_layers)
    model, factor = load_model(path, section.path, dtype or section.dtype, device)
    return Target(model, load_tokenizer(section), config, aux_layers, factor)


def load_model(folder: Path, path: str, dtype: str, device: torch.device | str = "cpu") -> tuple[Any, float]:
    """The causal LM in `folder`, frozen and in eval mode, after its modules and logits were checked, and the
    factor of its logits. `path`: `target.path`, for messages.

    Raises:
        ValueError: as `load_target`, but for its config and tokenizer.
    """
    full_config = load_full_config(folder)
    config, factor = full_config.get_text_config(), logits_factor(full_config, path)
    weight_files(folder)  # for missing files its errors say more than those of transformers
    settings = {"dtype": getattr(torch, dtype), "trust_remote_code": False}
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), **settings)
    check_modules(model, config, path)
    model.requires_grad_(False).eval().to(device)
    check_logits(model, config, path, factor)
    return model, factor


def empty_target(section: TargetSection) -> Target:
    """The target with parameters and buffers on the meta device, for ranks that receive its weights from
    rank 0.

    Raises:
        ValueError: the folder is missing or holds no Hugging Face model, has too few layers, or no tokenizer.
    """
    path = resolve_path(section.path, section.build is not None)
    config = load_full_config(path)
    text_config = config.get_text_config()
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, section.dtype), trust_remote_code=False
        )
    model.requires_grad_(False).eval()
    return Target(
        model,
        load_tokenizer(section),
        text_config,
        choose_aux_layers(text_config.num_hidden_layers, section.aux_layers),
    )


def load_tokenizer(section: TargetSection) -> Any:
    """The target's tokenizer. Its weights are not loaded.

    Raises:
        ValueError: the folder is missing, or holds no tokenizer.
    """
    path = resolve_path(section.path, section.build is not None)
    try:
        return transformers.AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"target.path = {section.path!r} holds no tokenizer that transformers can load ({error}). Put "
            "the target's tokenizer files beside its weights."
        ) from error


def resolve_path(path: str, is_built: bool = False) -> Path:
    """The local folder of a target: `path` itself, or the downloaded snapshot of a hub name.

    Args:
        is_built: whether the recipe has `target.build`; the message for a missing folder then says how to
            build it.

    Raises:
        ValueError: there is neither such a folder nor such a model on the hub.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if is_built:
        raise ValueError(
            f"target.path = {path!r} is not built yet: `eagle3-ds prepare` with this recipe builds it."
        )
    # "output/target" has the form of a hub name too. If the folder `output` exists, a folder was meant.
    if not HUB_NAME.fullmatch(path) or folder.parent.is_dir():
        raise ValueError(
            f"target.path = {path!r} is not a folder: the target must exist before the run. Correct the "
            "path, or add target.build to have a small one built there."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=list(HUB_FILES)))
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"target.path = {path!r} is neither a folder here nor a model that could be fetched from the hub "
            f"({error}). Correct it, or download the model where there is a network and name its folder."
        ) from error


def choose_aux_layers(num_layers: int, wanted: Sequence[int] | None = None) -> tuple[int, ...]:
    """The layers whose inputs are captured: `wanted`, or without it those of the EAGLE-3 rule
    (2, n // 2, n - 3).

    Raises:
        ValueError: the target has too few layers for the rule, or `wanted` does not ascend or names layers
            that the target lacks.
    """
    if wanted is None:
        if num_layers < FEWEST_LAYERS:
            raise ValueError(
                f"the target has {num_layers} layers: the rule (2, n // 2, n - 3) gives three different ones "
                f"from {FEWEST_LAYERS} layers on. Choose a deeper target, or set target.aux_layers."
            )
        return (2, num_layers // 2, num_layers - 3)
    ascending = all(low < high for low, high in zip(wanted, wanted[1:], strict=False))
    # Servers collect the layers in ascending order and each once, whatever order the config names them in.
    if not wanted or not ascending or not 0 <= wanted[0] <= wanted[-1] < num_layers:
        raise ValueError(
            f"target.aux_layers = {list(wanted)}: they must ascend, each once, and lie in "
            f"0..{num_layers - 1}, the target's layers. Correct them, or leave them null."
        )
    return tuple(wanted)


def target_fingerprint(path: str | Path, aux_layers: Sequence[int], dtype: str) -> dict[str, str]:
    """What captured hidden states depend on: digests of weights and tokenizer, the aux layers, the dtype.

    The digest of the weights covers the config, the files' names and sizes, their safetensors headers and
    3 MiB of each: it takes seconds for a target of hundreds of GB.

    Raises:
        ValueError: the folder is missing, or holds no safetensors weights.
    """
    folder = resolve_path(str(path))
    weights = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(set(weight_files(folder).values())):
        weights.update(f"{file.name} {file.stat().st_size}\n".encode())
        for piece in _sample(file):
            weights.update(piece)
    tokenizer = hashlib.sha256()
    for pattern in (
        "tokenizer*",
        "vocab*",
        "merges.txt",
        "special_tokens_map.json",
        "added_tokens.json",
        "*.jinja",
    ):
        for file in sorted(folder.glob(pattern)):
            tokenizer.update(f"{file.name} {file.stat().st_size}\n".encode())
            tokenizer.update(file.read_bytes())
    return {
        "target_weights": weights.hexdigest(),
        "tokenizer": tokenizer.hexdigest(),
        "aux_layers": ",".join(str(layer) for layer in aux_layers),
        "target_dtype": dtype,
    }


def _sample(file: Path) -> Iterable[bytes]:
    """The header of a safetensors file, then up to `SAMPLE_BYTES` from start, middle and end of its data."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
        yield stream.read(header)
        for start in (8 + header, (8 + header + size) // 2, size - SAMPLE_BYTES):
            stream.seek(max(8 + header, start))
            yield stream.read(SAMPLE_BYTES)
