"""The server that a run starts, with a small program in vLLM's place: it is given our connector, its last
words are told, and no process outlives the run. And what the connector's file shares with ours, which cannot
import each other.
"""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from eagle3_ds.config import TargetSection
from eagle3_ds.config.target import ServerSection
from eagle3_ds.serving import client, rows, written
from eagle3_ds.serving.process import CONNECTOR, own_server, server_command
from eagle3_ds.serving.rows import Expected, read_rows
from eagle3_ds.targets import target_fingerprint
from tests.unit.tiny_target import build_tiny_target

ROOT = Path(__file__).parents[2]
SERVER = """
import http.server, json, os, signal, sys
words = dict(word[2:].split("=", 1) for word in sys.argv if word.startswith("--") and "=" in word)
json.dump([sys.argv, os.environ.get("VLLM_API_KEY"), os.getpid(), sys.path], open({seen!r}, "w"))
if {ignore}: signal.signal(signal.SIGTERM, signal.SIG_IGN)
if {dies}:
    print("the last words")
    sys.exit(3)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(words["port"])), Handler).serve_forever()
"""


def program(folder: Path, dies: bool = False, ignore: bool = False) -> ServerSection:
    """A `python` that runs SERVER, whatever it is asked to run."""
    (folder / "server.py").write_text(SERVER.format(seen=str(folder / "seen"), dies=dies, ignore=ignore))
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {folder / "server.py"} "$@"\n')
    path.chmod(0o755)
    return ServerSection(python=str(path), arguments=("--more",), start_seconds=20.0)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def seen(folder: Path) -> Any:
    return json.loads((folder / "seen").read_text())


def test_the_server_gets_our_connector_and_no_key_and_ends_with_an_error_in_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "a-secret")
    section, log = program(tmp_path), tmp_path / "logs" / "server.log"
    with (
        pytest.raises(KeyboardInterrupt),
        own_server(section, tmp_path / "model", "float32", (2, 3, 4, 7), 99, log) as server,
    ):
        words, key, pid, places = seen(tmp_path)
        assert key is None
        assert {"--dtype=float32", "--max-model-len=100", "--no-enable-prefix-caching", "--more"} <= set(
            words
        )
        assert any("[2, 3, 4, 7]" in word for word in words)
        assert any(Path(place, "eagle3_ds_connector.py").is_file() for place in places)
        assert server.folder.is_dir()
        server.require_alive()
        raise KeyboardInterrupt
    assert not is_running(pid)
    assert not server.folder.exists()


def test_a_server_that_dies_is_told_with_its_last_words(tmp_path: Path) -> None:
    section, log = program(tmp_path, dies=True), tmp_path / "server.log"
    with (
        pytest.raises(
            ValueError, match=r"(?s)ended with status 3; .*same command.*server\.log.*the last words"
        ),
        own_server(section, tmp_path, "float32", (7,), 99, log),
    ):
        pass


def test_a_server_that_is_killed_midway_is_known(tmp_path: Path) -> None:
    with own_server(program(tmp_path), tmp_path, "float32", (7,), 99, tmp_path / "server.log") as server:
        os.kill(seen(tmp_path)[2], signal.SIGKILL)
        time.sleep(0.5)
        with pytest.raises(ValueError, match="ended by signal 9"):
            server.require_alive()


def test_a_server_that_ignores_the_request_to_end_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eagle3_ds.serving.process.STOP_SECONDS", 0.5)
    section = program(tmp_path, ignore=True)
    with own_server(section, tmp_path, "float32", (7,), 99, tmp_path / "server.log"):
        pid = seen(tmp_path)[2]
    assert not is_running(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_the_server_ends_when_the_run_is_killed(tmp_path: Path) -> None:
    section = program(tmp_path)
    code = f"""
import time
from pathlib import Path
from eagle3_ds.config.target import ServerSection
from eagle3_ds.serving.process import own_server
place = Path({str(tmp_path)!r})
with own_server(ServerSection(python={section.python!r}), place, "float32", (7,), 9, place / "log"):
    print("ready", flush=True)
    time.sleep(60)
"""
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    assert run.stdout is not None
    assert run.stdout.readline() == b"ready\n"
    pid = seen(tmp_path)[2]
    assert is_running(pid)
    run.kill()
    run.wait()
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


def test_without_vllm_there_is_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="no `vllm` on PATH: .*target.server.python.*target.server.url"):
        server_command(ServerSection(), tmp_path)
    with pytest.raises(ValueError, match=r"target\.server\.python = 'absent' is no program"):
        server_command(ServerSection(python="absent"), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "http://user:secret@host:1", "folder": "x"}, "without user, password or query"),
        ({"url": "http://host:1?key=1", "folder": "x"}, "without user, password or query"),
        ({"url": "host:1", "folder": "x"}, "must be http"),
        ({"url": "http://host:1"}, "folder is null: name the folder"),
        ({"url": "http://host:1", "folder": "x", "python": "p"}, "python say how to start a server"),
        ({"arguments": ("--api-key=secret",)}, "arguments has --api-key: a recipe is logged"),
        ({"arguments": ("--hf-token", "secret")}, "HF_TOKEN"),
        ({"key_variable": "KEY"}, "url is null"),
    ],
)
def test_a_recipe_names_one_server_and_no_credential(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ServerSection(**changes)


def test_settings_of_a_server_that_would_not_be_asked_are_refused() -> None:
    with pytest.raises(ValidationError, match="capture is 'single': no server would be asked"):
        TargetSection(path="x", server=ServerSection(concurrency=3))
    assert TargetSection(path="x", capture="server", server=ServerSection(concurrency=3))


@pytest.fixture(scope="module")
def connector() -> dict[str, Any]:
    """The constants and functions of the connector's file, without what needs vLLM: its imports and "
    "classes."""
    tree = ast.parse(CONNECTOR.read_text(encoding="utf-8"))
    tree.body = [
        node
        for node in tree.body
        if not isinstance(node, ast.ClassDef)
        and not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm"))
    ]
    found: dict[str, Any] = {}
    exec(compile(tree, str(CONNECTOR), "exec"), found)
    return found


def test_the_connector_imports_vllm_torch_and_the_standard_library_alone() -> None:
    tree = ast.parse(CONNECTOR.read_text(encoding="utf-8"))
    modules = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add((node.module or "").partition(".")[0])
    assert modules - set(sys.stdlib_module_names) == {"vllm", "torch"}
    assert "eagle3_ds." not in CONNECTOR.read_text(encoding="utf-8").replace("`eagle3_ds.targets", "")


def test_both_sides_mean_the_same_words(connector: dict[str, Any]) -> None:
    assert connector["ROWS_FORMAT"] == rows.ROWS_FORMAT
    assert (connector["PREFIX"], connector["ROWS_FILE"]) == (client.PREFIX, written.ROWS_FILE)


def test_the_server_gives_the_weights_the_digest_of_our_fingerprint(
    connector: dict[str, Any], tmp_path: Path
) -> None:
    target = build_tiny_target(tmp_path / "target")
    expected = target_fingerprint(target, (2, 3, 4), "float32")["target_weights"]
    assert connector["_digest"](str(target), None) == expected
    (target / "model.safetensors").unlink()
    assert connector["_digest"](str(target), None) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 4, 5, 11])
def test_rows_come_out_of_the_pages_and_through_the_file_as_they_were(
    dtype: torch.dtype, length: int, connector: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    cache = torch.randn(9, 2, 4, 3).to(dtype)  # nine pages of four tokens, two states of width three
    pages = [7, 0, 3]
    connector["PIECE_BYTES"] = 2 * cache[0].numel() * dtype.itemsize
    name = str(dtype).removeprefix("torch.")
    about = {"format": rows.ROWS_FORMAT, "layer_ids": "2,7", "vocab_size": "9", "dtype": name}
    about["target_weights"] = ""
    tokens = list(range(length))
    pieces = connector["_pieces"](cache, pages, length)
    connector["write_rows"](tmp_path / "x", tokens, pieces, (length, 2, 3), dtype, about)
    found = read_rows(tmp_path / "x.safetensors", tokens, Expected((2, 7), 3, 9, name, "any"))
    for row in range(length):
        assert torch.equal(found[row], cache[pages[row // 4], :, row % 4])
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_file_that_could_not_be_written_whole_leaves_nothing(
    connector: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="2 rows instead of 3"):
        connector["write_rows"](
            tmp_path / "x", [1, 2, 3], iter([torch.zeros(2, 1, 1)]), (3, 1, 1), torch.float32, {}
        )
    assert not list(tmp_path.iterdir())
