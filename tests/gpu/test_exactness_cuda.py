"""The training step on one CUDA device against the dense reference: numbers, raw gradients and trained
weights, bf16.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from judge.cases import Case, full_matrix
from judge.exactness import judge

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def on_one_device(**factors: Any) -> Case:
    """A bf16 case of the matrix, with these factors."""
    base = full_matrix()[0]
    fixed: dict[str, Any] = {
        "draft_dp": 1,
        "ring": 1,
        "ulysses": 1,
        "dtype": "bfloat16",
        "kernel": "auto",
        "kv_exchange": "gather",
        "layers": 1,
    }
    return replace(base, **{**fixed, "accumulation": 1, "ttt_steps": 7, **factors})


@pytest.mark.parametrize(
    "case",
    [
        on_one_device(activation="recompute", heads="gqa", documents="many_unaligned", deepspeed="zero2"),
        on_one_device(activation="offload", heads="mha", documents="one", deepspeed="zero2"),
        on_one_device(
            activation="offload", heads="gqa", documents="indivisible", deepspeed="zero3", accumulation=2
        ),
    ],
    ids=str,
)
def test_the_step_is_that_of_the_dense_reference(case: Case) -> None:
    verdict = judge(case, device="cuda")
    assert verdict.passed, verdict.line()
