"""The step benchmark: what it feeds, counts and refuses. Times are measured, never judged."""

import json
import re
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import step
from benchmarks.gpu import SHAPE_TINY as TINY
from benchmarks.step import DisagreementError, Measured, Row, draw
from judge.dense_baseline import DenseDraft
from judge.ranks import run_ranks
from judge.result_file import write_result
from judge.step_inputs import as_batch, make_model, make_pack, make_rows, map_rows


@pytest.fixture(scope="module")
def model():
    return make_model(TINY)


def test_every_slot_is_supervised_and_its_teacher_is_in_the_draft_vocabulary(model):
    pack = make_pack(model, 1500, make_rows(model, 1500))
    best = (pack.teacher @ model.frozen.head.T).argmax(-1)
    assert torch.equal(best, pack.teacher_token)
    draft_to_target = model.frozen.d2t + torch.arange(TINY.draft.draft_vocab_size)
    assert torch.isin(best, draft_to_target).all()
    assert pack.loss_mask.all()
    assert len(best.unique()) > 50


def test_mapped_rows_are_the_rows_and_are_written_once(model, tmp_path):
    mapped = map_rows(model, 1500, tmp_path, torch.bfloat16)
    for of_file, made in zip(mapped, make_rows(model, 1500), strict=True):
        assert torch.equal(of_file, made.bfloat16())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = map_rows(model, 1100, tmp_path, torch.bfloat16)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert torch.equal(again.teacher, mapped.teacher[:1100])


def test_flops_are_those_that_torch_counts(model):
    """The dense side's, but for what the product is spared: masked scores, the teacher's full vocabulary."""
    length, steps, width = 96, TINY.ttt_steps, TINY.draft.query_size
    batch = as_batch(make_pack(model, length, make_rows(model, length)))
    dense = DenseDraft(model.weights, TINY.config(), model.frozen, TINY.rules)
    with FlopCounterMode(display=False) as counter:
        dense.step(batch)
    causal_attention = 3.5 * 4 * width * steps * length * (length + 1) / 2
    full_attention = 3 * 4 * width * steps * length**2
    spared_head = 2 * length * TINY.draft.hidden_size * (TINY.draft.vocab_size - TINY.draft.draft_vocab_size)
    assert counter.get_total_flops() == TINY.flops(length) - causal_attention + full_attention + spared_head


def test_both_sides_are_measured_and_agree():
    """A whole small run, in the world of one rank that the command makes."""
    ((rows, record),) = run_ranks(1, step.run, TINY, (1100, 600), 2, "recompute", 600, (1.0, 0.25))
    assert [(row.length, row.supervised) for row in rows] == [
        (600, 1.0),
        (1100, 1.0),
        (600, 0.25),
        (1100, 0.25),
    ]
    assert rows[3].ours.peak_bytes < 0.5 * rows[1].ours.peak_bytes
    assert rows[3].flops < 0.4 * rows[1].flops
    assert record["largest_gradient_difference"] <= step.TOLERANCE
    assert record["dense_attention"]["chosen"] in record["dense_attention"]["seconds"]
    for row, written in zip(rows, record["rows"], strict=True):
        assert row.dense is not None
        assert row.ours.loss == pytest.approx(row.dense.loss, rel=1e-5)
        assert min(row.ours.seconds, row.dense.seconds, row.ours.optimizer_seconds) > 0
        assert min(row.ours.peak_bytes, row.dense.peak_bytes) > 0
        assert written["faster"] == row.dense.seconds / row.ours.seconds
        assert written["smaller"] == row.dense.peak_bytes / row.ours.peak_bytes
    json.dumps(record)


def row_at(length, dense_bytes=None, missing=None):
    ours = Measured(1.0, length / 1.0, 10**6, 2.0, 3.0)
    dense = dense_bytes and replace(ours, seconds=4.0, peak_bytes=dense_bytes)
    return Row(length, 10**9, 1e11, ours, 0.01, dense, missing)


def test_another_loss_or_gradient_fails():
    with pytest.raises(
        DisagreementError, match="64 slots: the loss is 2.1 here and 2.0 in the dense implementation"
    ):
        step._require_equal(64, {"loss": (2.1, 2.0)})
    with pytest.raises(DisagreementError, match="nan"):
        step._require_equal(64, {"loss": (float("nan"), 2.0)})


def test_a_dense_step_that_would_not_fit_is_left_out_with_its_size(monkeypatch):
    monkeypatch.setattr(step, "free_memory", lambda: 10 * 10**9)
    assert step._too_large(None, 1024) is None
    assert step._too_large(row_at(1024, 2 * 10**9), 2048) is None
    reason = step._too_large(row_at(1024, 3 * 10**9), 2048)
    assert reason == "needs about 12 GB, and 10 GB are free"
    assert step._too_large(row_at(2048, missing=reason), 4096) == reason


def test_the_picture_and_the_table_take_rows_without_a_dense_side(tmp_path, capsys):
    rows = [row_at(512, 8 * 10**6), row_at(2048, missing="needs about 12 GB, and 10 GB are free")]
    draw(rows, tmp_path / "new" / "step.png")
    assert (tmp_path / "new" / "step.png").read_bytes().startswith(b"\x89PNG")
    step.show(rows)
    printed = capsys.readouterr().out
    assert "4.0" in printed
    assert "needs about 12 GB" in printed


def test_a_result_says_how_and_where_it_was_measured(tmp_path):
    path = write_result(
        "result", "python -m benchmarks.step --rounds 2", {"rows": []}, tmp_path / "new", threads=3
    )
    assert path == tmp_path / "new" / "result.json"
    written = json.loads(path.read_text())
    assert written["command"] == "python -m benchmarks.step --rounds 2"
    assert written["machine"]["torch_threads"] == 3
    assert written["machine"]["cpu"]
    assert written["versions"]["torch"] == torch.__version__
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "arguments", [["--rounds", "0"], ["--lengths", "-5"], ["--supervised", "0"], ["--supervised", "1.5"]]
)
def test_senseless_numbers_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        step.main(arguments)
    assert re.search("must be positive|above 0 and up to 1", capsys.readouterr().err)
