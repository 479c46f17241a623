"""The small target: it learns, has the chat template, appears whole or not at all, and is never replaced."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from eagle3_ds.config import TargetSection
from eagle3_ds.targets import build_target, load_target
from tests.unit.tiny_target import CONVERSATIONS, TEXTS, build_tiny_target, tiny_build


def test_training_beats_the_unigram(tmp_path: Path) -> None:
    folder = build_tiny_target(tmp_path / "target", steps=100)
    record = json.loads((folder / "build.json").read_text())
    assert len(record["losses"]) == 100
    assert record["losses"][-1] < 0.8 * record["unigram_loss"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["target"]


def test_the_saved_target_is_fp32_untied_and_chats(tmp_path: Path) -> None:
    target = load_target(TargetSection(path=str(build_tiny_target(tmp_path / "target"))), dtype="float32")
    assert not target.config.tie_word_embeddings
    assert target.embedding.dtype == torch.float32 and not target.embedding.requires_grad
    assert target.aux_layers == (2, 3, 4)
    encoded = target.tokenizer.apply_chat_template(
        CONVERSATIONS[3], return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    spoken = [token for token, on in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if on]
    assert target.tokenizer.decode(spoken) == "It adds 3 to x.<|im_end|>"
    assert target.tokenizer.eos_token_id == spoken[-1] == target.config.eos_token_id
    assert target.tokenizer.decode(target.tokenizer("  naïve\t\x00 ☃")["input_ids"]) == "  naïve\t\x00 ☃"


def test_the_same_build_is_reused_and_another_refused(tmp_path: Path) -> None:
    folder = build_tiny_target(tmp_path / "target")
    before = (folder / "model.safetensors").stat().st_mtime_ns

    def never() -> Iterator[str]:
        raise AssertionError("an existing target needs no text")
        yield ""

    build_target(TargetSection(path=str(folder), build=tiny_build()), never())
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"built from other values \(seed 0 there, 5 wanted\)"):
        build_target(TargetSection(path=str(folder), build=tiny_build(seed=5)), never())
    (folder / "build.json").unlink()
    with pytest.raises(ValueError, match="was not built from target.build"):
        build_target(TargetSection(path=str(folder), build=tiny_build()), never())


def test_equal_seeds_give_equal_weights(tmp_path: Path) -> None:
    first = build_tiny_target(tmp_path / "a", steps=2)
    torch.manual_seed(99)
    second = build_tiny_target(tmp_path / "b", steps=2)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[str]:
        yield TEXTS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_target(TargetSection(path=str(tmp_path / "target"), build=tiny_build()), broken())
    assert not list(tmp_path.iterdir())


def test_bad_values_are_told(tmp_path: Path) -> None:
    path = str(tmp_path / "target")
    with pytest.raises(ValueError, match="target.build is null"):
        build_target(TargetSection(path=path), TEXTS)
    with pytest.raises(ValueError, match="vocab_size = 100 is less than the 256 bytes and 3 special"):
        build_target(TargetSection(path=path, build=tiny_build(vocab_size=100)), TEXTS)
    with pytest.raises(ValueError, match="less than one training row"):
        build_target(TargetSection(path=path, build=tiny_build()), ["short"])
    with pytest.raises(ValueError, match=r"target.aux_layers = \[2, 3, 7\]"):
        build_target(TargetSection(path=path, build=tiny_build(), aux_layers=(2, 3, 7)), TEXTS)
