"""`eagle3-ds serve-check` with a real vLLM: an export that serves as trained, and one that does not load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from eagle3_ds.cli.main import main
from eagle3_ds.config import TargetSection
from eagle3_ds.targets import build_target, load_target
from tests.served.pairs import Pair, make_pair
from tests.unit.tiny_target import CONVERSATIONS, TEXTS, tiny_build


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A target with a tokenizer, and its draft."""
    folder = tmp_path_factory.mktemp("checked")
    section = TargetSection(
        path=str(folder / "target"), build=tiny_build(hidden_size=128, intermediate_size=128)
    )
    path = build_target(section, TEXTS, CONVERSATIONS, progress=False)
    return make_pair(load_target(section, "float32").model, path, folder, {})


@pytest.mark.parametrize(("broken", "status"), [(False, 0), (True, 1)])
def test_serve_check_says_whether_it_serves_as_trained(
    broken: bool,
    status: int,
    pair: Pair,
    served_python: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    draft = Path(shutil.copytree(pair.speculators, tmp_path / "draft"))
    if broken:
        keys = json.loads((draft / "config.json").read_text())
        # What exports had once, and what transformers does not know.
        (draft / "config.json").write_text(json.dumps({**keys, "model_type": "speculator_model"}))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"input_ids": prompt}) + "\n" for prompt in pair.prompts))
    words = ["--target", pair.target, "--draft", draft, "--prompts", prompts, "--python", served_python]
    assert main(["serve-check", *map(str, words), "--tolerance", "0"]) == status
    told = capsys.readouterr().out
    assert ("does not serve as trained" in told) == broken
    assert ("failed: speculators layout: does not load" in told) == broken
    assert told.count("the target alone") >= 1 and "vLLM's log: " in told
