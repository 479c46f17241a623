"""docs/tutorial.md, command by command, with a small target, few conversations and no GPU."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from eagle3_ds.cli.main import main
from tests.unit.data_samples import write_jsonl
from tests.unit.tiny_target import CONVERSATIONS, build_tiny_target

pytestmark = pytest.mark.e2e
PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
SMALL = {
    "meta-llama/Llama-3.1-8B-Instruct": "tiny",
    "--length 131072 --gpus 8 --gpu-memory 80": "",
    "--server http://localhost:8000": "--max_new_tokens 8",
}
"""What of the page is another thing here."""
FEWER = ["train.epochs=null", "train.steps=2", "eval.num_prompts=1", "eval.max_new_tokens=4"]
SERVED = "serve-check"
"""tests/served runs it."""


def commands() -> list[list[str]]:
    text = PAGE.read_text("utf-8")
    for words, small in SMALL.items():
        assert words in text
        text = text.replace(words, small)
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def test_every_command_does_what_the_page_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    build_tiny_target(tmp_path / "tiny")
    write_jsonl(tmp_path / "chats.jsonl", CONVERSATIONS)
    ran = []
    for program, *arguments in commands():
        assert program == "./launch.sh"
        if arguments[0] == SERVED:
            continue
        is_launch = arguments[0].endswith(".yaml")
        line = ["launch", *arguments, *FEWER] if is_launch else arguments
        status = main(line)
        said = capsys.readouterr()
        assert status == 0, f"{line}\n{said.out}{said.err}"
        ran.append(arguments[0])
    assert ran == ["init", "data", "data", "my.yaml", "data", "data", "my.yaml"]
    (run,) = (path.parent for path in (tmp_path / "output").glob("*/metrics.jsonl"))
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 2
    assert json.loads((run / "eval.json").read_text())["lossless"]
    for name in ("report.png", "draft/serve.md", "draft-speculators/config.json"):
        assert (run / name).is_file()
