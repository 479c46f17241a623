"""What follows a target's last layer, loaded without the rest: for hidden states that others computed.

Legend: n rows, V vocabulary and Ht hidden size of the target.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from eagle3_ds.targets.capture import teacher_tokens
from eagle3_ds.targets.weights import load_embedding_and_head, weight_files


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
    """Load the target's final norm and head, and no other weights.

    Raises:
        ValueError: the norm or the head is not found.
    """
    with torch.device("meta"):
        norm = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False).model.norm
    files = weight_files(folder)
    names = {name.removeprefix("model.norm."): name for name in files if name.startswith("model.norm.")}
    if set(names) != set(norm.state_dict()):
        raise ValueError(
            f"{folder} has no weights {', '.join(f'model.norm.{name}' for name in norm.state_dict())}"
        )
    weights = {}
    for key, name in names.items():
        with safe_open(files[name], framework="pt") as file:
            weights[key] = file.get_tensor(name).to(dtype)
    norm.load_state_dict(weights, assign=True)
    return TargetEnd(norm.to(device), load_embedding_and_head(folder, dtype)[1].to(device))
