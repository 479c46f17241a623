"""`prepare`: what it says and saves; what a capture by one process did before it was interrupted is not done
again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eagle3_ds.cli.main import main
from eagle3_ds.config import load_recipe
from eagle3_ds.data import PreparedData
from eagle3_ds.draft import VocabularyMap
from eagle3_ds.run import states
from eagle3_ds.store import HiddenStateStore
from tests.unit.data_samples import write_jsonl
from tests.unit.served_target import server_of_target
from tests.unit.tiny_target import CONVERSATIONS, build_tiny_target

COUNT = 8


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    rows = write_jsonl(tmp_path / "rows.jsonl", CONVERSATIONS[:COUNT])
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"target: {{path: {build_tiny_target(tmp_path / 'target')}, dtype: float32}}\ndraft: {{vocab_size: "
        f"128}}\ndata: {{train: [{rows}], cache_dir: {tmp_path / 'cache'}}}\ntrain: {{steps: 1}}\neval: "
        f"{{num_prompts: 0}}\ndeepspeed: none.json\noutput_dir: {tmp_path / 'output'}\n"
    )
    return str(path)


def test_progress_size_and_coverage_are_told_and_the_vocabulary_saved(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", recipe, "draft.vocab_size=60"]) == 0
    said = capsys.readouterr()
    assert "tokenise train: " in said.err and "capture: 100%" in said.err
    assert f"hidden states: {COUNT} documents of " in said.out and " take " in said.out
    prepared = json.loads((tmp_path / "output" / "prepared.json").read_text())
    data = PreparedData.open(Path(prepared["data"]), prepared["data_fingerprint"])
    vocabulary = VocabularyMap.load(tmp_path / "output" / "vocabulary.safetensors")
    covered = int(data.supervised_counts[vocabulary.t2d].sum()) / int(data.supervised_counts.sum())
    assert f"draft vocabulary: 60 tokens, {covered:.1%} of the supervised ones" in said.out
    assert vocabulary.t2d[data.required_tokens].all()


@pytest.mark.parametrize("harm", ["nan", "interrupt"])
def test_an_interrupted_capture_goes_on_with_the_document_it_stopped_at(
    recipe: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    harm: str,
) -> None:
    calls = []
    original = states.capture_hidden_states

    def counted(target: Any, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(len(token_ids))
        aux, teacher = original(target, token_ids)
        if len(calls) == 4:
            if harm == "interrupt":
                raise KeyboardInterrupt
            teacher[2] = torch.nan
        return aux, teacher

    monkeypatch.setattr(states, "capture_hidden_states", counted)
    if harm == "interrupt":
        assert main(["prepare", recipe]) == 130
        assert capsys.readouterr().err.splitlines()[-1] == "eagle3-ds prepare: interrupted"
    else:
        assert main(["prepare", recipe]) == 2
        said = capsys.readouterr().err
        assert (
            "teacher of document" in said
            and "is not finite as bfloat16 (largest input nan), first at row 2: " in said
        )
    assert len(calls) == 4 and not list((tmp_path / "cache").glob("hidden-????????????????"))
    assert main(["prepare", recipe]) == 0
    assert "3 documents are there already" in capsys.readouterr().out
    assert len(calls) == 4 + COUNT - 3
    (folder,) = (tmp_path / "cache").glob("hidden-*")
    store = HiddenStateStore.open(folder)
    store.verify()
    assert len(store.lengths) == COUNT
    assert main(["prepare", recipe]) == 0 and len(calls) == 4 + COUNT - 3


def test_a_server_gives_the_store_that_the_target_gives_here(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [f"data.cache_dir={tmp_path / 'other'}", "data.hidden_dtype=float32"]
    assert main(["prepare", recipe, "data.hidden_dtype=float32"]) == 0
    monkeypatch.setenv("SERVERS_KEY", "a-secret")
    with server_of_target(tmp_path / "target", tmp_path / "rows", key="a-secret").running() as fake:
        words = ["target.capture=server", f"target.server.url={fake.url}"]
        words += [f"target.server.folder={tmp_path / 'rows'}", "target.server.key_variable=SERVERS_KEY"]
        # A recipe that streams fills a store by this command all the same.
        assert main(["capture", recipe, *places, *words, "data.hidden_states=stream"]) == 0
    (folder,) = (tmp_path / "cache").glob("hidden-*")
    (other,) = (tmp_path / "other").glob("hidden-*")
    expected, found = HiddenStateStore.open(folder), HiddenStateStore.open(other)
    assert found.origin == "vLLM extract_hidden_states"
    assert found.lengths == expected.lengths
    for document, length in found.lengths.items():
        for name in ("aux", "teacher", "teacher_token"):
            wanted = expected.rows(document, name, 0, length)
            torch.testing.assert_close(found.rows(document, name, 0, length), wanted)
    told = capsys.readouterr()
    written = "".join(
        path.read_text() for path in (tmp_path / "output").glob("*.*") if path.suffix != ".safetensors"
    )
    assert "a-secret" not in told.out + told.err + written + (other / "index.json").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["target.capture=server", "data.hidden_states=online"], "target.capture is server and .* is online"),
        (["data.hidden_states=stream"], "hidden_states is stream and target.capture is single"),
        (["target.capture=parallel", "data.hidden_states=stream"], "Set target.capture to server"),
        (["target.capture=server", "target.server.buffer_gib=0"], "target.server.buffer_gib"),
    ],
)
def test_who_runs_the_target_and_where_its_rows_go_must_fit(
    recipe: str, words: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe, words)
