"""Every kernel that runs on this CUDA device, through the checks of tests/unit/kernel_conformance.py."""

from __future__ import annotations

import pytest
import torch

from eagle3_ds.kernels import KERNELS, AttentionKernel, select_kernel
from tests.unit import kernel_conformance as conformance
from tests.unit.kernel_conformance import Case, each_case

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)
each_kernel = pytest.mark.parametrize(("kernel", "device", "dtype"), conformance.kernels_on("cuda"))


@pytest.fixture(autouse=True)
def deterministic_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS refuses deterministic mode without it; the kernels in plain torch multiply through cuBLAS."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_is_checked_here(kernel: AttentionKernel) -> None:
    conformance.skip_if_unusable(kernel, "cuda")


@each_case
@each_kernel
def test_forward_equals_dense(kernel: AttentionKernel, device: str, dtype: torch.dtype, case: Case) -> None:
    conformance.check_forward(kernel, device, dtype, case)


@pytest.mark.parametrize("with_others", [False, True], ids=["own softmax", "merged softmax"])
@each_case
@each_kernel
def test_backward_equals_autograd(
    kernel: AttentionKernel, device: str, dtype: torch.dtype, case: Case, with_others: bool
) -> None:
    conformance.check_backward(kernel, device, dtype, case, with_others)


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@each_kernel
def test_it_holds_too(
    kernel: AttentionKernel, device: str, dtype: torch.dtype, check: conformance.Check
) -> None:
    check(kernel, device, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_auto_takes_a_flash_kernel(dtype: torch.dtype) -> None:
    assert select_kernel("auto", torch.device("cuda"), dtype, 128).name in (
        "cuda",
        "cudnn",
        "flash_attn2",
        "flash_attn3",
        "flash_attn4",
    )
