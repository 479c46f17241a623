"""The benchmark of a long step, on a short one: what it passes, and what it must not pass."""

import copy
import json
from itertools import accumulate

import numpy as np
import pytest

from benchmarks import long_step
from benchmarks.long_step import FIGURES, document_lengths, errors_of_guesses, expect, make_run, problems
from eagle3_ds.train.trainer import StepReport
from judge.long_run import Guesses, RankRecord, sample_mask, sampled_slots

pytestmark = pytest.mark.ranks
LENGTH = 12_288
"""The shortest whose longest document fills a block of the attention's backward, as the planner assumes."""


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Exit status and record of a whole run on ring 2 x ulysses 2."""
    path = tmp_path_factory.mktemp("long-step") / "short.json"
    status = long_step.main(
        ["--tokens", str(LENGTH), "--supervised", "0.5", "--clusters", "16", "--output", str(path)]
    )
    return status, json.loads(path.read_text())


def test_a_short_step_passes_every_check(judged):
    status, record = judged
    assert [row["problems"] for row in record["rows"]] == [[], []]
    assert status == 0 and record["passed"] == 2
    documents, one = record["rows"]
    assert len(documents["documents"]) == 8 and one["documents"] == [LENGTH]
    for row in record["rows"]:
        assert row["guesses"]["slots"] > 100 and min(row["guesses"]["slots_by_rank"]) > 5
        assert {"loss", "tau", "gradient of fc.weight", "gradient of layers.0.self_attn.k_proj.weight"} <= (
            row["sampled"].keys()
        )
        assert row["wire"]["counted"] == [row["wire"]["predicted"]] * 4
        assert 0 < row["share_of_matmul_rate"] < 1


FAULTS = {
    "bytes": (("bytes", "ratio", "peak"), 1.2, "peak bytes: predicted / counted is 1.2"),
    "wire": (("wire", "equal"), False, "calls or bytes on the wire"),
    "loss of one guess": (("guesses", "largest_error_of_a_loss"), 2e-5, "largest_error_of_a_loss: 2.0e-05"),
    "no number": (("guesses", "error_of_losses"), float("nan"), "error_of_losses: nan"),
    "gradient": (("sampled", "gradient of norm.weight"), 1e-3, "gradient of norm.weight: 1.0e-03"),
    "idle rank": (("guesses", "slots_by_rank"), [200, 0, 9, 9], "too few sampled slots"),
    "other guesses": (("guesses", "same_guesses_count"), False, "other guesses are in the loss"),
    "ranks": (("reports_agree",), False, "the ranks report different figures"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_off_is_named(judged, name):
    (*place, key), value, message = FAULTS[name]
    row = copy.deepcopy(judged[1]["rows"][0])
    part = row
    for step in place:
        part = part[step]
    part[key] = value
    (problem,) = problems(row)
    assert message in problem


def test_the_exit_status_is_one_when_the_step_is_off(monkeypatch, tmp_path):
    """The reference of another draft: everything but bytes and calls must be found wrong."""

    def of_another(runs, clusters):
        with monkeypatch.context() as patched:
            patched.setattr("judge.long_run.SHARPNESS", 1.6001)
            return expect(runs, clusters)

    monkeypatch.setattr(long_step, "expect", of_another)
    path = tmp_path / "off.json"
    assert long_step.main(["--tokens", "2048", "--supervised", "1", "--output", str(path)]) == 1
    record = json.loads(path.read_text())
    assert record["passed"] == 0
    for row in record["rows"]:
        found = " ".join(row["problems"])
        assert "largest_error_of_a_loss" in found and "gradient of layers.0.self_attn.q_proj" in found


def test_slots_are_sampled_at_every_border():
    lengths = document_lengths(LENGTH)
    runs = [make_run(LENGTH, share, lengths) for share in (0.25, 1.0)]
    mask = sample_mask(runs, 16)
    chosen = set(sampled_slots(runs[0], mask).tolist())
    ends = list(accumulate(lengths))
    steps = runs[0].ttt_steps
    for length, end in zip(lengths, ends, strict=True):
        # The last slot of a document reads nothing inside, the one before it does.
        assert end - 1 not in chosen
        assert length == 1 or end - 2 in chosen
    assert ends[0] in chosen
    for run in runs:
        owner = run.owners()
        live = np.flatnonzero(owner >= 0)
        borders = live[:-1][owner[live[1:]] != owner[live[:-1]]]
        assert len(borders) >= 6
        near = [any(slot in chosen for slot in range(border - steps, border + steps)) for border in borders]
        assert all(near)


def record_of(guesses, step_loss):
    report = StepReport(1.0, step_loss, (0.0,) * 3, 1.0, 1.0, 2048)
    return RankRecord(report, {}, report, guesses, 1.0, 1, 1, {})


def test_a_tap_that_is_not_the_reported_loss_is_seen():
    run = make_run(2048, 1.0, None)
    slots = expect([run], 8).slots
    covered = (slots.supervised(run.loss_mask(), "served") & slots.covered).numpy()
    value = slots.value.detach().numpy().copy()
    guesses = Guesses(slots.slots.numpy(), value, slots.accepted.numpy(), covered)
    mean = np.where(covered, value, 0).sum(1) / covered.sum(1)

    def found(step_loss):
        return errors_of_guesses(run, [record_of(guesses, tuple(step_loss.tolist()))], slots)

    right = found(mean)
    assert right["error_of_the_reported_loss"] <= 1e-7 and right["largest_error_of_a_loss"] == 0
    assert right["same_guesses_count"] and right["guesses"] == covered.sum()
    assert found(1.0001 * mean)["error_of_the_reported_loss"] > 1e-5
    first = tuple(np.argwhere(covered)[0])
    value[first] *= 1.001
    assert found(mean)["largest_error_of_a_loss"] > 1e-4
    covered[first] = False
    assert not found(mean)["same_guesses_count"]


def test_what_cannot_be_asked_for_is_refused(capsys):
    for words, message in ((["--tokens", "512"], "2048 or more"), (["--supervised", "2"], "up to 1")):
        with pytest.raises(SystemExit):
            long_step.main(words)
        assert message in capsys.readouterr().err


def test_every_figure_of_the_report_is_compared():
    assert set(FIGURES) == StepReport.__dataclass_fields__.keys() - {"tokens"}
