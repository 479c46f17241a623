"""A server in a thread that talks like vLLM, or SGLang, and answers as a test wants it to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from eagle3_ds.config import TargetSection
from eagle3_ds.targets import load_tokenizer


class Reply(NamedTuple):
    """What goes back; `cut` sends only half of the body and closes."""

    status: int
    body: Any
    headers: Mapping[str, str] = MappingProxyType({})
    cut: bool = False


class FakeServer:
    """Answers each prompt with the last word of its last question in capitals and the end token.

    Attributes:
        requests: (path, body, headers) of everything that was asked.
        name, root: what /v1/models lists.
        trouble: looks at (path, body, decoded prompt) first; a Reply of its goes back in place of the answer.
        change: may change the answer of /v1/completions before it goes back.
        delay: seconds before a prompt is answered.
        token_shift: added to the ids that /tokenize gives.
        sglang: token ids come from /generate alone.
        says: in place of its own answer to every prompt.
    """

    def __init__(self, tokenizer: Any, name: str, end: int, context: int = 512) -> None:
        self.tokenizer, self.name, self.end, self.context = tokenizer, name, end, context
        self.root: str | None = name
        self.requests: list[tuple[str, Any, dict[str, str]]] = []
        self.trouble: Callable[[str, Any, str], Reply | None] = lambda path, body, text: None
        self.change: Callable[[dict[str, Any]], None] = lambda answer: None
        self.delay: Callable[[str], float] = lambda text: 0.0
        self.token_shift, self.sglang, self.has_tokenize = 0, False, True
        self.says: str | None = None
        self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._reply(outer.reply(self.path, None, dict(self.headers)))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._reply(outer.reply(self.path, body, dict(self.headers)))

            def _reply(self, reply: Reply) -> None:
                data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if reply.cut else data)
                self.close_connection |= reply.cut

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def prompts(self) -> list[str]:
        """Decoded prompts of rows, in the order in which they were asked; the client's probe left out."""
        bodies = [body for path, body, _ in self.requests if path in ("/v1/completions", "/generate")]
        asked = [body.get("prompt", body.get("input_ids")) for body in bodies]
        return [text for text in map(self.tokenizer.decode, asked) if "2 + 2" not in text]

    def answer(self, text: str) -> str:
        if self.says is not None:
            return self.says
        return str(text.split("?")[-2].split()[-1].upper()) if "?" in text else "?"

    def reply(self, path: str, body: Any, headers: dict[str, str]) -> Reply:
        with self._lock:
            self.requests.append((path, body, headers))
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            prompt = (body or {}).get("input_ids", (body or {}).get("prompt", []))
            text = self.tokenizer.decode(prompt) if isinstance(prompt, list) else prompt
            time.sleep(self.delay(text))
            return self.trouble(path, body, text) or self._usual(path, body, prompt, text)
        finally:
            with self._lock:
                self.in_flight -= 1

    def _usual(self, path: str, body: Any, prompt: Any, text: str) -> Reply:
        if path == "/v1/models":
            model = {"id": self.name, "root": self.root, "max_model_len": self.context}
            return Reply(200, {"data": [model]})
        if path == "/tokenize" and self.has_tokenize:
            ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            return Reply(200, {"tokens": [token + self.token_shift for token in ids]})
        longest = body.get("max_tokens", body.get("sampling_params", {}).get("max_new_tokens"))
        words = self.tokenizer(self.answer(text), add_special_tokens=False)["input_ids"]
        tokens = [*words, self.end][:longest]
        is_whole = len(tokens) == len(words) + 1
        if path == "/v1/completions":
            choice = {
                "text": self.tokenizer.decode(tokens),
                "token_ids": tokens,
                "prompt_token_ids": prompt,
                "finish_reason": "stop" if is_whole else "length",
                "stop_reason": None,
            }
            answer = {"choices": [choice], "usage": {"completion_tokens": len(tokens)}}
            if self.sglang:
                del choice["token_ids"], choice["prompt_token_ids"]
            self.change(answer)
            return Reply(200, answer)
        if path == "/generate" and self.sglang:
            reason = {"type": "stop", "matched": self.end} if is_whole else {"type": "length"}
            meta = {"finish_reason": reason, "completion_tokens": len(tokens)}
            # Without the token that ended it, as some versions have it.
            return Reply(200, {"output_ids": words[:longest], "meta_info": meta})
        return Reply(404, {"detail": "Not Found"})


Kind = TypeVar("Kind", bound=FakeServer)


@contextmanager
def serving(kind: type[Kind], target: Path) -> Iterator[Kind]:
    """A server of this kind that knows the tokenizer of a target, and goes by its name."""
    tokenizer = load_tokenizer(TargetSection(path=str(target)))
    fake = kind(tokenizer, str(target), tokenizer.eos_token_id)
    try:
        yield fake
    finally:
        fake.close()
