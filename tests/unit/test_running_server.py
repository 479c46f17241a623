"""`serve-check --server URL` against a server in a thread that answers and counts as a test wants it to."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from eagle3_ds import patient_http
from eagle3_ds.cli.main import main
from eagle3_ds.config import TargetSection
from eagle3_ds.eval import Round, served
from eagle3_ds.eval.counters import Meter
from eagle3_ds.run import running_server, serve_check
from eagle3_ds.run.regeneration import Serving
from eagle3_ds.run.running_server import check_running
from eagle3_ds.run.serve_check import Check, Report
from tests.unit.counting_server import NEW, CountingServer
from tests.unit.fake_answer_server import Reply, serving
from tests.unit.tiny_target import build_tiny_target

PROMPTS = [[5, 6, 7], [9, 10, 11, 12]]
# The server's rounds of NEW tokens: 4 of two guesses, both right after 3 tokens, one in two rounds after 4.
ROUNDS = [Round(3, 2, 2, 3)] * 4 + [Round(4, 2, 1, 2), Round(4, 1, 0, 1)] * 2
RECORDED = {
    "prompts": 2,
    "draft_tokens": 2,
    "max_new_tokens": NEW,
    "dtype": "bfloat16",
    "acceptance_length": 2.25,
    "acceptance_by_position": [{"accepted": 0.75}, {"accepted": 0.5}],
}
Run = Callable[..., Report]


class SglangServer(CountingServer):
    """Tells of each request what SGLang does; `told` may change it."""

    told: Callable[[dict[str, Any]], None] = staticmethod(lambda meta: None)

    def _usual(self, path: str, body: Any, prompt: Any, text: str) -> Reply:
        reply = super()._usual(path, body, prompt, text)
        if path == "/generate" and self.speculates:
            right = NEW // 3 if len(prompt) % 2 else 0
            histogram = [0, 0, 4] if right else [2, 2, 0]
            meta: dict[str, Any] = {
                "spec_verify_ct": 4,
                "spec_accept_token_num": histogram[1] + 2 * histogram[2],
                "spec_draft_token_num": 8,
                "spec_accept_histogram": histogram,
            }
            self.told(meta)
            reply.body["meta_info"] |= meta
        return reply


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_target(tmp_path_factory.mktemp("running") / "tiny")


@pytest.fixture
def server(target: Path) -> Iterator[CountingServer]:
    with serving(CountingServer, target) as fake:
        yield fake


@pytest.fixture(autouse=True)
def in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "Meter", partial(Meter, settle=0.3, still=0.01))
    monkeypatch.setattr(patient_http, "FIRST_WAIT", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def check(target: Path) -> Check:
    return Check(TargetSection(path=str(target)), {"vllm": Path("d")}, PROMPTS, NEW, 2, "float32")


@pytest.fixture
def ours(server: CountingServer, monkeypatch: pytest.MonkeyPatch) -> list[Check]:
    """What our own decoding was asked for; it finds the server's answers and ROUNDS."""
    words = server.tokenizer(server.answer(""), add_special_tokens=False)["input_ids"]
    asked: list[Check] = []

    def decode(check: Check) -> tuple[list[list[int]], dict[str, list[Round]]]:
        asked.append(check)
        return [[*words, server.end][:NEW]] * 2, {"vLLM layout": ROUNDS, "eval.json": ROUNDS}

    monkeypatch.setattr(running_server, "decode_here", decode)
    return asked


def test_a_server_that_does_as_we_do(check: Check, server: CountingServer, ours: list[Check]) -> None:
    [way] = check_running(check, Serving(server.url), None, 0.0).ways
    assert not way.failures and way.acceptance_length == (2.25, 2.25)
    assert way.accepted == ((0.75, 0.75), (0.5, 0.5)) and (way.tokens_per_second or 0) > 0
    bodies = [body for path, body, _ in server.requests if path == "/v1/completions"][1:]
    assert [body["prompt"] for body in bodies] == [PROMPTS[0], *PROMPTS]
    assert all(body["ignore_eos"] and body["stop_token_ids"] == [] for body in bodies)
    assert ours[0].draft_tokens == 2


def test_our_decoding_guesses_as_many_as_the_server(
    check: Check, server: CountingServer, ours: list[Check], caplog: pytest.LogCaptureFixture
) -> None:
    check_running(replace(check, draft_tokens=7), Serving(server.url), None, 0.0)
    assert ours[0].draft_tokens == 2 and "guesses 2 tokens in a round, eval.draft_tokens is 7" in caplog.text


def test_what_fails(check: Check, server: CountingServer, ours: list[Check]) -> None:
    server.more = lambda counts: counts.update(p0=0, p1=0, accepted=0)
    [way] = check_running(check, Serving(server.url), None, 0.02).ways
    assert way.failures[0].startswith("acceptance length 1.000, our decoding of the same export has 2.250")
    server.more = lambda counts: counts.update(drafts=0, p0=0, p1=0, accepted=0)
    [way] = check_running(check, Serving(server.url), None, 1.0).ways
    assert way.failures == ("the server never asked the draft",)
    server.says = "zyxwvutsrqponm"
    [way] = check_running(check, Serving(server.url), None, 1.0).ways
    assert "2 of 2 answers are not the target's own; prompt 1 differs from new token 1" in way.failures[0]


def test_what_is_refused(check: Check, server: CountingServer, ours: list[Check]) -> None:
    here = Serving(server.url)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        unused = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(ValueError, match="cannot be reached"):
        check_running(check, Serving(unused), None, 0.0)
    server.context = 17
    with pytest.raises(ValueError, match="takes 17 tokens; the longest prompt .* are 19"):
        check_running(check, here, None, 0.0)
    server.context, server.more = 512, lambda counts: counts.update(ended=2)
    with pytest.raises(ValueError, match="another client asks this server"):
        check_running(check, here, None, 0.0)
    server.speculates = False
    with pytest.raises(ValueError, match="does not speculate"):
        check_running(check, here, None, 0.0)
    server.name = server.root = "other"
    with pytest.raises(ValueError, match="serves 'other', but the recipe's target.path is"):
        check_running(check, here, None, 0.0)
    assert not ours


def test_a_plain_server_is_the_target(
    check: Check, server: CountingServer, ours: list[Check], target: Path
) -> None:
    check = replace(check, recorded=RECORDED)
    with serving(CountingServer, target) as plain:
        both = (Serving(server.url), Serving(plain.url))
        with pytest.raises(ValueError, match="--plain-server .* speculates too"):
            check_running(check, *both, 0.0)
        plain.speculates = plain.counts_at_all = False
        alone, way = check_running(check, *both, 0.0).ways
        assert not ours and not alone.failures and (alone.tokens_per_second or 0) > 0
        assert not way.failures and way.acceptance_length == (2.25, 2.25)
        bodies = [body for path, body, _ in plain.requests if path == "/v1/completions"][-2:]
        assert all(body["ignore_eos"] and body["stop_token_ids"] == [server.end] for body in bodies)
        worse = {**RECORDED, "acceptance_by_position": [{"accepted": 0.9}, {"accepted": 0.35}]}
        _, way = check_running(replace(check, recorded=worse), *both, 0.02).ways
        assert "guess 1 is accepted in 0.750 of all rounds" in way.failures[0]
        plain.says = "zyxwvutsrqponm"
        _, way = check_running(check, *both, 0.0).ways
        assert "2 of 2 answers are not the target's own" in way.failures[0]
        for changed, told in (
            (replace(check, recorded=None), "there is no eval.json"),
            (replace(check, draft_tokens=3), "draft_tokens is 2, here 3"),
            (replace(check, recorded={**RECORDED, "acceptance_length": None}), "ended before the draft"),
        ):
            with pytest.raises(ValueError, match=told):
                check_running(changed, *both, 0.0)
    with pytest.raises(ValueError, match="is --server too"):
        check_running(check, Serving(server.url), Serving(server.url + "/"), 0.0)


def test_sglang_tells_with_each_answer(check: Check, target: Path, ours: list[Check]) -> None:
    with serving(SglangServer, target) as fake:
        fake.sglang = True
        [way] = check_running(check, Serving(fake.url), None, 0.0).ways
        assert not way.failures and way.acceptance_length == (2.25, 2.25)
        sent = [body["sampling_params"] for path, body, _ in fake.requests if path == "/generate"][-1]
        assert sent["ignore_eos"] and sent["stop_token_ids"] == []
        fake.told = lambda meta: meta.pop("spec_accept_histogram")
        with pytest.raises(ValueError, match="tells no spec_accept_histogram with its answers"):
            check_running(check, Serving(fake.url), None, 0.0)
        fake.told = lambda meta: meta.update(spec_accept_token_num=99)
        with pytest.raises(ValueError, match="contradicts itself: 4 rounds and 99 accepted"):
            check_running(check, Serving(fake.url), None, 0.0)
        fake.speculates = False
        with pytest.raises(ValueError, match="have no spec_verify_ct"):
            check_running(check, Serving(fake.url), None, 0.0)


def test_the_command(
    check: Check,
    server: CountingServer,
    ours: list[Check],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serve_check, "check_of_folders", lambda *words: check)
    monkeypatch.setenv("COLUMNS", "200")
    words = ["serve-check", "--target", "t", "--draft", str(tmp_path)]
    assert main([*words, "--server", server.url, "--tolerance", "0"]) == 0
    told = capsys.readouterr().out
    assert "a running server, one prompt at a time" in told and told.rstrip().endswith("serves as trained")
    assert "2.250" in told and "SGLang" not in told and "log" not in told
    server.more = lambda counts: counts.update(p0=0, p1=0, accepted=0)
    assert main([*words, "--server", server.url]) == 1
    assert "does not serve as trained" in capsys.readouterr().out
    for more, rule in (
        (["--server", "sglang"], "Write vllm, or a URL"),
        (["--server", server.url, "--python", "p"], "--python is for a vLLM that is started here"),
        (["--plain-server", server.url], "--plain-server is for a server that runs"),
        (["--server", "http://me:secret@host"], "holds a user name"),
        (["--server", server.url, "--timeout", "0"], "--timeout is 0"),
    ):
        assert main([*words, *more]) == 2
        error = capsys.readouterr().err
        assert rule in error and "secret" not in error, json.dumps(more)
