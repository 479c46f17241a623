"""What follows a target's last layer, loaded without the rest: for hidden states that others computed.

Legend: n rows, V vocabulary and Ht hidden size of the target.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from eagle3_ds.targets.capture import teacher_tokens
from eagle3_ds.targets.structure import build_empty, find_decoder
from eagle3_ds.targets.weights import (
    OTHER_PARTS,
    check_weight_names,
    load_embedding_and_head,
    load_text_config,
    weight_files,
)


@dataclass(frozen=True)
class TargetEnd:
    """The part of the target that follows its last layer: the final norm and the head [V, Ht], whole."""

    norm: nn.Module
    head: Tensor

    @torch.no_grad()
    def finish(self, last: Tensor, is_normed: bool) -> tuple[Tensor, Tensor]:
        """Turn last hidden states [n, Ht], before or after the norm, into teacher [n, Ht] after it, and the
        target's tokens int64 [n].
        """
        last = last.to(self.head.device, self.head.dtype)
        teacher = last if is_normed else self.norm(last)
        return teacher, teacher_tokens(teacher, self.head)


def load_target_end(
    folder: Path, config: Any, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> TargetEnd:
    """Load the target's final norm and head, and no other weights; the rest may be quantized.

    Args:
        config: the target's text config.

    Raises:
        ValueError: the norm or the head is not found.
    """
    norm, names = _find_norm(folder, config)
    files = weight_files(folder)
    weights = {}
    for key, name in names.items():
        with safe_open(files[name], framework="pt") as file:
            weights[key] = file.get_tensor(name).to(dtype)
    norm.load_state_dict(weights, assign=True)
    return TargetEnd(norm.to(device), load_embedding_and_head(folder, dtype)[1].to(device))


def check_target_end(folder: Path) -> None:
    """Raises ValueError when `load_target_end` would. Reads the names and sizes of weights alone."""
    _find_norm(folder, load_text_config(folder))
    check_weight_names(folder)


def _find_norm(folder: Path, config: Any) -> tuple[nn.Module, dict[str, str]]:
    """The final norm without its weights, of the class that the family has, and {key: name in the files}.

    It is the part of the decoder beside its layers whose weights are all as long as a hidden state; families
    call it norm, final_layernorm, norm_f, ln_f.
    """
    decoder = find_decoder(build_empty(config, str(folder)))
    children = list(decoder.named_children())
    behind = [name for name, _ in children].index("layers") if hasattr(decoder, "layers") else 0
    for child, module in children[behind:]:
        own = module.state_dict()
        if not own or any(tuple(tensor.shape) != (config.hidden_size,) for tensor in own.values()):
            continue
        names = {key: _named_in(folder, f"{child}.{key}") for key in own}
        return module, names
    has = ", ".join(name for name, _ in children)
    raise ValueError(
        f"target.path = {str(folder)!r}: no final norm of {config.hidden_size} weights follows the layers of "
        f"{type(decoder).__name__}, which has {has}. Let this program run the target: "
        "target.capture single or parallel."
    )


def _named_in(folder: Path, ending: str) -> str:
    """The one name in the target's files that ends so, those within layers and other parts left aside."""
    own = [name for name in weight_files(folder) if not OTHER_PARTS.search(name)]
    found = [name for name in own if name == ending or name.endswith(f".{ending}")]
    if len(found) != 1:
        told = f"several, {', '.join(sorted(found))}" if found else "none"
        raise ValueError(
            f"target.path = {str(folder)!r} must have one tensor whose name ends in {ending}, of its final "
            f"norm, and has {told}. Save its language model by save_pretrained, and name that."
        )
    return found[0]
