"""The fused merge on this CUDA device, through the checks of tests/unit/merge_checks.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.unit.merge_checks import SHAPES, Shape, check_merge

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)
merge_triton = pytest.importorskip("eagle3_ds.attention.merge_triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_fused_merge_equals_one_softmax(
    shape: Shape, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = {name: getattr(merge_triton, name) for name in ("fused_merge", "fused_merge_backward")}
    called = []

    def counted(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            called.append(name)
            return fused[name](*arguments)

        return call

    for name in fused:
        monkeypatch.setattr(merge_triton, name, counted(name))
    check_merge(shape, "cuda", dtype)
    assert called == list(fused)


def test_fp64_stays_with_torch() -> None:
    check_merge(SHAPES["grouped"], "cuda", torch.float64)
