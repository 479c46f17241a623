"""The sizes of a DFlash draft, and its parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eagle3_ds.attention.rotary import rotated_channels
from eagle3_ds.costs import DraftShape
from eagle3_ds.draft.geometry import aux_size, has_own_embedding, target_hidden_size


@dataclass(frozen=True)
class DFlashShape(DraftShape):
    """Sizes of a DFlash draft.

    Attributes:
        aux_size: entries of a slot's captured hidden states, which `fc` reads.
        own_mask: whether it has a mask embedding of its own.
    """

    aux_size: int = 0
    own_mask: bool = False

    @classmethod
    def of(cls, config: Any) -> DFlashShape:
        """From the draft's transformers config (`build_dflash_config`)."""
        rotated = rotated_channels(config)
        return cls(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            draft_vocab_size=config.draft_vocab_size,
            num_layers=config.num_hidden_layers,
            target_size=target_hidden_size(config) if has_own_embedding(config) else None,
            rotated_size=None if rotated == config.head_dim else rotated,
            aux_size=aux_size(config),
            own_mask=config.mask_embedding,
        )

    def layer_weights(self, layer: int) -> dict[str, int]:
        """Parameters of each matrix of a layer; all layers are alike."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "q": self.query_size * hidden,
            "k": self.kv_size * hidden,
            "v": self.kv_size * hidden,
            "o": hidden * self.query_size,
            "gate": inner * hidden,
            "up": inner * hidden,
            "down": hidden * inner,
        }

    @property
    def parameter_sizes(self) -> tuple[int, ...]:
        """Elements of every trained tensor: the mask embedding, fc and its norm, layers, final norm, head."""
        hidden = self.hidden_size
        sizes = [hidden] if self.own_mask else []
        sizes += [self.aux_size * hidden, hidden]
        for layer in range(self.num_layers):
            sizes += [*self.layer_weights(layer).values(), self.head_dim, self.head_dim, hidden, hidden]
        return (*sizes, hidden, self.draft_vocab_size * hidden)

    @property
    def live_slots_alone(self) -> bool:
        """True: a slot that is no anchor gives the keys and values of all layers, which need no layer."""
        return True
