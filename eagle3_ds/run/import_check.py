"""Checking imported hidden states: the target runs over the beginning of a few samples, and its states are
compared with the imported ones.

Legend: n rows that are compared, Ht hidden size of the target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from eagle3_ds.store.foreign import ForeignFiles, Sample
from eagle3_ds.targets import Target

COMPARED_SAMPLES = 3
COMPARED_ROWS = 512
FAR = 0.1
"""Relative error above which hidden states are taken to be of another model. Different kernels in bfloat16
give errors of about 0.01.
"""


def compare_with_target(files: ForeignFiles, target: Target) -> Iterator[str]:
    """Compare a few samples, spread over the files; yields a line about each.

    Raises:
        ValueError: the states are of another model or of other layers, or the last state is before the final
            norm where it should be after it, or the other way round.
    """
    places = {round(part * (len(files) - 1) / (COMPARED_SAMPLES - 1)) for part in range(COMPARED_SAMPLES)}
    for index in sorted(places):
        sample = files.sample(index)
        if sample is not None:
            error = _compare(sample, files.last_is_normed, target)
            yield f"{sample.place} is what the target computes, to a relative error of {error:.1e}"


def _compare(sample: Sample, last_is_normed: bool, target: Target) -> float:
    """The largest relative error of a sample's aux states and last state, each a median over the rows.

    Raises:
        ValueError: the states are not those of this target.
    """
    length = min(len(sample.token_ids), COMPARED_ROWS)
    token_ids = sample.token_ids[:length]
    if int(token_ids.max()) >= len(target.head):
        raise ValueError(
            f"{sample.place} holds token {int(token_ids.max())}, and the target's vocabulary has "
            f"{len(target.head)}. Name the model that the files were made with in target.path"
        )
    layers, ends = _run(target, token_ids)
    aux, last = sample.states(0, length)
    parts = aux.split(last.shape[1], dim=-1)
    if len(parts) != len(target.aux_layers):
        raise ValueError(
            f"{sample.place} holds {len(parts)} aux states, and the recipe wants those of the layers "
            f"{list(target.aux_layers)}. Set target.aux_layers to the layers that were captured"
        )
    distances = [[_distance(part, layer) for layer in layers] for part in parts]
    _require_layers(sample.place, distances, target.aux_layers)
    near, other = (_distance(last, ends[side]) for side in (last_is_normed, not last_is_normed))
    if near > FAR:
        raise ValueError(
            f"{sample.place}: the last hidden state should lie {'behind' if last_is_normed else 'before'} "
            f"the target's final norm and is {near:.2f} away from it (relative error; {other:.2f} from the "
            "other side). The files are another model's, or of a version of their writer that is not known "
            "here"
        )
    return max(near, *(errors[layer] for errors, layer in zip(distances, target.aux_layers, strict=True)))


@torch.no_grad()
def _run(target: Target, token_ids: Tensor) -> tuple[list[Tensor], dict[bool, Tensor]]:
    """Run the target over token_ids int64 [n].

    Returns:
        The inputs of all layers, and the last hidden state before (False) and after (True) the final norm:
        [n, Ht] each.
    """
    base = target.model.model
    before_norm: list[Tensor] = []
    hook = base.norm.register_forward_pre_hook(lambda _module, inputs: before_norm.append(inputs[0][0]))
    output = base(input_ids=token_ids[None].to(target.device), output_hidden_states=True, use_cache=False)
    hook.remove()
    # The last state that transformers collects is the output of the norm, not the input of a layer.
    inputs = [hidden[0] for hidden in output.hidden_states[:-1]]
    return inputs, {False: before_norm[0], True: output.last_hidden_state[0]}


def _require_layers(place: str, distances: Sequence[Sequence[float]], wanted: Sequence[int]) -> None:
    """Check that each aux state is closest to the input of the layer that it should be.

    Args:
        distances: for each aux state, its distance from the input of every layer.
        wanted: for each aux state, its layer.

    Raises:
        ValueError: an aux state is of another layer.
    """
    nearest = [min(range(len(errors)), key=errors.__getitem__) for errors in distances]
    least = [errors[layer] for errors, layer in zip(distances, nearest, strict=True)]
    if max(least) > FAR:
        raise ValueError(
            f"{place}: these hidden states are not the target's, they are {max(least):.2f} away from the "
            f"nearest layers {nearest} (relative error). Name the model that computed them in target.path, "
            "with the weights it had then"
        )
    # Up to twice the least distance passes: bfloat16 may not tell neighbouring layers apart.
    if any(errors[layer] > 2 * low for errors, layer, low in zip(distances, wanted, least, strict=True)):
        raise ValueError(
            f"{place} holds the inputs of layers {nearest} of the target, and the recipe wants those of "
            f"{list(wanted)}. Set target.aux_layers='{nearest}'"
        )


def _distance(rows: Tensor, reference: Tensor) -> float:
    """The median over the rows of the relative error of `rows` against `reference`, both [n, Ht]."""
    rows, reference = rows.float().cpu(), reference.float().cpu()
    return float(((rows - reference).norm(dim=-1) / reference.norm(dim=-1).clamp(min=1e-30)).median())
