"""The fused soft cross entropy without a GPU: its values in Triton's interpreter, and that it compiles."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.kl_checks import CASES

triton = pytest.importorskip("triton", reason="the package triton is not installed")


def test_the_interpreted_kernel_is_the_plain_form() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.unit.kl_interpreted"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("right") == 2 * len(CASES)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("with_gradient", [True, False])
def test_the_compiler_takes_the_kernel(
    with_gradient: bool, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With bf16 logits of 32,000 tokens, down to PTX; no GPU takes part."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from eagle3_ds.losses.kl_triton import _kl_kernel

    kinds = {"logits_ptr": "*bf16", "gradient_ptr": "*bf16", "best_ptr": "*i64"}
    signature = {
        name: kinds.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in _kl_kernel.arg_names
    }
    chosen = {"WITH_GRADIENT": with_gradient, "BLOCK": 4096}
    signature |= dict.fromkeys(chosen, "constexpr")
    constants = {(_kl_kernel.arg_names.index(name),): value for name, value in chosen.items()}
    source = ASTSource(_kl_kernel, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    assert f".target sm_{capability}" in compiled.asm["ptx"]
