"""The planner's formulas: against the model, the span plan and figures worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagle3_ds.algorithms.eagle3 import DraftModel, Eagle3Shape, build_draft_config
from eagle3_ds.attention.costs import (
    choose_kv_exchange,
)
from eagle3_ds.config import DraftSection, load_recipe
from eagle3_ds.costs import Setup, ZeroSettings
from eagle3_ds.kernels.cpu import CpuKernel
from eagle3_ds.kernels.cuda import CudaKernel
from eagle3_ds.kernels.cudnn import CudnnKernel
from eagle3_ds.kernels.npu import NpuKernel
from eagle3_ds.layout import SpanPlan
from eagle3_ds.plan import (
    DEVICES,
    attention_pairs,
    attention_traffic,
    explain_shortage,
    fastest,
    helpful_changes,
    largest_length,
    predict_memory,
    predict_time,
    state_traffic,
    step_flops,
)

ROOT = Path(__file__).parents[2]
GIB = 2**30
SMALL = Eagle3Shape(64, 96, 4, 2, 16, 160, 128)
LLAMA_8B = Eagle3Shape(4096, 14336, 32, 8, 128, 128256, 32000)
NODE = Setup(LLAMA_8B, 131_072, ulysses=4, ring=2, zero=ZeroSettings(stage=2, overlap_comm=True))
FILES = {
    str(path): ZeroSettings.of(json.loads(path.read_text()))
    for path in sorted((ROOT / "ds_configs").glob("*.json"))
}


@pytest.mark.parametrize("layers", [1, 2])
def test_parameters_are_those_of_the_model(layers: int) -> None:
    from transformers import LlamaConfig

    target = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=160,
    )
    config = build_draft_config(target, DraftSection(vocab_size=128, num_layers=layers))
    shape = Eagle3Shape.of(config)
    assert shape == replace(SMALL, num_layers=layers, aux_size=3 * 64)
    assert sorted(shape.parameter_sizes) == sorted(p.numel() for p in DraftModel(config).parameters())


@given(
    st.integers(1, 5000), st.integers(1, 5), st.sampled_from([1, 2, 4]), st.integers(1, 8), st.floats(0, 1)
)
def test_slots_are_those_of_the_span_plan(
    length: int, ring: int, ulysses: int, chunks: int, supervised: float
) -> None:
    live = np.arange(length) < round(length * supervised)
    plan = SpanPlan.make([length], ring, ulysses, chunks, live)
    setup = Setup(SMALL, length, ring=ring, ulysses=ulysses, chunks_per_rank=chunks, supervised=supervised)
    assert (setup.slots, setup.columns, setup.padded_length, setup.live_slots) == (
        plan.slots_per_rank,
        plan.columns_per_ring_rank,
        plan.padded_length,
        plan.live_per_rank,
    )


def test_short_answers_cost_a_part_of_everything_but_the_prompts_keys() -> None:
    tenth = replace(NODE, supervised=0.1)
    whole, share = (step_flops(setup, attention_pairs(setup)) for setup in (NODE, tenth))
    assert share.loss == pytest.approx(0.1 * whole.loss, rel=0.01)
    assert share.attention_forward == pytest.approx(0.1 * whole.attention_forward, rel=0.01)
    assert share.total < 0.13 * whole.total
    saved = [predict_memory(setup).phases["loss"]["saved activations"] for setup in (NODE, tenth)]
    assert saved[1] < 0.17 * saved[0]
    sent = [sum(t.sent for t in attention_traffic(setup) if t.axis == "ulysses") for setup in (NODE, tenth)]
    assert sent[1] < 0.15 * sent[0]
    # A second layer makes its keys of what the first one gives at every slot.
    two_layers = replace(tenth, shape=replace(LLAMA_8B, num_layers=2))
    assert two_layers.live_slots == two_layers.slots


def test_zero_settings_of_the_shipped_files() -> None:
    by_name = {Path(file).stem: zero for file, zero in FILES.items()}
    assert [by_name[f"zero{stage}"].stage for stage in range(4)] == [0, 1, 2, 3]
    assert by_name["zero2"].overlap_comm and not by_name["zero1"].overlap_comm
    assert by_name["zero3_offload"].offload_optimizer and by_name["zero3_offload"].offload_parameters
    assert by_name["zero3_hpz"].secondary_partition == 2


def test_states_by_stage() -> None:
    """Bytes per parameter on 8 ranks in bf16: weights 2, masters 4, moments 8; ZeRO-3 shards the weights, and
    its gradients.
    """
    parameters = LLAMA_8B.num_parameters
    frozen = 2 * (128256 + 32000) * 4096
    expected = {0: 14.0, 1: 2 + 12 / 8, 2: 2 + 12 / 8, 3: 2 / 8 + 12 / 8 + 2 / 8}
    for stage, per_parameter in expected.items():
        zero = ZeroSettings(stage=stage, reduce_bucket=0, persistence_threshold=0)
        found = predict_memory(replace(NODE, zero=zero)).states
        assert found == pytest.approx(per_parameter * parameters + frozen, rel=1e-3), stage
        replicas = predict_memory(replace(NODE, zero=zero, zero_group="draft_dp")).states
        alone = {0: 14.0, 1: 14.0, 2: 14.0, 3: 16.0}[stage]
        assert replicas == pytest.approx(alone * parameters + frozen, rel=1e-3), stage


def test_memory_falls_with_more_ranks_and_with_what_is_not_kept() -> None:
    def peak(**changes: Any) -> int:
        return predict_memory(replace(NODE, **changes)).peak

    assert peak(ring=4) < peak() < peak(length=2 * NODE.length)
    assert peak(activation="offload") < peak() < peak(activation="keep")
    stashed = predict_memory(replace(NODE, activation="offload")).host["saved activations"]
    # Hidden state and attention's output of 7 steps, bf16.
    assert stashed == 7 * NODE.slots * (4096 + 4096) * 2


def test_no_term_grows_with_slots_times_vocabulary() -> None:
    short, long = (
        predict_memory(replace(NODE, length=length)).phases["loss"]["tile of the loss"]
        for length in (2**17, 2**20)
    )
    assert long - short < 0.01 * (2**20 - 2**17) // 8 * 32000 * 4


def test_a_step_of_the_8b_shape_takes_the_flops_of_the_design() -> None:
    alone = Setup(LLAMA_8B, 131_072, activation="keep")
    flops = step_flops(alone, attention_pairs(alone))
    assert flops.total == pytest.approx(5.5e15, rel=0.02)
    assert flops.recompute == 0
    with_recompute = step_flops(replace(alone, activation="recompute"), attention_pairs(alone))
    assert with_recompute.attention_forward == flops.attention_forward
    assert 0 < with_recompute.recompute < flops.layers / 3


def test_a_call_of_the_backward_has_as_many_rows_as_its_heads_leave_room_for() -> None:
    assert CpuKernel().backward_rows(4096) == 2**12
    # 32 heads of 128 channels, a quarter of them, 64 heads of 256, and one head.
    rows = {4096: 2**14, 1024: 2**16, 64 * 256: 2**12, 64: 2**18}
    for kernel in (CudaKernel(), CudnnKernel(), NpuKernel()):
        assert {size: kernel.backward_rows(size) for size in rows} == rows


def test_ranks_share_the_flops_evenly() -> None:
    alone = Setup(LLAMA_8B, 131_072)
    whole, share = (step_flops(setup, attention_pairs(setup)).total for setup in (alone, NODE))
    assert share == pytest.approx(whole / 8, rel=0.01)


def test_packed_documents_cost_less_attention_than_one() -> None:
    assert attention_pairs(NODE, [16_384] * 8) == pytest.approx(attention_pairs(NODE) / 8, rel=0.01)


def test_a_window_makes_attention_grow_with_the_length_alone() -> None:
    windowed = replace(NODE, window=4096)
    # All but the first rows see a whole window; the ring's ranks share them evenly.
    assert attention_pairs(windowed) == pytest.approx(131_072 * 4096 / 2, rel=0.03)
    assert (
        step_flops(windowed, attention_pairs(windowed)).attention_forward
        < 0.07 * step_flops(NODE, attention_pairs(NODE)).attention_forward
    )


def test_time_counts_slow_links_between_nodes() -> None:
    pairs = attention_pairs(NODE)
    one_node = predict_time(NODE, DEVICES["H100"], pairs, ranks_per_node=8)
    across = predict_time(NODE, DEVICES["H100"], pairs, ranks_per_node=4)
    assert across.parts["ring exchange"] > 3 * one_node.parts["ring exchange"]
    assert across.parts["ulysses exchange"] == one_node.parts["ulysses exchange"]
    assert one_node.tokens == 131_072
    assert one_node.tokens_per_second == pytest.approx(131_072 / one_node.seconds)


def test_streaming_keeps_as_many_blocks_as_fit() -> None:
    setup = Setup(SMALL, 4096, ring=4, kv_exchange="ring", kv_bytes=0, dtype="float32")
    block = 1024 * 2 * 32
    calls = {}
    for kept in (1, 2, 4):
        traffic = attention_traffic(replace(setup, kv_bytes=(kept - 1) * block * 8))[0]
        calls[kept] = traffic.calls
    # K = 7. Step 0 sends 3 blocks; each of the 13 other passes those not kept; their gradients follow in 7;
    # kept ones in 3.
    assert calls == {1: 3 + 13 * 3 + 7 * 3, 2: 3 + 13 * 2 + 7 * 2 + 3, 4: 3 + 0 + 0 + 3}


def test_auto_gathers_what_fits() -> None:
    others = (NODE.ring - 1) * NODE.columns * 2 * (1024 // 4) * (2 + 4)
    assert choose_kv_exchange(replace(NODE, kv_bytes=others)) == "gather"
    assert choose_kv_exchange(replace(NODE, kv_bytes=others - 1)) == "ring"
    assert choose_kv_exchange(replace(NODE, ring=1, kv_bytes=0)) == "gather"


def test_zero_moves_weights_and_gradients() -> None:
    weights = LLAMA_8B.num_parameters * 2

    def moved(stage: int, **changes: Any) -> dict[str, int]:
        setup = replace(NODE, zero=ZeroSettings(stage=stage), **changes)
        return {f"{t.axis} {t.kind}": t.payload for t in state_traffic(setup)}

    assert moved(0) == {"zero all_reduce": weights}
    assert moved(2) == {"zero reduce_scatter": weights, "zero all_gather": weights // 8}
    assert moved(3, accumulation=2) == {
        "zero reduce_scatter": 2 * weights,
        "zero all_gather": 4 * weights // 8,
    }
    assert moved(2, zero_group="draft_dp") == {"sp all_reduce": weights}


def test_the_largest_length_is_the_largest() -> None:
    budget = 80 * GIB
    length = largest_length(NODE, budget)
    assert length % 1024 == 0
    assert (
        predict_memory(replace(NODE, length=length)).peak
        <= budget
        < predict_memory(replace(NODE, length=length + 1024)).peak
    )
    assert largest_length(NODE, 2**20) == 0


def test_the_fastest_fit_and_use_all_ranks() -> None:
    found = fastest(NODE, 8, 40 * GIB, DEVICES["H100"], FILES)
    assert found
    for candidate in found:
        assert candidate.setup.world_size == 8
        assert candidate.setup.ulysses in (1, 2, 4, 8)
        assert candidate.memory.peak <= 40 * GIB
    rates = [candidate.time.tokens_per_second for candidate in found]
    assert rates[0] > 0.99 * max(rates)
    assert fastest(NODE, 8, GIB, DEVICES["H100"], FILES) == []


def test_six_heads_take_no_ulysses_of_eight() -> None:
    shape = replace(LLAMA_8B, num_heads=36, num_kv_heads=6)
    found = fastest(
        replace(NODE, shape=shape), 8, 80 * GIB, DEVICES["H100"], {"zero2": ZeroSettings(stage=2)}
    )
    assert {candidate.setup.ulysses for candidate in found} == {1, 2}


def test_a_shortage_names_the_bytes_and_the_three_settings_that_help_most(tmp_path: Path) -> None:
    recipe_path = ROOT / "recipes" / "llama3.1-8b_128k_usp.yaml"
    setup = replace(NODE, activation="keep", length=2**20)
    peak = predict_memory(setup).peak
    text = explain_shortage(setup, 40 * GIB, FILES)
    assert f"{peak} bytes" in text and str(40 * GIB) in text
    changes = helpful_changes(setup, FILES)
    assert len(changes) == 3
    assert [c.saved for c in changes] == sorted((c.saved for c in changes), reverse=True)
    assert changes[0].overrides == "train.activation=offload"
    for change in changes:
        assert change.overrides in text
        # What is suggested can be pasted.
        assert load_recipe(recipe_path, change.overrides.split()) != load_recipe(recipe_path)


def test_where_nothing_helps_more_ranks_are_named() -> None:
    least = Setup(SMALL, 1, ttt_steps=1, activation="offload", zero=ZeroSettings(stage=1, reduce_bucket=0))
    assert helpful_changes(least, {}) == []
    assert "use more ranks" in explain_shortage(least, 1, {})


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        ({"stage": 3, "param_persistence_threshold": 7}, {"persistence_threshold": 7, "overlap_comm": True}),
        ({"stage": 3, "stage3_param_persistence_threshold": 7.0}, {"persistence_threshold": 7}),
        ({"stage": 3, "overlap_comm": None}, {"overlap_comm": True}),
        ({"stage": 2, "overlap_comm": None, "offload_optimizer": None}, {"overlap_comm": False}),
        ({"stage": 2, "offload_optimizer": {"device": None}}, {"offload_optimizer": False}),
        ({"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 1.0}}, {"offload_optimizer": True}),
        ({"stage": 2.0, "reduce_bucket_size": 5e8}, {"stage": 2, "reduce_bucket": 500_000_000}),
    ],
)
def test_zero_settings_are_seen_by_every_name_that_passes(
    zero: dict[str, object], expected: dict[str, object]
) -> None:
    settings = ZeroSettings.of({"zero_optimization": zero})
    assert {name: getattr(settings, name) for name in expected} == expected
