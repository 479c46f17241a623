"""Asking a server for hidden states: what a store gets, every way in which a server can be wrong, and going
on after an interruption.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eagle3_ds import patient_http
from eagle3_ds.serving.client import ServerClient
from eagle3_ds.serving.fill import fill_store, require_lengths, require_same_head
from eagle3_ds.serving.rows import Expected
from eagle3_ds.store import HiddenStateStore, HiddenStateWriter, RowFormat, writer
from eagle3_ds.store.rows import row_checksums
from tests.unit.fake_server import FakeServer

WIDTH, LAYERS = 4, (2, 3, 4, 7)
ABOUT = {
    "format": "eagle3_ds rows 1",
    "layer_ids": "2,3,4,7",
    "vocab_size": "50",
    "dtype": "float32",
    "target_weights": "abc",
}
EXPECTED = Expected(LAYERS, WIDTH, 50, "float32", "abc")
DOCUMENTS = [(number, [number + place for place in range(3 + number)]) for number in range(12)]
LENGTHS = {number: len(tokens) for number, tokens in DOCUMENTS}
FINGERPRINT = {"target_weights": "abc"}


def states(token_ids: list[int]) -> tuple[Tensor, int]:
    """[n, 4, WIDTH], different for every token and layer; the next token is that of `finish`."""
    tokens = torch.tensor(token_ids, dtype=torch.float32)[:, None, None]
    return tokens + torch.arange(4.0)[:, None] / 8 + torch.arange(WIDTH) / 64, token_ids[-1]


def finish(last: Tensor) -> tuple[Tensor, Tensor]:
    return 2 * last, last[:, 0].long()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    (tmp_path / "rows").mkdir()
    with FakeServer(tmp_path / "rows", states, dict(ABOUT)).running() as fake:
        yield fake


@pytest.fixture(autouse=True)
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patient_http, "FIRST_WAIT", 0.01)


def client_of(server: FakeServer, **changes: Any) -> ServerClient:
    settings = {"timeout": 5.0, "retries": 2, **changes}
    return ServerClient(server.url, server.folder, "run", **settings)


def writer_at(tmp_path: Path) -> HiddenStateWriter:
    layout = RowFormat(3 * WIDTH, WIDTH, "float32")
    return HiddenStateWriter(tmp_path / "store", LENGTHS, layout, FINGERPRINT, origin="test")


def fill(server: FakeServer, tmp_path: Path, told: Callable[[int], object] = lambda tokens: None) -> None:
    """Connect, ask for what is missing, and write it."""
    client, target = client_of(server), writer_at(tmp_path)
    client.connect()
    missing = set(target.missing())
    wanted = [document for document in DOCUMENTS if document[0] in missing]
    fill_store(client, wanted, EXPECTED, finish, target, 3, told)


def require_right(tmp_path: Path) -> None:
    """Every document is in the store as the server computes it, and no row twice."""
    writer_at(tmp_path).finish()
    store = HiddenStateStore.open(tmp_path / "store", FINGERPRINT)
    store.verify()
    pieces = [piece for shard in store.shards.values() for piece in shard.pieces]
    assert sum(piece.length for piece in pieces) == sum(LENGTHS.values())
    for number, tokens in DOCUMENTS:
        hidden, _ = states(tokens)
        assert torch.equal(store.rows(number, "aux", 0, len(tokens)), hidden[:, :3].flatten(1))
        assert torch.equal(store.rows(number, "teacher", 0, len(tokens)), 2 * hidden[:, 3])
        assert store.rows(number, "teacher_token", 0, len(tokens)).tolist() == tokens


def test_a_store_gets_every_document_once_and_the_files_are_removed(
    server: FakeServer, tmp_path: Path
) -> None:
    told: list[int] = []
    fill(server, tmp_path, told.append)
    require_right(tmp_path)
    assert sum(told) == sum(LENGTHS.values())
    assert len(server.asked) == len(DOCUMENTS)
    assert not list(server.folder.iterdir())


def test_as_many_are_asked_for_at_once_as_was_said_and_no_more(server: FakeServer, tmp_path: Path) -> None:
    together = threading.Barrier(3)  # breaks, and fails the request, unless three wait at once
    server.before = lambda: together.wait(10)
    running, most, lock = 0, 0, threading.Lock()

    def counted(token_ids: list[int]) -> tuple[Tensor, int]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        return states(token_ids)

    server.states = counted
    fill(server, tmp_path)
    assert most <= 3
    require_right(tmp_path)


def test_an_interrupted_client_goes_on_and_no_row_is_written_twice(
    server: FakeServer, tmp_path: Path
) -> None:
    told: list[int] = []

    def interrupt(tokens: int) -> None:
        told.append(tokens)
        if len(told) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(server, tmp_path, interrupt)
    (server.folder / "run-left-behind.safetensors").write_bytes(b"x")
    (server.folder / "other-of-someone-else.safetensors").write_bytes(b"x")
    assert len(writer_at(tmp_path).missing()) == len(DOCUMENTS) - 4
    server.asked.clear()
    fill(server, tmp_path)
    assert len(server.asked) == len(DOCUMENTS) - 4
    assert [file.name for file in server.folder.iterdir()] == ["other-of-someone-else.safetensors"]
    require_right(tmp_path)


def test_a_server_that_restarts_midway_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    fake, told = FakeServer(tmp_path / "rows", states, dict(ABOUT)), threading.Event()

    def killed(path: Path) -> None:
        if len(fake.asked) >= 5:  # two threads ask, and each may see the other's request too
            told.set()

    fake.spoil = killed
    errors: list[BaseException] = []

    def run() -> None:
        try:
            client, target = client_of(fake, retries=9), writer_at(tmp_path)
            client.connect()
            fill_store(client, DOCUMENTS, EXPECTED, finish, target, 2)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    with fake.running():
        thread.start()
        assert told.wait(10)
    with fake.running():
        thread.join(30)
    assert not thread.is_alive()
    assert not errors
    require_right(tmp_path)


def cut_tokens(tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        tensors[name] = tensors[name][:-1].clone()


def other_token(tensors: dict[str, Tensor]) -> None:
    tensors["token_ids"][1] = 49


def not_finite(tensors: dict[str, Tensor]) -> None:
    tensors["hidden_states"][1, 3, 0] = float("nan")
    tensors["row_crc32"] = row_checksums(tensors["hidden_states"].flatten(1))


def narrow(tensors: dict[str, Tensor]) -> None:
    tensors["hidden_states"] = tensors["hidden_states"][:, :, :2].clone()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"about": {**ABOUT, "layer_ids": "2,3,7"}},
            r"layers 2,3,7, and the recipe needs 2,3,4,7 .*\[2,3,4,7\]",
        ),
        ({"about": {**ABOUT, "vocab_size": "51"}}, r"vocabulary of 51, that in target\.path of 50"),
        (
            {"about": {**ABOUT, "dtype": "bfloat16"}},
            "in bfloat16, and target.dtype is float32. .* --dtype float32",
        ),
        ({"about": {**ABOUT, "target_weights": "x"}}, "other weights .*Serve the folder of target.path"),
        ({"about": {**ABOUT, "format": "rows 9"}}, "format 'rows 9'.*connector.py of this version"),
        ({"alter": cut_tokens}, r"14 tokens were sent and the server gave rows for 13.*truncation"),
        ({"alter": other_token}, r"token 1 of the document was sent as 12, .* for 49"),
        ({"alter": not_finite}, "row 1 is not finite in the hidden state of layer 7.*--dtype"),
        ({"alter": narrow}, r"rows of shape \(14, 4, 2\), expected \(14, 4, 4\).*Serve the model"),
        ({"status": 400, "reason": "too long"}, "refuses the request: 400 too long"),
        ({"status": 401}, r"asks for a key \(401\).*target.server.key_variable is null"),
        (
            {"answer": lambda answer: answer.pop("kv_transfer_params")},
            "without this program's connector. Start",
        ),
        ({"answer": lambda answer: answer["kv_transfer_params"].update(eagle3_ds_rows="../x")}, "connector"),
    ],
)
def test_rows_that_are_not_the_targets_end_the_capture_at_once(
    changes: dict[str, Any], message: str, server: FakeServer
) -> None:
    for name, value in changes.items():
        setattr(server, name, value)
    client = client_of(server)
    client.connect()
    with pytest.raises(ValueError, match=message):
        client.rows(DOCUMENTS[11][1], EXPECTED)
    assert len(server.asked) == 1


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-4 * 14 - 20] ^= 1  # in the last row, before the checksums
    path.write_bytes(data)


def lose(path: Path) -> None:
    path.unlink()


def fail(path: Path) -> None:
    path.unlink()
    path.with_suffix(".failed").write_text("OSError: device gone")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, "14 tokens: .*cannot be read"),
        (flip, "14 tokens: .*row 13 has another checksum"),
        (lose, "14 tokens: .*did not appear in 0.2 s: .*target.server.folder"),
        (fail, "14 tokens: .*device gone"),
    ],
)
def test_damage_is_asked_for_again_and_then_told(
    spoil: Callable[[Path], None], message: str, server: FakeServer
) -> None:
    client = client_of(server, timeout=0.2)
    client.connect()
    server.spoil = spoil
    with pytest.raises(ValueError, match=message + ".*tried 3 times.*run the same command again"):
        client.rows(DOCUMENTS[11][1], EXPECTED)
    assert len(server.asked) == 3
    server.spoil = lambda path: spoil(path) if len(server.asked) == 4 else None
    assert torch.equal(client.rows(DOCUMENTS[11][1], EXPECTED).hidden, states(DOCUMENTS[11][1])[0])


def test_a_busy_server_is_asked_again(server: FakeServer) -> None:
    client = client_of(server)
    client.connect()
    server.failures = 2
    assert client.rows([1, 2], EXPECTED).token == 2
    server.failures = 3
    with pytest.raises(ValueError, match="says 503.*tried 3 times.*target.server.retries"):
        client.rows([1, 2], EXPECTED)


def test_a_full_disk_of_the_server_is_one_message(server: FakeServer) -> None:
    def full(path: Path) -> None:
        path.unlink()
        path.with_suffix(".failed").write_text("OSError: [Errno 28] No space left on device")

    server.spoil = full
    client = client_of(server)
    client.connect()
    with pytest.raises(ValueError, match="free some space in target.server.folder"):
        client.rows([1, 2], EXPECTED)
    assert len(server.asked) == 1


def test_a_full_disk_of_the_store_is_one_message_and_nothing_is_lost(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(writer, "save_file", full)
        with pytest.raises(ValueError, match="free some space and run again"):
            fill(server, tmp_path)
    fill(server, tmp_path)
    require_right(tmp_path)


def test_a_server_that_is_not_there_or_is_none_of_vllms(server: FakeServer, tmp_path: Path) -> None:
    gone = FakeServer(server.folder, states, dict(ABOUT))
    with gone.running():
        pass
    with pytest.raises(ValueError, match=r"target\.server\.url http.*cannot be reached .*set it to null"):
        client_of(gone).connect()
    server.models = {"models": []}
    with pytest.raises(ValueError, match="not vLLM's, which has max_model_len"):
        client_of(server).connect()
    with pytest.raises(ValueError, match=r"target\.server\.folder = .*no folder"):
        ServerClient(server.url, tmp_path / "absent", "run", 1.0, 0).connect()


def test_documents_that_are_too_long_for_the_server_are_counted() -> None:
    require_lengths([99, 10], 100, "url")
    with pytest.raises(ValueError, match=r"2 documents .*longest 120, .*100 .*--max-model-len 121"):
        require_lengths([100, 10, 120], 100, "url")


def test_a_server_of_another_model_is_found_by_the_tokens_it_chooses(server: FakeServer) -> None:
    server.about["target_weights"] = ""
    client = client_of(server)
    client.connect()
    require_same_head(client, DOCUMENTS, EXPECTED, finish)
    server.states = lambda token_ids: (states(token_ids)[0], 0)
    with pytest.raises(ValueError, match="after 8 texts .* 0 times: it runs another model"):
        require_same_head(client, DOCUMENTS[1:], EXPECTED, finish)


def test_the_key_is_sent_and_never_shown(
    server: FakeServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    server.key = "a-secret"
    monkeypatch.setenv("OURS", "a-secret")
    client = client_of(server, key_variable="OURS")
    assert client.connect() == 512
    monkeypatch.setenv("OURS", "wrong-secret")
    message = "OURS of target.server.key_variable is not accepted"
    with pytest.raises(ValueError, match=message) as refused:
        client_of(server, key_variable="OURS").connect()
    assert "secret" not in caplog.text + str(refused.value)


def test_a_client_that_is_stopped_leaves_no_thread_waiting(server: FakeServer, tmp_path: Path) -> None:
    hold = threading.Event()
    server.before = lambda: hold.wait(20) if len(server.asked) > 1 else None
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fill(server, tmp_path, lambda tokens: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert time.monotonic() - started < 5
    hold.set()
