"""A recipe as the planner counts it, with the target beside the draft where there is one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from eagle3_ds.attention.costs import choose_kv_exchange
from eagle3_ds.config import Recipe, load_deepspeed_config
from eagle3_ds.costs import DraftShape, Setup


def counted_setup(
    recipe: Recipe, shape: DraftShape, target: Any, draft_dp: int, supervised: float = 1.0
) -> Setup:
    """What a rank of the recipe's run holds and does.

    Args:
        shape: of the draft.
        target: its text config; read where the target is on the devices too, which is online and with
            `eval.during`.
        supervised: share of the tokens that are supervised.

    Raises:
        ValueError: the DeepSpeed JSON is refused.
    """
    setup = Setup.of(recipe, load_deepspeed_config(recipe.deepspeed), shape, draft_dp)
    setup = replace(setup, supervised=supervised)
    if recipe.data.hidden_states == "online":
        setup = replace(setup, target_bytes=weight_bytes(target, recipe.target.dtype))
    if recipe.eval.during:
        # Target and draft, both in the target's dtype.
        draft = shape.num_parameters * getattr(torch, recipe.target.dtype).itemsize
        decoder = weight_bytes(target, recipe.target.dtype)
        setup = replace(setup, decoder_bytes=decoder, decoder_draft_bytes=draft)
    if recipe.parallel.kv_exchange == "auto":
        setup = replace(setup, kv_exchange=choose_kv_exchange(setup))
    return setup


def weight_bytes(config: Any, dtype: str) -> int:
    """Bytes of the weights of the whole target, which is built from its config on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return sum(parameter.numel() for parameter in model.parameters()) * getattr(torch, dtype).itemsize
