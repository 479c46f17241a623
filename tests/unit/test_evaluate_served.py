"""`evaluate --server` against a server in a thread that counts like vLLM and can do everything wrong."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Text

from eagle3_ds import patient_http
from eagle3_ds.cli.main import main
from eagle3_ds.eval import counters, served
from eagle3_ds.eval.counters import Meter, parse_counters
from eagle3_ds.eval.intervals import interval_of_counts
from eagle3_ds.eval.report import _figure
from eagle3_ds.run import finish, served_evaluation
from eagle3_ds.run.eval_file import DIGEST, SERVED, WEIGHTS, read_eval, weights_digest, write_evaluation
from eagle3_ds.serving.decode import COUNTED
from tests.unit.counting_server import NEW, CountingServer
from tests.unit.fake_answer_server import Reply, serving
from tests.unit.tiny_target import build_tiny_target

LENGTHS = (5, 7, 30, 40, 45, 200)
Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_target(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture
def server(target: Path) -> Iterator[CountingServer]:
    with serving(CountingServer, target) as fake:
        yield fake


@pytest.fixture
def run(
    target: Path,
    server: CountingServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """Exit status and everything printed of `evaluate --server` with prompts of LENGTHS."""
    monkeypatch.setattr(served, "Meter", partial(Meter, settle=0.3, still=0.01))
    monkeypatch.setattr(patient_http, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    rows = [{"input_ids": [5 + n % 50 for n in range(length)]} for length in LENGTHS]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"target: {{path: {target}, dtype: float32}}\neval: {{max_new_tokens: {NEW}, draft_tokens: 2, "
        f"context_buckets: [16, 64, 128]}}\ntrain: {{steps: 1}}\ndeepspeed: x.json\n"
        f"output_dir: {tmp_path}/out\n"
    )

    def one(*arguments: str, url: str | None = None, prompts: str | None = None) -> tuple[int, str]:
        asked = str(tmp_path / "p.jsonl") if prompts is None else prompts
        words = ["evaluate", str(recipe), "--server", url or server.url, "--prompts", asked]
        status = main([*words, *arguments])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return one


def written(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "out" / "eval.json").read_text())
    return found


def test_acceptance_by_bucket(run: Run, server: CountingServer, tmp_path: Path) -> None:
    server.lag = 2
    status, said = run()
    assert status == 0, said
    result = written(tmp_path)["served"]
    rounds = NEW // 3
    rows = result["acceptance_by_context"]
    assert [(row["above"], row["up_to"], row["prompts"]) for row in rows] == [
        (0, 16, 2), (16, 64, 3), (64, 128, 0), (128, None, 1),
    ]  # fmt: skip
    assert [row["rounds"] for row in rows] == [2 * rounds, 3 * rounds, 0, rounds]
    # 5 and 7 tokens are odd, of 30, 40 and 45 one is, 200 is not.
    accepted = [16, 2 + 2 + 8, 0, 2]
    assert [row["accepted"] for row in rows] == accepted
    assert [row["acceptance_length"] for row in rows] == [3.0, 2.0, None, 1.5]
    assert [place["accepted"] for place in rows[1]["acceptance_by_position"]] == [8 / 12, 4 / 12]
    assert rows[1]["interval"] == interval_of_counts([6, 6, 12], [4, 4, 4]) != rows[0]["interval"]
    assert rows[0]["interval"] == [3.0, 3.0] and rows[3]["interval"] is None
    assert (result["prompts"], result["accepted"], result["rounds"]) == (6, sum(accepted), 6 * rounds)
    assert result["interval"][0] < result["acceptance_length"] < result["interval"][1]
    assert rows[0]["first_token_seconds"] == 0.25 and rows[0]["decoding_tokens_per_second"] == (NEW - 1) / 0.5
    assert rows[0]["tokens_per_second"] == pytest.approx(2 * NEW / rows[0]["seconds"])
    assert result["server"] == "127.0.0.1" and str(server.url).rpartition(":")[2] not in json.dumps(result)
    assert (result["concurrency"], result["draft_tokens"], result["temperature"]) == (1, 2, 0.0)
    assert "<= 16" in said and "3.000" in said and "1.000" in said
    assert server.most_in_flight == 1


def test_what_is_sent(run: Run, server: CountingServer, tmp_path: Path) -> None:
    assert run()[0] == 0
    bodies = [body for path, body, _ in server.requests if path == "/v1/completions"][1:]
    # The shortest once before, and every one once.
    assert [len(body["prompt"]) for body in bodies] == [5, *sorted(LENGTHS)]
    assert all((body["temperature"], body["max_tokens"]) == (0.0, NEW) for body in bodies)
    assert all(body["stop_token_ids"] == [server.end] and "ignore_eos" not in body for body in bodies)
    assert len({body["cache_salt"] for body in bodies}) == len(bodies), "no prompt finds another's cache"
    server.requests.clear()
    assert run("--ignore_eos")[0] == 0
    bodies = [body for path, body, _ in server.requests if path == "/v1/completions"][1:]
    assert all(body["ignore_eos"] and body["stop_token_ids"] == [] for body in bodies)
    assert written(tmp_path)["served"]["ignore_eos"] is True


def test_several_at_a_time_have_no_interval(run: Run, server: CountingServer, tmp_path: Path) -> None:
    assert run()[0] == 0
    alone = written(tmp_path)["served"]
    # Long enough for the third to be asked for on a machine that has other work.
    server.delay = lambda text: 0.5
    status, said = run("--concurrency", "3")
    assert status == 0 and "do not tell them apart" in said
    result = written(tmp_path)["served"]
    assert server.most_in_flight == 3 and result["concurrency"] == 3
    rows = [*result["acceptance_by_context"], result]
    assert all(row["interval"] is None for row in rows)
    for one, other in zip(rows, [*alone["acceptance_by_context"], alone], strict=True):
        assert {key: one[key] for key in ("rounds", "accepted", "acceptance_length")} == {
            key: other[key] for key in ("rounds", "accepted", "acceptance_length")
        }
    assert "do not tell them apart" in result["note"]
    assert run("--concurrency", "0")[0] == 2


@pytest.mark.parametrize(
    ("name", "by", "rule"),
    [
        ("new", 1.0, "another client asks this server"),
        ("ended", 1.0, "another client asks this server"),
        ("read", 9.0, "another client asks this server"),
        ("new", -1.0, "one of several servers behind the URL"),
        ("new", -(10.0**6), "it was restarted"),
    ],
)
def test_counts_of_others_are_refused(
    name: str, by: float, rule: str, run: Run, server: CountingServer, tmp_path: Path
) -> None:
    def at_the_fourth(counts: dict[str, float]) -> None:
        counts[name] += by if counts["read"] == 40 else 0

    server.more = at_the_fourth
    status, said = run()
    assert status == 2 and rule in said and "that nobody else uses meanwhile" in said
    assert len([line for line in said.splitlines() if line.startswith("eagle3-ds")]) == 1
    assert not (tmp_path / "out" / "eval.json").exists()


def test_a_busy_server_is_refused(run: Run, server: CountingServer) -> None:
    def busy(path: str, body: Any, text: str) -> Reply | None:
        server.counts["new"] += path == "/metrics"
        return None

    server.trouble = busy
    status, said = run()
    assert status == 2 and "counts although we ask nothing: another client asks" in said


def test_what_is_no_server_of_a_draft(run: Run, server: CountingServer, target: Path) -> None:
    server.speculates = False
    status, said = run()
    assert status == 2 and "does not speculate" in said and "--speculative-config" in said
    server.counts_at_all = False
    status, said = run()
    assert status == 2 and "has no counters of vLLM" in said and "--disable-log-stats" in said
    server.trouble = lambda path, body, text: Reply(404, {"error": "no"}) if path == "/metrics" else None
    status, said = run()
    assert status == 2 and "/metrics: 404 no" in said
    server.trouble = lambda path, body, text: None
    server.name, server.root = "other", "/models/other"
    status, said = run()
    assert status == 2 and "serves 'other', but the recipe's target.path is" in said and "--model" in said
    server.name, server.sglang = str(target), True
    status, said = run()
    assert status == 2 and "talks like SGLang" in said


def test_a_draft_that_is_never_asked(run: Run, server: CountingServer) -> None:
    server.more = lambda counts: counts.update(drafts=0, draft=0, accepted=0, p0=0, p1=0)
    status, said = run()
    assert status == 2 and "never asked its draft" in said


def test_unreachable_and_dying_servers(run: Run, server: CountingServer, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        unused = f"http://127.0.0.1:{probe.getsockname()[1]}"
    status, said = run(url=unused)
    assert status == 2 and "cannot be reached" in said and "the same command then begins anew" in said
    status, said = run(url="http://me:secret@host")
    assert status == 2 and "secret" not in said and "OPENAI_API_KEY" in said
    asked: list[str] = []

    def die(path: str, body: Any, text: str) -> Reply | None:
        asked.append(path)
        if asked.count("/v1/completions") == 5:
            threading.Thread(target=server.close).start()
            return Reply(200, {"choices": [{"text": "x", "token_ids": [5, 6]}]}, cut=True)
        return None

    server.trouble = die
    status, said = run()
    assert status == 2 and "prompts above 16 tokens, a prompt of 30 tokens" in said
    assert "no figure was written" in said and not (tmp_path / "out").exists()


def test_no_request_is_sent_twice(run: Run, server: CountingServer) -> None:
    def full(path: str, body: Any, text: str) -> Reply | None:
        is_long = path == "/v1/completions" and len(body["prompt"]) == 200
        return Reply(503, {"error": "full"}) if is_long else None

    server.trouble = full
    status, said = run()
    assert status == 2 and "a prompt of 200 tokens: the server says 503 full; tried 1 times" in said
    assert (
        sum(path == "/v1/completions" and len(body["prompt"]) == 200 for path, body, _ in server.requests)
        == 1
    )


def test_prompts_that_do_not_fit(run: Run, server: CountingServer, tmp_path: Path) -> None:
    server.context = 60
    status, said = run()
    assert status == 2 and "1 of 6 prompts, the longest of 200 tokens" in said
    assert "--max-model-len" in said and "--max_prompt_tokens 48" in said
    status, said = run("--max_prompt_tokens", "48")
    assert status == 0 and "1 prompts were left out" in said
    assert written(tmp_path)["served"]["prompts_left_out"] == 1
    assert "--max_prompt_tokens is 0" in run("--max_prompt_tokens", "0")[1]
    assert "of 6 prompts 0 are left" in run("--max_prompt_tokens", "2")[1]


def test_prompts_by_name(run: Run, server: CountingServer, tmp_path: Path) -> None:
    server.context = 5000
    status, said = run("--prompts", "ruler:2000:3")
    assert status == 0, said
    result = written(tmp_path)["served"]
    assert result["prompts"] == 9 and result["prompts_from"][1] == "ruler:2000:3"
    made = result["acceptance_by_context"][3]["prompt_tokens"] - 200
    assert 3 * 1800 < made <= 3 * 2000
    for words, rule in {
        "ruler": "Write ruler:LENGTH",
        "ruler:0": "Write ruler:LENGTH",
        "ruler:900:x": "Write ruler:LENGTH",
        "longbench-v2:0": "of 0 prompts",
        "absent.jsonl": "is no file here and no known set",
    }.items():
        status, said = run(prompts=words)
        assert status == 2 and rule in said, said
    copy = tmp_path / "copy"
    copy.mkdir()
    row = {"context": "long", "question": "q", **{f"choice_{letter}": letter for letter in "ABCD"}}
    (copy / "rows.jsonl").write_text((json.dumps(row) + "\n") * 3)
    status, said = run(prompts=f"longbench-v2:{copy}:2")
    assert status == 0 and written(tmp_path)["served"]["prompts"] == 2, said


def test_words_that_need_a_server(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--prompts", "p"], ["--concurrency", "2"], ["--ignore_eos"], ["--compare", "d"]):
        assert main(["evaluate", str(tmp_path / "r.yaml"), *words]) == 2
        assert f"{words[0]} is for a server" in capsys.readouterr().err
    assert "has no eval.json of its weights" in run("--compare", str(tmp_path))[1]
    command = ["evaluate", str(tmp_path / "r.yaml"), "--server", "http://127.0.0.1:9"]
    assert main(command) == 2


def test_held_out_prompts_are_those_of_the_run(
    server: CountingServer,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "out").mkdir()
    words = ["evaluate", str(tmp_path / "r.yaml"), "--server", server.url]
    monkeypatch.setattr(served_evaluation, "prompts_of_run", lambda recipe, longest: [[5] * 9, [6] * 20])
    assert main(words) == 0
    assert written(tmp_path)["served"]["prompts_from"] == ["held-out data"]
    monkeypatch.setattr(served_evaluation, "prompts_of_run", finish.prompts_of_run)
    capsys.readouterr()
    assert main(words) == 2 and "has no prepared.json" in capsys.readouterr().err
    assert main([*words, "eval.num_prompts=0"]) == 2
    assert "name prompts by --prompts" in capsys.readouterr().err


def test_the_other_figures_stay_as_long_as_the_weights_do(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / WEIGHTS).write_bytes(b"first")
    write_evaluation(out, {"acceptance_length": 2.0})
    status, said = run()
    assert status == 0 and written(tmp_path)["acceptance_length"] == 2.0, said
    assert read_eval(out).keys() == {"acceptance_length", DIGEST, SERVED}
    # Of other weights, written at the same moment, the old figures say nothing.
    (out / WEIGHTS).write_bytes(b"other")
    (out / "draft").mkdir()
    status, said = run()
    assert status == 0 and "the evaluation in process is of other weights" in said
    assert set(written(tmp_path)) == {SERVED} and read_eval(out)[SERVED][DIGEST] == weights_digest(out)
    card = (out / "draft" / "README.md").read_text()
    assert "It was not evaluated." in card and "### On a vLLM server" in card
    (out / WEIGHTS).write_bytes(b"third")
    write_evaluation(out, {"acceptance_length": 3.0})
    assert written(tmp_path) == {"acceptance_length": 3.0, DIGEST: weights_digest(out)}
    # Weights that were removed to save space leave what was measured of them.
    (out / WEIGHTS).unlink()
    assert read_eval(out)["acceptance_length"] == 3.0


RECORD = {"step": 1, "loss": 3.0, "step_loss": [2.0, 1.0], "step_accuracy": [0.5, 0.25]}


def test_the_picture_shows_it_beside_other_runs(
    run: Run, server: CountingServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run()[0] == 0
    other = tmp_path / "other"
    (tmp_path / "out").rename(other)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text(json.dumps(RECORD) + "\n")
    status, said = run("--compare", str(other), "eval.context_buckets=[64]", "eval.max_new_tokens=6")
    assert status == 0 and (tmp_path / "out" / "report.png").stat().st_size > 1000
    assert "other was measured with other max_new_tokens than this run" in said
    compared = {"other": json.loads((other / "eval.json").read_text())}
    figure = _figure([RECORD], written(tmp_path), "t", compared)
    words = {text.get_text() for text in figure.findobj(Text)}
    assert {"this run, served", "other, served", "≤ 64", "> 64", "≤ 16", "> 128"} <= words
    drawn = figure.axes[2]
    own, theirs = (np.asarray(line.get_ydata()) for line in drawn.get_lines()[:2])
    rows = [row for row in compared["other"]["served"]["acceptance_by_context"] if row["rounds"]]
    assert list(theirs) == [row["acceptance_length"] for row in rows] and len(own) == 2
    # Another run that has no server's figures, and a report on its own.
    row = {"above": 0, "up_to": 16, "rounds": 4, "acceptance_length": 1.25}
    (other / "eval.json").write_text(json.dumps({"acceptance_length": 1.25, "acceptance_by_context": [row]}))
    assert main(["report", str(tmp_path / "r.yaml"), "--compare", str(other)]) == 0
    assert "other was evaluated in process, this run on a server" in "".join(capsys.readouterr())
    (other / "eval.json").write_text('{"prompts": 1}')
    assert main(["report", str(tmp_path / "r.yaml"), "--compare", str(other)]) == 2
    assert "has no acceptance by context" in capsys.readouterr().err


def test_names_and_pages() -> None:
    assert {counters.ROUNDS, counters.GUESSED, counters.ACCEPTED, counters.BY_POSITION} == set(
        COUNTED.values()
    )
    with pytest.raises(ValueError, match="has no counters of vLLM"):
        parse_counters("<html>not found</html>\n", "http://h")
