"""One training pass of speculators' own P-EAGLE: its loss, its gradients, and which guesses it drew.

Runs in the environment of `make_environment.sh`: `python peagle_by_speculators.py DRAFT ROWS RESULT`. DRAFT
is an export in its layout; ROWS are safetensors of one document: `tokens` int64 [n], `mask` bool [n], `aux`
[n, A], `last` [n, H], the target's hidden states before its last norm. The batch is shifted by its own
function, the guesses are drawn by its own sampling. RESULT are safetensors: `loss`, `slots` and `guesses`
int64 [pairs], and the gradients by name.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from speculators.losses import resolve_loss_config
from speculators.models.eagle3.data import shift_batch
from speculators.models.peagle import PEagleSpeculatorConfig, core


def main(draft: str, rows_file: str, result_file: str) -> None:
    """Load, run forward and backward, write."""
    rows = load_file(rows_file)
    config = PEagleSpeculatorConfig.from_pretrained(draft)
    config.transformer_layer_config._attn_implementation = "eager"
    model = core.PEagleDraftModel(config)
    tensors = load_file(f"{draft}/model.safetensors")
    model.load_vocab_mappings(tensors.pop("t2d"), tensors.pop("d2t"))
    missing = model.load_state_dict(tensors, strict=False)
    assert not missing.unexpected_keys, missing
    model.load_verifier_weights()
    model.float()
    length = len(rows["tokens"])
    batch = shift_batch(
        {
            "input_ids": rows["tokens"],
            "hidden_states": rows["aux"],
            "verifier_last_hidden_states": rows["last"],
            "loss_mask": rows["mask"].long(),
            "lengths": torch.tensor([length]),
            "position_ids": torch.arange(length),
        }
    )
    drawn = []
    sample = core.generate_cod_sample_indices

    def watched(**named: Any) -> Any:
        drawn.append(sample(**named))
        return drawn[-1]

    core.generate_cod_sample_indices = watched
    torch.manual_seed(0)
    _, loss, _ = model(
        hidden_states=batch["hidden_states"][None],
        input_ids=batch["input_ids"][None],
        document_ids=torch.zeros(1, length - 1, dtype=torch.long),
        loss_mask=batch["loss_mask"][None],
        verifier_last_hidden_states=batch["verifier_last_hidden_states"][None],
        loss_config=resolve_loss_config("kl_div", "eager"),
        num_depths=5,
    )
    loss.backward()
    gradients = {n: p.grad.contiguous() for n, p in model.named_parameters() if p.grad is not None}
    slots, guesses = drawn[0]
    save_file(
        {"loss": loss.detach().reshape(1), "slots": slots, "guesses": guesses, **gradients}, result_file
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
