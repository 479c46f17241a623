"""Capturing what the draft is taught with: the inputs of some target layers (aux), the output of the target's
final norm (teacher), and the target's greedy token at every position.

Legend: L tokens of a document, S tokens of a forward, A = layers * Ht, Ht hidden size of the target, V its
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from eagle3_ds.targets.load import Target


class AuxCapture:
    """Inside its `with` block, keeps the inputs of the aux layers of the last forward.

    Args:
        model: the decoder without its head; it has `layers`.
        aux_layers: the numbers of the layers, ascending.
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
            self._found[place] = hidden.detach()

        return hook

    def take(self) -> Tensor:
        """`take_batch` of a forward with one sequence of S tokens: [S, A]."""
        (taken,) = self.take_batch()
        return taken

    def take_batch(self) -> Tensor:
        """The inputs of the aux layers in the last forward, concatenated from the lowest layer up: [B, S, A],
        of B sequences of S tokens. They are kept no longer.
        """
        assert len(self._found) == len(self._layers), "no forward since the last take"
        return torch.cat([self._found.pop(place) for place in range(len(self._layers))], dim=-1)


@torch.no_grad()
def capture_hidden_states(target: Target, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Run the target without its head over one whole document. Not collective.

    Args:
        input_ids: int64 [L], on any device.

    Returns:
        aux [L, A], the concatenated inputs of the aux layers; and teacher [L, Ht], the output of the final
        norm, which is the head's input. Both in the target's dtype, on its device.
    """
    base = target.base
    with AuxCapture(base, target.aux_layers) as capture:
        output = base(input_ids=input_ids.to(target.device, torch.int64)[None], use_cache=False)
        return capture.take(), output.last_hidden_state[0]


@torch.no_grad()
def teacher_tokens(hidden: Tensor, head: Tensor, chunk: int = 8192, rows: int = 4096) -> Tensor:
    """The target's greedy token at every position: the argmax over the whole vocabulary, of equal logits the
    lowest id. At most `rows` x `chunk` logits exist at a time.

    Args:
        hidden: [L, Ht], outputs of the final norm; any rows, for example those of one rank.
        head: [V, Ht], whole, of the same dtype and device.

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
        higher = value > best  # not >=, so that of equal logits the lowest id wins
        best = torch.where(higher, value, best)
        token = torch.where(higher, index + start, token)
    return token
