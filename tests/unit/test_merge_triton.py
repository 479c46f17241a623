"""The fused merge without a GPU: its values in Triton's interpreter, and that it compiles for GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.merge_checks import SHAPES

triton = pytest.importorskip("triton", reason="the package triton is not installed")


def test_interpreted_kernels_equal_one_softmax() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.unit.merge_interpreted"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("right") == 2 * len(SHAPES)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["_merge_kernel", "_merge_backward_kernel"])
def test_compiler_takes_the_kernels(
    name: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For two diagonals in bf16, 8 query heads of 128 on 2 key heads, down to PTX; no GPU takes part."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from eagle3_ds.attention import merge_triton

    _, sizes = merge_triton._launch(torch.empty(5, 8, 128), torch.empty(5, 2, 128))
    options = {"num_warps": sizes.pop("num_warps")}
    kernel = getattr(merge_triton, name)
    constants = {(kernel.arg_names.index(size),): value for size, value in sizes.items()}
    source = ASTSource(kernel, {argument: kind_of(argument) for argument in kernel.arg_names}, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert f".target sm_{capability}" in compiled.asm["ptx"]


def kind_of(argument: str) -> Any:
    if argument.endswith("_ptrs"):
        return ("*bf16", "*bf16")
    if argument.endswith("_ptr"):
        return "*fp32" if argument.startswith(("lse", "delta")) else "*bf16"
    return {"num_slots": "i32", "scale": "fp32"}.get(argument, "constexpr")
