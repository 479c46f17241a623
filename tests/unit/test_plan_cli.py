"""`eagle3-ds plan` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eagle3_ds.cli import plan as plan_command
from eagle3_ds.cli.main import main
from eagle3_ds.config import load_recipe
from eagle3_ds.plan import DEVICES
from eagle3_ds.store import HiddenStateStore
from tests.unit.data_samples import write_jsonl
from tests.unit.tiny_target import CONVERSATIONS, build_tiny_target

ROOT = Path(__file__).parents[2]
LLAMA = ("recipes/llama3.1-8b_128k_usp.yaml", "--shape", "llama3.1-8b")


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "120")


def planned(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    assert main(["plan", *arguments]) == status
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 2
    return capsys.readouterr().err


def test_a_target_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(capsys, *LLAMA, "--gpus", "8", "--gpu-memory", "80")
    assert "425 M trained parameters" in text
    assert "fits in 78.0 GiB" in text
    for part in (
        "Adam moments",
        "saved activations",
        "KV gradients",
        "longest sequence that fits",
        "tokens/s",
    ):
        assert part in text
    line = next(line for line in text.splitlines() if line.startswith("best as overrides: "))
    best = load_recipe(LLAMA[0], line.removeprefix("best as overrides: ").split())
    assert best.parallel.ulysses * best.parallel.ring * (best.parallel.draft_dp or 0) == 8


def test_a_target_that_will_be_built_and_one_of_which_only_the_config_is_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built = planned(capsys, "recipes/quickstart.yaml", "--gpus", "4", f"target.path={tmp_path / 'none'}")
    assert "hidden 128, 4/2 heads of 32" in built
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_hidden_layers": 7,
        "vocab_size": 1024,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    here = planned(
        capsys, "recipes/quickstart.yaml", "--gpus", "4", f"target.path={tmp_path}", "target.build=null"
    )
    assert "hidden 128, 4/2 heads of 32" in here


def test_the_disk_of_a_store_is_told_for_each_dtype_and_for_documents_that_are_prepared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = planned(capsys, *LLAMA)
    # Four hidden states of 4096 numbers, the teacher's token, and a checksum for each of the three.
    told = ", ".join(
        f"{dtype} {(4 * 4096 * size + 4 + more) / 1024:.1f} KiB"
        for dtype, size, more in (
            ("float32", 4, 12),
            ("bfloat16", 2, 12),
            ("float16", 2, 12),
            ("float8", 1, 24),
        )
    )
    assert f"hidden states on disk, per token: {told}; data.hidden_dtype is bfloat16" in text
    assert "data.hidden_states=stream" in text
    rows = write_jsonl(tmp_path / "rows.jsonl", CONVERSATIONS)
    target = build_tiny_target(tmp_path / "target")
    here = [f"data.train=[{rows}]", f"target.path={target}", "target.build=null", "draft.vocab_size=128"]
    here += [f"output_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}", "eval.num_prompts=0"]
    assert main(["prepare", "recipes/quickstart.yaml", *here]) == 0
    capsys.readouterr()
    (folder,) = (tmp_path / "cache").glob("hidden-*")
    tokens = sum(HiddenStateStore.open(folder).lengths.values())
    text = planned(capsys, "recipes/quickstart.yaml", "--gpus", "4", *here)
    assert f"in brackets for the {tokens} tokens that are prepared: float32 0.5 KiB (0.0 GiB)" in text


def test_sizes_over_a_shape(capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(capsys, *LLAMA, "--num-kv-heads", "4", "--head-dim", "64", "data.max_length=16384")
    assert "32/4 heads of 64" in text and "16384 tokens" in text


def test_a_target_beside_costs_its_shard(capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(capsys, *LLAMA, "data.hidden_states=online")
    row = next(line for line in text.splitlines() if "target beside" in line)
    # 8.03 billion bf16 weights over 8 ranks.
    assert "1.87" in row
    assert "its forward is not" in text


def test_what_does_not_fit_is_said_with_bytes_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(capsys, *LLAMA, "--gpu-memory", "12", "train.activation=keep", status=1)
    assert "does NOT fit" in text
    assert "bytes" in text and "What would help most" in text and "train.activation=offload" in text
    assert "best as overrides" in text
    error = refused(capsys, *LLAMA, "--gpu-memory", "3")
    assert "fits no mesh and no setting" in error and "What would help most" in error


def test_every_device_that_the_planner_knows_can_be_asked_for() -> None:
    assert sorted(DEVICES) == sorted(plan_command.DEVICES)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "6"], ["world size", "6", "ulysses 4 x ring 2 = 8"]),
        (["--gpus", "16"], ["parallel.draft_dp", "16"]),
        (
            ["parallel.ulysses=8", "parallel.ring=1", "--num-kv-heads", "4"],
            ["parallel.ulysses is 8", "divide 4"],
        ),
        (["--gpu-memory", "1"], ["--reserve 2.0 leaves nothing"]),
    ],
)
def test_a_plan_that_cannot_be(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, *LLAMA, *arguments)
    assert all(word in error for word in words), error


def test_missing_sizes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "recipes/llama3.1-8b_128k_usp.yaml", "--hidden-size", "4096")
    assert "--intermediate-size" in error and "--vocab-size" in error and "--shape" in error


def test_an_unreachable_hub_name_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(name: str, **_: object) -> None:
        raise OSError(f"{name} cannot be reached")

    monkeypatch.setattr("eagle3_ds.run.planning.AutoConfig.from_pretrained", unreachable)
    error = refused(capsys, "recipes/llama3.1-8b_128k_usp.yaml")
    assert (
        "meta-llama/Llama-3.1-8B-Instruct" in error
        and "cannot be reached" in error
        and "--shape llama3.1-8b" in error
    )
