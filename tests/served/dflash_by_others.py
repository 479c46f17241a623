"""The DFlash loss of speculators or SpecForge and its gradients, of weights and rows that are given.

Runs in the environment of `make_environment.sh`: `python dflash_by_others.py PACKAGE CASE RESULT`, both files
of torch.save. CASE is {"weights", "config" (keys of a Qwen3 config), "block_size", "mask_token_id", "anchors"
(positions of their tokens in the pack), "tokens", "mask", "lengths", "aux", "hidden" (rows before the final
norm), "norm" (its weight), "embedding", "head", "decay"}. RESULT is {"loss", "gradients"}, by the names of
docs/dflash.md. Anchors are drawn by chance in both packages; here those of the case take their place.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config

HEAD = "lm_head.weight"


def by_speculators(case: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and the parameters, of its own training model."""
    from speculators.losses import eager
    from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig, core

    layer = Qwen3Config(**case["config"])
    layer._attn_implementation = "eager"
    width = layer.hidden_size
    config = DFlashSpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=layer.vocab_size,
        block_size=case["block_size"],
        mask_token_id=case["mask_token_id"],
        aux_hidden_state_layer_ids=list(range(1, 1 + case["aux"].shape[1] // width)),
    )
    model = DFlashDraftModel(config).double().train()
    found = model.load_state_dict(
        {
            **case["weights"],
            "embed_tokens.weight": case["embedding"],
            "verifier_lm_head.weight": case["head"],
            "verifier_norm.weight": case["norm"],
        }
    )
    assert not found.missing_keys and not found.unexpected_keys, found
    model.lm_head.weight.requires_grad_(True)
    anchors = case["anchors"]
    core.select_anchors = lambda *_: (anchors, torch.ones(len(anchors), dtype=torch.bool))
    lengths = case["lengths"]
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    _, loss, _ = model(
        hidden_states=case["aux"][None],
        input_ids=case["tokens"][None],
        loss_mask=case["mask"][None],
        verifier_last_hidden_states=case["hidden"][None],
        document_ids=documents[None],
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        loss_config={"kl_div": (eager.kl_div_loss, 1.0)},
        gamma=-1 / math.log(case["decay"]),
        max_anchors=len(anchors),
    )
    return loss, dict(model.named_parameters())


def by_specforge(case: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and the parameters, of its own training model; the pack is one document."""
    from specforge.algorithms.common.dflash_family_model import OnlineDFlashModel
    from specforge.modeling.draft.dflash import DFlashDraftModel

    config = Qwen3Config(**case["config"])
    config._attn_implementation = "eager"
    config.block_size, config.num_target_layers = case["block_size"], 8
    layers = list(range(case["aux"].shape[1] // config.hidden_size))
    config.dflash_config = {"mask_token_id": case["mask_token_id"], "target_layer_ids": layers}
    draft = DFlashDraftModel(config).double().train()
    draft.load_state_dict({name: w for name, w in case["weights"].items() if name != HEAD})
    vocabulary, width = case["weights"][HEAD].shape
    head = torch.nn.Linear(width, vocabulary, bias=False, dtype=torch.float64)
    head.weight.data.copy_(case["weights"][HEAD])
    embedding = torch.nn.Embedding.from_pretrained(case["embedding"])
    model = OnlineDFlashModel(
        draft,
        head,
        embedding,
        case["mask_token_id"],
        case["block_size"],
        attention_backend="eager",
        loss_decay_gamma=-1 / math.log(case["decay"]),
    )
    anchors = case["anchors"]
    model._sample_anchor_positions = lambda *_: (anchors[None], torch.ones(1, len(anchors)).bool())
    loss, _, _ = model(case["tokens"][None], case["aux"][None], case["mask"][None].double())
    return loss, {**dict(draft.named_parameters()), HEAD: head.weight}


def main(words: list[str]) -> None:
    """Compute and write."""
    package, case_file, result_file = words
    case = torch.load(case_file)
    loss, parameters = {"speculators": by_speculators, "specforge": by_specforge}[package](case)
    loss.backward()
    gradients = {name: parameters[name].grad for name in case["weights"]}
    torch.save({"loss": loss.item(), "gradients": gradients}, result_file)


if __name__ == "__main__":
    main(sys.argv[1:])
