"""The fused merge in Triton's interpreter, on the CPU. A program of its own: TRITON_INTERPRET=1 is read at
import.
"""

from __future__ import annotations

import torch

from eagle3_ds.attention.merge_triton import fused_merge, fused_merge_backward
from tests.unit.merge_checks import SHAPES, check_merge


def main() -> None:
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            check_merge(shape, "cpu", dtype, fused_merge, fused_merge_backward)
            print(f"{name}, {dtype}: right")


if __name__ == "__main__":
    main()
