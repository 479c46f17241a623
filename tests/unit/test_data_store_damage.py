"""A store that was damaged, cut off at any step of its writing, or made by somebody who means harm."""

import json
import os
import signal

import pytest
import torch

from eagle3_ds.store import reader as store_reader
from eagle3_ds.store import writer as writer_module
from eagle3_ds.store.index import DTYPES
from eagle3_ds.store.reader import HiddenStateStore
from tests.unit.test_data_store import LENGTHS, filled, states, writer

# Verifying


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_any_flipped_byte_is_found_and_its_file_tensor_and_row_are_named(tmp_path, dtype):
    store = filled(tmp_path / "s", dtype=dtype, shard_bytes=150)
    assert len(store.shards) > 1
    store.verify()
    for shard in store.shards.values():
        path = store.path / shard.file
        content = path.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        tensors = {
            name: spec for name, spec in json.loads(content[8:header]).items() if name != "__metadata__"
        }
        covered = 0
        for name, spec in tensors.items():
            start, stop = (header + offset for offset in spec["data_offsets"])
            covered += stop - start
            row_bytes = (stop - start) // spec["shape"][0]
            column, document, _ = name.split(".")
            for place in range(start, stop, 5):
                message = damage(store, path, content, place)
                named = f"{path.name}, {column} of document {document}, "
                row = (place - start) // row_bytes
                rows = f"rows 0:{LENGTHS[int(document)]}" if column == "checksum" else f"row {row}."
                assert named + rows in message, message
        assert header + covered == len(content)
        for place in (0, 3, 20, header - 2):
            assert str(path) in damage(store, path, content, place)


def damage(store, path, content, place):
    """What `verify` says of a flipped bit."""
    path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
    with pytest.raises(ValueError, match="damaged") as error:
        HiddenStateStore.open(store.path).verify()
    path.write_bytes(content)
    return str(error.value)


def test_all_damages_are_named_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(store_reader, "ROWS_AT_ONCE", 4)
    store = filled(tmp_path / "s", shard_bytes=2**20)
    (path,) = (tmp_path / "s").glob("*.safetensors")
    content = bytearray(path.read_bytes())
    for row in (2, 7):
        content[content.find(states(4, 9)[1][row].numpy().tobytes())] ^= 1
    content[content.find(states(7, 3)[0][1].numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"aux of document 7, row 1; .*teacher of document 4, rows 2, 7|rows 2, 7; .*row 1"
    ):
        store.verify()


def test_a_file_that_vanishes_or_shrinks_while_the_store_is_open_is_named(tmp_path):
    store = filled(tmp_path / "s")
    path = tmp_path / "s" / next(iter(store.shards))
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    with pytest.raises(ValueError, match=f"{path.name} has .* bytes instead of .* truncated"):
        store.rows(0, "aux", 0, 1)
    path.unlink()
    with pytest.raises(
        ValueError, match=f"{path.name} is missing from the hidden-state store: remove the folder"
    ):
        store.rows(0, "aux", 0, 1)
    with pytest.raises(ValueError, match=f"{path.name} is missing"):
        store.verify()


# Crashes


class CountedCalls:
    """Every step that changes the disk, counted; the process kills itself before step `fatal`."""

    def __init__(self, fatal=None):
        self.calls = 0
        self.fatal = fatal

    def wrap(self, function):
        def counted(*args, **kwargs):
            if self.calls == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            self.calls += 1
            return function(*args, **kwargs)

        return counted

    def install(self, patch):
        for module, name in ((writer_module, "save_file"), (writer_module, "_sync"), (os, "rename")):
            patch.setattr(module, name, self.wrap(getattr(module, name)))


def capture_all(path):
    out = writer(path)
    for document in out.missing():
        out.append(document, *states(document, LENGTHS[document]))
    return out.finish()


def test_a_capture_killed_before_any_step_is_continued(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        steps = CountedCalls()
        steps.install(patch)
        capture_all(tmp_path / "whole")
    assert steps.calls > 8
    for fatal in range(steps.calls):
        path = tmp_path / f"killed-{fatal}" / "s"
        assert run_in_child(path, fatal) == signal.SIGKILL
        store = HiddenStateStore.open(path) if path.exists() else capture_all(path)
        store.verify()
        store.require_documents(LENGTHS)
        for document, length in LENGTHS.items():
            assert torch.equal(store.rows(document, "aux", 0, length), states(document, length)[0])
        assert [folder.name for folder in path.parent.iterdir()] == ["s"]
        assert not list(path.glob(".*"))


def run_in_child(path, fatal):
    """The signal that ended a process which captured until it met step `fatal`."""
    child = os.fork()
    if child == 0:
        patch = pytest.MonkeyPatch()
        CountedCalls(fatal).install(patch)
        try:
            capture_all(path)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) * -1


def test_a_damaged_shard_of_an_interrupted_capture_is_named(tmp_path):
    first = writer(tmp_path / "s")
    first.append(0, *states(0, 5))
    (path,) = first.partial.glob("shard-*")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=f"{path.name} is damaged .*remove that file"):
        writer(tmp_path / "s")
    path.unlink()
    assert writer(tmp_path / "s").missing() == list(LENGTHS)


def test_a_shard_of_other_documents_is_named(tmp_path):
    first = writer(tmp_path / "s")
    first.append(4, *states(4, 9))
    with pytest.raises(
        ValueError, match="rows up to 9 of document 4, which has 8 tokens here: finish what began"
    ):
        writer(tmp_path / "s", lengths={4: 8})


# Indices that lie


def shard(**changes):
    return lambda index: index["shards"][0].update(changes)


def piece(*values):
    return lambda index: index["shards"][0]["pieces"].__setitem__(0, list(values))


def layout(**changes):
    return lambda index: index["layout"].update(changes)


HOSTILE = {
    "parent folder": shard(file="../other/shard-0000-000000.safetensors"),
    "absolute path": shard(file="/etc/passwd"),
    "path through a shard": shard(file="shard-0000-000000.safetensors/../../x"),
    "newline": shard(file="shard-0000-000000.safetensors\n"),
    "no text": shard(file=7),
    "same shard twice": lambda index: index["shards"].append(index["shards"][0]),
    "negative size": shard(bytes=-1),
    "absurd size": shard(bytes=2**70),
    "fractional size": shard(bytes=10.5),
    "size in words": shard(bytes="many"),
    "crc too large": shard(header_crc32=2**32),
    "no pieces": shard(pieces=None),
    "unknown key": shard(url="http://example.org"),
    "absurd length": piece(0, 0, 2**60, 0),
    "length beyond the file": piece(0, 0, 2**30, 0),
    "length zero": piece(0, 0, 0, 0),
    "negative start": piece(0, -1, 5, 0),
    "true for a length": piece(0, 0, True, 0),
    "piece too short": piece(0, 0, 5),
    "gap": piece(0, 1, 5, 0),
    "width zero": layout(aux_width=0),
    "absurd width": layout(teacher_width=2**50),
    "unknown dtype": layout(dtype="int8"),
    "dtype as a list": layout(dtype=["float32"]),
    "fingerprint of numbers": lambda index: index["fingerprint"].update(target=1),
    "no fingerprint": lambda index: index.pop("fingerprint"),
    "no origin": lambda index: index.pop("origin"),
    "shards are a name": lambda index: index.update(shards="shard-0000-000000.safetensors"),
}


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    return filled(tmp_path_factory.mktemp("honest") / "s", shard_bytes=2**20).path


@pytest.fixture
def rewrite(honest):
    """Changes the index for the length of a test."""
    file = honest / "index.json"
    before = file.read_text()

    def write(text):
        file.write_bytes(text if isinstance(text, bytes) else text.encode())

    yield lambda change: write(changed(before, change)) if callable(change) else write(change)
    file.write_text(before)


def changed(text, change):
    index = json.loads(text)
    change(index)
    return json.dumps(index)


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_an_index_that_cannot_be_is_refused(honest, rewrite, change):
    rewrite(change)
    with pytest.raises(
        ValueError, match=r"s/index.json is damaged \(.+\): remove the folder .*/s and capture again"
    ):
        HiddenStateStore.open(honest)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 100_000, b"\xff\xfe", '{"format": 2}'],
    ids=["empty", "cut", "deep", "bytes", "bare"],
)
def test_an_index_that_is_no_json_of_ours_is_refused(honest, rewrite, text):
    rewrite(text)
    with pytest.raises(ValueError, match="s/index.json is damaged"):
        HiddenStateStore.open(honest)


@pytest.mark.parametrize("text", ["[]", "1", "null", '{"format": "2"}', '{"format": 1}'])
def test_another_format_is_named(honest, rewrite, text):
    rewrite(text)
    with pytest.raises(ValueError, match="this version reads 2: remove the folder"):
        HiddenStateStore.open(honest)


def test_an_index_larger_than_any_is_not_read(honest, rewrite):
    rewrite("{}")
    os.truncate(honest / "index.json", 2**40)
    with pytest.raises(ValueError, match="has 1,099,511,627,776 bytes, which no index has"):
        HiddenStateStore.open(honest)


def swapped_widths(index):
    index["layout"].update(aux_width=2, teacher_width=6)


def other_document(index):
    for entry in index["shards"][0]["pieces"]:
        entry[0] += 100


@pytest.mark.parametrize(
    ("change", "document", "message"),
    [
        (swapped_widths, 0, r"aux.0.0 is F32 \(5, 6\) instead of torch.float32 \(5, 2\)"),
        (layout(dtype="bfloat16", aux_width=12, teacher_width=4), 0, "aux.0.0 is F32"),
        (other_document, 100, "aux.100.0"),
        (shard(header_crc32=0), 0, "its header is not the one that was written"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_found_when_they_are_read(
    honest, rewrite, change, document, message
):
    rewrite(change)
    store = HiddenStateStore.open(honest)
    with pytest.raises(ValueError, match=f"shard-0000-000000.safetensors is damaged .*{message}"):
        store.rows(document, "aux", 0, 1)
    with pytest.raises(ValueError, match="is damaged"):
        store.verify()


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    store = filled(tmp_path / "s")
    path = tmp_path / "s" / next(iter(store.shards))
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match="is a link out of the hidden-state store, to .*/elsewhere, and is not followed"
    ):
        HiddenStateStore.open(tmp_path / "s")
