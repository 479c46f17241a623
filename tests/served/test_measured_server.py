"""`evaluate --server` on a real vLLM that drafts: its counters, read by difference, are prompt for prompt the
rounds of our own decoding. And `serve-check --server URL` on it.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from safetensors.torch import load_file, save_file

from eagle3_ds.cli.main import main
from eagle3_ds.config import TargetSection
from eagle3_ds.eval import Round
from eagle3_ds.eval.intervals import interval_of_counts
from eagle3_ds.run.regeneration import Serving
from eagle3_ds.run.running_server import check_running
from eagle3_ds.run.serve_check import Check
from eagle3_ds.targets import load_tokenizer
from tests.served.on_cpu import vllm
from tests.served.pairs import DRAFT_TOKENS, NEW_TOKENS, Pair, answered_prompts, make_pair, random_target
from tests.unit.tiny_target import build_tiny_target

BUCKETS = (10, 20)


@pytest.fixture(scope="module")
def pair(served_python: str, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A random target with a tokenizer of its size, and a draft that guesses it sometimes."""
    folder = tmp_path_factory.mktemp("measured")
    model = random_target(folder / "target", "llama")
    tokenizer = load_tokenizer(TargetSection(path=str(build_tiny_target(folder / "tiny"))))
    assert len(tokenizer) <= model.config.vocab_size
    tokenizer.save_pretrained(folder / "target")
    return make_pair(model, folder / "target", folder / "draft", answered_prompts(model), {})


@pytest.fixture(scope="module")
def recipe(pair: Pair) -> Path:
    folder = pair.target.parent
    rows = [json.dumps({"input_ids": prompt}) + "\n" for prompt in pair.prompts]
    (folder / "p.jsonl").write_text("".join(rows))
    path = folder / "r.yaml"
    path.write_text(
        f"target: {{path: {pair.target}, dtype: float32}}\neval: {{max_new_tokens: {NEW_TOKENS}, "
        f"draft_tokens: {DRAFT_TOKENS}, context_buckets: {list(BUCKETS)}}}\n"
        f"train: {{steps: 1}}\ndeepspeed: x.json\noutput_dir: {folder}/run\n"
    )
    return path


@pytest.fixture(scope="module")
def url(pair: Pair, served_python: str) -> Iterator[str]:
    draft = {"method": "eagle3", "model": str(pair.vllm), "num_speculative_tokens": DRAFT_TOKENS}
    words = ("--max-model-len", "256", "--speculative-config", json.dumps(draft))
    with vllm(served_python, pair.target, pair.target.parent, *words) as (url, _):
        yield url


def words(recipe: Path, url: str, *more: str) -> list[str]:
    prompts = str(recipe.parent / "p.jsonl")
    return ["evaluate", str(recipe), "--server", url, "--prompts", prompts, "--ignore_eos", *more]


def served(recipe: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((recipe.parent / "run" / "eval.json").read_text())["served"]
    return found


def expected(of_prompts: list[list[Round]]) -> dict[str, Any]:
    """Our own rounds as a row has them."""
    rounds = [each for rounds in of_prompts for each in rounds]
    accepted = sum(each.accepted for each in rounds)
    by_position = [
        sum(each.accepted >= k for each in rounds) / len(rounds) for k in range(1, DRAFT_TOKENS + 1)
    ]
    return {
        "prompts": len(of_prompts),
        "rounds": len(rounds),
        "guessed": len(rounds) * DRAFT_TOKENS,
        "accepted": accepted,
        "acceptance_length": 1 + accepted / len(rounds),
        "acceptance_by_position": [
            {"position": k, "accepted": share} for k, share in enumerate(by_position, 1)
        ],
        "new_tokens": len(of_prompts) * NEW_TOKENS,
    }


def by_bucket(pair: Pair) -> list[list[list[Round]]]:
    """The rounds of the prompts in each bucket."""
    ends = [0, *BUCKETS, 10**9]
    return [
        [
            rounds
            for prompt, rounds in zip(pair.prompts, pair.rounds, strict=True)
            if lower < len(prompt) <= upper
        ]
        for lower, upper in zip(ends, ends[1:], strict=False)
    ]


def test_one_at_a_time_it_counts_our_rounds(pair: Pair, recipe: Path, url: str) -> None:
    assert main(words(recipe, url)) == 0
    result = served(recipe)
    buckets = by_bucket(pair)
    assert all(len(inside) >= 2 for inside in buckets)
    rows = [*result["acceptance_by_context"], result]
    for row, inside in zip(rows, [*buckets, pair.rounds], strict=True):
        wanted = expected(inside)
        assert {name: row[name] for name in wanted} == wanted
        counts = [(len(rounds), sum(each.accepted for each in rounds)) for rounds in inside]
        assert row["interval"] == interval_of_counts([n + a for n, a in counts], [n for n, _ in counts])
        assert row["tokens_per_second"] > 0 and row["first_token_seconds"] > 0
        assert row["decoding_tokens_per_second"] > row["tokens_per_second"] * 0.9
    assert 1.1 < result["acceptance_length"] < 5, "a draft that is never or always right would prove little"


def test_several_at_a_time_give_the_same_acceptance(pair: Pair, recipe: Path, url: str) -> None:
    assert main(words(recipe, url, "--concurrency", "3")) == 0
    result = served(recipe)
    for row, inside in zip(result["acceptance_by_context"], by_bucket(pair), strict=True):
        wanted = expected(inside)
        assert {name: row[name] for name in wanted} == wanted and row["interval"] is None


def test_another_client_is_noticed(
    pair: Pair, recipe: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = threading.Event()

    def ask() -> None:
        body = {"model": str(pair.target), "prompt": pair.prompts[0], "max_tokens": 8, "ignore_eos": True}
        while not stop.is_set():
            httpx2.post(f"{url}/v1/completions", json=body, timeout=60)

    other = threading.Thread(target=ask)
    other.start()
    try:
        status = main(words(recipe, url))
    finally:
        stop.set()
        other.join()
    assert status == 2 and "another client asks this server" in capsys.readouterr().err


def test_a_server_without_a_draft_is_refused(
    pair: Pair, recipe: Path, served_python: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with vllm(served_python, pair.target, pair.target.parent, "--max-model-len", "256") as (url, _):
        assert main(words(recipe, url)) == 2
    assert "does not speculate" in capsys.readouterr().err


def check_words(recipe: Path, pair: Pair, url: str, *more: str) -> list[str]:
    prompts = str(recipe.parent / "p.jsonl")
    named = ["--target", str(pair.target), "--draft", str(pair.vllm), "--prompts", prompts]
    return ["serve-check", *named, "--server", url, "--tolerance", "0", *more]


def test_serve_check_of_a_running_server(
    pair: Pair, recipe: Path, url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(check_words(recipe, pair, url)) == 0, capsys.readouterr().out
    told = capsys.readouterr().out
    [row] = [line.split("│")[1:-1] for line in told.splitlines() if line.startswith("│ the server")]
    _, speed, theirs, ours, places = (cell.strip() for cell in row)
    assert theirs == ours and 1.1 < float(ours) < 5 and float(speed) > 0
    pairs = [place.strip("()") for place in places.split()]
    assert len(pairs) == 2 * DRAFT_TOKENS and pairs[::2] == pairs[1::2] and pairs[0] != "0.000"
    assert told.rstrip().endswith("serves as trained")
    # The server has the draft that it had; an export of other weights is held against it.
    other = Path(shutil.copytree(pair.vllm, recipe.parent / "other"))
    state = load_file(other / "model.safetensors")
    save_file(
        {name: tensor.flip(0).contiguous() for name, tensor in state.items()}, other / "model.safetensors"
    )
    words = check_words(recipe, pair, url)
    words[words.index(str(pair.vllm))] = str(other)
    assert main(words) == 1
    assert "failed: the server: acceptance length" in capsys.readouterr().out


def test_serve_check_beside_a_plain_server(pair: Pair, url: str, served_python: str) -> None:
    prompts, end = pair.prompts, load_tokenizer(TargetSection(path=str(pair.target))).eos_token_id
    ended = [answer[: answer.index(end) + 1] if end in answer else answer for answer in pair.answers]
    assert ended == pair.answers, "rounds of whole answers are those of an evaluation then"
    figures = expected(pair.rounds)
    recorded: dict[str, Any] = {
        "prompts": len(prompts),
        "draft_tokens": DRAFT_TOKENS,
        "max_new_tokens": NEW_TOKENS,
    }
    recorded |= {"dtype": "float32", **figures}
    section = TargetSection(path=str(pair.target))
    check = Check(section, {"vllm": pair.vllm}, prompts, NEW_TOKENS, DRAFT_TOKENS, "float32", recorded)
    with vllm(served_python, pair.target, pair.target.parent, "--max-model-len", "256") as (plain, _):
        report = check_running(check, Serving(url), Serving(plain), 0.0)
        alone, drafted = report.ways
        assert not report.failures and (alone.tokens_per_second or 0) > 0
        assert drafted.acceptance_length == pytest.approx((figures["acceptance_length"],) * 2)
        with pytest.raises(ValueError, match="does not speculate"):
            check_running(check, Serving(plain), Serving(url), 0.0)
        with pytest.raises(ValueError, match="speculates too"):
            check_running(check, Serving(url), Serving(url.replace("127.0.0.1", "localhost")), 0.0)
