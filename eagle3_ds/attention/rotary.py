"""The rotary embedding (RoPE): angles from transformers' own rotary code, in fp32, and the rotation."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


class RotaryFrequencies(NamedTuple):
    """The angles of a rotary embedding.

    Attributes:
        frequencies: fp32 [R / 2], the angle per position of each pair of the R channels of a head that turn.
        factor: scales cos and sin (transformers' `attention_scaling`).
    """

    frequencies: Tensor
    factor: float

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, fp32 [S, R], of positions int64 [S]."""
        angles = positions[:, None].float() * self.frequencies
        cos, sin = angles.cos() * self.factor, angles.sin() * self.factor
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)


def rotary_length(config: LlamaConfig) -> int:
    """The longest sequence that a draft is made for, in tokens."""
    return int(getattr(config, "rotary_length", None) or config.max_position_embeddings)


def rotary_frequencies(config: LlamaConfig, device: torch.device) -> RotaryFrequencies:
    """The angles of the rotary embedding of `config`.

    Scalings that depend on a length (dynamic, longrope) take that of the config, `rotary_length` or else
    `max_position_embeddings`, as a server fixes it when it starts: not the longest document of a pack, which
    differs from pack to pack, and not the positions met so far, as transformers' module does.
    """
    longest, config = rotary_length(config), _turning_part(config)
    kind = config.rope_parameters["rope_type"]
    compute = (
        LlamaRotaryEmbedding.compute_default_rope_parameters
        if kind == "default"
        else ROPE_INIT_FUNCTIONS[kind]
    )
    frequencies, factor = compute(config, device=device, seq_len=longest)
    return RotaryFrequencies(frequencies.to(device).float(), float(factor))


def rotated_channels(config: LlamaConfig) -> int:
    """R: how many channels of a head turn, counted from its front; rounded as servers round."""
    return int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))


def _turning_part(config: LlamaConfig) -> LlamaConfig:
    """The config of heads that have only the channels that turn. transformers' default angles for Llama know
    no `partial_rotary_factor`, and would be those of the whole head.
    """
    part = copy.copy(config)
    part.head_dim = rotated_channels(config)
    part.rope_parameters = {**config.rope_parameters, "partial_rotary_factor": 1.0}
    return part


def rotate(x_SHD: Tensor, cos_SR: Tensor, sin_SR: Tensor) -> Tensor:
    """Rotary embedding in the half-split convention of Llama: x cos + (-x_2, x_1) sin for x = (x_1, x_2), the
    first R channels of a head. The other D - R channels stay as they are.

    x [S, heads, D], cos and sin fp32 [S, R] -> [S, heads, D] in the dtype of x, computed in fp32. Its
    backward is the transpose of a rotation: the same function with -sin.
    """
    num_turning = cos_SR.shape[-1]
    if num_turning < x_SHD.shape[-1]:
        front = rotate(x_SHD[..., :num_turning], cos_SR, sin_SR)
        return torch.cat((front, x_SHD[..., num_turning:]), dim=-1)
    x = x_SHD.to(torch.promote_types(cos_SR.dtype, x_SHD.dtype))
    turned = torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)
    return torch.addcmul(x * cos_SR[:, None], turned, sin_SR[:, None]).to(x_SHD.dtype)
