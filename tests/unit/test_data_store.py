"""The hidden-state store: exact rows, crash safety, and errors that name the damage."""

import re
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle3_ds.data import store_writer
from eagle3_ds.data.store import HiddenStateStore, Layout
from eagle3_ds.data.store_writer import HiddenStateWriter, required_bytes

LENGTHS = {0: 5, 1: 1, 4: 9, 7: 3}
PRINT = {"target": "t1", "tokenizer": "k1", "layers": "2,4,5"}


def states(document, length, dtype=torch.float32):
    generator = torch.Generator().manual_seed(document)
    aux = torch.randn(length, 6, generator=generator).to(dtype)
    teacher = torch.randn(length, 2, generator=generator).to(dtype)
    return aux, teacher, torch.randint(0, 99, (length,), generator=generator)


def writer(path, lengths=LENGTHS, dtype="float32", shard_bytes=100, fingerprint=PRINT, **more):
    return HiddenStateWriter(path, lengths, Layout(6, 2, dtype), fingerprint, shard_bytes=shard_bytes, **more)


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
        assert torch.equal(store.rows(document, "teacher", length // 2, length), teacher[length // 2 :].to(cast))
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
    original = HiddenStateStore.rows
    monkeypatch.setattr(HiddenStateStore, "rows", lambda self, *args: asked.append(args) or original(self, *args))
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
    with pytest.raises(ValueError, match=r"1 documents .* instead of 4; missing: \[1, 4, 7\]"):
        out.finish()


def test_another_fingerprint_is_refused_by_field(tmp_path):
    filled(tmp_path / "s")
    HiddenStateStore.open(tmp_path / "s", PRINT)
    other = {**PRINT, "target": "t2", "template": "x"}
    expected = "target: stored t1, expected t2; template: stored absent, expected x"
    with pytest.raises(ValueError, match=expected):
        HiddenStateStore.open(tmp_path / "s", other)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"fingerprint": {**PRINT, "target": "t2"}}, "target: stored t1, expected t2"), ({"dtype": "float16"}, "layout")],
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
    with pytest.raises(ValueError, match=rf"{name} is missing from the hidden-state store: remove the folder"):
        HiddenStateStore.open(tmp_path / "s")


def test_verify_names_the_damaged_tensor(tmp_path):
    filled(tmp_path / "s", shard_bytes=2**20)
    (path,) = (tmp_path / "s").glob("*.safetensors")
    content = bytearray(path.read_bytes())
    needle = states(4, 9)[1].numpy().tobytes()
    content[content.find(needle) + 3] ^= 1
    path.write_bytes(content)
    store = HiddenStateStore.open(tmp_path / "s")
    with pytest.raises(ValueError, match=re.escape(f"{path.name} is damaged (teacher.4 rows 0:9)")):
        store.verify()


@pytest.mark.parametrize(("text", "message"), [("{", "index.json is damaged"), ('{"format": 9}', "has format 9")])
def test_a_bad_index_is_named(tmp_path, text, message):
    filled(tmp_path / "s")
    (tmp_path / "s" / "index.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        HiddenStateStore.open(tmp_path / "s")


def test_the_disk_is_measured_first(tmp_path, monkeypatch):
    need = required_bytes(LENGTHS, Layout(6, 2, "float32"))
    assert need == 18 * (8 * 4 + 4) + 4 * store_writer.SHARD_OVERHEAD
    usage = shutil.disk_usage(tmp_path)._replace(free=need - 1)
    monkeypatch.setattr(store_writer.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=f"take {need:,} bytes and .* has {need - 1:,} free"):
        writer(tmp_path / "s")


def test_required_bytes_cover_what_is_written(tmp_path):
    filled(tmp_path / "s", shard_bytes=1)
    written = sum(file.stat().st_size for file in (tmp_path / "s").iterdir())
    assert written <= required_bytes(LENGTHS, Layout(6, 2, "float32"))


def test_bad_tensors_are_refused(tmp_path):
    out = writer(tmp_path / "s", dtype="float16")
    aux, teacher, token = states(0, 5)
    with pytest.raises(ValueError, match=r"teacher of document 0 has shape \(4, 2\), expected \(5, 2\)"):
        out.append(0, aux, teacher[:4], token)
    aux[2, 3] = 1e6
    with pytest.raises(ValueError, match=r"aux of document 0 is not finite as float16 \(largest input 1e\+06\).*bfloat16"):
        out.append(0, aux, teacher, token)


def test_wrong_documents_and_dtypes_are_refused(tmp_path):
    store = filled(tmp_path / "s")
    with pytest.raises(ValueError, match="1 of 2 are missing .* document 7 with 4 tokens .store: 3."):
        store.require_documents({0: 5, 7: 4})
    with pytest.raises(ValueError, match="document 3 is not in the hidden-state store"):
        store.rows(3, "aux", 0, 1)
    with pytest.raises(ValueError, match="there is a complete hidden-state store at"):
        writer(tmp_path / "s")
    with pytest.raises(ValueError, match="data.hidden_dtype is 'int8': use one of float32, bfloat16, float16"):
        writer(tmp_path / "other", dtype="int8")
