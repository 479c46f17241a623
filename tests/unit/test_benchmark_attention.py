"""What benchmarks.attention counts and writes; never how fast anything is."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from benchmarks.attention import (
    BARE_OPERATOR,
    SETTINGS,
    main,
    make_operands,
    measure,
    share_kept,
    visible_pairs,
)
from eagle3_ds.kernels import Tile, select_kernel


@pytest.mark.parametrize(
    "tiles",
    [
        (Tile(0, 9, 0, 9, True),),
        (Tile(0, 5, 0, 12, True), Tile(5, 9, 3, 8, False)),
        (Tile(0, 20, 0, 30, True, 6), Tile(20, 26, 4, 16, False, 3)),
    ],
)
def test_visible_pairs_are_those_of_the_reference(tiles: tuple[Tile, ...]) -> None:
    """With zero queries every shown key weighs alike, so that the log-sum-exp is the log of their number."""
    q, k = torch.zeros(26, 1, 4), torch.zeros(30, 1, 4)
    kernel = select_kernel("reference", torch.device("cpu"), torch.float32, 4)
    _, lse = kernel.forward(q, k, k, tiles, 1.0)
    assert visible_pairs(tiles) == round(float(lse.exp().sum()))


def test_share_kept() -> None:
    assert share_kept(kernel_tflops=200.0, attention_flop=1e15, step_seconds=10.0) == pytest.approx(0.5)


def test_cases_differ_in_what_is_visible() -> None:
    pairs = [
        visible_pairs(make_operands(case, 64, SETTINGS["cpu"], torch.device("cpu")).tiles)
        for case in ("one document", "eight documents", "sliding window")
    ]
    assert pairs == [64 * 65 // 2, 8 * 8 * 9 // 2, 64 * 16 - 16 * 15 // 2]


def test_writes_every_usable_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETTINGS, "cpu", SETTINGS["cpu"].__class__(2, 1, 16, "float32", (64,), 32))
    main(["--device", "cpu", "--lengths", "64", "128", "--repeats", "1", "--folder", str(tmp_path)])
    written = json.loads((tmp_path / "attention.json").read_text())
    assert written["matmul_tflops"] > 0 and written["versions"]["torch"] == version("torch")
    measured = {
        (row["case"], row["length"], row["kernel"]) for row in written["rates"] if row["backward_tflops"] > 0
    }
    for length in (64, 128):
        assert {kernel for case, n, kernel in measured if (case, n) == ("eight documents", length)} == {
            "cpu",
            "blockwise",
        }
        assert ("one document", length, BARE_OPERATOR) in measured


def test_a_pass_over_the_limit_is_named_not_run() -> None:
    setting = SETTINGS["cpu"].__class__(2, 1, 16, "float32", (64, 128), 32)
    rates = measure(setting, torch.device("cpu"), repeats=1, limit=0.0)
    assert all(
        (rate.forward_seconds is None) == (rate.length == 128 and rate.kernel != BARE_OPERATOR)
        for rate in rates
    )


def test_lengths_that_do_not_divide_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--device", "cpu", "--lengths", "100"])
    assert "multiples of 8" in capsys.readouterr().err
