"""`kv_exchange: auto` follows the bytes that gathering would take."""

from dataclasses import replace

import pytest

from eagle3_ds.algorithms.eagle3 import Eagle3Shape
from eagle3_ds.attention.costs import choose_kv_exchange
from eagle3_ds.costs import Setup

LLAMA_8B = Eagle3Shape(4096, 14336, 32, 8, 128, 128256, 32000)
# Seven other ring ranks' share of 128k tokens of 8 heads of 128: keys and values, bf16, with gradients in
# fp32.
OTHERS = 7 * (131072 // 8) * 2 * 1024 * (2 + 4)


@pytest.mark.parametrize(("kv_bytes", "choice"), [(OTHERS, "gather"), (OTHERS - 1, "ring"), (0, "ring")])
def test_auto_gathers_what_the_limit_holds(kv_bytes, choice):
    setup = Setup(LLAMA_8B, length=131072, ring=8, kv_bytes=kv_bytes)
    assert choose_kv_exchange(setup) == choice
    assert choose_kv_exchange(replace(setup, ring=1)) == "gather"
