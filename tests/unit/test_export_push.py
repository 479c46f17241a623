"""Uploading an export, to a stand-in of the hub that speaks its HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub.utils import close_session

from eagle3_ds.cli.main import main
from eagle3_ds.export import check_push, push_folder
from eagle3_ds.run import stages

TOKEN = "hf_thetokenthatmustnotbetold"
WEIGHTS = bytes(range(256)) * 40


class Hub:
    """Keeps what is uploaded, commit by commit. `refuse` maps a part of a path to the status it answers.

    Attributes:
        private: {name of a repository: whether it is private}.
        files: {name: {path: content}} of what was committed.
        tokens: all that were sent.
    """

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.refuse: dict[str, int] = {}
        self.tokens: set[str | None] = set()
        self._objects: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer()

            def do_POST(self) -> None:
                self._answer()

            def do_PUT(self) -> None:
                self._answer()

            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.tokens.add(self.headers.get("Authorization"))
                refused = [status for part, status in hub.refuse.items() if part in self.path]
                status = refused[0] if refused else 200
                reply = {"error": "no"} if refused else hub.reply(self.path, body)
                if reply is None:
                    status, reply = 404, {"error": "Repository not found"}
                data = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def reply(self, path: str, body: bytes) -> Any:
        if path.startswith("/objects/"):
            self._objects[path.removeprefix("/objects/")] = body
            return {}
        asked: Any = json.loads(body) if body and not path.endswith("/commit/main") else None
        if path == "/api/repos/create":
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            is_private = asked.get("private") or asked.get("visibility") == "private"
            self.private.setdefault(name, bool(is_private))
            return {"url": f"{self.url}/{name}"}
        if path == "/api/validate-yaml":
            return {"warnings": [], "errors": []}
        if path.endswith("/info/lfs/objects/batch"):
            return {"transfer": "basic", "objects": [self._object(each) for each in asked["objects"]]}
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if path.endswith("/preupload/main"):
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in asked["files"]
            ]
            return {"files": modes}
        if path.endswith("/commit/main"):
            self._commit(name, body)
            commit = f"{self.url}/{name}/commit/abc"
            return {"commitUrl": commit, "commitOid": "abc", "hookOutput": "", "success": True}
        if name not in self.private:
            return None
        return {"id": name, "private": self.private[name], "sha": "abc", "siblings": []}

    def _object(self, wanted: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{self.url}/objects/{wanted['oid']}", "header": {}}
        return {"oid": wanted["oid"], "size": wanted["size"], "actions": {"upload": upload}}

    def _commit(self, name: str, body: bytes) -> None:
        files = self.files.setdefault(name, {})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self._objects[value["oid"]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", found.url)
    # Without it files go by a protocol of the hub's own, which a stand-in cannot speak.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield found
    close_session()
    found.close()


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "draft"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLMEagle3"]}')
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A draft\n")
    (folder / "serve.md").write_text("# Serving\n")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    return folder


def test_every_file_arrives_whole(hub: Hub, export: Path) -> None:
    assert push_folder(export, "me/draft", private=True) == f"{hub.url}/me/draft/commit/abc"
    assert hub.private == {"me/draft": True}
    assert hub.files["me/draft"] == {path.name: path.read_bytes() for path in export.iterdir()}
    assert hashlib.sha256(WEIGHTS).hexdigest() in hub._objects
    assert f"Bearer {TOKEN}" in hub.tokens


def test_a_public_repository_is_not_taken_for_a_private_one(hub: Hub, export: Path) -> None:
    hub.private["me/draft"] = False
    with pytest.raises(ValueError, match="is there and public, so nothing was sent"):
        push_folder(export, "me/draft", private=True)
    assert not hub.files and not hub._objects
    push_folder(export, "me/draft", private=False)
    assert set(hub.files["me/draft"]) == {path.name for path in export.iterdir()}


@pytest.mark.parametrize(
    ("path", "status", "rule"),
    [
        ("/api/repos/create", 401, r"the hub refuses the token \(401"),
        ("/api/repos/create", 403, "Log in with one that may write"),
        ("/commit/main", 400, "the hub answered 400.*Nothing was committed"),
        ("/objects/batch", 422, "the hub answered 422"),
        ("/preupload/", 404, "the hub answered 404"),
    ],
)
def test_a_hub_that_refuses(hub: Hub, export: Path, path: str, status: int, rule: str) -> None:
    hub.refuse[path] = status
    with pytest.raises(ValueError, match=rule) as error:
        push_folder(export, "me/draft", private=False)
    assert str(error.value).startswith("--push me/draft: ") and TOKEN not in str(error.value)
    assert not hub.files


def test_a_hub_that_is_not_there(hub: Hub, export: Path) -> None:
    hub.close()
    with pytest.raises(ValueError, match="cannot be reached or broke off"):
        push_folder(export, "me/draft", private=False)


@pytest.mark.parametrize("name", ["draft", "me/draft/more", "me/dra ft", "-me/draft", ""])
def test_names_that_the_hub_has_not(hub: Hub, name: str) -> None:
    with pytest.raises(ValueError, match="--push"):
        check_push(name)


def test_nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="nobody is logged in"):
        check_push("me/draft")


def test_the_command_pushes_each_layout(
    hub: Hub,
    export: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = export.parent / "recipe.yaml"
    recipe.write_text(
        "target: {path: t}\ndata: {train: [stdlib]}\ntrain: {steps: 1}\ndeepspeed: ds_configs/zero2.json\n"
        f"output_dir: {export.parent}\n"
    )
    done: list[str] = []

    def written(_: Any) -> dict[Path, float]:
        done.append("written")
        return {export: 0.0, export.parent / "second": 0.0}

    (export.parent / "second").mkdir()
    (export.parent / "second" / "config.json").write_text("{}")
    monkeypatch.setattr(stages, "export_draft", written)
    with caplog.at_level(logging.INFO):
        assert main(["export", str(recipe), "--push", "me/draft"]) == 0
    assert set(hub.files["me/draft"]) == {path.name for path in export.iterdir()}
    assert set(hub.files["me/draft-speculators"]) == {"config.json"}
    told = capsys.readouterr()
    assert TOKEN not in told.out + told.err + caplog.text
    # A name that cannot be is refused before anything is written.
    done.clear()
    assert main(["export", str(recipe), "--push", "draft"]) == 2 and not done
    assert "Write owner/name" in capsys.readouterr().err
    assert main(["export", str(recipe), "--private"]) == 2
