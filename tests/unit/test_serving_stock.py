"""Hidden states from a server that runs vLLM's own connector: the same store and the same spans as from ours,
and every way in which its files can be wrong.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eagle3_ds import patient_http
from eagle3_ds.serving import written
from eagle3_ds.serving.ahead import LookAhead
from eagle3_ds.serving.client import ServerClient, StoppedError
from eagle3_ds.serving.rows import RowFile
from eagle3_ds.store import HiddenStateStore
from tests.unit.fake_server import FakeServer
from tests.unit.test_serving import (
    ABOUT,
    DOCUMENTS,
    EXPECTED,
    FINGERPRINT,
    client_of,
    fill,
    require_right,
    states,
)

TOKENS = DOCUMENTS[11][1]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    (tmp_path / "rows").mkdir()
    with FakeServer(tmp_path / "rows", states, dict(ABOUT), is_stock=True).running() as fake:
        yield fake


@pytest.fixture(autouse=True)
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patient_http, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(written, "SETTLE_SECONDS", 0.05)


def connected(server: FakeServer, **changes: Any) -> ServerClient:
    client = client_of(server, **changes)
    client.connect()
    return client


def test_a_store_filled_from_it_is_the_one_filled_from_ours(server: FakeServer, tmp_path: Path) -> None:
    fill(server, tmp_path)
    assert not list(server.folder.iterdir()), "files or locks were left"
    require_right(tmp_path)
    server.is_stock, ours = False, tmp_path / "ours"
    ours.mkdir()
    fill(server, ours)
    require_right(ours)
    stores = [HiddenStateStore.open(folder / "store", FINGERPRINT) for folder in (tmp_path, ours)]
    for number, tokens in DOCUMENTS:
        for name in ("aux", "teacher", "teacher_token"):
            left, right = (store.rows(number, name, 0, len(tokens)) for store in stores)
            assert torch.equal(left, right)


def test_spans_of_a_streamed_file_are_the_rows_of_the_store(server: FakeServer, tmp_path: Path) -> None:
    fill(server, tmp_path)
    require_right(tmp_path)
    store = HiddenStateStore.open(tmp_path / "store", FINGERPRINT)
    ahead = LookAhead(connected(server), EXPECTED, 4 * 4 * 4 + 12, 10**6, 2)
    packs = [DOCUMENTS[:2], DOCUMENTS[10:]]
    ahead.announce(iter(packs))
    for turn, pack in enumerate(packs):
        places = [server.folder / f"run-{turn}-{i}.safetensors" for i in range(2)]
        ahead.take(pack, places)
        for (number, _), place in zip(pack, places, strict=True):
            rows = RowFile(place, EXPECTED).rows(1, 3)
            assert torch.equal(rows[:, :3].flatten(1), store.rows(number, "aux", 1, 3))
            assert torch.equal(2 * rows[:, 3], store.rows(number, "teacher", 1, 3))
        ahead.release(places)
    ahead.close()
    assert not list(server.folder.iterdir()), "files or locks were left"


def test_what_cannot_be_checked_is_said_once(server: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    client = connected(server)
    for _ in range(3):
        client.rows(TOKENS, EXPECTED)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    for word in ("layer_ids are [2, 3, 4, 7]", "weights", "flipped bit", "This program's connector"):
        assert word in warning
    caplog.clear()
    quiet = ServerClient(server.url, server.folder, "run", 5.0, 0, warns=False)
    quiet.connect()
    quiet.rows(TOKENS, EXPECTED)
    server.is_stock = False
    connected(server).rows(TOKENS, EXPECTED)
    assert not caplog.records


def test_a_file_is_read_when_its_lock_is_free_and_not_before(server: FakeServer) -> None:
    writers: list[threading.Thread] = []

    def slow(path: Path) -> None:
        data, lock = path.read_bytes(), open(f"{path}.lock")  # noqa: SIM115 -- the thread closes it
        fcntl.flock(lock, fcntl.LOCK_EX)
        path.write_bytes(data[:99])

        def end() -> None:
            time.sleep(0.3)
            path.write_bytes(data)
            lock.close()

        writers.append(threading.Thread(target=end))
        writers[-1].start()

    server.spoil = slow
    found = connected(server, retries=0).rows(TOKENS, EXPECTED).hidden
    writers[0].join()
    assert torch.equal(found, states(TOKENS)[0])


def test_files_that_a_killed_client_left_are_removed(server: FakeServer) -> None:
    for name in ("cmpl-run-0a-0-1.safetensors", "cmpl-run-0a-0-1.safetensors.lock", "cmpl-other.safetensors"):
        (server.folder / name).write_bytes(b"x")
    connected(server)
    assert [file.name for file in server.folder.iterdir()] == ["cmpl-other.safetensors"]


def cut_tokens(tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        tensors[name] = tensors[name][:-1].clone()


def other_token(tensors: dict[str, Tensor]) -> None:
    tensors["token_ids"][1] = 49


def not_finite(tensors: dict[str, Tensor]) -> None:
    tensors["hidden_states"][1, 3, 0] = float("nan")


def narrow(tensors: dict[str, Tensor]) -> None:
    tensors["hidden_states"] = tensors["hidden_states"][:, :, :2].clone()


def one_layer_less(tensors: dict[str, Tensor]) -> None:
    tensors["hidden_states"] = tensors["hidden_states"][:, :3].clone()


def other_dtype(tensors: dict[str, Tensor]) -> None:
    tensors["hidden_states"] = tensors["hidden_states"].bfloat16()


def told_as(told: str) -> Callable[[dict[str, Any]], object]:
    """The answer names another path; FOLDER stands for the right folder."""

    def answer(answer: dict[str, Any]) -> None:
        folder = Path(answer["kv_transfer_params"]["hidden_states_path"]).parent
        answer["kv_transfer_params"]["hidden_states_path"] = told.replace("FOLDER", str(folder))

    return answer


OUTSIDE = r"which is no file in target\.server\.folder .*Name there the shared_storage_path"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alter": cut_tokens}, r"14 tokens were sent and the server gave rows for 13.*truncation"),
        ({"alter": other_token}, r"token 1 of the document was sent as 12, .* for 49"),
        ({"alter": not_finite}, "row 1 is not finite in the hidden state of layer 7.*--dtype"),
        ({"alter": narrow}, r"rows of shape \(14, 4, 2\), expected \(14, 4, 4\).*Serve the model"),
        (
            {"alter": one_layer_less},
            r"3 hidden states of each token, and the recipe needs 4: .*layer_ids \[2, 3, 4, 7\]",
        ),
        ({"alter": other_dtype}, "in bfloat16, and target.dtype is float32. .* --dtype float32"),
        ({"answer": told_as("/elsewhere/x.safetensors")}, OUTSIDE),
        ({"answer": told_as("FOLDER/../outside.safetensors")}, OUTSIDE),
        ({"answer": told_as("FOLDER/../rows/x.safetensors")}, OUTSIDE),
        ({"answer": told_as("x.safetensors")}, OUTSIDE),
        ({"answer": told_as("FOLDER/x")}, OUTSIDE),
        ({"answer": told_as("FOLDER/a\0.safetensors")}, OUTSIDE),
        ({"answer": told_as("FOLDER/link.safetensors")}, OUTSIDE),
        (
            {"spoil": lambda path: Path(f"{path}.lock").unlink()},
            "no lock beside it.*use_synchronization_lock",
        ),
    ],
)
def test_what_another_try_cannot_mend_ends_the_capture_at_once(
    changes: dict[str, Any], message: str, server: FakeServer
) -> None:
    outside = server.folder.parent / "outside.safetensors"
    outside.write_bytes(b"of someone else")
    (server.folder / "link.safetensors").symlink_to(outside)
    for name, value in changes.items():
        setattr(server, name, value)
    with pytest.raises(ValueError, match=message):
        connected(server).rows(TOKENS, EXPECTED)
    assert len(server.asked) == 1
    assert outside.read_bytes() == b"of someone else"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def lose(path: Path) -> None:
    path.unlink()


def lose_both(path: Path) -> None:
    path.unlink()
    Path(f"{path}.lock").unlink()


def hold(path: Path) -> None:
    """Lock the file until the process ends."""
    HELD.append(os.open(f"{path}.lock", os.O_RDONLY))
    fcntl.flock(HELD[-1], fcntl.LOCK_EX)


HELD: list[int] = []


@pytest.fixture(autouse=True)
def let_go() -> Iterator[None]:
    yield
    while HELD:
        with suppress(OSError):
            os.close(HELD.pop())


def fewer_rows(tensors: dict[str, Tensor]) -> None:
    tensors["hidden_states"] = tensors["hidden_states"][:-1].clone()


def unwritten(tensors: dict[str, Tensor]) -> None:
    tensors["hidden_states"][5] = 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spoil": truncate}, "cannot be read"),
        ({"spoil": lose}, "was not written, and its lock is free: the server's log says why"),
        ({"spoil": lose_both}, "did not appear in 1 s: .*target.server.folder"),
        ({"spoil": hold}, "not complete after 1 s: the server still holds its lock"),
        ({"alter": fewer_rows}, "holds 13 rows for 14 tokens"),
        ({"alter": unwritten}, "row 5 is zero in every layer.*--max-model-len"),
    ],
)
def test_damage_is_asked_for_again_and_then_told(
    changes: dict[str, Any], message: str, server: FakeServer
) -> None:
    client, right = connected(server), {name: getattr(server, name) for name in changes}
    client.timeout = 1.0  # of a file alone: a busy machine may answer late
    for name, value in changes.items():
        setattr(server, name, value)
    with pytest.raises(ValueError, match="14 tokens: .*" + message + ".*tried 3 times.*run the same command"):
        client.rows(TOKENS, EXPECTED)
    assert len(server.asked) == 3
    for name, value in right.items():
        setattr(server, name, value)
    assert torch.equal(client.rows(TOKENS, EXPECTED).hidden, states(TOKENS)[0])


def test_a_client_that_is_stopped_waits_for_no_lock(server: FakeServer) -> None:
    server.spoil = hold
    client = connected(server, timeout=60.0)
    threading.Timer(0.3, client.stop).start()
    started = time.monotonic()
    with pytest.raises(StoppedError):
        client.rows(TOKENS, EXPECTED)
    assert time.monotonic() - started < 10


def test_rights_that_are_missing_are_told(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    client = connected(server)

    def no_right(path: Any, mode: int) -> bool:
        return False

    monkeypatch.setattr(os, "access", no_right)
    with pytest.raises(ValueError, match="may not be read by this user .*as the same user"):
        client.rows(TOKENS, EXPECTED)
    with pytest.raises(ValueError, match=r"target\.server\.folder = .*may not read it, or not remove files"):
        client.connect()


def test_a_file_system_without_locks_is_told(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    client = connected(server)

    def no_locks(file: Any, operation: int) -> None:
        raise OSError(37, "No locks available")

    server.spoil = lambda path: monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(ValueError, match=r"cannot be locked .*No locks available.*file system with flock"):
        client.rows(TOKENS, EXPECTED)
