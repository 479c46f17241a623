"""DFlash drafts for servers that nobody here wrote: weights by the names of docs/dflash.md, written as
checkpoints. The dense reference itself trains them for a few steps, so that some guesses are accepted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from judge.dense_reference import Frozen, LossRules, MicroBatch
from judge.dflash_reference import dflash_step

SIZE, LAYERS, AUX_LAYERS = 6, 2, (1, 2, 4, 5, 7)
TRAIN_STEPS = 45


@dataclass(frozen=True)
class DraftForm:
    """One draft and how it is served.

    Attributes:
        keys: of our config, over those of `draft_config`.
        dflash: keys of the checkpoint's `dflash_config`.
        speculators: in the speculators layout, with these keys of its own; None for vLLM's.
        vocabulary: draft vocabulary; None for the target's.
        own_mask: the draft has a mask embedding of its own.
        norms_differ: layers have different `k_norm`; else all have the first one's.
        own_head: the checkpoint has `lm_head`; else the target's is served.
        draft_tokens: what the server is asked for.
    """

    keys: dict[str, Any] = field(default_factory=dict)
    dflash: dict[str, Any] = field(default_factory=dict)
    speculators: dict[str, Any] | None = None
    vocabulary: int | None = None
    own_mask: bool = False
    norms_differ: bool = False
    own_head: bool = True
    draft_tokens: int = SIZE - 1


def draft_config(target: Any, **more: Any) -> LlamaConfig:
    """The config of a draft of a target: its width and heads, a block of `SIZE`."""
    config = LlamaConfig(
        vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rms_norm_eps=1e-6,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    settings = {"block_size": SIZE, "mask_token_id": 3, "block_causal": False, **more}
    for name, value in settings.items():
        setattr(config, name, value)
    return config


def random_weights(
    config: LlamaConfig, aux_size: int, vocabulary: int, own_mask: bool = False, norms_differ: bool = True
) -> dict[str, Tensor]:
    """fp32 weights of a draft that reads hidden states of `aux_size` entries."""
    generator = torch.Generator().manual_seed(4)
    H, wide, D = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * D, config.num_key_value_heads * D
    shapes: dict[str, tuple[int, ...]] = {"fc": (H, aux_size), "hidden_norm": (H,), "norm": (H,)}
    shapes["lm_head"] = (vocabulary, H)
    for layer in range(config.num_hidden_layers):
        of: dict[str, tuple[int, ...]] = {"input_layernorm": (H,), "post_attention_layernorm": (H,)}
        of |= {"self_attn.q_proj": (q, H), "self_attn.k_proj": (kv, H), "self_attn.v_proj": (kv, H)}
        of |= {"self_attn.o_proj": (H, q), "self_attn.q_norm": (D,), "self_attn.k_norm": (D,)}
        of |= {"mlp.gate_proj": (wide, H), "mlp.up_proj": (wide, H), "mlp.down_proj": (H, wide)}
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in of.items()}
    weights = {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=generator)
        weights[f"{name}.weight"] = 1 + 0.2 * drawn if len(shape) == 1 else drawn * shape[-1] ** -0.5
        if name.endswith("k_norm") and not norms_differ:
            weights[f"{name}.weight"] = weights["layers.0.self_attn.k_norm.weight"].clone()
    if own_mask:
        weights["mask_embedding"] = torch.randn(H, generator=generator)
    return weights


def trained(
    weights: dict[str, Tensor],
    config: LlamaConfig,
    frozen: Frozen,
    texts: list[MicroBatch],
    steps: int = TRAIN_STEPS,
    still: tuple[str, ...] = ("lm_head.weight", "k_norm.weight"),
) -> dict[str, Tensor]:
    """Adam by the reference's gradients, a third of the texts in each step; tensors whose names end with one
    of `still` stay.
    """
    masters = {name: torch.nn.Parameter(weight.clone()) for name, weight in weights.items()}
    moving = [p for name, p in masters.items() if not name.endswith(still)]
    optimizer = torch.optim.Adam(moving, lr=3e-3)
    for step in range(steps):
        current = {name: master.detach() for name, master in masters.items()}
        result = dflash_step(current, config, frozen, texts[step % 3 :: 3], LossRules(config.block_size - 1))
        for name, master in masters.items():
            master.grad = result.gradients[name]
        optimizer.step()
    return {name: master.detach() for name, master in masters.items()}


def write_draft(
    folder: Path, form: DraftForm, config: LlamaConfig, weights: dict[str, Tensor], d2t: Tensor | None
) -> None:
    """A checkpoint as servers read it."""
    folder.mkdir()
    shape = {
        "model_type": "qwen3",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "dtype": "float32",
    }
    for name in (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "rope_parameters"),
    ):
        shape[name] = getattr(config, name)
    vocabulary = len(weights["lm_head.weight"])
    if form.speculators is None:
        keys = shape | {"architectures": ["DFlashDraftModel"], "draft_vocab_size": vocabulary}
        keys["block_size"] = config.block_size
        of_others = [layer - 1 for layer in AUX_LAYERS]
        mask = {"mask_token_id": config.mask_token_id, "target_layer_ids": of_others}
        keys["dflash_config"] = mask | form.dflash
    else:
        method = {"proposal_type": "greedy", "speculative_tokens": form.draft_tokens}
        keys = {
            "architectures": ["DFlashDraftModel"],
            "speculators_model_type": "dflash",
            "draft_vocab_size": vocabulary,
            "block_size": config.block_size,
            "mask_token_id": config.mask_token_id,
            "aux_hidden_state_layer_ids": list(AUX_LAYERS),
            "transformer_layer_config": shape,
            "speculators_config": {
                "algorithm": "dflash",
                "default_proposal_method": "greedy",
                "proposal_methods": [method],
                "verifier": {"name_or_path": "a target", "architectures": []},
            },
            **form.speculators,
        }
    tensors = {name: tensor.contiguous() for name, tensor in weights.items() if name != "mask_embedding"}
    if not form.own_head:
        del tensors["lm_head.weight"]
    if d2t is not None:
        tensors["d2t"] = d2t
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(keys))
    if form.own_mask:
        mask_state = {"embedding": weights["mask_embedding"], "mask_token_id": config.mask_token_id}
        torch.save(mask_state, folder / "mask_embedding.pt")
