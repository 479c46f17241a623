"""The draft and its unroll over the TTT steps (EAGLE-3 paper, section 3; the semantics are in docs/semantics.md).

Legend: S slots of this rank, E rows of its extended buffers, K TTT steps, H hidden size, Ht the target's, V its vocabulary,
Vd the draft's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from eagle3_ds.attention import UnrollMemory
from eagle3_ds.layout import LocalBatch
from eagle3_ds.model.decoder import DraftCache, DraftLayer
from eagle3_ds.model.rope import rotary_angles


class DraftHead(nn.Linear):
    """The head over the draft vocabulary. A loss that needs its weight runs in here, because under ZeRO-3 the weight has
    size 0 outside of its own module's forward."""

    def forward(self, x: Any, loss: Callable[[Any, Tensor], Any] | None = None) -> Any:
        """Logits [S, Vd] of x [S, H]; or `loss(x, weight)`, with x whatever that loss takes."""
        return functional.linear(x, self.weight) if loss is None else loss(x, self.weight)


class DraftModel(nn.Module):
    """fc, the decoder layers, the final norm and the head over the draft vocabulary.

    The token embedding is the target's, frozen; it is handed in, not owned, so that it stays out of checkpoints, optimizer
    and ZeRO.
    """

    sp_ring_degree: int = 1
    sp_ulysses_degree: int = 1
    sp_world_size: int = 1
    sp_rank: int = 0

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(3 * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList(DraftLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = DraftHead(config.hidden_size, config.draft_vocab_size, bias=False)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)

    def unroll(self, batch: LocalBatch, embedding: Tensor, ttt_steps: int, recompute: bool) -> list[Tensor]:
        """The draft's output after each TTT step, K tensors [S, H], normed and ready for the head.

        Args:
            batch: this rank's slots; its tensors on the device of the model.
            embedding: [V, H], the target's.

        The attention layers must be patched (`patch_attention`).
        """
        hidden = self.fc(batch.aux.to(self.fc.weight.dtype))
        memories = [UnrollMemory(batch.plan, batch.ring_rank) for _ in self.layers]
        outputs = []
        for step in range(ttt_steps):
            cos, sin = rotary_angles(self.config, batch.position + step, batch.max_position + 1 + ttt_steps)
            tokens = batch.token_ids[batch.row + 1 + step]

            def embed(tokens: Tensor = tokens) -> Tensor:
                return functional.embedding(tokens, embedding)

            for layer, memory in zip(self.layers, memories, strict=True):
                assert isinstance(layer, DraftLayer)
                hidden = layer.unroll_step(embed, hidden, cos, sin, memory, recompute)
            outputs.append(self.norm(hidden))
        return outputs

    def project_aux(self, aux: Tensor) -> Tensor:
        """The step-0 hidden state: aux [S, 3 * Ht] -> [S, H]."""
        return self.fc(aux)

    @torch.no_grad()
    def decode(self, embeds: Tensor, hidden: Tensor, positions: Tensor, cache: DraftCache) -> Tensor:
        """Served: the S newest slots after those in the cache. embeds, hidden [S, H], positions int64 [S] -> [S, H]."""
        cos, sin = rotary_angles(self.config, positions, int(positions.max()) + 1)
        for layer in self.layers:
            hidden = layer(embeds, hidden, cos, sin, cache)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, H], before the final norm -> [S, Vd]."""
        return self.lm_head(self.norm(hidden))
