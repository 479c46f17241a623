"""The benchmark of the balance: cuts worked out by hand, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import balance


def test_cuts_of_one_document_and_of_equal_ones() -> None:
    (one,) = [balance.measure("one document", [[balance.LENGTH]])]
    # Of 8 equal pieces of a causal triangle the last costs 15 / 8 of the mean.
    assert one.quantile("contiguous", 0.5) == pytest.approx(15 / 8, abs=1e-3)
    assert one.quantile("zigzag", 0.5) == pytest.approx(1.0, abs=1e-3)
    equal = balance.measure("equal", [[balance.LENGTH // 16] * 16])
    assert all(equal.quantile(cut, 0.5) == pytest.approx(1.0, abs=1e-3) for cut in ("contiguous", "zigzag"))


def test_the_plan_holds_the_bar_and_the_result_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    balance.main(["--packs", "20", "--folder", str(tmp_path), "--pictures", str(tmp_path)])
    assert "median 48k" in capsys.readouterr().out
    assert (tmp_path / "balance.png").stat().st_size > 10_000
    rows = json.loads((tmp_path / "balance.json").read_text())["balance"]
    assert len(rows) == 5
    for row in rows:
        assert row["span plan"]["median"] <= 1.03
        assert row["span plan"]["90th_percentile"] <= 1.05
        assert row["span plan"]["median"] <= row["zigzag"]["median"] <= row["contiguous"]["median"]
