"""Reading the commands that a run ends with: as a shell splits them, and as the command line parses them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from eagle3_ds.config import load_recipe
from tests.unit.page_commands import parsed

HEAD = "next, for this run:"


def printed_commands(output: str) -> list[list[str]]:
    """The commands behind the heading, without the comments over them."""
    lines = [line.strip() for line in output.partition(HEAD)[2].splitlines()]
    return [shlex.split(line) for line in lines if line and not line.startswith("#")]


def require_usable(words: list[str], program: str, target: Path) -> None:
    """That a command is one of ours with options that it has, or vLLM's, and that what it reads exists."""
    if words[:2] == ["vllm", "serve"]:
        speculative = json.loads(words[words.index("--speculative-config") + 1])
        assert Path(words[2]) == target and (target / "config.json").is_file()
        assert (Path(speculative["model"]) / "model.safetensors").is_file()
        return
    assert words[0] == program
    given = parsed(words[1:])
    if "recipe" in given:
        load_recipe(given["recipe"], given["overrides"])
    else:
        assert Path(given["run"]).is_dir() and given["html"].parent.is_dir()
