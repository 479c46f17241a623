"""`eagle3-ds doctor`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from eagle3_ds.cli.main import main
from eagle3_ds.kernels import KERNELS, Tile, select
from eagle3_ds.kernels.base import Call
from eagle3_ds.kernels.blockwise import BlockwiseKernel
from eagle3_ds.kernels.selfcheck import TOLERANCE, checked_kernel, measured_error


@pytest.fixture(autouse=True)
def plain_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("COLUMNS", "200")


def test_lists_every_kernel_with_its_error_or_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--head-dim", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    kernels = lines[
        next(i for i, line in enumerate(lines) if "attention kernels on cpu with heads of 64" in line) :
    ]
    row = {kernel.name: next(line for line in kernels if f"│ {kernel.name} " in line) for kernel in KERNELS}
    assert row["cpu"].count("error") == 2 and row["cpu"].count("auto") == 2
    assert row["blockwise"].count("error") == 2 and "auto" not in row["blockwise"]
    for name in ("cuda", "cudnn", "flash_attn2", "flash_attn3", "flash_attn4"):
        assert "NVIDIA GPUs" in row[name] and "error" not in row[name]
    assert "Ascend NPUs" in row["npu"] and "error" not in row["npu"]
    assert any("torch" in line and torch.__version__ in line for line in lines)
    assert any("flash-attn-4" in line for line in lines)


@pytest.mark.parametrize("break_it", ["wrong", "raises"])
def test_a_kernel_that_does_not_hold_its_word_is_found(
    break_it: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = BlockwiseKernel.backward

    def broken(self: BlockwiseKernel, dout: torch.Tensor, *rest: Any) -> torch.Tensor:
        if break_it == "raises":
            raise RuntimeError("no kernel image")
        return right(self, dout * 1.1, *rest)

    monkeypatch.setattr(BlockwiseKernel, "backward", broken)
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert (
        "broken: blockwise in float32: "
        + {"wrong": "wrong by 1e-01", "raises": "fails: RuntimeError: no kernel"}[break_it]
        in said
    )
    assert "broken: cpu" not in said


def test_head_dim_must_be_a_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--head-dim", "0"]) == 2
    assert "--head-dim is 0" in capsys.readouterr().err


def test_measured_error_sees_a_wrong_row_without_keys() -> None:
    class Filled(BlockwiseKernel):
        def forward(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
            out, lse = super().forward(*arguments)
            return out, lse.nan_to_num(neginf=0.0)

    device = torch.device("cpu")
    assert measured_error(BlockwiseKernel(), device, torch.float32, 16) <= TOLERANCE[torch.float32]
    assert measured_error(Filled(), device, torch.float32, 16) == float("inf")


class Scaled(BlockwiseKernel):
    name = "scaled"

    def backward(self, *arguments: Any) -> torch.Tensor:
        return 1.01 * super().backward(*arguments)


class Forgetful(BlockwiseKernel):
    """Right for one document in a call, wrong for several of one mask."""

    name = "forgetful"

    def calls(self, tiles: Iterable[Tile], most: int | None = None) -> list[Call]:
        seen = {(tile.causal, tile.left): tile for tile in tiles}
        return super().calls(tuple(seen.values()), most)


@pytest.mark.parametrize("wrong", [Scaled(), Forgetful()], ids=lambda kernel: kernel.name)
def test_a_kernel_that_computes_wrongly_is_refused_before_training(
    wrong: BlockwiseKernel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device = torch.device("cpu")
    monkeypatch.setattr(select, "KERNELS", (wrong, BlockwiseKernel()))
    with pytest.raises(
        ValueError, match=rf"attention.kernel {wrong.name!r} computes wrongly on cpu .*such as blockwise"
    ):
        checked_kernel(wrong.name, device, torch.float32, 16)
    # auto tells of it and takes the next.
    assert checked_kernel("auto", device, torch.float32, 16).name == "blockwise"
    assert f"{wrong.name!r} computes wrongly" in caplog.text
    monkeypatch.setattr(select, "KERNELS", (wrong,))
    with pytest.raises(ValueError, match="computes wrongly"):
        checked_kernel("auto", device, torch.float32, 16)


class Refusing(BlockwiseKernel):
    """As an operator of a driver that does not go with this torch."""

    name = "refusing"

    def __init__(self, error: RuntimeError) -> None:
        super().__init__()
        self.error = error

    def forward(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise self.error


def test_a_kernel_that_fails_is_refused_or_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device, error = torch.device("cpu"), RuntimeError("no kernel image is available.\nmore of it")
    kernels = (Refusing(error), BlockwiseKernel())
    monkeypatch.setattr(select, "KERNELS", kernels)
    said = r"'refusing' fails on cpu with torch.float32 heads of 16: no kernel image is available\."
    with pytest.raises(ValueError, match=said):
        checked_kernel("refusing", device, torch.float32, 16)
    assert checked_kernel("auto", device, torch.float32, 16).name == "blockwise"
    assert "no kernel image is available. Taking the next." in caplog.text


def test_a_device_without_room_is_no_fault_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Refusing(torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr(select, "KERNELS", (full, BlockwiseKernel()))
    with pytest.raises(torch.OutOfMemoryError):
        checked_kernel("auto", torch.device("cpu"), torch.float32, 16)
