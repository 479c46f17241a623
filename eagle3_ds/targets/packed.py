"""Running the target over one rank's spans of a packed sequence. The model's own code runs; only its
attention is replaced, through transformers' attention interface.

All layers but the attention work on each slot by itself, so a rank runs them on its own slots. The attention
function is registered without a mask function: transformers then builds no mask, and the span plan says which
slots each slot attends to.

Legend: S slots of this rank, Hq query heads, Hkv key/value heads, D head size, Ht hidden size, A layers * Ht.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from eagle3_ds.attention import PackedAttention
from eagle3_ds.targets.capture import AuxCapture
from eagle3_ds.targets.load import Target
from eagle3_ds.targets.structure import TRIED_TOKENS, build_empty, find_decoder

logger = logging.getLogger(__name__)

INTERFACE_NAME = "eagle3_ds_packed"
MLP_ROWS = 8192
"""Slots that go through an MLP at a time. This bounds its transient memory to a few MLP_ROWS x intermediate
size.
"""
WITHOUT_EFFECT = frozenset(
    (
        "position_ids",
        "use_cache",
        "cache",
        "past_key_values",
        "cache_position",
        "output_attentions",
        "output_hidden_states",
    )
)
"""Further keyword arguments that models pass to their attention. They have no effect in a forward without a
cache.
"""

_SINGLE = "Capture this target with target.capture: single, which runs it as transformers does."


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    packed: PackedAttention | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in each layer. Collective over the sp group of `packed`.

    Args:
        query: [1, Hq, S, D], of this rank's slots with all heads.
        key: [1, Hkv, S, D], likewise.
        value: [1, Hkv, S, Dv], likewise. In multi-head latent attention Dv differs from D.
        scaling: factor of the scores; None is D ** -0.5.
        s_aux: the logits of attention sinks, if the layer has them.
        packed: the attention over the span plan; `SpanForward` passes it through the model's keyword
            arguments.

    Returns:
        [1, S, Hq, Dv], and None for the attention weights.

    Raises:
        ValueError: the layer asks for something that the kernels do not compute, or the model did not pass
            `packed` on.
    """
    layer = type(module).__name__
    if packed is None:
        raise ValueError(
            f"{layer} does not hand the model's keyword arguments on to its attention. {_SINGLE}"
        )
    if is_causal is False or not getattr(module, "is_causal", True):
        raise ValueError(f"{layer} attends without a causal mask. {_SINGLE}")
    asked = [name for name, given in others.items() if name not in WITHOUT_EFFECT and given is not None]
    asked += ["a mask of its own"] if attention_mask is not None else []
    asked += ["dropout"] if dropout else []
    if asked:
        raise ValueError(
            f"{layer} asks its attention for {', '.join(asked)}, which the kernels do not compute. {_SINGLE}"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # The kernels take one size. Zero columns change no score and give zero columns, which are cut off.
    size, kept = max(key.shape[-1], value.shape[-1]), value.shape[-1]
    q, k, v = (functional.pad(x[0].transpose(0, 1), (0, size - x.shape[-1])) for x in (query, key, value))
    return packed.attend(q, k, v, scale, sliding_window, s_aux)[None, ..., :kept], None


class _Rehearsal:
    """In place of a `PackedAttention`, on tensors without values."""

    def attend(self, q: Tensor, *_others: Any) -> Tensor:
        return q


def check_spans(full_config: Any, path: str) -> None:
    """Send a document without values through the target without weights, with our attention put in.

    Raises:
        ValueError: an attention layer asks for what no kernel computes, before the first layer whose code
            needs values; what comes after is judged by the probe of the ranks.
    """
    config = full_config.get_text_config()
    decoder = find_decoder(build_empty(full_config, path))
    AttentionInterface.register(INTERFACE_NAME, packed_attention)
    ids = torch.zeros(1, TRIED_TOKENS, dtype=torch.int64, device="meta")
    try:
        decoder.set_attn_implementation(INTERFACE_NAME)
        decoder(
            input_ids=ids,
            position_ids=torch.arange(TRIED_TOKENS, device="meta")[None],
            use_cache=False,
            packed=_Rehearsal(),
        )
    except ValueError as error:
        if _SINGLE not in str(error):
            logger.debug("%s: judged by the probe of the ranks (%s)", path, error)
            return
        raise ValueError(
            f"target.path = {path!r} ({config.model_type}) cannot run on several ranks: {error}"
        ) from error
    except Exception as error:  # a family's own code, which needs values
        logger.debug("%s: judged by the probe of the ranks (%s)", path, error)


class SpanForward(nn.Module):
    """The decoder of a target, without its head, as a module that runs over the slots of one rank."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        AttentionInterface.register(INTERFACE_NAME, packed_attention)
        self.decoder: Any = target.base
        self.aux_layers = target.aux_layers
        for layer in self.decoder.layers:
            if isinstance(getattr(layer, "mlp", None), nn.Module):
                layer.mlp.forward = _tiled(layer.mlp.forward)

    @torch.no_grad()
    def forward(
        self, token_ids: Tensor, positions: Tensor, packed: PackedAttention | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the decoder over this rank's slots. Collective over the sp group of `packed`.

        Args:
            token_ids: int64 [S], the tokens of this rank's slots; any token in padding.
            positions: int64 [S], their positions in their documents.
            packed: a new attention over the plan of this packed sequence. None: the slots are one whole
                document, and transformers' eager attention runs, for comparison.

        Returns:
            aux [S, A] and teacher [S, Ht] of this rank's slots, as `capture_hidden_states` returns them.

        Raises:
            ValueError: a layer has no attention, or one that the kernels do not compute.
        """
        self.decoder.set_attn_implementation("eager" if packed is None else INTERFACE_NAME)
        options = {} if packed is None else {"packed": packed}
        with AuxCapture(self.decoder, self.aux_layers) as capture:
            output = self.decoder(
                input_ids=token_ids[None], position_ids=positions[None], use_cache=False, **options
            )
            aux = capture.take()
        if packed is not None and packed.num_calls != len(self.decoder.layers):
            raise ValueError(
                f"the target has {len(self.decoder.layers)} layers, but {packed.num_calls} went through "
                "transformers' attention interface: the others mix tokens in a way that a rank cannot do "
                f"over its spans alone. {_SINGLE}"
            )
        return aux, output.last_hidden_state[0]


def _tiled(forward: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """The forward of an MLP, dense or of experts, on `MLP_ROWS` slots at a time. The result is the same,
    because an MLP works on each slot by itself.
    """

    def tiled(hidden: Tensor) -> Tensor:
        if hidden.shape[1] <= MLP_ROWS:
            return forward(hidden)
        return torch.cat([forward(rows) for rows in hidden.split(MLP_ROWS, dim=1)], dim=1)

    return tiled
