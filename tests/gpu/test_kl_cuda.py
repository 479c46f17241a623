"""The fused soft cross entropy on this CUDA device, through the checks of tests/unit/kl_checks.py."""

from __future__ import annotations

import pytest
import torch

from tests.unit.kl_checks import CASES, Case, check_kl

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)
kl_triton = pytest.importorskip("eagle3_ds.losses.kl_triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_kernel_is_the_plain_form(case: Case, dtype: torch.dtype) -> None:
    check_kl(case, "cuda", dtype, kl_triton.fused_kl)
