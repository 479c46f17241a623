"""Every shipped DeepSpeed JSON trains four sequence-parallel ranks as the dense reference does."""

from dataclasses import replace
from pathlib import Path

import pytest

from judge.cases import Case
from judge.exactness import judge

pytestmark = pytest.mark.ranks
SHIPPED = sorted(path.stem for path in (Path(__file__).parents[2] / "ds_configs").glob("*.json"))
HYBRID = Case(ring=2, ulysses=2, deepspeed="zero3", accumulation=2, dtype="bfloat16")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_is_exact_under_sequence_parallelism(name):
    _assert_exact(replace(HYBRID, deepspeed=name))


@pytest.mark.parametrize("name", ["zero3_hpz", "zero3_offload"])
def test_what_the_matrix_does_not_show_is_exact_in_fp32_too(name):
    _assert_exact(replace(HYBRID, deepspeed=name, dtype="float32"))


def test_offload_is_exact_when_zero_shards_over_draft_dp_only():
    _assert_exact(
        replace(HYBRID, draft_dp=2, ring=1, deepspeed="zero3_offload", zero_group="draft_dp", dtype="float32")
    )


def _assert_exact(case):
    verdict = judge(case)
    assert verdict.passed, verdict.failure or verdict.line()
