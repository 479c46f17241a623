"""The hidden-state store: exact rows, crash safety, and errors that name the damage."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from eagle3_ds.store import writer as writer_module
from eagle3_ds.store.index import DTYPES, RowFormat
from eagle3_ds.store.reader import HiddenStateStore
from eagle3_ds.store.writer import HiddenStateWriter, required_bytes

LENGTHS = {0: 5, 1: 1, 4: 9, 7: 3}
PRINT = {"target": "t1", "tokenizer": "k1", "layers": "2,4,5"}


def states(document, length, dtype=torch.float32):
    generator = torch.Generator().manual_seed(document)
    aux = torch.randn(length, 6, generator=generator).to(dtype)
    teacher = torch.randn(length, 2, generator=generator).to(dtype)
    return aux, teacher, torch.randint(0, 99, (length,), generator=generator)


def writer(path, lengths=LENGTHS, dtype="float32", shard_bytes=100, fingerprint=PRINT, **more):
    return HiddenStateWriter(
        path, lengths, RowFormat(6, 2, dtype), fingerprint, shard_bytes=shard_bytes, **more
    )


def filled(path, **more):
    out = writer(path, **more)
    for document in out.missing():
        out.append(document, *states(document, out.lengths[document]))
    return out.finish()


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory):
    return filled(tmp_path_factory.mktemp("store") / "s")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_come_back_exactly(tmp_path, dtype):
    store = filled(tmp_path / "s", dtype=dtype)
    assert len(store.shards) > 1
    for document, length in LENGTHS.items():
        aux, teacher, token = states(document, length)
        cast = getattr(torch, dtype)
        assert torch.equal(store.rows(document, "aux", 0, length), aux.to(cast))
        assert torch.equal(
            store.rows(document, "teacher", length // 2, length), teacher[length // 2 :].to(cast)
        )
        assert torch.equal(store.rows(document, "teacher_token", 0, length), token.int())
    store.verify()


@settings(max_examples=100, deadline=None)
@given(st.permutations(list(LENGTHS)), st.integers(0, 18), st.integers(0, 18))
def test_a_view_slices_like_the_concatenation(shared_store, order, start, stop):
    whole = torch.cat([states(document, LENGTHS[document])[0] for document in order])
    view = shared_store.view(order, "aux")
    assert len(view) == 18 and view.shape == (18, 6)
    assert torch.equal(view[start:stop], whole[start:stop])
    assert view[start:stop].dtype == view.dtype


def test_a_view_reads_only_the_rows_asked_for(tmp_path, monkeypatch):
    store = filled(tmp_path / "s")
    asked = []
    original = HiddenStateStore.rows_as_stored

    def rows(self, *args):
        asked.append(args)
        return original(self, *args)

    monkeypatch.setattr(HiddenStateStore, "rows_as_stored", rows)
    store.view([4, 1, 0], "aux")[8:12]
    assert asked == [(4, "aux", 8, 9), (1, "aux", 0, 1), (0, "aux", 0, 2)]
    with pytest.raises(ValueError, match="not in steps of 2"):
        store.view([4], "aux")[::2]


def test_an_interrupted_capture_continues(tmp_path):
    first = writer(tmp_path / "s")
    first.append(0, *states(0, 5))
    first.append(1, *states(1, 1))  # waits in memory, lost with the process
    (first.partial / ".shard-0000-000001.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="no hidden-state store .* interrupted capture continues"):
        HiddenStateStore.open(tmp_path / "s")
    second = writer(tmp_path / "s")
    assert second.missing() == [1, 4, 7]
    for document in second.missing():
        second.append(document, *states(document, LENGTHS[document]))
    store = second.finish()
    store.verify()
    store.require_documents(LENGTHS)
    assert store.origin == "capture" and filled(tmp_path / "t", origin="elsewhere").origin == "elsewhere"
    assert torch.equal(store.rows(0, "aux", 0, 5), states(0, 5)[0])
    assert not first.partial.exists()
    assert not list((tmp_path / "s").glob(".*"))


def test_a_crash_between_the_index_and_the_last_rename_loses_nothing(tmp_path):
    filled(tmp_path / "s")
    (tmp_path / "s").rename(tmp_path / "s.partial")
    again = writer(tmp_path / "s")
    assert again.missing() == []
    again.finish().verify()


def test_several_writers_fill_one_store(tmp_path):
    writers = [writer(tmp_path / "s", rank=rank) for rank in range(2)]
    for index, document in enumerate(LENGTHS):
        writers[index % 2].append(document, *states(document, LENGTHS[document]))
    writers[1].flush()
    writers[0].finish().require_documents(LENGTHS)


def test_finish_refuses_a_store_with_gaps(tmp_path):
    out = writer(tmp_path / "s")
    out.append(0, *states(0, 5))
    with pytest.raises(ValueError, match=r"1 whole documents instead of 4; missing: \[1, 4, 7\]"):
        out.finish()


def test_other_users_may_read_the_store(tmp_path):
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in filled(tmp_path / "s").path.iterdir())


def test_another_fingerprint_is_refused_by_field(tmp_path):
    filled(tmp_path / "s")
    HiddenStateStore.open(tmp_path / "s", PRINT)
    other = {**PRINT, "target": "t2", "template": "x"}
    expected = "target: stored t1, expected t2; template: stored absent, expected x"
    with pytest.raises(ValueError, match=expected):
        HiddenStateStore.open(tmp_path / "s", other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": {**PRINT, "target": "t2"}}, "target: stored t1, expected t2"),
        ({"dtype": "float16"}, "layout"),
        ({"origin": "x"}, "origin: stored capture, expected x"),
    ],
)
def test_a_capture_does_not_continue_another_one(tmp_path, change, message):
    first = writer(tmp_path / "s")
    first.append(0, *states(0, 5))
    with pytest.raises(ValueError, match=f"{message}.*s.partial to start again"):
        writer(tmp_path / "s", **change)


def test_a_missing_and_a_truncated_file_are_named(tmp_path):
    store = filled(tmp_path / "s")
    name = sorted(store.shards)[1]
    path = tmp_path / "s" / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"{name} has {len(content) - 1} bytes instead of {len(content)}"):
        HiddenStateStore.open(tmp_path / "s")
    path.unlink()
    with pytest.raises(
        ValueError, match=rf"{name} is missing from the hidden-state store: remove the folder"
    ):
        HiddenStateStore.open(tmp_path / "s")


def test_the_disk_is_measured_first(tmp_path, monkeypatch):
    need = required_bytes(LENGTHS, RowFormat(6, 2, "float32"))
    assert need == 18 * (8 * 4 + 4 + 3 * 4) + 4 * writer_module.OVERHEAD
    usage = shutil.disk_usage(tmp_path)._replace(free=need - 1)
    monkeypatch.setattr(writer_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=f"take {need:,} bytes and .* has {need - 1:,} free"):
        writer(tmp_path / "new" / "s")
    assert not list(tmp_path.iterdir())


def test_the_size_is_known_before_anything_is_written(tmp_path):
    out = writer(tmp_path / "new" / "s")
    assert not list(tmp_path.iterdir())
    assert (
        "4 documents of 18 tokens take 17.2 kB as float32" in out.size_text
        and "there already" not in out.size_text
    )
    out.append(0, *states(0, 5))
    again = writer(tmp_path / "new" / "s")
    assert again.required == required_bytes({1: 1, 4: 9, 7: 3}, RowFormat(6, 2, "float32"))
    assert (
        "3 documents of 13 tokens" in again.size_text and "1 documents are there already" in again.size_text
    )


def test_a_resumed_capture_measures_the_disk_for_what_is_missing(tmp_path, monkeypatch):
    writer(tmp_path / "s").append(0, *states(0, 5))
    need = required_bytes({1: 1, 4: 9, 7: 3}, RowFormat(6, 2, "float32"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writer_module.shutil, "disk_usage", lambda _: usage._replace(free=need - 1))
    with pytest.raises(ValueError, match=f"take {need:,} bytes.*data.hidden_dtype to float8"):
        writer(tmp_path / "s")
    monkeypatch.setattr(writer_module.shutil, "disk_usage", lambda _: usage._replace(free=need))
    assert writer(tmp_path / "s").missing() == [1, 4, 7]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left")]
)
def test_a_disk_that_fills_up_loses_nothing_that_was_written(tmp_path, monkeypatch, error):
    out = writer(tmp_path / "s")
    out.append(0, *states(0, 5))

    def full(_tensors, path, metadata):
        path.write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "save_file", full)
        with pytest.raises(
            ValueError,
            match="shard-0000-000001.safetensors could not be written .*No space left.*continues after",
        ):
            out.append(4, *states(4, 9))
    assert not list(out.partial.glob(".*"))
    again = writer(tmp_path / "s")
    for document in again.missing():
        again.append(document, *states(document, LENGTHS[document]))
    with monkeypatch.context() as patch:
        patch.setattr(writer_module.Path, "write_text", lambda *_: raise_(error))
        with pytest.raises(ValueError, match="s.partial/index.json could not be written .*No space left"):
            again.finish()
    assert writer(tmp_path / "s").finish().lengths == LENGTHS


def raise_(error):
    raise error


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_required_bytes_cover_what_is_written(tmp_path, dtype):
    filled(tmp_path / "s", shard_bytes=1, dtype=dtype)
    written = sum(file.stat().st_size for file in (tmp_path / "s").iterdir())
    assert written <= required_bytes(LENGTHS, RowFormat(6, 2, dtype))


def test_bad_tensors_are_refused(tmp_path):
    out = writer(tmp_path / "s", dtype="float16")
    aux, teacher, token = states(0, 5)
    with pytest.raises(ValueError, match=r"teacher of document 0 has shape \(4, 2\), expected \(5, 2\)"):
        out.append(0, aux, teacher[:4], token)
    aux[2, 3] = 1e6
    expected = (
        r"aux of document 0 is not finite as float16 \(largest input 1e\+06\), first at row 2: .*bfloat16"
    )
    with pytest.raises(ValueError, match=expected):
        out.append(0, aux, teacher, token)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_hidden_states_that_are_not_finite_are_refused(tmp_path, dtype, value):
    out = writer(tmp_path / "s", dtype=dtype)
    aux, teacher, token = states(4, 9)
    teacher[5, 1] = value
    with pytest.raises(
        ValueError, match=f"teacher of document 4 is not finite as {dtype} .*, first at row 5.*--document 4"
    ):
        out.append(4, aux, teacher, token)
    assert out.missing() == list(LENGTHS)


def test_values_that_float8_would_round_to_infinity_are_refused(tmp_path):
    aux, teacher, token = states(4, 9)
    aux[8, 0] = -3.3e38
    with pytest.raises(ValueError, match=r"not finite as float8 \(largest input 3.3e\+38\), first at row 8"):
        writer(tmp_path / "s", dtype="float8").append(4, aux, teacher, token)


def test_a_document_may_come_in_the_pieces_that_ranks_hold(tmp_path):
    """Two ranks hold interleaved spans of document 4; rank 1's are lost with its process, and the capture is
    continued by one rank with other spans, which overlap."""
    aux, teacher, token = states(4, 9)
    spans = [(0, 2), (2, 5), (5, 6), (6, 9)]
    ranks = [writer(tmp_path / "s", lengths={4: 9}, rank=rank, shard_bytes=2**20) for rank in range(2)]
    for number, (start, stop) in enumerate(spans):
        ranks[number % 2].append(4, aux[start:stop], teacher[start:stop], token[start:stop], start=start)
    ranks[0].flush()
    with pytest.raises(ValueError, match=r"0 whole documents instead of 1; missing: \[4\]"):
        ranks[0].finish()
    again = writer(tmp_path / "s", lengths={4: 9}, rank=2)
    assert again.missing() == [4]
    for start, stop in [(0, 4), (4, 9)]:
        again.append(4, aux[start:stop], teacher[start:stop], token[start:stop], start=start)
    store = again.finish()
    store.verify()
    for start in range(10):
        for stop in range(start, 10):
            assert torch.equal(store.rows(4, "aux", start, stop), aux[start:stop])
            assert torch.equal(store.rows(4, "teacher_token", start, stop), token[start:stop].int())


def test_wrong_documents_and_dtypes_are_refused(tmp_path):
    store = filled(tmp_path / "s")
    with pytest.raises(ValueError, match="1 of 2 are missing .* document 7 with 4 tokens .store: 3."):
        store.require_documents({0: 5, 7: 4})
    with pytest.raises(ValueError, match="document 3 is not in the hidden-state store"):
        store.rows(3, "aux", 0, 1)
    with pytest.raises(ValueError, match="there is a complete hidden-state store at"):
        writer(tmp_path / "s")
    with pytest.raises(
        ValueError, match="data.hidden_dtype is 'int8': use one of float32, bfloat16, float16, float8"
    ):
        writer(tmp_path / "other", dtype="int8")
