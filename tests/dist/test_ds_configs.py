"""Every shipped DeepSpeed JSON trains on four ranks under sequence parallelism as the dense reference does."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.exactness import judge
from benchmarks.exactness_cases import Case

pytestmark = pytest.mark.dist
SHIPPED = sorted(path.stem for path in (Path(__file__).parents[2] / "ds_configs").glob("*.json"))
HYBRID = Case(
    draft_dp=1,
    ring=2,
    ulysses=2,
    deepspeed="zero3",
    zero_group="all",
    accumulation=2,
    documents="many_unaligned",
    heads="gqa",
    kv_exchange="gather",
    ttt_steps=3,
    dtype="bfloat16",
    alignment="served",
    reduction="supervised",
    layers=1,
    activation="recompute",
    kernel="auto",
)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_is_exact_under_sequence_parallelism(name, dtype):
    verdict = judge(replace(HYBRID, deepspeed=name, dtype=dtype))
    assert verdict.passed, verdict.failure or verdict.line()


@pytest.mark.parametrize("name", [name for name in SHIPPED if name != "zero3_hpz"])
def test_a_shipped_config_is_exact_when_zero_shards_over_draft_dp_only(name):
    verdict = judge(replace(HYBRID, draft_dp=2, ring=1, deepspeed=name, zero_group="draft_dp", dtype="float32"))
    assert verdict.passed, verdict.failure or verdict.line()
