"""Preparation: what is kept, counted, split, cached and refused."""

import datasets
import numpy as np
import pytest
import torch
from data_samples import chat, data_recipe, tiny_tokenizer, write_jsonl

from eagle3_ds.data import prepare
from eagle3_ds.data.prepare import heldout_mask, prepare_data


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def conversations(count):
    return [chat(f"question {i}", f"answer {i}") for i in range(count)]


def run(recipe, tokenizer, **more):
    return prepare_data(recipe, tokenizer, "tok", show_progress=False, **more)


def test_documents_split_and_counts(tmp_path, tokenizer):
    recipe = data_recipe(tmp_path, train=(write_jsonl(tmp_path / "a.jsonl", conversations(100)),), heldout_fraction=0.1)
    data = run(recipe, tokenizer, vocab_size=400)
    assert (len(data.train), len(data.heldout)) == (90, 10)
    assert sorted(data.lengths()) == list(range(100))
    assert not set(data.train["document_id"]) & set(data.heldout["document_id"])
    counts = torch.zeros(400, dtype=torch.int64)
    for document in data.train:
        for token, flag in zip(document["input_ids"], document["loss_mask"], strict=True):
            counts[token] += flag
    assert torch.equal(data.supervised_counts, counts)
    assert data.statistics.train_supervised_tokens == int(counts.sum())
    assert data.statistics.train_tokens == sum(len(document["input_ids"]) for document in data.train)
    assert data.lengths()[int(data.train[0]["document_id"])] == len(data.train[0]["input_ids"])


def test_a_second_run_opens_the_cache(tmp_path, tokenizer, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", conversations(10))
    recipe = data_recipe(tmp_path, train=(path,))
    first = run(recipe, tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "encode_conversations", None)
        second = run(recipe, tokenizer)
    assert second.path == first.path and second.statistics == first.statistics
    assert second.train[0] == first.train[0]
    write_jsonl(tmp_path / "a.jsonl", conversations(11))
    third = run(recipe, tokenizer)
    assert third.path != first.path and third.statistics.conversations == 11
    assert prepare_data(recipe, tokenizer, "another", show_progress=False).path not in (first.path, third.path)


def test_an_interrupted_run_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    recipe = data_recipe(tmp_path, train=(write_jsonl(tmp_path / "a.jsonl", conversations(200)),))
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    original = prepare.encode_conversations
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, "encode_conversations", interrupted)
        run(recipe, tokenizer)
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(run(recipe, tokenizer).train) == 196


def test_own_heldout_files_and_limits(tmp_path, tokenizer):
    rows = conversations(20)
    train = write_jsonl(tmp_path / "a.jsonl", rows)
    heldout = write_jsonl(tmp_path / "b.jsonl", [*rows[:2], chat("new", "words")])
    data = run(data_recipe(tmp_path, train=(train,), heldout=(heldout,), max_conversations=8), tokenizer)
    assert (len(data.train), len(data.heldout), data.statistics.heldout_in_train) == (8, 3, 2)


def test_parquet_and_folders(tmp_path, tokenizer):
    folder = tmp_path / "data"
    folder.mkdir()
    datasets.Dataset.from_list([{"messages": row} for row in conversations(3)]).to_parquet(str(folder / "p.parquet"))
    write_jsonl(folder / "q.jsonl", [chat("more", "rows", system="be kind")])
    data = run(data_recipe(tmp_path, train=(str(folder),), heldout_fraction=0.0), tokenizer)
    assert (len(data.train), len(data.heldout)) == (4, 0)


def test_too_long(tmp_path, tokenizer):
    rows = [chat("hello", "yes"), chat("q", "long " * 100), chat("long " * 100, "yes")]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    common = {"train": (path,), "max_length": 40, "heldout_fraction": 0.0}
    message = r"a.jsonl, row 2: the conversation has \d+ tokens, more than data.max_length 40: raise data.max_length"
    with pytest.raises(ValueError, match=message):
        run(data_recipe(tmp_path, **common), tokenizer)
    dropped = run(data_recipe(tmp_path, on_too_long="drop", **common), tokenizer)
    assert (len(dropped.train), dropped.statistics.too_long_dropped) == (1, 2)
    cut = run(data_recipe(tmp_path, on_too_long="truncate", **common), tokenizer)
    assert [len(row) for row in cut.train["input_ids"]][1] == 40
    assert (cut.statistics.truncated, cut.statistics.unsupervised_dropped, cut.statistics.longest) == (2, 1, 40)


def test_nothing_left(tmp_path, tokenizer):
    empty = write_jsonl(tmp_path / "e.jsonl", [])
    with pytest.raises(ValueError, match="data.train: the data set is empty, no conversation in .*e.jsonl"):
        run(data_recipe(tmp_path, train=(empty,)), tokenizer)
    long = write_jsonl(tmp_path / "l.jsonl", [chat("long " * 100, "yes")] * 2)
    with pytest.raises(ValueError, match="no supervised token at all in 2 conversations"):
        run(data_recipe(tmp_path, train=(long,), max_length=30, on_too_long="truncate"), tokenizer)
    with pytest.raises(ValueError, match="all 2 conversations .* longer than data.max_length .30. and were dropped"):
        run(data_recipe(tmp_path, train=(long,), max_length=30, on_too_long="drop"), tokenizer)
    same = write_jsonl(tmp_path / "s.jsonl", [chat("a", "b")] * 2)
    with pytest.raises(ValueError, match="no training document is left after 2 were held out"):
        run(data_recipe(tmp_path, train=(same,)), tokenizer)


def test_bad_sources(tmp_path, tokenizer):
    good = write_jsonl(tmp_path / "a.jsonl", conversations(3))
    (tmp_path / "hollow").mkdir()
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "bad.jsonl").write_text('{"messages": []\n')
    (tmp_path / "bad.parquet").write_text("no parquet")
    cases = {
        "nowhere.jsonl": r"data.train\[1\] is '.*nowhere.jsonl', which does not exist",
        "hollow": r"data.train\[1\] is '.*hollow', a folder without any .jsonl or .parquet",
        "a.csv": r"data.train\[1\] is '.*a.csv', a file of type '.csv'",
        "a.jsonl": r"a.jsonl is named already: name every file once",
        "bad.jsonl": r"bad.jsonl, line 1: not valid JSON \(.*: every line holds one JSON object",
        "bad.parquet": r"bad.parquet cannot be read as Parquet",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            run(data_recipe(tmp_path, train=(good, str(tmp_path / name))), tokenizer)
    with pytest.raises(ValueError, match="a.jsonl is both in data.train and in data.heldout"):
        run(data_recipe(tmp_path, train=(good,), heldout=(good,)), tokenizer)
    with pytest.raises(ValueError, match="lies outside the target's vocabulary of 10"):
        run(data_recipe(tmp_path, train=(good,)), tokenizer, vocab_size=10)


def test_a_damaged_cache_is_named(tmp_path, tokenizer):
    recipe = data_recipe(tmp_path, train=(write_jsonl(tmp_path / "a.jsonl", conversations(3)),))
    (run(recipe, tokenizer).path / "statistics.json").unlink()
    with pytest.raises(ValueError, match="statistics.json is missing from the prepared data: remove the folder"):
        run(recipe, tokenizer)


def test_the_split_goes_by_content():
    hashes = np.array([5, 1, 9, 1, 7], dtype=np.uint64)
    assert heldout_mask(hashes, 0.2).tolist() == [False, True, False, True, False]
    assert heldout_mask(hashes, 0.0).sum() == 0
    assert heldout_mask(hashes[:1], 0.5).sum() == 0
    assert heldout_mask(hashes, 0.001).sum() == 2
