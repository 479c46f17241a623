"""A checkpoint in four bits, in GPTQ's form: what servers read of many published targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

BITS, GROUP = 4, 32
"""Bits of a weight; weights of a row that share a scale."""
PER_WORD = 32 // BITS
ZERO = 2 ** (BITS - 1)


def quantize_body(model: Any, folder: Path) -> None:
    """Round every matrix of the body to sixteen values a group, symmetric about zero, in the model itself,
    and write them to `folder` as a checkpoint of four bits. Embedding, norms and head stay as they are.
    """
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            del state[f"{name}.weight"]
            state |= {f"{name}.{key}": tensor for key, tensor in _quantized(module).items()}
    for file in folder.glob("*.safetensors"):
        file.unlink()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    form = {"quant_method": "gptq", "bits": BITS, "group_size": GROUP, "desc_act": False, "sym": True}
    config["quantization_config"] = {**form, "checkpoint_format": "gptq", "lm_head": False}
    (folder / "config.json").write_text(json.dumps(config))


@torch.no_grad()
def _quantized(module: nn.Linear) -> dict[str, Tensor]:
    """The tensors that stand for a matrix [out, in]; the module then holds the values that they mean."""
    rows, columns = module.weight.shape
    groups = module.weight.view(rows, columns // GROUP, GROUP)
    scales = (groups.abs().amax(-1) / (ZERO - 1)).half()
    values = (groups / scales.float()[..., None]).round().clamp(-ZERO, ZERO - 1)
    module.weight.copy_((values * scales.float()[..., None]).view(rows, columns))
    codes = (values + ZERO).long().view(rows, columns)
    # GPTQ stores a zero point less one.
    zeros = torch.full((columns // GROUP, rows), ZERO - 1)
    return {
        "qweight": _packed(codes.T, 0),
        "scales": scales.T.contiguous(),
        "qzeros": _packed(zeros, 1),
        "g_idx": (torch.arange(columns) // GROUP).int(),
    }


def _packed(codes: Tensor, dim: int) -> Tensor:
    """Eight neighbouring codes along `dim` in a 32-bit word each, the first in the lowest bits: int32."""
    words = codes.movedim(dim, -1).unflatten(-1, (-1, PER_WORD))
    packed = (words << torch.arange(PER_WORD) * BITS).sum(-1)
    signed = torch.where(packed >= 2**31, packed - 2**32, packed)
    return signed.int().movedim(-1, dim).contiguous()
