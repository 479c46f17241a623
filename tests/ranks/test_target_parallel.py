"""A target over spans of a packed sequence against transformers' forward of each document alone, family by
family.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from eagle3_ds.attention import PackedAttention
from eagle3_ds.kernels import select_kernel
from eagle3_ds.layout import SpanPlan
from eagle3_ds.targets import SpanForward, Target, capture_hidden_states
from eagle3_ds.topology import maybe_setup_distributed
from tests.unit.tiny_families import (
    AUX_LAYERS,
    FAMILIES,
    family_config,
    other_config,
    random_model,
    vision_language_config,
)

LENGTHS = (19, 3, 26, 7, 1)
CHUNKS = 3
VISION_LANGUAGE = "gemma3"
LATENT = "deepseek_v3"
"""Its keys have 12 channels and its values 8."""
# Two key heads: with four Ulysses ranks each of them is repeated.
CASES = [
    *((family, 2, 2) for family in (*FAMILIES, VISION_LANGUAGE, LATENT)),
    ("llama", 1, 4),
    ("gpt_oss", 1, 4),
]


def tiny_target(family: str) -> Target:
    if family == VISION_LANGUAGE:
        config = vision_language_config()
    else:
        config = other_config(family) if family == LATENT else family_config(family)
    return Target(random_model(config), None, config.get_text_config(), AUX_LAYERS)


def tokens() -> torch.Tensor:
    return torch.randint(97, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))


def rank_of_targets(cases: list[tuple[str, int, int]]) -> list[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
    """Slots, aux and teacher of this rank for each case."""
    results = []
    for family, ring, ulysses in cases:
        topology = maybe_setup_distributed(ulysses, ring)
        place = topology.place
        plan = SpanPlan.make(LENGTHS, ring, ulysses, CHUNKS)
        slots = plan.slots(place.ring_rank, place.ulysses_rank)
        padded = torch.zeros(plan.padded_length, dtype=torch.int64)
        padded[: plan.length] = tokens()
        kernel = select_kernel("auto", topology.device, torch.float32, 8)
        packed = PackedAttention(plan, place.ring_rank, kernel, topology.ulysses_group, topology.ring_group)
        positions = torch.from_numpy(plan.position[slots])
        results.append(
            (slots, *SpanForward(tiny_target(family))(padded[torch.from_numpy(slots)], positions, packed))
        )
    return results


def plain(family: str) -> list[torch.Tensor]:
    """Aux and teacher of all documents, each run alone."""
    target = tiny_target(family)
    documents = [capture_hidden_states(target, ids) for ids in tokens().split(list(LENGTHS))]
    return [torch.cat(parts) for parts in zip(*documents, strict=True)]


@pytest.fixture(scope="module")
def found(run_ranks: Any) -> dict[tuple[str, int, int], list[Any]]:
    by_rank = run_ranks(4, rank_of_targets, CASES)
    return {case: [results[number] for results in by_rank] for number, case in enumerate(CASES)}


@pytest.mark.ranks
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-ring{case[1]}-ulysses{case[2]}")
def test_spans_equal_each_document_alone(found: Any, case: tuple[str, int, int]) -> None:
    for place, name in ((1, "aux"), (2, "teacher")):
        expected = plain(case[0])[place - 1]
        whole = torch.full_like(expected, torch.nan)
        for result in found[case]:
            real = result[0] < len(expected)
            whole[torch.from_numpy(result[0][real])] = result[place][torch.from_numpy(real)]
        error = (whole - expected).norm() / expected.norm()
        assert error <= 1e-5, f"{name}: relative error {error:.2e}"
