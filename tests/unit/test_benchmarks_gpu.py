"""The GPU benchmark, all of it but the device: in tiny on the CPU."""

import json
import time
from dataclasses import replace

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Figures, Job, Measurement, Series
from judge.result_file import FOLDER


def test_one_command_runs_tests_and_series_and_writes_one_json(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    assert gpu.main(["--tiny", "--folder", str(tmp_path), "--scratch", str(tmp_path)]) == 0
    written = json.loads(path.read_text())
    assert written["command"] == f"python -m benchmarks.gpu --tiny --folder {tmp_path} --scratch {tmp_path}"
    assert written["tests"]["passed"]
    assert torch.cuda.is_available() or "skipped" in written["tests"]["output"][-1]
    measured = {(m["series"]["side"], m["series"]["way"], m["length"]) for m in written["measurements"]}
    assert {("product", "cpu", length) for length in gpu.TINY_LENGTHS} <= measured
    assert {("dense", form, length) for form in ("eager", "fused") for length in gpu.TINY_LENGTHS} <= measured
    for measurement in written["measurements"]:
        assert measurement["missing"] is None
        assert measurement["figures"]["peak_bytes"] > 0
        assert bool(measurement["figures"]["predicted_bytes"]) == (measurement["series"]["side"] == "product")
    assert written["summary"]["largest_difference"] <= gpu.AGREEMENT
    assert written["summary"]["dense_longest"] == max(gpu.TINY_LENGTHS)
    assert list(tmp_path.iterdir()) == [path]  # The hidden states are gone.
    assert "product cpu recompute" in capsys.readouterr().out


def test_tiny_figures_cannot_become_results(capsys):
    for path in (FOLDER, FOLDER / "deeper"):
        with pytest.raises(SystemExit):
            gpu.main(["--tiny", "--folder", str(path)])
        assert "give --folder one outside of" in capsys.readouterr().err


def test_without_a_device_it_says_so(capsys, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no accelerator here" in capsys.readouterr().err


def job(tmp_path, way, seconds):
    series = Series("product", way, "recompute", (32, 64))
    return Job(
        series,
        gpu.SHAPE_TINY,
        "cpu",
        str(tmp_path),
        64,
        str(tmp_path / "series.jsonl"),
        time.time() + seconds,
    )


def test_a_series_that_crashes_is_reported_and_no_success(tmp_path):
    found = gpu.run_series(job(tmp_path, "cuda", 120.0))
    assert [(m.length, m.figures) for m in found] == [(32, None)]
    missing = found[0].missing
    assert missing is not None and missing.startswith("failed: ")
    assert "cannot run" in missing
    record = {
        "tests": {"passed": True},
        "measurements": [{"missing": found[0].missing}],
        "summary": {"largest_difference": 0.0},
    }
    assert not gpu._is_good(record)
    assert gpu._is_good({**record, "measurements": [{"missing": "out of memory"}]})


def test_what_the_time_does_not_hold_is_not_begun(tmp_path):
    found = gpu.run_series(job(tmp_path, "cpu", -1.0))
    assert [(m.length, m.missing) for m in found] == [(32, "not run: 0 s are left")]
    assert gpu._no_time(10.0, 9.0) == "not run: takes about 10 s, and 9 s are left"
    assert gpu._no_time(10.0, 10.0) is None


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "disk_usage", lambda _: gpu.shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(
        ValueError, match=r"--scratch: hidden states of 524288 slots take 17.2 GB, and .* has 0.0 GB free"
    ):
        gpu._require_disk(tmp_path, gpu.SHAPE_8B, 2**19)


def test_the_plan_measures_every_length_of_the_product_and_each_kernel_and_mode():
    series = gpu.plan_series(gpu.LENGTHS, "cuda", ["flash_attn3", "cudnn"], ["recompute", "offload"])
    of = [(s.way, s.activation) for s in series]
    assert sorted(
        length for s in series if (s.way, s.activation) == ("cuda", "recompute") for length in s.lengths
    ) == list(gpu.LENGTHS)
    assert {
        ("eager", None),
        ("fused", None),
        ("flash_attn3", "recompute"),
        ("cudnn", "recompute"),
        ("cuda", "offload"),
    } <= set(of)
    assert max(series[0].lengths) == 131072
    assert all(list(s.lengths) == sorted(s.lengths) for s in series)


def test_the_summary_compares_where_both_sides_have_figures():
    ours = Figures(2.0, 50.0, 10**9, 1e10, 0.05, 100, loss=2.0, grad_norm=1.0, optimizer_seconds=0.1)
    product, dense = (
        Series("product", "cuda", "recompute", (100, 200, 400)),
        Series("dense", "eager", None, (100, 200, 400)),
    )
    offload = replace(product, activation="offload")
    measurements = [
        Measurement(product, 100, ours),
        Measurement(product, 200, replace(ours, seconds=4.0)),
        Measurement(offload, 400, replace(ours, peak_bytes=70)),
        Measurement(dense, 100, replace(ours, seconds=3.0, loss=2.02)),
        Measurement(dense, 200, replace(ours, seconds=12.0)),
        Measurement(replace(dense, way="fused"), 200, replace(ours, seconds=10.0)),
        Measurement(dense, 400, missing="out of memory"),
    ]
    summary = gpu.summarise(measurements, "cuda", "recompute")
    assert summary["largest_difference"] == pytest.approx(0.02 / 2.02)
    assert (summary["dense_longest"], summary["times_faster"]) == (200, 2.5)
    assert summary["longest"] == {"series": "product cuda offload", "length": 400, "bytes": 70}
    nothing = gpu.summarise([Measurement(dense, 100, missing="out of memory")], "cuda", "recompute")
    assert nothing == {
        "largest_difference": None,
        "dense_longest": None,
        "times_faster": None,
        "longest": None,
    }
