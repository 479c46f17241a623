"""Preparation: what is kept, counted, split, cached and refused."""

import errno
import json
import multiprocessing
import os
import signal
import time

import datasets
import numpy as np
import pytest
import torch

from eagle3_ds import say
from eagle3_ds.data import findings, prepare
from eagle3_ds.data.packing import pack
from eagle3_ds.data.prepare import heldout_mask, prepare_data
from eagle3_ds.data.sources import Row
from eagle3_ds.draft import VocabularyMap
from tests.unit.data_samples import TEMPLATE, chat, data_recipe, tiny_tokenizer, write_jsonl


@pytest.fixture
def children_left():
    """Lists the processes started by a test and still alive; pools that other tests share do not count."""
    before = set(multiprocessing.active_children())
    return lambda: set(multiprocessing.active_children()) - before


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def conversations(count):
    return [chat(f"question {i}", f"answer {i}") for i in range(count)]


def run(recipe, tokenizer, **more):
    return prepare_data(recipe, tokenizer, "tok", show_progress=False, **more)


def test_documents_split_and_counts(tmp_path, tokenizer):
    recipe = data_recipe(
        tmp_path, train=(write_jsonl(tmp_path / "a.jsonl", conversations(100)),), heldout_fraction=0.1
    )
    data = run(recipe, tokenizer, vocab_size=400)
    assert (len(data.train), len(data.heldout)) == (90, 10)
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in data.path.iterdir()), (
        "other users may read the cache"
    )
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
        patch.setattr(prepare, "RowEncoder", None)
        second = run(recipe, tokenizer)
        more_workers = run(data_recipe(tmp_path, train=(path,), workers=5), tokenizer)
    assert second.path == more_workers.path == first.path and second.statistics == first.statistics
    assert second.train[0] == first.train[0]
    moved = write_jsonl(tmp_path / "moved.jsonl", conversations(10))
    again = run(data_recipe(tmp_path, train=(moved,)), tokenizer)
    assert again.path == first.path and again.statistics.sources == {moved: "messages"}
    others = (
        {"shape": "messages"},
        {"supervise": "last"},
        {"chat_template_arguments": {"a": 1}},
        {"on_too_long": "split"},
    )
    assert all(
        run(data_recipe(tmp_path, train=(path,), **other), tokenizer).path != first.path for other in others
    )
    write_jsonl(tmp_path / "a.jsonl", conversations(11))
    third = run(recipe, tokenizer)
    assert third.path != first.path and third.statistics.conversations == 11
    assert prepare_data(recipe, tokenizer, "another", show_progress=False).path not in (
        first.path,
        third.path,
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_an_interrupted_run_leaves_nothing(tmp_path, tokenizer, monkeypatch, workers, children_left):
    recipe = data_recipe(
        tmp_path, train=(write_jsonl(tmp_path / "a.jsonl", conversations(200)),), workers=workers
    )
    monkeypatch.setattr(prepare, "BATCH", 8)
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    original = prepare._Builder._write_batch
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare._Builder, "_write_batch", interrupted)
        run(recipe, tokenizer)
    assert list((tmp_path / "cache").iterdir()) == [] and not children_left()
    assert len(run(recipe, tokenizer).train) == 196


def test_a_killed_run_leaves_nothing_that_is_taken_for_a_cache(tmp_path, tokenizer, monkeypatch):
    recipe = data_recipe(tmp_path, train=(write_jsonl(tmp_path / "a.jsonl", conversations(200)),), workers=1)
    monkeypatch.setattr(prepare, "BATCH", 8)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "save_statistics", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        process = multiprocessing.get_context("fork").Process(target=run, args=(recipe, tokenizer))
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    (left,) = (tmp_path / "cache").iterdir()
    assert left.name.startswith(".")
    assert len(run(recipe, tokenizer).train) == 196 and left.is_dir(), "it may be of a run that is at work"
    for entry in (left, *left.iterdir()):
        os.utime(entry, (0, time.time() - 1.1 * prepare.ABANDONED_AFTER))
    run(data_recipe(tmp_path, train=recipe.data.train, max_length=300), tokenizer)
    assert not left.exists()


def test_the_documents_do_not_depend_on_the_number_of_processes(
    tmp_path, tokenizer, monkeypatch, children_left
):
    monkeypatch.setattr(prepare, "BATCH", 8)
    files = tuple(
        write_jsonl(tmp_path / f"{name}.jsonl", conversations(90 + len(name))) for name in ("a", "bb", "ccc")
    )
    folders = []
    for workers in (1, 2, 3):
        recipe = data_recipe(
            tmp_path, train=files, workers=workers, cache_dir=str(tmp_path / f"cache{workers}"), max_length=40
        )
        folders.append(run(recipe, tokenizer).path)
    for name in ("documents.arrow", "tables.safetensors", "statistics.json"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1, name
    bad = write_jsonl(
        tmp_path / "d.jsonl", [*conversations(150), chat("a"), *conversations(20), chat("b", "")]
    )
    for workers in (1, 2, 3):
        with pytest.raises(ValueError, match="d.jsonl, line 151: no assistant message"):
            run(data_recipe(tmp_path, train=(bad,), workers=workers), tokenizer)
    assert not children_left()


def test_every_shape_in_one_run(tmp_path, tokenizer):
    said = chat("question", "answer")
    sharegpt = {"conversations": [{"from": "human", "value": "question"}, {"from": "gpt", "value": "answer"}]}
    by_hand = tokenizer("<|user|>question<|end|><|assistant|>answer<|end|>")["input_ids"]
    rows = {
        "messages": {"messages": said},
        "sharegpt": sharegpt,
        "prompt_response": {"prompt": "question", "response": "answer"},
        "tokenized": {"input_ids": by_hand, "loss_mask": [0] * 3 + [1] * (len(by_hand) - 3)},
    }
    files = []
    for shape, row in rows.items():
        (tmp_path / f"{shape}.jsonl").write_text(json.dumps(row) + "\n")
        files.append(str(tmp_path / f"{shape}.jsonl"))
    data = run(data_recipe(tmp_path, train=tuple(files), heldout_fraction=0.0), tokenizer)
    assert data.statistics.sources == dict(zip(files, rows, strict=True))
    assert all(document["input_ids"] == by_hand for document in data.train)
    assert len({tuple(document["loss_mask"]) for document in list(data.train)[:3]}) == 1
    assert f"rows of shape sharegpt in {files[1]}" in data.statistics.lines()
    with pytest.raises(
        ValueError,
        match="sharegpt.jsonl, line 1: the row is of shape 'sharegpt' .* is read as 'prompt_response'",
    ):
        run(data_recipe(tmp_path, train=(files[1],), shape="prompt_response"), tokenizer)


def test_tokenised_rows_need_no_template(tmp_path):
    plain = tiny_tokenizer(chat_template=None)
    (tmp_path / "t.jsonl").write_text('{"input_ids": [5, 6, 7], "loss_mask": [false, true, true]}\n')
    recipe = data_recipe(tmp_path, train=(str(tmp_path / "t.jsonl"),), heldout_fraction=0.0)
    assert run(recipe, plain).train[0] == {
        "input_ids": [5, 6, 7],
        "loss_mask": [False, True, True],
        "document_id": 0,
    }
    with pytest.raises(
        ValueError, match="t.jsonl, line 1: token id 7 lies outside the target's vocabulary of 7"
    ):
        run(recipe, plain, vocab_size=7)


def test_own_heldout_files_and_limits(tmp_path, tokenizer):
    rows = conversations(20)
    train = write_jsonl(tmp_path / "a.jsonl", rows)
    heldout = write_jsonl(tmp_path / "b.jsonl", [*rows[:2], chat("new", "words")])
    data = run(data_recipe(tmp_path, train=(train,), heldout=(heldout,), max_conversations=8), tokenizer)
    assert (len(data.train), len(data.heldout), data.statistics.heldout_in_train) == (8, 3, 2)


def test_parquet_and_folders(tmp_path, tokenizer):
    folder = tmp_path / "data"
    folder.mkdir()
    datasets.Dataset.from_list([{"messages": row} for row in conversations(3)]).to_parquet(
        str(folder / "p.parquet")
    )
    write_jsonl(folder / "q.jsonl", [chat("more", "rows", system="be kind")])
    data = run(data_recipe(tmp_path, train=(str(folder),), heldout_fraction=0.0), tokenizer)
    assert (len(data.train), len(data.heldout)) == (4, 0)


def test_too_long(tmp_path, tokenizer):
    rows = [chat("hello", "yes"), chat("q", "long " * 100), chat("long " * 100, "yes")]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    common = {"train": (path,), "max_length": 40, "heldout_fraction": 0.0}
    too_long = r"the conversation has (\d+) tokens, more than data.max_length 40: raise data.max_length"
    message = f"a.jsonl, line 2: {too_long}"
    with pytest.raises(ValueError, match=message):
        run(data_recipe(tmp_path, **common), tokenizer)
    long = [len(tokenizer.apply_chat_template(row, return_dict=False)) for row in rows[1:]]
    dropped = run(data_recipe(tmp_path, on_too_long="drop", **common), tokenizer)
    counts = dropped.statistics
    assert (len(dropped.train), counts.too_long_dropped, counts.tokens_left_out) == (1, 2, sum(long))
    cut = run(data_recipe(tmp_path, on_too_long="truncate", **common), tokenizer)
    counts = cut.statistics
    assert [len(row) for row in cut.train["input_ids"]][1] == 40
    assert (counts.truncated, counts.unsupervised_dropped, counts.longest) == (2, 1, 40)
    assert counts.train_tokens + counts.tokens_left_out == sum(long) + len(cut.train[0]["input_ids"])
    assert "2 conversations are too long and were truncated" in counts.lines()


def test_split_loses_no_token_that_is_learnt_from(tmp_path, tokenizer):
    row = chat("q", "long " * 100)
    path = write_jsonl(tmp_path / "a.jsonl", [row, chat("long " * 100, "yes")])
    data = run(
        data_recipe(tmp_path, train=(path,), max_length=40, heldout_fraction=0.0, on_too_long="split"),
        tokenizer,
    )
    whole = tokenizer.apply_chat_template(row, return_dict=False)
    pieces = data.train["input_ids"][:-1]
    assert [token for piece in pieces for token in piece] == whole
    assert len(pieces) == -(-len(whole) // 40) and max(map(len, pieces)) - min(map(len, pieces)) <= 1
    assert (data.statistics.split, data.statistics.conversations) == (2, 2)
    assert data.statistics.unsupervised_dropped > 0 and data.train["loss_mask"][-1][-1]
    assert sum(len(ids) for ids in data.train["input_ids"]) + data.statistics.tokens_left_out == len(
        whole
    ) + len(tokenizer.apply_chat_template(chat("long " * 100, "yes"), return_dict=False))
    # pieces of one conversation stay on one side of the split
    apart = run(
        data_recipe(tmp_path, train=(path,), max_length=40, heldout_fraction=0.1, on_too_long="split"),
        tokenizer,
    )
    assert {len(apart.train), len(apart.heldout)} == {len(pieces), len(data.train) - len(pieces)}


def test_last_turns_only(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [chat("one", "uno", "two", "dos")])
    data = run(data_recipe(tmp_path, train=(path,), heldout_fraction=0.0, supervise="last"), tokenizer)
    document = data.train[0]
    learnt = [token for token, flag in zip(document["input_ids"], document["loss_mask"], strict=True) if flag]
    assert tokenizer.decode(learnt) == "dos<|end|>"


def test_statistics_and_picture(tmp_path, tokenizer):
    rows = [chat("q", "answer " * count) for count in (1, 2, 4, 8, 16, 32, 64)]
    data = run(
        data_recipe(tmp_path, train=(write_jsonl(tmp_path / "a.jsonl", rows),), heldout_fraction=0.2),
        tokenizer,
    )
    statistics, lengths = data.statistics, [len(ids) for ids in data.train["input_ids"]]
    for upper, documents, tokens, supervised in statistics.histogram:
        inside = [row for row in data.train if upper // 2 < len(row["input_ids"]) <= upper]
        assert documents == len(inside) and tokens == sum(len(row["input_ids"]) for row in inside)
        assert supervised == sum(sum(row["loss_mask"]) for row in inside)
    assert sum(row[1] for row in statistics.histogram) == len(data.train)
    packs = pack(lengths, 4096, 0)
    assert (statistics.packs, statistics.fill) == (len(packs), sum(lengths) / (4096 * len(packs)))
    assert (data.path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert any("training documents" in line and "% " not in line for line in statistics.lines())


def test_special_and_end_tokens_are_required(tmp_path, tokenizer):
    data = run(data_recipe(tmp_path, train=(write_jsonl(tmp_path / "a.jsonl", conversations(5)),)), tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert end in data.required_tokens
    unused = tokenizer.convert_tokens_to_ids("<|tool|>")
    assert unused not in data.required_tokens  # special, but neither named nor ever generated
    counts = torch.zeros(300, dtype=torch.int64)
    counts[100:200] = 5
    vocabulary = VocabularyMap.from_counts(counts, 20, always=data.required_tokens)
    assert vocabulary.t2d[data.required_tokens].all() and int(vocabulary.t2d.sum()) == 20
    assert torch.equal(vocabulary.draft_to_target, vocabulary.t2d.nonzero().flatten())
    with pytest.raises(ValueError, match="draft.vocab_size = 2 is smaller than the 3 special and end tokens"):
        VocabularyMap.from_counts(counts, 2, always=torch.tensor([0, 1, 2]))


def test_a_full_disk_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepare, "save_file", full)
    recipe = data_recipe(tmp_path, train=(write_jsonl(tmp_path / "a.jsonl", conversations(5)),))
    with pytest.raises(
        ValueError, match="data.cache_dir: no space left on the disk of .*cache while writing tokenised"
    ):
        run(recipe, tokenizer)
    assert list((tmp_path / "cache").iterdir()) == []


def test_nothing_left(tmp_path, tokenizer):
    empty = write_jsonl(tmp_path / "e.jsonl", [])
    with pytest.raises(ValueError, match="data.train: the data set is empty, no conversation in .*e.jsonl"):
        run(data_recipe(tmp_path, train=(empty,)), tokenizer)
    long = write_jsonl(tmp_path / "l.jsonl", [chat("long " * 100, "yes")] * 2)
    with pytest.raises(ValueError, match="no supervised token at all in 2 conversations"):
        run(data_recipe(tmp_path, train=(long,), max_length=30, on_too_long="truncate"), tokenizer)
    with pytest.raises(
        ValueError, match="all 2 conversations .* longer than data.max_length .30. and were dropped"
    ):
        run(data_recipe(tmp_path, train=(long,), max_length=30, on_too_long="drop"), tokenizer)
    same = write_jsonl(tmp_path / "s.jsonl", [chat("a", "b")] * 2)
    with pytest.raises(ValueError, match="no training document is left after 2 were held out"):
        run(data_recipe(tmp_path, train=(same,)), tokenizer)


def test_held_out_data_is_apart(tmp_path, tokenizer):
    good = write_jsonl(tmp_path / "a.jsonl", conversations(3))
    with pytest.raises(ValueError, match="a.jsonl is both in data.train and in data.heldout"):
        run(data_recipe(tmp_path, train=(good,), heldout=(good,)), tokenizer)
    with pytest.raises(ValueError, match="lies outside the target's vocabulary of 10"):
        run(data_recipe(tmp_path, train=(good,)), tokenizer, vocab_size=10)


def test_a_damaged_cache_is_named(tmp_path, tokenizer):
    recipe = data_recipe(tmp_path, train=(write_jsonl(tmp_path / "a.jsonl", conversations(3)),))
    (run(recipe, tokenizer).path / "statistics.json").unlink()
    with pytest.raises(
        ValueError, match="statistics.json is missing from the prepared data: remove the folder"
    ):
        run(recipe, tokenizer)


def test_the_split_goes_by_content():
    hashes = np.array([5, 1, 9, 1, 7], dtype=np.uint64)
    assert heldout_mask(hashes, 0.2).tolist() == [False, True, False, True, False]
    assert heldout_mask(hashes, 0.0).sum() == 0
    assert heldout_mask(hashes[:1], 0.5).sum() == 0
    assert heldout_mask(hashes, 0.001).sum() == 2


BAD_ROWS = [
    chat("q", ""),
    chat("question", "answer"),
    chat("q", "a", "q", ""),
    [{"role": "user", "content": ["x", 3]}, {"role": "assistant", "content": "a"}],
    [{"role": "user", "content": "one"}, *chat("two", "three")],
    chat("q", ""),
]


@pytest.mark.parametrize("workers", [1, 2])
def test_all_bad_rows_are_told_at_once(tmp_path, tokenizer, monkeypatch, workers):
    monkeypatch.setattr(prepare, "BATCH", 4)
    path = write_jsonl(tmp_path / "a.jsonl", [*conversations(100), *BAD_ROWS])
    with pytest.raises(ValueError) as caught:
        run(data_recipe(tmp_path, train=(path,), workers=workers), tokenizer)
    lines = str(caught.value).splitlines()
    assert lines[0] == "4 of 106 rows are bad:"
    assert lines[1:4] == [
        f"  {path}, line 101: messages[1].content is empty: remove the message or the row "
        f"[3 rows, further {path}, line 103, {path}, line 106]",
        f"  {path}, line 104: messages[0].content[1] is a int, expected an object with 'type' and 'text'",
        "  correct these rows, or set data.on_bad_row: drop, which leaves them out and counts them (those "
        "that are too long are left to data.on_too_long)",
    ]
    assert "'user' after 'user'" in lines[4] and lines[4].endswith(f"({path}, line 105)")
    assert not list((tmp_path / "cache").iterdir())


def test_bad_rows_are_dropped_and_counted(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", BAD_ROWS)
    recipe = data_recipe(tmp_path, train=(path,), on_bad_row="drop", heldout_fraction=0.0)
    data = run(recipe, tokenizer)
    assert len(data.train) == 2 and data.statistics.conversations == 6
    lines = data.statistics.lines()
    assert "4 rows are bad and were dropped (data.on_bad_row)" in lines
    assert "3 dropped as bad: messages[n].content is empty: remove the message or the row" in lines
    assert run(recipe, tokenizer).statistics == data.statistics
    with pytest.raises(ValueError, match="a.jsonl, line 2: the conversation has .* data.max_length 3"):
        run(data_recipe(tmp_path, train=(path,), on_bad_row="drop", max_length=3), tokenizer)
    bad = write_jsonl(tmp_path / "b.jsonl", [chat("q", ""), chat("q", "")])
    with pytest.raises(ValueError, match=r"2 of 2 rows are bad:\n.*\n  every row has this fault: the recipe"):
        run(data_recipe(tmp_path, train=(bad,), on_bad_row="drop"), tokenizer)


def test_lines_that_are_no_json_are_bad_rows(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    good = json.dumps({"messages": chat("q", "a")})
    path.write_text(f'{good}\n{{"messages": \n{good}\n[1]\n')
    with pytest.raises(
        ValueError, match=r"2 of 4 rows are bad:\n.*line 2: not valid JSON .*\n.*line 4: the row is"
    ):
        run(data_recipe(tmp_path, train=(str(path),)), tokenizer)


def test_many_bad_rows_end_the_reading(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(prepare, "ENOUGH", 5)
    monkeypatch.setattr(findings, "ENOUGH", 5)
    monkeypatch.setattr(prepare, "BATCH", 2)
    path = write_jsonl(tmp_path / "a.jsonl", [chat("q", "")] * 50)
    with pytest.raises(ValueError, match="6 of 6 rows are bad") as caught:
        run(data_recipe(tmp_path, train=(path,), workers=1), tokenizer)
    assert "reading stopped there; more may follow" in str(caught.value)


def test_what_is_marked_as_context_is_not_learnt(tmp_path):
    plain = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    plain = plain + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    rows = [
        chat("a", "no", "b", "yes"),
        chat("a", "yes", "b", "no"),
        [{"role": "assistant", "content": "no"}, *chat("a", "yes")],
        [*chat("a", "no"), {"role": "assistant", "content": "yes"}],
    ]
    for row in rows:
        for message in row:
            if message["content"] == "no" and message is not row[0]:
                message["weight"] = 0
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    for template in (TEMPLATE, plain):
        tokenizer = tiny_tokenizer(template)
        data = run(data_recipe(tmp_path, train=(path,), heldout_fraction=0.0), tokenizer)
        for document in data.train:
            pairs = zip(document["input_ids"], document["loss_mask"], strict=True)
            assert tokenizer.decode([token for token, flag in pairs if flag]) == "yes<|end|>"
        assert any("'weight' says not to learn" in line for line in data.statistics.lines())
        last = data_recipe(tmp_path, train=(path,), supervise="last", heldout_fraction=0.0)
        with pytest.raises(ValueError, match="a.jsonl, line 2: the last assistant message is marked not to"):
            run(last, tokenizer)


def test_a_row_has_template_arguments_of_its_own(tmp_path):
    tokenizer = tiny_tokenizer("{{ style }}" + TEMPLATE)
    rows = [
        {"messages": chat("q", "a"), "chat_template_kwargs": {"style": "own"}},
        {"messages": chat("q", "a"), "chat_template_kwargs": None},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = data_recipe(
        tmp_path,
        train=(str(tmp_path / "a.jsonl"),),
        chat_template_arguments={"style": "common"},
        heldout_fraction=0.0,
    )
    texts = [tokenizer.decode(document["input_ids"]) for document in run(recipe, tokenizer).train]
    assert [text.partition("<|user|>")[0] for text in texts] == ["own", "common"]


def test_calls_reach_templates_that_read_content_and_function(tmp_path):
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content "
        "+ '' }}{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson "
        "}}{% endfor %}<|end|>{% endgeneration %}{% else %}{{ m.content + '' "
        "}}<|end|>{% endif %}{% endfor %}"
    )
    call, tokenizer = {"name": "f", "arguments": {"x": None}}, tiny_tokenizer(template)
    told = [{"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps(call)}]
    rows = {
        "a": {"messages": [*chat("q"), {"role": "assistant", "content": None, "tool_calls": [call]}]},
        "b": {"messages": [*chat("q"), {"role": "assistant", "content": None, "function_call": call}]},
        "c": {"conversations": told},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    data = run(
        data_recipe(
            tmp_path, train=tuple(str(tmp_path / f"{name}.jsonl") for name in rows), heldout_fraction=0.0
        ),
        tokenizer,
    )
    for document in data.train:
        text = tokenizer.decode(document["input_ids"])
        assert text == '<|user|>q<|end|><|assistant|>f{"x": null}<|end|>'


def test_padding_that_no_column_tells_is_told(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<|end|>"
    pad = tokenizer.pad_token_id
    rows = [
        {"input_ids": [pad, 6, 7], "loss_mask": [0, 0, 1]},
        {"input_ids": [6, 7, pad, pad], "loss_mask": [0, 1, 0, 0]},
        {"input_ids": [6, 7, pad], "loss_mask": [0, 1, 1]},
        {"input_ids": [pad, 6, 7], "loss_mask": [0, 0, 1], "attention_mask": [0, 1, 1]},
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = run(data_recipe(tmp_path, train=(str(tmp_path / "t.jsonl"),), heldout_fraction=0.0), tokenizer)
    told = [line for line in data.statistics.lines() if "padding " in line]
    assert told == [
        "2 rows of tokens begin or end with the padding token, which is taken as text: give 'attention_mask'",
        "1 rows have padding by 'attention_mask', which was cut off",
    ]


@pytest.mark.parametrize("first", ["{", '{"question": "q"}', "3", '{"messages": [], "input_ids": null}'])
def test_a_bad_row_at_the_beginning_is_one_of_the_bad_rows(tmp_path, tokenizer, first):
    path = write_jsonl(tmp_path / "a.jsonl", [chat("q", "a"), chat("q", "")])
    text = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(f"{first}\n{text}")
    with pytest.raises(ValueError, match=r"2 of 3 rows are bad:\n.*line 1: .*\n.*line 3: "):
        run(data_recipe(tmp_path, train=(path,)), tokenizer)
    data = run(data_recipe(tmp_path, train=(path,), on_bad_row="drop", heldout_fraction=0.0), tokenizer)
    assert len(data.train) == 1 and data.statistics.bad_rows_dropped == 2


def test_long_rows_are_batches_by_themselves():
    rows = [
        Row(f"{number}", "messages", b"x" * size) for number, size in enumerate([9, 9, 70_000, 9, 99_999])
    ]
    assert [[row.place for row in batch] for batch in prepare.batches(rows)] == [["0", "1", "2"], ["3", "4"]]
    assert [len(batch) for batch in prepare.batches(rows[:1] * 150)] == [64, 64, 22]
    assert [len(batch) for batch in prepare.batches([Row("r", "messages", {"a": "x" * 66_000})] * 3)] == [
        1,
        1,
        1,
    ]
    assert list(prepare.batches([])) == []


def test_the_bar_moves_by_tokens(tmp_path, monkeypatch):
    moved = []
    monkeypatch.setattr(prepare, "BATCH", 1)
    monkeypatch.setattr(say.tqdm, "update", lambda bar, number: moved.append(number))
    path = write_jsonl(tmp_path / "a.jsonl", [chat("q" * n, "a") for n in range(1, 6)])
    data = prepare_data(data_recipe(tmp_path, train=(str(path),)), tiny_tokenizer(), "tok")
    assert len(moved) == 5 and sum(moved) == data.statistics.train_tokens + data.statistics.heldout_tokens
