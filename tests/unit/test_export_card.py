"""The model card and the commands that an export carries."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from eagle3_ds.export import Card, license_in, write_card
from eagle3_ds.export.card import card_text, commands_text, vllm_words

CARD = Card(
    target="org/target",
    is_hub=True,
    license="apache-2.0",
    algorithm="eagle3",
    dtype="bfloat16",
    draft_tokens=5,
    aux_layers=None,
    data=["org/chats", "own.jsonl"],
    max_length=131072,
    recipe="target:\n  path: org/target\n",
    versions={"eagle3_ds": "1.2", "torch": "3.4"},
)
EVALUATION = {
    "prompts": 16,
    "new_tokens": 640,
    "draft_tokens": 2,
    "dtype": "float32",
    "looping_prompts": 3,
    "acceptance_length": 2.25,
    "acceptance_length_untrained": 1.0,
    "acceptance_by_position": [{"accepted": 0.75}, {"accepted": 0.5}],
    "acceptance_by_context": [
        {"above": 0, "up_to": 512, "rounds": 9, "acceptance_length": 2.5},
        {"above": 512, "up_to": 2048, "rounds": 0, "acceptance_length": None},
        {"above": 2048, "up_to": None, "rounds": 4, "acceptance_length": 2.0},
    ],
}


def header(text: str) -> dict[str, object]:
    before, head, _ = text.split("---\n", 2)
    assert not before
    return dict(yaml.safe_load(head))


def shell(text: str) -> list[list[str]]:
    """The commands in a page."""
    return [shlex.split(block) for block in text.split("```")[1::2]]


def test_the_header_is_what_the_hub_reads() -> None:
    assert header(card_text("vllm", CARD)) == {
        "license": "apache-2.0",
        "base_model": "org/target",
        "pipeline_tag": "text-generation",
        "tags": ["speculative-decoding", "eagle3", "vllm", "sglang"],
    }
    local = card_text("speculators", replace(CARD, is_hub=False, license=None))
    assert header(local).keys() == {"pipeline_tag", "tags"} and "No license is stated." in local


def test_figures_data_recipe_and_versions_are_told() -> None:
    assert "It was not evaluated." in card_text("vllm", CARD)
    text = card_text("vllm", replace(CARD, evaluation=EVALUATION))
    assert "**2.25 tokens per forward of the target** (1 without a draft; 1.00 before training)" in text
    assert "| guess | 1 | 2 |\n|---|---|---|\n| accepted, share of rounds | 0.750 | 0.500 |" in text
    assert "| above 0, up to 512 | 9 | 2.50 |\n| above 2048 | 4 | 2.00 |" in text
    assert "3 of the target's answers go round in circles" in text
    assert "Data: org/chats, own.jsonl; texts of up to 131,072 tokens" in text
    assert "eagle3_ds 1.2, torch 3.4" in text and CARD.recipe in text
    silent = card_text("vllm", replace(CARD, evaluation={**EVALUATION, "acceptance_length": None}))
    assert "Every answer ended before the draft was asked" in silent


def test_what_a_server_measured_is_told() -> None:
    rows = [
        {
            "above": 0,
            "up_to": 512,
            "prompts": 3,
            "acceptance_length": 2.5,
            "decoding_tokens_per_second": 40.0,
        },
        {"above": 512, "up_to": 2048, "prompts": 0, "acceptance_length": None},
        {"above": 2048, "up_to": None, "prompts": 1, "acceptance_length": None},
    ]
    served = {
        "prompts": 4,
        "prompts_from": ["ruler:4096:4"],
        "concurrency": 2,
        "new_tokens": 320,
        "draft_tokens": 5,
        "acceptance_length": 2.125,
        "tokens_per_second": 31.25,
        "acceptance_by_context": rows,
    }
    text = card_text("vllm", replace(CARD, served=served))
    assert "4 prompts (ruler:4096:4), 2 at a time, greedily, 320 tokens, 5 guesses per round" in text
    assert "**2.12 tokens per forward of the target**, 31.2 tokens/s with the reading" in text
    assert "| above 0, up to 512 | 3 | 2.50 | 40.00 |" in text and "above 512" not in text
    assert "| above 2048 | 1 | - | - |" in text
    assert "On a vLLM server" not in card_text("vllm", CARD)


def test_the_commands_of_each_layout() -> None:
    vllm, sglang = shell(commands_text("vllm", CARD, "own/draft one"))
    assert vllm[:3] == ["vllm", "serve", "org/target"]
    speculative = {"method": "eagle3", "model": "own/draft one", "num_speculative_tokens": 5}
    assert json.loads(vllm[vllm.index("--speculative-config") + 1]) == speculative
    values = dict(zip(sglang[3::2], sglang[4::2], strict=True))
    assert values["--speculative-draft-model-path"] == "own/draft one" and values["--dtype"] == "bfloat16"
    assert (values["--speculative-num-steps"], values["--speculative-num-draft-tokens"]) == ("5", "6")
    beside, alone = shell(commands_text("speculators", CARD, "own/draft"))
    assert beside == vllm_words("org/target", "own/draft", "bfloat16", 5, "eagle3")
    assert alone == ["vllm", "serve", "own/draft", "--dtype", "bfloat16"]


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (None, None),
        ((2, 5, 9), None),
        ((3, 6, 9), 'add --json-model-override-args \'{"eagle_config"'),
        ((1, 6, 9), "serve this draft by vLLM: no ids mean"),
        ((0, 6, 9), "Layer 0 has no layer before it"),
    ],
)
def test_what_users_of_sglang_must_know_of_captured_layers(
    layers: tuple[int, ...] | None, said: str | None
) -> None:
    text = commands_text("vllm", replace(CARD, aux_layers=layers), "draft")
    assert (said or "# Serving") in text and ("Captured layers" in text) == (said is not None)


def test_both_files_are_written_anew(tmp_path: Path) -> None:
    write_card(tmp_path, "vllm", CARD)
    write_card(tmp_path, "vllm", replace(CARD, evaluation=EVALUATION), "own/name")
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "serve.md"}
    assert "2.25 tokens" in (tmp_path / "README.md").read_text()
    assert "own/name" in (tmp_path / "serve.md").read_text()


def test_the_license_of_the_target_is_looked_up_in_its_card(tmp_path: Path) -> None:
    assert license_in(tmp_path) is None
    for text, found in (
        ("---\nlicense: mit\n---\n# A model\n", "mit"),
        ("---\nlicense: [mit]\n---\n", None),
        ("---\na: [\n---\n", None),
        ("# license: mit\n", None),
    ):
        (tmp_path / "README.md").write_text(text)
        assert license_in(tmp_path) == found


@pytest.mark.parametrize("layout", ["vllm", "speculators"])
def test_a_draft_that_sglang_does_not_have_has_no_command_for_it(layout: str) -> None:
    card = replace(CARD, algorithm="dflash", draft_tokens=7)
    text = commands_text(layout, card, "draft")
    given = {"method": "dflash", "model": "draft", "num_speculative_tokens": 7}
    assert json.loads(shell(text)[0][-1]) == given
    assert "sglang.launch_server" not in text and "a head of its own, so it is for vLLM" in text
    assert "sglang" not in str(header(card_text(layout, card))["tags"])
