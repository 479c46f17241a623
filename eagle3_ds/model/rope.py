"""Rotary angles, from transformers' own rotary code, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


def rotary_angles(config: LlamaConfig, positions: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [S, head_dim], of int64 positions [S].

    Stateless on purpose: transformers' module lets dynamic scaling depend on the positions it has met, which would differ
    between sequence-parallel ranks. `longest` is the length of the longest document plus the TTT steps, the same everywhere.
    """
    kind = config.rope_parameters["rope_type"]
    compute = LlamaRotaryEmbedding.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
    frequencies, factor = compute(config, device=positions.device, seq_len=longest)
    angles = positions[:, None].float() * frequencies.to(positions.device).float()
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * factor, angles.sin() * factor
