"""Sources: files, folders and hub data sets, and what is said when they cannot be read."""

import json
import os

import datasets
import pytest

from eagle3_ds.data import sources
from eagle3_ds.data.sources import expand_sources, is_hub_name, open_source, source_fingerprint
from tests.unit.data_samples import chat, write_jsonl


def rows_of(source, shape=None):
    found, rows = open_source(source, shape)
    return found, [(row.place, row.shape, row.value()) for row in rows]


def test_files_and_folders(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "deep").mkdir()
    parquet = str(folder / "p.parquet")
    datasets.Dataset.from_list([{"messages": chat("a", "b")}]).to_parquet(parquet)
    lines = write_jsonl(folder / "deep" / "q.jsonl", [chat("a", "b"), chat("c", "d")])
    assert expand_sources([str(folder)], "data.train") == [lines, parquet]
    assert rows_of(parquet) == ("messages", [(f"{parquet}, row 1", "messages", {"messages": chat("a", "b")})])
    assert [place for place, _, _ in rows_of(lines)[1]] == [f"{lines}, line 1", f"{lines}, line 2"]
    assert rows_of(lines, "sharegpt")[0] == "sharegpt"
    assert source_fingerprint(lines) != source_fingerprint(parquet)


def test_lines_keep_their_own_keys_and_numbers(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '\n{"prompt": "q", "response": "a", "x": 1}\n\n{"prompt": "q", "response": "a", "y": [2]}\n'
    )
    found, rows = rows_of(str(path))
    assert found == "prompt_response" and [place for place, _, _ in rows] == [
        f"{path}, line 2",
        f"{path}, line 4",
    ]
    assert set(rows[0][2]) == {"prompt", "response", "x"} and set(rows[1][2]) == {"prompt", "response", "y"}
    (tmp_path / "e.jsonl").write_text("\n")
    assert rows_of(str(tmp_path / "e.jsonl")) == (None, [])


def test_bad_entries(tmp_path):
    good = write_jsonl(tmp_path / "a.jsonl", [chat("a", "b")])
    (tmp_path / "hollow").mkdir()
    (tmp_path / "a.csv").write_text("x")
    cases = {
        "nowhere.jsonl": r"data.train\[1\] is '.*nowhere.jsonl', which does not exist: name a .jsonl, .json or .parquet file",
        "hollow": r"data.train\[1\] is '.*hollow', a folder without any file of .jsonl, .json",
        "a.csv": r"data.train\[1\] is '.*a.csv', a file of type '.csv'",
        "a.jsonl": r"a.jsonl is named already: name every file once",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            expand_sources([good, str(tmp_path / name)], "data.train")


def test_bad_files(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "q", "response": "a"}\n{"prompt": \n')
    rows = open_source(str(bad), None)[1]
    assert next(rows).value() == {"prompt": "q", "response": "a"}
    with pytest.raises(
        ValueError, match=r"bad.jsonl, line 2: not valid JSON \(.*: every line holds one JSON object"
    ):
        next(rows).value()
    bad.write_bytes(b'{"prompt": "\xff\xfe"}\n')
    with pytest.raises(ValueError, match="bad.jsonl, line 1: not valid JSON"):
        open_source(str(bad), None)
    (tmp_path / "bad.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="bad.parquet cannot be read as Parquet: .* Write the file again"):
        open_source(str(tmp_path / "bad.parquet"), None)
    bad.write_text('{"question": "q"}\n')
    with pytest.raises(
        ValueError, match="bad.jsonl, line 1: the row's shape is unknown, its keys are 'question'"
    ):
        open_source(str(bad), None)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_file_that_vanished(tmp_path, suffix):
    path = str(tmp_path / f"a.{suffix}")
    message = (
        f"a.{suffix} was there and cannot be read any more .*: "
        "put it back, or take it out of the recipe's data"
    )
    with pytest.raises(ValueError, match=message):
        open_source(path, None)
    with pytest.raises(ValueError, match=message):
        source_fingerprint(path)


def test_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats").mkdir()
    for name in ("owner/name", "owner/name:train_sft", "owner/name/config", "owner/name/config:train[:10%]"):
        assert is_hub_name(name)
        assert expand_sources([name], "data.train") == [name]
    for name in ("stdlib", "chats/new", "owner/name.jsonl", "/tmp/x", "./owner/name", "a/b/c/d"):
        assert not is_hub_name(name)


def test_hub_data_sets_are_loaded_by_name_config_and_split(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", [chat("a", "b"), chat("c", "d")])
    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        return original("json", data_files=path, split="train", cache_dir=str(tmp_path / "cache"))

    original = datasets.load_dataset
    monkeypatch.setattr(sources.datasets, "load_dataset", load)
    found, rows = rows_of("owner/name/config:test")
    assert found == "messages" and [row["messages"][0]["content"] for _, _, row in rows] == ["a", "c"]
    assert rows[1][0] == "owner/name/config:test, row 2"
    first = source_fingerprint("owner/name")
    assert asked == [("owner/name", "config", "test"), ("owner/name", None, "train")]
    path = write_jsonl(tmp_path / "b.jsonl", [chat("a", "b")])
    assert source_fingerprint("owner/name") != first


def test_a_hub_data_set_that_cannot_be_loaded(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError,
        match="'nobody/nothing' is no file here, and could not be loaded from the hub .*: correct it",
    ):
        open_source("nobody/nothing", None)


def test_json_is_what_a_line_holds(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": chat("é🦊", "b")}, ensure_ascii=False) + os.linesep)
    assert rows_of(str(path))[1][0][2]["messages"][0]["content"] == "é🦊"
