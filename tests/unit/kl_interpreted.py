"""The fused soft cross entropy in Triton's interpreter, on the CPU. A program of its own: TRITON_INTERPRET=1
is read at import.
"""

from __future__ import annotations

import torch

from eagle3_ds.losses.kl_triton import fused_kl
from tests.unit.kl_checks import CASES, check_kl


def main() -> None:
    for name, case in CASES.items():
        for dtype in (torch.float32, torch.bfloat16):
            check_kl(case, "cpu", dtype, fused_kl)
            print(f"{name}, {dtype}: right")


if __name__ == "__main__":
    main()
