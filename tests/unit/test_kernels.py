"""Every kernel that runs on a CPU against dense autograd in fp64, through the one interface they share."""

from __future__ import annotations

import pytest
import torch

import eagle3_ds.kernels.blockwise as blockwise_module
from eagle3_ds.kernels import KERNELS, AttentionKernel, Tile, merge_partial, select_kernel
from eagle3_ds.kernels.base import out_with_delta
from tests.unit import kernel_conformance as conformance
from tests.unit.kernel_conformance import Case, each_case

each_kernel = pytest.mark.parametrize(("kernel", "device", "dtype"), conformance.kernels_on("cpu"))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 8 and 12, so that the cases have many of them and ragged ones."""
    monkeypatch.setattr(blockwise_module, "_QUERY_BLOCK", 8)
    monkeypatch.setattr(blockwise_module, "_KEY_BLOCK", 12)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_is_checked_here(kernel: AttentionKernel) -> None:
    conformance.skip_if_unusable(kernel, "cpu")


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


@pytest.mark.parametrize("magnitude", [1.0, 1e-30, 1e30])
def test_out_with_delta_survives_any_magnitude(magnitude: float) -> None:
    dout = torch.randn(7, 3, 16, generator=torch.Generator().manual_seed(0)) * magnitude
    dout[2] = 0
    delta = dout.sum(-1)
    rebuilt = (dout.double() * out_with_delta(dout, delta).double()).sum(-1)
    torch.testing.assert_close(rebuilt, delta.double(), rtol=1e-6, atol=0.0)


def test_merge_of_two_empty_rows_is_empty() -> None:
    zero, nothing = torch.zeros(2, 1, 4), torch.full((2, 1), -torch.inf)
    out, lse = merge_partial(zero, nothing, zero, nothing)
    assert torch.equal(out, zero) and torch.equal(lse, nothing)


@pytest.mark.parametrize(
    "tile", [Tile(0, 4, 0, 3, True), Tile(0, 4, 0, 3, False, 2), Tile(0, 4, 0, 6, True, -1)]
)
def test_a_tile_with_an_empty_row_is_a_bug(tile: Tile) -> None:
    x = torch.zeros(6, 1, 8)
    with pytest.raises(AssertionError, match="leaves rows without a key"):
        select_kernel("blockwise", torch.device("cpu"), torch.float32, 8).forward(x, x, x, (tile,), 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_takes_the_fast_kernel_on_cpu(dtype: torch.dtype) -> None:
    assert select_kernel("auto", torch.device("cpu"), dtype, 64).name == "cpu"


@pytest.mark.parametrize("device", ["meta", "mps", "xpu"])
def test_auto_runs_on_any_device(device: str) -> None:
    assert select_kernel("auto", torch.device(device), torch.float32, 64).name == "blockwise"


def test_named_kernel_that_cannot_run_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"'cuda' cannot run .* NVIDIA GPUs.* can: cpu, blockwise, reference"
    ):
        select_kernel("cuda", torch.device("cpu"), torch.bfloat16, 64)
    with pytest.raises(
        ValueError, match=r"'cpu' cannot run .* not torch.float16.* can: blockwise, reference"
    ):
        select_kernel("cpu", torch.device("cpu"), torch.float16, 64)
    with pytest.raises(
        ValueError, match=r"'flsh', but no kernel is named so.* these: cpu, blockwise, reference"
    ):
        select_kernel("flsh", torch.device("cpu"), torch.float32, 64)
