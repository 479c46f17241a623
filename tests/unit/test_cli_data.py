"""`eagle3-ds data`: inspection of recipes and files, and regeneration by a real, tiny target."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eagle3_ds.cli.main import main
from eagle3_ds.config import TargetSection, dump_recipe, load_recipe
from eagle3_ds.eval.speculative import decode_alone
from eagle3_ds.run.checks import RESOLVED, check_output
from eagle3_ds.targets import load_target
from tests.unit.data_samples import chat, write_jsonl
from tests.unit.tiny_target import build_tiny_target

QUESTIONS = ("What is f3?", "What is f4? What is f4?", "f14?", "What is f5?")
"""Of several lengths, so that a batch of them is padded."""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained a little, so that its turns end."""
    return build_tiny_target(tmp_path_factory.mktemp("data") / "tiny", steps=100)


@pytest.fixture
def recipe(tmp_path: Path, target: Path) -> str:
    rows = write_jsonl(tmp_path / "rows.jsonl", [chat(question, "old") for question in QUESTIONS])
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"target: {{path: {target}, dtype: float32}}\ndata: {{train: [{rows}]}}\ntrain: {{steps: 1}}\n"
        f"deepspeed: none.json\noutput_dir: {tmp_path / 'run'}\n"
    )
    return str(path)


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    status = main(["data", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_inspect(recipe: str, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = said(capsys, "inspect", recipe, "--row", 2)
    assert status == 0
    assert (
        "<|im_start|>user\nWhat is f4? What is f4?<|im_end|>\n<|im_start|>assistant\n>>>old<|im_end|><<<"
        in text
    )
    assert "rows.jsonl, line 2, shape messages: " in text
    assert said(capsys, "inspect", tmp_path / "rows.jsonl", "--target", target, "--row", 2) == (status, text)
    status, text = said(capsys, "inspect", recipe, "--html", tmp_path / "row.html")
    assert status == 0 and "<mark>old&lt;|im_end|&gt;</mark>" in (tmp_path / "row.html").read_text()
    documents = [
        said(capsys, "inspect", recipe, "data.heldout_fraction=0.3", "--document", number)[1]
        for number in range(4)
    ]
    for number, text in enumerate(documents):
        assert f"{QUESTIONS[number]}<|im_end|>\n<|im_start|>assistant\n>>>old<|im_end|><<<" in text
        assert f"document {number}, training: " in text or f"document {number}, held out: " in text
    assert sum("held out" in text for text in documents) == 1
    refusals = [
        (("inspect", recipe, "--document", 4), "--document is 4, but the documents are 0 to 3"),
        (("inspect", tmp_path / "rows.jsonl", "--document", 1), "rows.jsonl is none: use --row"),
        (("inspect", recipe, "--row", 0), "--row is 0, but rows are counted from 1"),
        (("inspect", recipe, "--row", 9), "--row is 9, but "),
        (("inspect", tmp_path / "rows.jsonl"), "name the target by --target FOLDER"),
        (("inspect", recipe, "--target", target), "--target is for a data file"),
        (
            ("inspect", tmp_path / "rows.jsonl", "data.shape=messages", "--target", target),
            "'data.shape=messages' changes a",
        ),
        (("inspect", tmp_path / "none.jsonl", "--target", target), "none.jsonl', which does not exist"),
    ]
    for arguments, message in refusals:
        status, text = said(capsys, *arguments)
        assert status == 2 and message in text, text


def test_check_names_every_bad_row_by_its_kind(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [json.dumps({"messages": chat("What is f3?", "It adds 3.")}) for _ in range(4)]
    silent = json.dumps({"messages": [{"role": "user", "content": "hi"}]})
    long = json.dumps({"messages": chat("What is f3?", "It adds 3 to x. " * 100)})
    lines = [good[0], silent, silent, silent, good[1], "{", long, silent, *good[2:]]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(lines) + "\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"target: {{path: {target}, dtype: float32}}\n"
        f"data: {{train: [{rows}], max_length: 128, workers: 1}}\n"
        f"train: {{steps: 1}}\noutput_dir: {tmp_path / 'run'}\n"
    )
    status, text = said(capsys, "check", path)
    assert status == 1, text
    assert "4 rows: " in text and "rows.jsonl, line 2-4, 8\n" in text
    assert "1 row: not valid JSON" in text and "rows.jsonl, line 6\n" in text
    assert "1 row: the conversation has" in text and "rows.jsonl, line 7\n" in text
    assert "10 rows, 6 of them bad: 4 documents of " in text
    assert "a run would stop: 6 rows are refused (data.on_bad_row: error)" in text
    assert sorted(item.name for item in tmp_path.iterdir()) == ["recipe.yaml", "rows.jsonl"]

    status, text = said(capsys, "check", path, "data.on_bad_row=drop")
    assert status == 1 and "a run would stop: 1 rows are refused, which data.on_bad_row: drop" in text
    status, text = said(capsys, "check", path, "data.on_bad_row=drop", "data.on_too_long=drop")
    assert status == 0 and "too long dropped: 1" in text and "a run would stop" not in text
    assert "10 rows, 5 of them bad: 4 documents of " in text

    rows.write_text("\n".join([silent] * 2))
    status, text = said(capsys, "check", path, "data.on_bad_row=drop")
    assert status == 1 and "a run would stop: data.train: no row of " in text
    assert said(capsys, "check", path, "data.train=[none.jsonl]")[0] == 2


def test_check_reads_held_out_rows_too(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(capsys, "check", recipe)[0] == 0
    (tmp_path / "held.jsonl").write_text('{"messages": []}\n')
    status, text = said(capsys, "check", recipe, f"data.heldout=[{tmp_path / 'held.jsonl'}]")
    assert status == 1 and "held.jsonl, line 1\n" in text and "5 rows, 1 of them bad" in text


def test_actions_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = said(capsys, "--help")
    assert status == 0 and "inspect" in text and "regenerate" in text
    assert said(capsys)[0] == 2
    assert "there is no action 'look'. Actions: inspect, check, regenerate." in said(capsys, "look")[1]
    assert main(["--help"]) == 0 and "data inspect | check | regenerate" in capsys.readouterr().out


def test_regenerate(recipe: str, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Padded batches answer like the target alone, greedily."""
    output = tmp_path / "answers.jsonl"
    command = ("regenerate", recipe, "--output", output, "--batch_size", 3, "--max_new_tokens", 40)
    status, text = said(capsys, *command)
    assert status == 0, text
    alone = load_target(TargetSection(path=str(target)), dtype="float32")
    stop = alone.tokenizer.eos_token_id
    expected = []
    for words in QUESTIONS:
        question = [{"role": "user", "content": words}]
        prompt = alone.tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
        tokens = decode_alone(alone, prompt, 40, stop)
        if tokens[-1] == stop:
            expected.append((prompt + tokens, [0] * len(prompt) + [1] * len(tokens)))
    assert expected, "the target never ends its turn: nothing is tested"
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["input_ids"], line["loss_mask"]) for line in lines] == expected
    assert f"4 rows read, {len(expected)} conversations with {len(expected)} answers" in text
    before = output.read_bytes()
    assert said(capsys, *command)[0] == 0 and output.read_bytes() == before
    status, text = said(capsys, *command, "--temperature", 0.5)
    assert status == 2 and "temperature 0.0 then, 0.5 now" in text


def test_sampled_answers_follow_the_seed(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(99)
        arguments = ("--max_new_tokens", 60, "--temperature", 1.5, "--top_p", 0.95, "--seed", seed)
        assert said(capsys, "regenerate", recipe, "--output", tmp_path / f"{name}.jsonl", *arguments)[0] == 0
        texts.append((tmp_path / f"{name}.jsonl").read_text())
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch_size", 0), "--batch_size is 0, but must be at least 1"),
        (
            ("--temperature", -1),
            "sampling.temperature: the value is -1.0, but it should be greater than or equal to 0",
        ),
        (("--top_p", 0), "sampling.top_p: the value is 0.0, but it should be greater than 0"),
        (("--max_new_tokens", 512), "sampling.max_new_tokens is 512, but the target's context is 512"),
    ],
)
def test_bad_options(
    recipe: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[object, ...],
    message: str,
) -> None:
    status, text = said(capsys, "regenerate", recipe, "--output", tmp_path / "x.jsonl", *arguments)
    assert status == 2 and message in text, text


def test_a_run_may_go_on_with_other_workers(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "latest.json").write_text("{}")
    (tmp_path / "run" / RESOLVED).write_text(dump_recipe(load_recipe(recipe)))
    check_output(load_recipe(recipe, ["data.workers=3"]), resume="auto", overwrite=False)
    with pytest.raises(ValueError, match="data.supervise: 'all' -> 'last'"):
        check_output(
            load_recipe(recipe, ["data.workers=3", "data.supervise=last"]), resume="auto", overwrite=False
        )
