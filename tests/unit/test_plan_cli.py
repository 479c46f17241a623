"""`eagle3-ds plan` from the command line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from eagle3_ds.cli import plan as plan_command
from eagle3_ds.cli.main import main
from eagle3_ds.config import load_recipe
from eagle3_ds.data import PackedLoader, PreparedData
from eagle3_ds.plan import DEVICES
from eagle3_ds.plan.devices import estimates
from eagle3_ds.run.target_config import built_config
from eagle3_ds.run.whole_run import capture_seconds, duration
from eagle3_ds.store import HiddenStateStore
from tests.unit.data_samples import write_jsonl
from tests.unit.tiny_target import CONVERSATIONS, build_tiny_target, tiny_build

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


def small_run(folder: Path) -> list[str]:
    """Overrides of the quickstart: a target and conversations made in `folder`, where all else goes too."""
    rows = write_jsonl(folder / "rows.jsonl", CONVERSATIONS)
    target = build_tiny_target(folder / "target")
    places = [f"output_dir={folder / 'run'}", f"data.cache_dir={folder / 'cache'}"]
    of_target = [f"target.path={target}", "target.build=null", "draft.vocab_size=128"]
    return [f"data.train=[{rows}]", *of_target, *places, "eval.num_prompts=0"]


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


def test_ranks_are_those_of_the_recipes_mesh(capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(capsys, "quickstart")
    assert "inferred: --gpus 4, by the recipe's mesh" in text
    assert "draft_dp x ring x ulysses = 1 x 2 x 2" in text and "0.38 M trained" in text
    text = planned(capsys, "quickstart", "--gpus", "8", "parallel.draft_dp=2")
    assert "inferred: --gpus" not in text and "draft_dp x ring x ulysses = 2 x 2 x 2" in text
    # Without draft_dp the mesh does not say how many there are.
    assert "draft_dp x ring x ulysses = 2 x 2 x 2" in planned(capsys, "quickstart", "parallel.draft_dp=null")


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
    here = small_run(tmp_path)
    assert main(["prepare", "recipes/quickstart.yaml", *here]) == 0
    capsys.readouterr()
    (folder,) = (tmp_path / "cache").glob("hidden-*")
    tokens = sum(HiddenStateStore.open(folder).lengths.values())
    text = planned(capsys, "recipes/quickstart.yaml", "--gpus", "4", *here)
    assert f"in brackets for the {tokens} tokens that are prepared: float32 0.5 KiB (0.0 GiB)" in text


def test_the_whole_run_and_the_capture_are_told_once_documents_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = small_run(tmp_path)
    here += ["data.max_length=64", "train.accumulation=2", "parallel.draft_dp=1", "train.steps=null"]
    command = ("recipes/quickstart.yaml", "--gpus", "4", *here, "train.epochs=3")
    text = planned(capsys, *command)
    assert "whole run: its steps follow from train.epochs = 3 and the data" in text
    assert "capture of the hidden states: its time and disk need the documents" in text
    by_steps = planned(capsys, *command, "train.epochs=null", "train.steps=70")
    assert "whole run: 70 steps (train.steps) of " in by_steps
    assert main(["prepare", "recipes/quickstart.yaml", *here, "train.epochs=3"]) == 0
    capsys.readouterr()
    (folder,) = (tmp_path / "cache").glob("hidden-*")
    store = HiddenStateStore.open(folder)
    prepared = json.loads((tmp_path / "run" / "prepared.json").read_text())
    data = PreparedData.open(Path(prepared["data"]), prepared["data_fingerprint"])
    loader = PackedLoader(data.train, store, 64, 1, 0, accumulation=2)
    text = planned(capsys, *command)
    assert (
        f"whole run: {loader.steps_in(3)} steps (train.epochs 3 of {loader.num_packs} packs, 2 in a" in text
    )
    assert f"{sum(store.lengths.values())} tokens: done already, " in text
    shutil.rmtree(folder)
    text = planned(capsys, *command)
    assert " on one H100 (target.capture), writing not counted; " in text
    assert "are not prepared for" in planned(capsys, *command, "data.max_length=128")
    assert "capture of" not in planned(capsys, *command, "data.hidden_states=online")


@pytest.mark.parametrize(
    ("gone", "why"),
    [
        ("target/*.safetensors", "not counted: .*holds neither model.safetensors"),
        ("target/tokenizer*", "not counted: target.path = .* holds no tokenizer"),
        ("rows.jsonl", "not counted: .*rows.jsonl"),
        ("cache/data-*/*.json", "not counted: .*data-"),
    ],
)
def test_a_plan_goes_on_without_counts_where_something_that_was_prepared_from_has_gone(
    gone: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The target's config is enough for it: weights may come late, or lie on another machine."""
    here = small_run(tmp_path)
    assert main(["prepare", "recipes/quickstart.yaml", *here]) == 0
    capsys.readouterr()
    assert "that are prepared: " in planned(capsys, "recipes/quickstart.yaml", "--gpus", "4", *here)
    taken = list(tmp_path.glob(gone))
    assert taken
    for path in taken:
        path.unlink()
    text = planned(capsys, "recipes/quickstart.yaml", "--gpus", "4", *here)
    assert re.search(f"need the documents, which are {why}", text)
    assert "that are prepared: " not in text


def test_the_seconds_of_a_capture_are_those_of_the_targets_products(tmp_path: Path) -> None:
    """Two documents and one layer more: what is added is what the formula of that layer says."""
    config = built_config(tiny_build())
    deeper = built_config(tiny_build(num_layers=8))
    recipe, device = load_recipe("recipes/quickstart.yaml", ["target.dtype=bfloat16"]), DEVICES["H100"]
    lengths = (100, 300)
    added = capture_seconds(recipe, lengths, deeper, device) - capture_seconds(
        recipe, lengths, config, device
    )
    # Hidden 32, 4 heads and 2 of keys of 8 channels, inner 64, and two norms.
    weights = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64 + 2 * 32
    pairs = 100 * 101 // 2 + 300 * 301 // 2
    reached = estimates(device)
    expected = (2 * weights * 400 / reached.matmul + 4 * 32 * pairs / reached.attention_forward) / 989e12
    assert added == pytest.approx(expected, rel=1e-9)


def test_times_are_told_in_units_that_say_something() -> None:
    told = [duration(seconds) for seconds in (2e-6, 1.5, 119, 121, 7199, 7200, 1e6)]
    assert told == [
        "2e-06 s",
        "1.500 s",
        "119.000 s",
        "2.0 minutes",
        "120.0 minutes",
        "2.0 hours",
        "277.8 hours",
    ]


def test_what_a_draft_of_blocks_refuses_is_not_offered_to_it(capsys: pytest.CaptureFixture[str]) -> None:
    for memory, offers in (("80", "longest sequence that fits this mesh"), ("10", "What would help most")):
        command = ["recipes/qwen3-8b_128k_dflash.yaml", "--shape", "qwen3-8b", "--gpu-memory", memory]
        assert main(["plan", *command]) in (0, 1, 2)
        said = capsys.readouterr()
        text = said.out + said.err
        assert offers in text and "offload" not in text.replace("zero3_offload", "")


def test_the_parts_of_a_step_are_told_of_the_smallest_draft_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = planned(capsys, "recipes/quickstart.yaml", "--gpus", "4", f"target.path={tmp_path / 'none'}")
    line = next(line for line in text.splitlines() if line.startswith("predicted step: "))
    parts = dict(part.rsplit(" ", 1) for part in line.split("in seconds: ")[1].split(", "))
    step = float(line.split()[2])
    assert "layers" in parts and sum(map(float, parts.values())) == pytest.approx(step, rel=0.2)


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
