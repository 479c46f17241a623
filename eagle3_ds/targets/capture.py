"""What the draft is taught with: hidden states of three target layers, of its final norm, and its choice of
token.

Legend: L tokens, Ht hidden size of the target, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from eagle3_ds.targets.load import Target


class AuxCapture:
    """While open, every forward of the target leaves the inputs of the three aux layers behind.

    Args:
        model: the base model (without the head), with `layers`.
        aux_layers: three layer numbers.
    """

    def __init__(self, model: nn.Module, aux_layers: Sequence[int]) -> None:
        self._layers = [model.get_submodule(f"layers.{index}") for index in aux_layers]
        self._found: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> AuxCapture:
        for place, layer in enumerate(self._layers):
            self._handles.append(layer.register_forward_pre_hook(self._keep(place), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _keep(self, place: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self._found[place] = hidden[0].detach()

        return hook

    def take(self) -> Tensor:
        """g [S, 3 * Ht] of the last forward over S tokens, lowest layer first; each is taken once."""
        assert len(self._found) == len(self._layers), "no forward since the last take"
        taken = torch.cat([self._found.pop(place) for place in range(len(self._layers))], dim=-1)
        return taken


@torch.no_grad()
def capture_hidden_states(target: Target, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Run the target over one document; its head is not evaluated.

    Args:
        input_ids: int64 [L], on any device.

    Returns:
        aux [L, 3 * Ht]: the concatenated inputs of the aux layers; teacher [L, Ht]: the output of the final
        norm, which the head applies to directly. Both in the target's dtype, on its device.
    """
    base = target.base
    with AuxCapture(base, target.aux_layers) as capture:
        output = base(input_ids=input_ids.to(target.device, torch.int64)[None], use_cache=False)
        return capture.take(), output.last_hidden_state[0]


@torch.no_grad()
def teacher_tokens(hidden: Tensor, head: Tensor, chunk: int = 8192, rows: int = 4096) -> Tensor:
    """The target's greedy token at every position: argmax over the whole vocabulary, ties to the lowest id.

    At most `rows` x `chunk` logits exist at a time.

    Args:
        hidden: [L, Ht], after the final norm.
        head: [V, Ht].

    Returns:
        int64 [L].
    """
    if not len(hidden):
        return torch.empty(0, dtype=torch.int64, device=hidden.device)
    return torch.cat([_best_tokens(piece, head, chunk) for piece in hidden.split(rows)])


def _best_tokens(hidden: Tensor, head: Tensor, chunk: int) -> Tensor:
    best, token = (hidden @ head[:chunk].T).max(dim=-1)
    for start in range(chunk, len(head), chunk):
        value, index = (hidden @ head[start : start + chunk].T).max(dim=-1)
        higher = value > best  # not >=: an equal logit later in the vocabulary loses
        best = torch.where(higher, value, best)
        token = torch.where(higher, index + start, token)
    return token
