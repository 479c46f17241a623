"""`data regenerate --server` against a server in a thread that can do everything wrong."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from eagle3_ds import patient_http
from eagle3_ds.cli.main import main
from tests.unit.data_samples import chat, write_jsonl
from tests.unit.fake_answer_server import FakeServer, Reply, serving
from tests.unit.tiny_target import build_tiny_target

ROWS = 30
Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_target(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture
def server(target: Path) -> Iterator[FakeServer]:
    with serving(FakeServer, target) as fake:
        yield fake


@pytest.fixture
def run(
    target: Path,
    server: FakeServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """Exit status and everything printed of `data regenerate --server`, with a server asked for 4 rows at a
    time for 30 conversations of two questions.
    """
    monkeypatch.setattr(patient_http, "FIRST_WAIT", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    talks = [chat(f"is it a{number} ?", "old", f"is it b{number} ?", "old") for number in range(ROWS)]
    rows = write_jsonl(tmp_path / "rows.jsonl", talks)

    def one(*arguments: str, url: str | None = None, output: str = "answers.jsonl") -> tuple[int, str]:
        recipe = tmp_path / "r.yaml"
        recipe.write_text(
            f"target: {{path: {target}, dtype: float32}}\n"
            f"data: {{train: [{rows}], max_length: 512}}\ndraft: {{vocab_size: 128}}\n"
            "sampling: {max_new_tokens: 40}\ntrain: {steps: 1}\ndeepspeed: x.json\noutput_dir: out\n"
        )
        words = ["data", "regenerate", str(recipe), "--output", str(tmp_path / output)]
        status = main([*words, "--server", url or server.url, "--concurrency", "4", *arguments])
        said = capsys.readouterr()
        return status, said.out + said.err

    return one


def lines(tmp_path: Path, output: str = "answers.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / output).read_text().splitlines()]


def learnt(server: FakeServer, rows: list[dict[str, Any]]) -> list[str]:
    """The words of each row that are learnt."""
    marked = [
        [token for token, flag in zip(row["input_ids"], row["loss_mask"], strict=True) if flag]
        for row in rows
    ]
    end = server.tokenizer.decode([server.end])
    return [server.tokenizer.decode(tokens).replace(end, "|") for tokens in marked]


def expected(*left_out: int) -> list[str]:
    """The words of all rows but some."""
    return [f"A{number}|B{number}|" for number in range(ROWS) if number not in left_out]


def test_answers_in_the_order_of_the_rows_on_top_of_those_before(
    run: Run, server: FakeServer, tmp_path: Path
) -> None:
    server.delay = lambda text: 0.1 if "a0 " in text else 0.01
    status, said = run()
    assert status == 0, said
    rows = lines(tmp_path)
    assert learnt(server, rows) == expected()
    assert [row["source"].rpartition(" ")[2] for row in rows] == [str(n + 1) for n in range(ROWS)]
    assert 1 < server.most_in_flight <= 4
    second = next(text for text in server.prompts() if "b7 " in text)
    assert "A7" in second and "old" not in second
    assert "30 rows read, 30 conversations with 60 answers" in said
    assert "tokens/s" in said


def test_the_form_of_sglang_gives_the_same_rows(run: Run, server: FakeServer, tmp_path: Path) -> None:
    """Without the end token in it, as some versions have it."""
    assert run()[0] == 0
    server.sglang = True
    status, said = run(output="sglang.jsonl")
    assert status == 0, said
    assert (tmp_path / "answers.jsonl").read_bytes() == (tmp_path / "sglang.jsonl").read_bytes()


def test_what_is_sent(run: Run, server: FakeServer) -> None:
    null = ("sampling.temperature=null", "sampling.top_p=null", "sampling.top_k=null")
    assert run(*null)[0] == 0
    bodies = [body for path, body, _ in server.requests if path == "/v1/completions"][1:]
    assert not {"temperature", "top_p"} & set(bodies[0]) and "top_k" not in bodies[0]
    assert len({body["seed"] for body in bodies}) == 2 * ROWS
    server.requests.clear()
    assert run("--temperature", "0.7", "--top_k", "5", "sampling.seed=null", output="b.jsonl")[0] == 0
    body = server.requests[-1][1]
    assert (body["temperature"], body["top_p"], body["top_k"]) == (0.7, 1.0, 5) and "seed" not in body
    assert body["stop_token_ids"] == [server.end] and body["repetition_penalty"] == 1.0
    assert run(output="c.jsonl")[0] == 0
    assert server.requests[-1][1]["top_k"] == -1


def test_the_key_goes_to_the_server_and_nowhere_else(
    run: Run, server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret-key")
    server.trouble = lambda path, body, text: (
        Reply(400, {"error": {"message": "bad s3cret-key row"}}) if "a3 " in text else None
    )
    status, said = run("--log-level", "debug")
    assert status == 2 and "bad *** row" in said
    assert all(headers["Authorization"] == "Bearer s3cret-key" for _, _, headers in server.requests)
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert "s3cret" not in said + "".join(written)
    server.trouble = lambda path, body, text: Reply(401, {"error": "key s3cret-key?"})
    status, said = run()
    assert status == 2 and "OPENAI_API_KEY is not accepted" in said and "s3cret" not in said
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "OPENAI_API_KEY is not set" in run()[1]


def unused_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_unreachable(run: Run, tmp_path: Path) -> None:
    status, said = run(url=unused_url())
    assert status == 2 and "cannot be reached" in said and "Start it, or correct the URL" in said
    assert not (tmp_path / "answers.jsonl").exists() and len(said.splitlines()) == 1


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://h", "http://:1", "http://h:port", "http://u:pw@h"])
def test_no_url(run: Run, url: str) -> None:
    status, said = run(url=url)
    assert status == 2 and "Write it as http://host:8000" in said and "pw" not in said


def test_another_model_behind_the_url(run: Run, server: FakeServer, tmp_path: Path, target: Path) -> None:
    server.name, server.root = "other", "/models/other"
    status, said = run()
    assert status == 2 and "serves 'other', but the recipe's target.path is" in said and "--model" in said
    status, said = run("--model", "mine")
    assert status == 2 and "--model is 'mine', but" in said and "serves 'other'" in said
    assert run("--model", "other")[0] == 0
    server.root = str(target / ".." / target.name)
    assert run(output="b.jsonl")[0] == 0
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "answers.jsonl").read_bytes()


def test_another_vocabulary(run: Run, server: FakeServer) -> None:
    server.token_shift = 1
    status, said = run()
    assert status == 2 and "has another vocabulary than target.path" in said
    server.has_tokenize = False

    def beyond(answer: dict[str, Any]) -> None:
        answer["choices"][0]["token_ids"][0] = 320

    server.change = beyond
    status, said = run()
    assert status == 2 and "answered with token 320, but the target has 320 tokens" in said
    assert "no /tokenize there" in said

    def shorter(answer: dict[str, Any]) -> None:
        del answer["choices"][0]["prompt_token_ids"][0]

    server.change = shorter
    status, said = run()
    assert status == 2 and "read another prompt than it was sent" in said


def test_no_token_ids(run: Run, server: FakeServer) -> None:
    def text_alone(answer: dict[str, Any]) -> None:
        del answer["choices"][0]["token_ids"]

    server.change = text_alone
    status, said = run()
    assert status == 2 and "returns no token ids, and its text need not become the same tokens" in said


def test_another_end_token(run: Run, server: FakeServer) -> None:
    server.end = 7
    status, said = run()
    assert status == 2 and "at token 7, which is no end token of target.path" in said
    assert "30 of 30 rows are bad" in said and "every row has this fault" in said


def test_too_little_context(run: Run, server: FakeServer) -> None:
    server.context = 40
    status, said = run()
    assert status == 2 and "sampling.max_new_tokens is 40, but the context of" in said
    server.context = 52
    status, said = run()
    assert status == 0 and "prompts leave no room for an answer" in said


def test_answers_cut_at_the_limit_are_counted(run: Run, tmp_path: Path) -> None:
    status, said = run("--max_new_tokens", "2")
    assert status == 0 and "30 answers did not end within sampling.max_new_tokens" in said
    assert lines(tmp_path) == []


@pytest.mark.parametrize(
    "reply",
    [
        Reply(429, {"error": "slow down"}, {"Retry-After": "0.05"}),
        Reply(503, b"<html>busy</html>"),
        Reply(200, {"choices": [{"text": "x", "token_ids": [5, 6]}]}, cut=True),
        Reply(200, {"choices": []}),
        Reply(200, {"choices": [{"token_ids": [5], "finish_reason": "abort"}]}),
        Reply(
            200,
            {"choices": [{"token_ids": [5], "finish_reason": "stop"}], "usage": {"completion_tokens": 2}},
        ),
        Reply(200, b"not json"),
        Reply(200, {"other": 1}),
    ],
    ids=["429", "503", "cut", "no choice", "abort", "token missing", "no JSON", "other form"],
)
def test_what_passes_is_asked_again(reply: Reply, run: Run, server: FakeServer, tmp_path: Path) -> None:
    times: dict[str, int] = {}

    def twice(path: str, body: Any, text: str) -> Reply | None:
        times[text] = times.get(text, 0) + 1
        return reply if path == "/v1/completions" and times[text] <= 2 and "a5 " in text else None

    server.trouble = twice
    status, said = run()
    assert status == 0, said
    assert learnt(server, lines(tmp_path)) == expected()


def test_rows_that_fail_are_listed(run: Run, server: FakeServer, tmp_path: Path) -> None:
    def reply(path: str, body: Any, text: str) -> Reply | None:
        if "b4 " in text:
            return Reply(500, {"error": {"message": "CUDA error"}})
        return Reply(400, {"error": {"message": "no such luck"}}) if "a9 " in text else None

    server.trouble = reply
    status, said = run()
    assert status == 2
    assert "2 of 30 rows are bad" in said and "data.on_bad_row: drop" in said
    assert "line 5: the server says 500 CUDA error; tried 6 times" in said
    assert "line 10: the server refuses the request: 400 no such luck" in said
    assert learnt(server, lines(tmp_path)) == expected(4, 9)
    listed = json.loads((tmp_path / "answers.jsonl.progress.json").read_text())["failed"]
    assert [one["row"].rpartition(" ")[2] for one in listed] == ["5", "10"]
    asked = len(server.prompts())
    assert run()[0] == 2 and len(server.prompts()) == asked
    status, said = run("data.on_bad_row=drop", output="dropped.jsonl")
    assert status == 0 and "2 rows failed" in said
    assert (tmp_path / "dropped.jsonl").read_bytes() == (tmp_path / "answers.jsonl").read_bytes()


def test_bad_rows_of_the_data_are_listed_too(run: Run, server: FakeServer, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    talks = path.read_text().splitlines()
    talks[2], talks[6] = "{half", json.dumps({"messages": []})
    path.write_text("\n".join(talks) + "\n")
    status, said = run()
    assert status == 2 and "line 3: not valid JSON" in said and "line 7: 'messages' is empty" in said
    assert learnt(server, lines(tmp_path)) == expected(2, 6)


def test_a_server_that_dies_costs_no_row(run: Run, server: FakeServer, target: Path, tmp_path: Path) -> None:
    assert run(output="whole.jsonl")[0] == 0
    asked: list[str] = []

    def die(path: str, body: Any, text: str) -> Reply | None:
        asked.append(text)
        if len(asked) > 40:
            # No more connections: what is asked now gets half an answer, and then nobody listens.
            server._server.socket.close()
            return Reply(200, {"choices": []}, {"Connection": "close"}, cut=True)
        return None

    server.trouble = die
    status, said = run()
    assert status == 2 and "the same command then goes on" in said, said
    before = lines(tmp_path)
    assert 0 < len(before) < ROWS and learnt(server, before) == expected()[: len(before)]
    another = FakeServer(server.tokenizer, str(target), server.end)
    try:
        status, said = run(url=another.url)
        assert status == 0, said
        assert len([text for text in another.prompts() if "b" not in text]) == ROWS - len(before)
    finally:
        another.close()
    assert (tmp_path / "answers.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_server_that_fails_every_row_costs_none(run: Run, server: FakeServer, tmp_path: Path) -> None:
    asked: list[str] = []

    def fail(path: str, body: Any, text: str) -> Reply | None:
        asked.append(text)
        return Reply(500, "down") if len(asked) > 20 else None

    server.trouble = fail
    status, said = run()
    assert status == 2 and "rows got no answer, and no row after them did: " in said and "500 down" in said
    progress = json.loads((tmp_path / "answers.jsonl.progress.json").read_text())
    assert 0 < progress["rows"] < 10 and progress["failed"] == []
    # The run has ended long before each of the 30 rows was asked for six times.
    assert len(asked) < 20 + 6 * 20
    server.trouble = lambda path, body, text: None
    assert run()[0] == 0
    assert learnt(server, lines(tmp_path)) == expected()


def test_trouble_with_the_last_rows_leaves_them_to_the_next_run(
    run: Run, server: FakeServer, tmp_path: Path
) -> None:
    server.trouble = lambda path, body, text: Reply(502, "gone") if "a29 " in text else None
    status, said = run()
    assert status == 2 and "1 rows got no answer, and no row after them did" in said
    assert len(lines(tmp_path)) == ROWS - 1
    server.trouble = lambda path, body, text: None
    assert run()[0] == 0
    assert learnt(server, lines(tmp_path)) == expected()
    server.trouble = lambda path, body, text: Reply(502, "gone") if "a29 " in text else None
    assert run("data.on_bad_row=drop", output="dropped.jsonl")[0] == 0
    assert learnt(server, lines(tmp_path, "dropped.jsonl")) == expected(29)


def test_a_file_begun_with_other_settings_is_not_continued(run: Run) -> None:
    assert run()[0] == 0
    status, said = run("--temperature", "1")
    assert status == 2 and "temperature 0.0 then, 1.0 now" in said


def test_bad_options(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (("--concurrency", "0"), "--concurrency is 0, but must be at least 1"),
        (("--timeout", "0"), "--timeout is 0.0, but must be more than 0"),
        (("--batch_size", "4"), "--batch_size is for answers without a server"),
        (("sampling.top_p=0",), "sampling.top_p: the value is 0, but it should be greater than 0"),
        (("sampling.top_k=-1",), "sampling.top_k: the value is -1"),
    ):
        status, said = run(*arguments)
        assert status == 2 and words in said, said
    recipe, output = str(tmp_path / "r.yaml"), str(tmp_path / "x.jsonl")
    for arguments, words in (
        (("--concurrency", "3"), "--concurrency is for a server. Name it by --server URL"),
        (("sampling.seed=null",), "sampling.seed is null, which leaves it to a server"),
    ):
        status = main(["data", "regenerate", recipe, "--output", output, *arguments])
        said = capsys.readouterr().err
        assert status == 2 and words in said, said
