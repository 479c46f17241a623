"""The block step benchmark without the other packages: what it feeds, how losses are compared, what it
refuses. `tests/served/test_block_step.py` runs it beside them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from benchmarks import block_step
from benchmarks.block_step import DisagreementError, Measured, Row, cases_of, require_close, show, too_large
from judge.block_peers import _every_guess
from judge.block_steps import (
    MASK_TOKEN,
    Pair,
    Sizes,
    StepCase,
    StepInputs,
    comparable,
    for_peer,
    make_inputs,
    make_model,
)
from judge.dense_reference import LossRules, MicroBatch
from judge.dflash_reference import block_logits, dflash_step
from judge.peagle_reference import peagle_guesses, peagle_step
from judge.peer_process import Peer, PeerError

TINY = Sizes(
    hidden=64, inner=96, heads=4, kv_heads=2, head_dim=16, vocabulary=160, draft_vocabulary=128, block=5,
    dflash_layers=2, dflash_captured=5, guesses=3,
)  # fmt: skip
DFLASH, SPECFORGE, PEAGLE = (
    Pair("speculators", "dflash"),
    Pair("specforge", "dflash"),
    Pair("speculators", "peagle"),
)


def as_batch(inputs: StepInputs) -> MicroBatch:
    pack = inputs.pack
    assert isinstance(pack.aux, torch.Tensor) and isinstance(pack.teacher, torch.Tensor)
    return MicroBatch(pack.token_ids, pack.loss_mask, pack.lengths, pack.aux, pack.teacher, pack.anchors)


def test_the_factor_leads_from_the_products_dflash_loss_to_that_of_speculators():
    """Written out here as one mean of divergences, each weighted by its guess."""
    model = make_model(DFLASH, TINY)
    inputs = make_inputs(model, StepCase(60, 12))
    batch = as_batch(inputs)
    rules = LossRules(4, 0.8, "predicted", "slots")
    ours = dflash_step(model.weights, model.config, model.frozen, [batch], rules).loss
    assert batch.anchors is not None
    slots = batch.anchors.nonzero()[:, 0]
    drafted = block_logits(model.weights, model.config, model.frozen, batch, slots)[:, 1:].log_softmax(-1)
    teacher = (batch.teacher[slots[:, None] + 1 + torch.arange(4)] @ model.frozen.head[model.kept].T).softmax(
        -1
    )
    divergence = functional.kl_div(drafted, teacher, reduction="none").sum(-1)
    theirs = float((divergence * 0.8 ** torch.arange(4)).sum() / (12 * 4))
    way = comparable(model, inputs)
    assert way.entropy > 0.1
    assert ours * way.factor - way.entropy == pytest.approx(theirs, rel=1e-5)


def test_the_factor_leads_from_the_products_dflash_loss_to_that_of_specforge():
    """The cross entropy of the text, by the sum of weights."""
    model = make_model(SPECFORGE, TINY)
    inputs = make_inputs(model, StepCase(60, 12))
    batch = as_batch(inputs)
    assert len(model.kept) == TINY.vocabulary
    rules = LossRules(4, 0.8, "predicted", "slots")
    ours = dflash_step(model.weights, model.config, model.frozen, [batch], rules).loss
    assert batch.anchors is not None
    slots, weight = batch.anchors.nonzero()[:, 0], 0.8 ** torch.arange(4)
    drafted = block_logits(model.weights, model.config, model.frozen, batch, slots)[:, 1:]
    text = batch.token_ids[slots[:, None] + 2 + torch.arange(4)]
    entropy = functional.cross_entropy(drafted.flatten(0, 1), text.flatten(), reduction="none")
    theirs = float((entropy.view(12, 4) * weight).sum() / (12 * weight.sum()))
    assert ours * comparable(model, inputs).factor == pytest.approx(theirs, rel=1e-5)


def test_the_factor_leads_from_the_products_peagle_loss_to_that_of_speculators():
    """One mean over all guesses of which each is in the document."""
    model = make_model(PEAGLE, TINY)
    inputs = make_inputs(model, StepCase(40))
    batch = as_batch(inputs)
    rules = LossRules(3, 1.0, "served", "slots")
    ours = peagle_step(model.weights, model.config, model.frozen, [batch], rules).loss
    slots, guesses = _every_guess(39, 3)
    logits = torch.stack(peagle_guesses(model.weights, model.config, model.frozen, batch, 3))
    teacher = (batch.teacher[slots + 1 + guesses] @ model.frozen.head[model.kept].T).softmax(-1)
    drafted = logits[guesses, slots].log_softmax(-1)
    theirs = float(functional.kl_div(drafted, teacher, reduction="none").sum(-1).mean())
    way = comparable(model, inputs)
    assert ours * way.factor - way.entropy == pytest.approx(theirs, rel=1e-5)


def test_texts_hold_no_mask_and_anchors_have_whole_blocks():
    model = make_model(DFLASH, TINY)
    inputs = make_inputs(model, StepCase(60, 55))
    pack = inputs.pack
    assert not (pack.token_ids == MASK_TOKEN).any()
    assert torch.isin(pack.token_ids, model.kept).all()
    assert torch.equal(pack.teacher_token[:-1], pack.token_ids[1:])
    assert pack.anchors is not None
    assert pack.anchors.nonzero()[:, 0].tolist() == list(range(55))
    asked = for_peer(model, inputs)
    assert asked["anchors"].tolist() == list(range(55))
    assert asked["guesses"] == 4 and asked["layer"]["num_hidden_layers"] == 2
    with pytest.raises(ValueError, match="56 anchors in 60 tokens: a document has room for 55"):
        make_inputs(model, StepCase(60, 56))


def test_every_guess_of_a_short_document():
    slots, guesses = _every_guess(3, 3)
    assert slots.tolist() == [0, 1, 2, 0, 1, 0]
    assert guesses.tolist() == [0, 0, 0, 1, 1, 2]


def test_cases_are_in_the_order_in_which_memory_is_foreseen():
    assert cases_of(DFLASH, (8, 4), (2, 1)) == [
        StepCase(4, 1), StepCase(4, 2), StepCase(8, 1), StepCase(8, 2),
    ]  # fmt: skip
    assert cases_of(PEAGLE, (8, 4), (2,)) == [
        StepCase(4), StepCase(8), StepCase(4, drawn=True), StepCase(8, drawn=True),
    ]  # fmt: skip


def row_of(case: StepCase, their_bytes: int | None = 10**6, missing: str | None = None) -> Row:
    ours = Measured(1.0, 10**6, 2.0)
    theirs = None if their_bytes is None else replace(ours, seconds=4.0, peak_bytes=their_bytes)
    return Row(PEAGLE if case.anchors is None else DFLASH, case, ours, theirs, missing, 3e-7)


def test_a_step_of_the_other_side_that_would_not_fit_is_left_out_with_its_size(monkeypatch):
    monkeypatch.setattr(block_step, "free_memory", lambda: 10 * 10**9)
    assert too_large(None, StepCase(4096)) is None
    assert too_large(row_of(StepCase(2048), 2 * 10**9), StepCase(4096)) is None
    reason = too_large(row_of(StepCase(2048), 3 * 10**9), StepCase(4096))
    assert reason == "needs about 12 GB, and 10 GB are free"
    left_out = row_of(StepCase(4096), None, reason)
    assert too_large(left_out, StepCase(8192)) == reason
    assert too_large(left_out, StepCase(2048, drawn=True)) is None
    assert too_large(row_of(StepCase(2048, 128), 10**9), StepCase(2048, 512)) is None
    assert too_large(row_of(StepCase(2048, 128), 2 * 10**9), StepCase(2048, 512)) is not None


def test_the_table_and_the_record_say_how_many_times(capsys):
    rows = [row_of(StepCase(2048, 128), 8 * 10**6), row_of(StepCase(4096), None, "needs about 12 GB")]
    show(rows)
    printed = capsys.readouterr().out
    assert "128 anchors" in printed and "8.0" in printed and "3e-07" in printed
    assert "needs about 12 GB" in printed
    written = [row.as_dict() for row in rows]
    assert (written[0]["faster"], written[0]["smaller"]) == (4.0, 8.0)
    assert (written[1]["faster"], written[1]["missing"]) == (None, "needs about 12 GB")
    json.dumps(written)


@pytest.mark.parametrize("theirs", [2.1, float("nan")])
def test_another_loss_fails(theirs):
    assert require_close("the loss", 2.00001, 2.0) == pytest.approx(5e-6)
    with pytest.raises(DisagreementError, match="the loss is 2.0 here and"):
        require_close("the loss", 2.0, theirs)


def test_a_process_without_the_package_says_so(tmp_path):
    """By this Python, which has none of the packages."""
    with Peer(sys.executable, "no_such_package", 1, tmp_path / "log") as peer:
        with pytest.raises(PeerError, match="PackageNotFoundError"):
            peer.ask("versions")
        with pytest.raises(PeerError, match="FileNotFoundError"):
            peer.ask("load", case=str(tmp_path / "none"), attention="sdpa")


def test_the_end_of_a_process_is_told_with_its_log(tmp_path):
    peer = Peer("false", "speculators", 1, tmp_path / "log")
    with peer, pytest.raises(PeerError, match="speculators ended with 1"):
        peer.ask("versions")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "must be positive"),
        (["--lengths", "-5"], "must be positive"),
        (["--anchors", "2000"], "has room for 1016"),
        (["--python", "/no/python"], "is no program"),
    ],
)
def test_senseless_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        block_step.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
