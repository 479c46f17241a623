"""The counted step: what is counted against figures worked out by hand and against the planner."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import device_step
from benchmarks.device_step import Step, count_step
from benchmarks.gpu import SHAPE_TINY
from eagle3_ds.kernels.tile import Tile
from eagle3_ds.losses.kl import KL
from eagle3_ds.plan import DEVICES, attention_traffic, step_flops
from eagle3_ds.plan.devices import estimates
from eagle3_ds.train.spans import plan_spans
from judge.device_counts import DEVICE, DeviceCounts, Launch
from judge.pretend_device import pretend_cuda, visible_pairs
from judge.step_inputs import answers_mask

H200 = DEVICES["H200"]
LONG = Step(SHAPE_TINY, 2048)


def total(counts: DeviceCounts):
    return counts.amount(H200, estimates(H200))


def only(counts: DeviceCounts) -> Launch:
    ((launch, times),) = counts.launches.items()
    assert times == 1
    return launch


@pytest.mark.parametrize(
    "step",
    [LONG, replace(LONG, supervised=0.25), replace(LONG, ring=2, ulysses=2)],
    ids=["one rank", "a quarter supervised", "ring 2 x ulysses 2"],
)
def test_products_are_those_of_the_planner(step):
    counted, setup = total(count_step(step)), step.setup()
    # Where the supervised tokens are; `attention_pairs` spreads them evenly.
    mask = answers_mask(step.length, step.supervised)
    pairs = int(plan_spans(step.recipe(), (step.length,), mask).ring_work()[0])
    planned = step_flops(setup, pairs)
    products = planned.layers + planned.recompute + planned.loss
    assert counted.matmul_flops == pytest.approx(products, rel=0.01)
    attention = planned.attention_forward + planned.attention_backward
    assert counted.attention_flops == pytest.approx(attention, rel=1e-3)


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2), (2, 2)])
def test_exchanges_are_those_of_the_planner(mesh):
    ring, ulysses = mesh
    step = replace(LONG, ring=ring, ulysses=ulysses)
    counts = count_step(step)
    reported = {"inputs", "report"}
    calls = [one for one in counts.launches.elements() if one.kind == "exchange" and one.part not in reported]
    # Two calls over the world are not the attention's: the sum of the normalizer, and the gathered report,
    # two fp32 numbers for each of six sums per guess and for the tokens.
    traffic = attention_traffic(step.setup())
    assert [one.operator for one in calls].count("allreduce_") == 1
    assert len(calls) - 2 == sum(one.calls for one in traffic)
    report = 2 * 4 * (6 * SHAPE_TINY.ttt_steps + 1) * (ring * ulysses - 1)
    sent = sum(one.linked for one in calls if one.operator != "allreduce_") - report
    assert sent == pytest.approx(sum(one.sent for one in traffic), abs=len(calls))


def test_rooflines_are_the_counts_over_each_devices_own_peaks():
    counts = count_step(LONG)
    found = device_step.rooflines(counts)
    assert set(found) == set(DEVICES)
    assert found["H200"]["all"] == pytest.approx(total(counts).peak_seconds, abs=1e-4)
    for of_device in found.values():
        parts = sum(seconds for part, seconds in of_device.items() if part != "all")
        assert parts == pytest.approx(of_device["all"], abs=1e-3)


def test_one_document_is_one_call_of_the_kernel_for_each_step_of_the_unrolling():
    """Without a window, and short enough for one block of keys in backward."""
    calls = device_step.attention_calls(count_step(LONG))
    assert calls == dict.fromkeys(("attention forward", "attention backward"), SHAPE_TINY.ttt_steps)


def test_smaller_tiles_launch_more_and_compute_the_same():
    shape = SHAPE_TINY.draft
    per_slot = (7 * shape.intermediate_size + 8 * shape.hidden_size) * 2
    whole, halves = (
        count_step(replace(LONG, tile_bytes=slots * per_slot)) for slots in (LONG.length, LONG.length // 2)
    )
    assert total(halves).launches > total(whole).launches
    # The loss has one tile more, which computes the K - 1 teacher rows between the two once more.
    tiles = [operators(counts)["loss", "fused_kl"] // SHAPE_TINY.ttt_steps for counts in (whole, halves)]
    again = 2 * (SHAPE_TINY.ttt_steps - 1) * shape.hidden_size * shape.draft_vocab_size
    assert tiles[0] < tiles[1]
    assert total(halves).matmul_flops == total(whole).matmul_flops + (tiles[1] - tiles[0]) * again
    # The backward after the attention runs its fused activation once per tile and step.
    assert operators(whole)["layers, backward", "silu_backward"] == SHAPE_TINY.ttt_steps
    assert operators(halves)["layers, backward", "silu_backward"] == 2 * SHAPE_TINY.ttt_steps


def operators(counts: DeviceCounts) -> dict[tuple[str, str], int]:
    found: dict[tuple[str, str], int] = {}
    for one, times in counts.launches.items():
        found[one.part, one.operator] = found.get((one.part, one.operator), 0) + times
    return found


def test_a_step_starts_the_kernels_of_a_gpu_and_reads_the_rows_from_the_host():
    counts = count_step(LONG)
    found, steps = operators(counts), SHAPE_TINY.ttt_steps
    assert found["attention", "_flash_attention_forward"] == steps
    assert found["attention", "_flash_attention_backward"] == steps
    assert found["attention", "fused_merge"] == found["attention", "fused_merge_backward"] == steps - 1
    assert set(counts.parts()) == {
        "inputs", "layers, forward", "layers, backward", "attention", "loss", "report", "other"
    }  # fmt: skip
    # Three layers' rows in forward and again in backward, the teacher's once, bf16.
    rows = LONG.length * SHAPE_TINY.draft.hidden_size * 2 * (3 + 3 + 1)
    assert rows < total(counts).host_bytes < 1.2 * rows
    parts = [counts.amount(H200, estimates(H200), part) for part in counts.parts()]
    assert sum(part.launches for part in parts) == total(counts).launches
    assert sum(part.peak_seconds for part in parts) == pytest.approx(total(counts).peak_seconds)


def test_views_allocations_empty_results_and_copies_onto_themselves_launch_nothing():
    x = torch.empty(8, 4, device=DEVICE)
    with DeviceCounts() as counts:
        torch.empty_like(x)
        x[2:4].T.unflatten(1, (1, 2)).expand(4, 3, 2)
        x[:0] + x[:0]
        x[2:4] = x[2:4]
    assert not counts.launches
    with counts:
        x[2:4] = x[4:6]
    assert only(counts) == Launch("other", "copy_", "memory", moved=2 * 8 * 4)


@pytest.mark.parametrize(
    ("work", "moved"),
    [
        (lambda x, rows: x * x[:1], (32 + 4 + 32) * 4),
        (lambda x, rows: x * x[:1].expand(8, 4), (32 + 4 + 32) * 4),
        (lambda x, rows: x.mul_(2), (32 + 32) * 4),
        (lambda x, rows: x.zero_(), 32 * 4),
        (lambda x, rows: torch.mul(x, 2, out=torch.empty_like(x)), (32 + 32) * 4),
        (lambda x, rows: torch.nn.functional.embedding(rows, x), (12 + 12) * 4 + 3 * 8),
        (lambda x, rows: x[rows], (12 + 12) * 4 + 3 * 8),
        (lambda x, rows: x.to(torch.bfloat16), 32 * 4 + 32 * 2),
    ],
)
def test_bytes_of_one_launch(work, moved):
    x = torch.empty(8, 4, device=DEVICE)
    rows = torch.empty(3, dtype=torch.int64, device=DEVICE)
    with DeviceCounts() as counts:
        work(x, rows)
    assert (only(counts).kind, only(counts).moved, only(counts).flops) == ("memory", moved, 0)


def test_products_that_add_to_an_fp32_sum():
    a = torch.empty(8, 16, dtype=torch.bfloat16, device=DEVICE)
    sums = torch.empty(8, 8, device=DEVICE)
    with DeviceCounts() as counts:
        torch.addmm(sums, a, a.T, out_dtype=torch.float32, out=sums)
    assert only(counts) == Launch("other", "addmm", "matmul", 2 * 8 * 8 * 16, 2 * 128 * 2 + 2 * 64 * 4)


def test_copies_from_the_host_and_back():
    with DeviceCounts() as counts:
        there = torch.zeros(5, dtype=torch.float64).to(DEVICE)
    assert only(counts) == Launch("other", "_to_copy", "host", linked=40)
    with DeviceCounts() as counts:
        assert there.cpu().tolist() == [0.0] * 5
    assert only(counts) == Launch("other", "_to_copy", "host", linked=40)


def test_the_loss_kernel_reads_logits_and_target_twice():
    logits = torch.empty(3, 32, dtype=torch.bfloat16, device=DEVICE)
    target, weight = torch.empty(3, 32, device=DEVICE), torch.empty(3, device=DEVICE)
    counts = DeviceCounts()
    with counts, pretend_cuda(counts):
        kernel = KL().fused(logits)
        assert kernel is not None
        kernel(logits, target, weight, torch.empty_like(logits))
    statistics = 3 * (4 + 4 + 4 + 8)
    assert only(counts).moved == 2 * 96 * 2 + 2 * 96 * 4 + 96 * 2 + statistics
    assert KL().fused(logits) is None  # Outside, the device is what it is.


def test_seconds_take_the_larger_of_operations_and_bytes():
    product = Launch("", "mm", "matmul", flops=989 * 10**12, moved=1)
    assert product.seconds(H200) == pytest.approx(1.0)
    assert product.seconds(H200, estimates(H200)) == pytest.approx(1 / estimates(H200).matmul)
    assert product._replace(moved=2 * 4800 * 10**9).seconds(H200) == pytest.approx(2.0)
    assert Launch("", "copy_", "host", linked=55 * 10**9).seconds(H200) == pytest.approx(1.0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("left", [None, 0, 3, 40])
def test_visible_pairs_are_those_of_the_mask(causal, left):
    tile = Tile(2, 9, 1, 21, causal, left)
    own = torch.arange(7)[:, None] + 13
    keys = torch.arange(20)[None, :]
    seen = torch.ones(7, 20, dtype=torch.bool)
    if causal:
        seen &= keys <= own
    if left is not None:
        seen &= keys >= own - left
    assert visible_pairs(tile) == int(seen.sum())


def test_the_command_prints_and_writes(tmp_path, capsys):
    assert device_step.main(["--length", "64", "--device", "H100", "--folder", str(tmp_path)]) == 0
    assert "64 slots, 100% supervised" in capsys.readouterr().out
    (written,) = json.loads((tmp_path / "device_step.json").read_text())["steps"]
    assert written["step"] == {
        "length": 64, "supervised": 1.0, "ring": 1, "ulysses": 1, "tile_bytes": device_step.TILE_BYTES
    }  # fmt: skip
    assert written["total"]["launches"] == sum(part["launches"] for part in written["parts"].values())
    assert "optimizer" not in written["planned_seconds"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--length", "0"], "--length [0]"),
        (["--ring", "0"], "--ring 0"),
        (["--ulysses", "3"], "--ulysses 3 must divide the 8 key heads"),
        (["--supervised", "0"], "--supervised 0.0: give a share"),
        (["--device", "B1"], "--device"),
    ],
)
def test_bad_options_are_refused(given, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        device_step.main(given)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
