"""The rotary embedding of a draft, as a recipe states it, and the scalings that servers compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import Field, model_validator

from eagle3_ds.config.section import Section


class ScalingKeys(NamedTuple):
    """What a scaling must say, and what it may say, beside `rope_type`."""

    needed: tuple[str, ...]
    allowed: tuple[str, ...] = ()


SCALINGS: Mapping[str, ScalingKeys] = {
    "linear": ScalingKeys(("factor",)),
    "dynamic": ScalingKeys(("factor",)),
    "yarn": ScalingKeys(
        ("factor", "original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
    "llama3": ScalingKeys(
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    ),
    "longrope": ScalingKeys(
        ("short_factor", "long_factor", "original_max_position_embeddings"), ("factor", "attention_factor")
    ),
}
"""Rotary scalings that transformers and the servers both compute, under the keys that both read."""
PER_PAIR = ("short_factor", "long_factor")
"""Keys of a scaling with a number for each pair of channels that turns."""


class RopeSection(Section):
    """What it says is all there is: a null `scaling` is none, whatever the target has."""

    theta: Annotated[float, Field(gt=0)] | None = None
    """Base of the angles; null: the target's."""
    scaling: dict[str, Any] | None = None
    """As in rope_parameters of transformers: `rope_type` and its own keys."""
    partial_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each head, from its front, that turns."""

    @model_validator(mode="after")
    def _known_scaling(self) -> RopeSection:
        if self.scaling is not None:
            _check_scaling(self.scaling)
        return self


def rotated_size(head_dim: int, partial_factor: float) -> int:
    """Channels of a head that turn, as servers and transformers round them."""
    return int(head_dim * partial_factor)


def check_rotated(head_dim: int, rope: RopeSection) -> None:
    """Refuse a rotated part that is not pairs, or that the numbers of a scaling do not fit.

    Raises:
        ValueError: it is odd or empty, or a list of the scaling is of another length.
    """
    rotated = rotated_size(head_dim, rope.partial_factor)
    if rotated % 2 or not rotated:
        raise ValueError(
            f"rope.partial_factor is {rope.partial_factor}, which turns {rotated} of the {head_dim} channels "
            "of a head (draft.head_dim): it should be an even number of them, at least 2. Choose a multiple "
            f"of {2 / head_dim:g}."
        )
    for key in PER_PAIR:
        found = len((rope.scaling or {}).get(key, ())) or rotated // 2
        if found != rotated // 2:
            raise ValueError(
                f"rope.scaling.{key} has {found} numbers, but it should have one for each of the "
                f"{rotated // 2} pairs of channels that turn (draft.head_dim {head_dim}, partial_factor "
                f"{rope.partial_factor}). Change one of them."
            )


def _check_scaling(scaling: Mapping[str, Any]) -> None:
    kind = scaling.get("rope_type")
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise ValueError(
            f"scaling.rope_type is {kind!r}, but it should be one of {', '.join(SCALINGS)}, which servers "
            "compute for drafts. Choose one, or set scaling to null for none."
        )
    keys = SCALINGS[kind]
    missing = [key for key in keys.needed if key not in scaling]
    unknown = [key for key in scaling if key not in ("rope_type", *keys.needed, *keys.allowed)]
    if missing or unknown:
        said = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has {', '.join(unknown)}"] * bool(unknown)
        raise ValueError(
            f"scaling of the type {kind!r} {' and '.join(said)}: it takes {', '.join(keys.needed)}"
            + (f", and may have {', '.join(keys.allowed)}" if keys.allowed else "")
            + ". Theta and partial factor stand beside it, in draft.rope."
        )
    for key in (*keys.needed, *keys.allowed):
        if key in scaling:
            _check_value(key, scaling[key])


def _check_value(key: str, value: Any) -> None:
    if key == "truncate":
        right, rule = isinstance(value, bool), "true or false"
    elif key in PER_PAIR:
        right = isinstance(value, list) and bool(value) and all(_is_positive(each) for each in value)
        rule = "a list of positive numbers, one for each pair of channels that turns"
    else:
        right, rule = _is_positive(value), "a positive number"
    if not right:
        raise ValueError(f"scaling.{key} is {value!r}, but it should be {rule}. Change it.")


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
