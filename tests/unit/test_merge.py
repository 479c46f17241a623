"""The merge of the diagonal keys in plain torch, forward and backward."""

from __future__ import annotations

import pytest
import torch

from eagle3_ds.attention import merge
from tests.unit.merge_checks import SHAPES, Shape, check_merge, make_inputs


@pytest.fixture(params=[2**21, 2**13], ids=["one block", "several blocks"])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "_BLOCK_BYTES", request.param)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.usefixtures("block_bytes")
def test_merge_equals_one_softmax(shape: Shape, dtype: torch.dtype) -> None:
    check_merge(shape, "cpu", dtype)


def test_without_diagonals_nothing_changes() -> None:
    inputs = make_inputs(SHAPES["grouped"], "cpu", torch.float32)
    out, lse = merge.merge_diagonals(inputs.out0, inputs.lse0, inputs.q, [], [], 1.0)
    assert torch.equal(out, inputs.out0) and torch.equal(lse, inputs.lse0)
