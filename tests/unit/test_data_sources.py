"""Sources: files, folders and hub data sets, and what is said when they cannot be read."""

import gzip
import json
import os
import sys

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
        "nowhere.jsonl": r"data.train\[1\] is '.*nowhere.jsonl', which does not exist: "
        "name a .jsonl, .json or .parquet file",
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


ROW = {"messages": chat("a", "b")}
LINE = json.dumps(ROW).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", gzip.compress(LINE * 2, mtime=0)),
        ("a.json", json.dumps([ROW, ROW], indent=1).encode()),
        ("a.json.gz", gzip.compress(json.dumps([ROW, ROW]).encode(), mtime=0)),
        ("a.json", LINE * 2),
        ("a.json.gz", gzip.compress(LINE * 2, mtime=0)),
    ],
)
def test_files_of_json(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    for entry in (path, tmp_path):
        assert expand_sources([str(entry)], "data.train") == [str(path)]
    found, rows = rows_of(str(path))
    assert found == "messages" and [row for _, _, row in rows] == [ROW, ROW]
    assert rows[1][0].startswith(f"{path}, ") and rows[1][0].endswith(" 2")


def test_a_file_that_is_one_row(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROW, indent=1))
    assert [row for _, _, row in rows_of(str(tmp_path / "a.json"))[1]] == [ROW]


def test_packed_files_that_cannot_be_read(tmp_path, monkeypatch):
    for name, content in (
        ("cut.jsonl.gz", gzip.compress(LINE * 9000, mtime=0)[:60]),
        ("plain.jsonl.gz", LINE),
        ("cut.json", b'[{"messages": '),
        ("plain.json.gz", LINE),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read: .* Write the file again"):
            list(open_source(str(tmp_path / name), None)[1])
    monkeypatch.setitem(sys.modules, "zstandard", None)
    for name in ("a.jsonl.zst", "a.json.zst"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ValueError, match=f"{name} is packed by Zstandard, .*`pip install zstandard`"):
            open_source(str(tmp_path / name), None)


def test_zstandard(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(LINE * 2))
    assert [row for _, _, row in rows_of(str(tmp_path / "a.jsonl.zst"))[1]] == [ROW, ROW]
    (tmp_path / "b.jsonl.zst").write_bytes(LINE)
    with pytest.raises(ValueError, match="b.jsonl.zst cannot be read"):
        rows_of(str(tmp_path / "b.jsonl.zst"))


def test_an_array_that_is_called_jsonl(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps([ROW], indent=1))
    with pytest.raises(
        ValueError, match="line 1: not valid JSON .* looks like one JSON array: name it .json"
    ):
        open_source(str(tmp_path / "a.jsonl"), None)


def test_data_sets_that_were_saved_to_disk(tmp_path):
    data = datasets.Dataset.from_list([ROW, ROW])
    data.save_to_disk(str(tmp_path / "deep" / "saved"))
    lines = write_jsonl(tmp_path / "q.jsonl", [chat("c", "d")])
    (tmp_path / "about.json").write_text(json.dumps({"made": "today"}, indent=1))
    saved = str(tmp_path / "deep" / "saved")
    assert expand_sources([saved], "data.train") == [saved]
    assert expand_sources([str(tmp_path)], "data.train") == [saved, lines]
    assert rows_of(saved) == (
        "messages",
        [(f"{saved}, row {number}", "messages", ROW) for number in (1, 2)],
    )
    before = source_fingerprint(saved)
    datasets.Dataset.from_list([ROW]).save_to_disk(str(tmp_path / "other"))
    assert source_fingerprint(str(tmp_path / "other")) != before
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match="holds the splits of a data set: .*splits/test, .*splits/train"):
        expand_sources([str(tmp_path / "splits")], "data.train")
    assert len(rows_of(str(tmp_path / "splits" / "train"))[1]) == 2


CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
OTHER = {"role": "assistant", "content": "", "tool_calls": [{"name": "g", "arguments": {"y": [{"z": None}]}}]}
SCHEMA = {"name": "f", "parameters": {"properties": {"x": {"type": "integer"}}}}
OTHER_SCHEMA = {"name": "g", "parameters": {"properties": {"y": {"type": "array"}}, "required": ["y"]}}
STRUCTS = [
    {"messages": [*chat("q"), CALL], "tools": [SCHEMA]},
    {"messages": [*chat("q"), OTHER], "tools": [OTHER_SCHEMA]},
]


@pytest.mark.parametrize("form", ["parquet", "saved", "hub"])
def test_nulls_that_arrow_puts_into_structs_go(tmp_path, monkeypatch, form):
    data = datasets.Dataset.from_list(STRUCTS)
    source = str(tmp_path / "a.parquet")
    if form == "parquet":
        data.to_parquet(source)
    elif form == "saved":
        source = str(tmp_path / "saved")
        data.save_to_disk(source)
    else:
        source = "owner/name"
        monkeypatch.setattr(sources, "_load", lambda entry: data)
    (first, second) = (row for _, _, row in rows_of(source)[1])
    assert first == STRUCTS[0]
    assert second["tools"] == STRUCTS[1]["tools"]
    assert second["messages"][1]["tool_calls"][0]["arguments"] == {"y": [{}]}


def test_nulls_that_were_written_stay(tmp_path):
    row = {
        "messages": [
            *chat("q"),
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": None}}]},
        ]
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "a.json").write_text(json.dumps([row]))
    for name in ("a.jsonl", "a.json"):
        assert rows_of(str(tmp_path / name))[1][0][2] == row
    text = {"messages": chat("q", "a"), "tools": '[{"name": "f", "default": null}]', "flags": [None, 1]}
    datasets.Dataset.from_list([text]).to_parquet(str(tmp_path / "a.parquet"))
    assert rows_of(str(tmp_path / "a.parquet"))[1][0][2] == text
    features = datasets.Features({"a": datasets.Json(), "b": {"c": datasets.Value("int64")}})
    assert sources.without_nulls({"a": {"x": None}, "b": {"c": None}}, features) == {
        "a": {"x": None},
        "b": {},
    }
