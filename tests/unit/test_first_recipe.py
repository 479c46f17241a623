"""`eagle3-ds init` on tiny targets of several families: recipes that loader and dry run accept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from eagle3_ds.cli.main import main
from eagle3_ds.config import Recipe, load_recipe
from eagle3_ds.run import first_recipe
from judge.family_configs import tiny_config
from tests.unit.chat_families import family_tokenizer
from tests.unit.data_samples import chat, write_jsonl
from tests.unit.tiny_families import random_model

FAMILIES = {
    "llama": "llama3",
    "qwen3": "qwen3",
    "gpt_oss": "gpt-oss",
    "deepseek_v3": "mistral",
    "gemma3_text": "gemma",
}
"""model_type of a target, and whose tokenizer and template it has here."""


def make_target(folder: Path, family: str, positions: int = 8192, template: str | None = None) -> Path:
    tokenizer = family_tokenizer(FAMILIES[family], template)
    config = tiny_config(family)
    config.vocab_size, config.max_position_embeddings = len(tokenizer), positions
    random_model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("init") / "tiny-qwen3", "qwen3")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return write_jsonl(
        tmp_path / "rows.jsonl", [chat(f"What is {n}?", f"It is {n} times one.") for n in range(40)]
    )


def init(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    status = main(["init", *map(str, words)])
    said = capsys.readouterr()
    return status, said.out + said.err


def plain(file: str) -> str:
    """A recipe's text without the marks and the line breaks of comments."""
    return " ".join(Path(file).read_text().replace("#", " ").split())


def test_the_next_command_is_called_as_this_one_was(
    rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_target(tmp_path / "llama", "llama")
    monkeypatch.setenv("EAGLE3_DS_CALLED", "./launch.sh")
    status, said = init(capsys, folder, "--data", rows, "--gpus", 2, "--gpu-memory", 16)
    assert status == 0 and "\nwritten: llama.yaml; next: ./launch.sh llama.yaml\n" in said


def test_enough_data_are_read_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_target(tmp_path / "llama", "llama")
    many = write_jsonl(tmp_path / "many.jsonl", [chat(f"What is {n}?", f"It is {n}.") for n in range(4000)])
    status, said = init(
        capsys, folder, "--data", many, "--length", 64, "--gpus", 1, "--gpu-memory", 16, "--output", "m.yaml"
    )
    assert status == 0 and "steps are few" not in said
    assert load_recipe("m.yaml").train.epochs == 2
    assert "twice over the data" in plain("m.yaml")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipe_for_a_target_of_this_kind_is_accepted(
    family: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_target(tmp_path / family, family)
    status, said = init(capsys, folder, "--data", rows, "--gpus", 2, "--gpu-memory", 16)
    assert status == 0, said
    assert f"\nwritten: {family}.yaml; next: eagle3-ds launch {family}.yaml\n" in said
    for word in ("time: ", "memory: ", "disk: ", "planned for 2 H100 of 16 GiB, as --gpus says"):
        assert word in said
    recipe = load_recipe(f"{family}.yaml")
    own = json.loads((folder / "config.json").read_text())["vocab_size"]
    assert (recipe.draft.vocab_size, recipe.data.max_length) == (own, 4096)
    # Few data, and a narrow draft.
    assert (recipe.train.epochs, recipe.train.learning_rate) == (10, 2e-3)
    assert " optimizer steps are few for a draft that begins at random weights" in said
    mesh = recipe.parallel
    assert mesh.ulysses * mesh.ring * (mesh.draft_dp or 0) == 2
    assert main(["launch", f"{family}.yaml", "--dry-run"]) == 0
    assert "dry run: nothing was started" in capsys.readouterr().out


def test_every_choice_has_its_reason(
    target: Path, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (target, "--data", rows, "--gpus", 8, "--output", "my.yaml")
    status, said = init(capsys, *words, "--length", 8192, "--device", "A100")
    assert status == 0, said
    text = Path("my.yaml").read_text()
    for reason in (
        "tokens of a pack: as --length says max_length: 8192",
        "all of the target's tokens",
        "40 rows of shape messages; of a sample of 40 of them 40 can be used",
        "about 0.00 GiB of hidden states in output/cache",
        "ranks share a sequence",
        "planned by `eagle3-ds init` for 8 A100 of 80 GiB, as --gpus says",
    ):
        assert reason in plain("my.yaml"), text
    assert yaml.safe_load(text)["output_dir"] == "output/my"
    status, said = init(capsys, *words)
    assert status == 2 and "my.yaml exists. Replace it by --overwrite" in said
    assert Path("my.yaml").read_text() == text
    assert init(capsys, *words, "--overwrite")[0] == 0
    assert load_recipe("my.yaml").data.max_length == 4096


def test_without_a_word_on_devices_it_is_for_this_machine(
    target: Path, rows: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = init(capsys, target, "--data", rows)
    assert status == 0 and "planned for one rank on this machine's CPU" in said
    assert "how long one takes is not predicted" in said
    recipe = load_recipe("tiny-qwen3.yaml")
    assert (recipe.target.dtype, recipe.train.dtype, recipe.parallel.draft_dp) == ("float32", "float32", 1)


def test_the_length_follows_conversations_target_and_memory(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = write_jsonl(tmp_path / "long.jsonl", [chat("hi", "word " * 1500), *[chat("a", "b")] * 5])
    assert init(capsys, target, "--data", long, "--gpus", 2)[0] == 0
    first = load_recipe("tiny-qwen3.yaml").data
    assert 4096 < first.max_length <= 8192 and first.max_length % 1024 == 0
    longer = write_jsonl(tmp_path / "longer.jsonl", [chat("hi", "word " * 4000), *[chat("a", "b")] * 5])
    assert init(capsys, target, "--data", longer, "--gpus", 2, "--overwrite")[0] == 0
    second = load_recipe("tiny-qwen3.yaml").data
    assert (second.max_length, second.on_too_long) == (8192, "drop")
    assert "1 of 6 conversations of the sample are longer" in plain("tiny-qwen3.yaml")


def test_more_ranks_do_not_leave_the_run_without_steps(
    target: Path, rows: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init(capsys, target, "--data", rows, "--gpus", 8)[0] == 0
    recipe = load_recipe("tiny-qwen3.yaml")
    assert recipe.parallel.draft_dp == 1, "one pack an epoch has work for one group"
    assert "its larger steps would be fewer than" in plain("tiny-qwen3.yaml")


def test_a_length_that_does_not_fit_is_halved_unless_it_was_asked_for(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = write_jsonl(tmp_path / "long.jsonl", [chat("hi", "word " * 1500), *[chat("a", "b")] * 5])
    real, asked = first_recipe.plan_recipe, []

    def only_short(recipe: Recipe, *arguments: Any) -> object:
        asked.append(recipe.data.max_length)
        if recipe.data.max_length > 3000:
            raise ValueError("too long for these ranks")
        return real(recipe, *arguments)

    monkeypatch.setattr(first_recipe, "plan_recipe", only_short)
    words = (target, "--data", long, "--gpus", 1)
    status, said = init(capsys, *words, "--length", 4096)
    assert status == 2 and "too long for these ranks" in said and asked == [4096]
    assert init(capsys, *words)[0] == 0
    data = load_recipe("tiny-qwen3.yaml").data
    assert data.max_length == asked[-1] <= 3000 < asked[-2] == 2 * asked[-1]
    assert "what fits the memory" in plain("tiny-qwen3.yaml")


def test_states_that_the_disk_does_not_hold_are_smaller_or_not_stored(
    target: Path, rows: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {"bytes": 10**12}

    def usage(_path: object) -> object:
        return type("Usage", (), {"free": free["bytes"]})

    monkeypatch.setattr(first_recipe.shutil, "disk_usage", usage)
    words = (target, "--data", rows, "--gpus", 1, "--overwrite")
    for state, dtype in (("offline", "float32"), ("offline", "float8"), ("online", None)):
        assert init(capsys, *words)[0] == 0
        data = load_recipe("tiny-qwen3.yaml").data
        assert data.hidden_states == state and (dtype is None or data.hidden_dtype == dtype)
        # 512 bytes a token in fp32 of four states of 32, a quarter in float8: below each in turn.
        tokens = int(Path("tiny-qwen3.yaml").read_text().split("about ")[1].split(" tokens")[0])
        free["bytes"] = tokens * 512 if free["bytes"] == 10**12 else 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nothing-here", "--data", "rows.jsonl"), "target.path = 'nothing-here' is not a folder"),
        (("TARGET", "--data", "none.jsonl"), "none.jsonl', which does not exist"),
        (("TARGET", "--data", "bad.jsonl"), "every row has this fault"),
        (("TARGET", "--data", "empty.jsonl"), "--data: no row in empty.jsonl"),
        (("TARGET", "--data", "one.jsonl"), "--data: 1 of 1 rows can be used"),
        (
            ("TARGET", "--data", "rows.jsonl", "--length", "9000"),
            "--length is 9000, and the target knows 8192",
        ),
        (("TARGET", "--data", "rows.jsonl", "--output", "a.json"), "a recipe is a .yaml file. Use a.yaml"),
        (("TARGET", "--data", "rows.jsonl", "--gpus", "1", "--gpu-memory", "1"), "leaves nothing"),
        (("TARGET",), "Missing option '--data'"),
    ],
)
def test_bad_input_is_one_message(
    words: tuple[str, ...],
    message: str,
    target: Path,
    rows: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("bad.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n' * 3)
    Path("empty.jsonl").write_text("")
    write_jsonl(Path("one.jsonl"), [chat("a", "b")])
    status, said = init(capsys, *(str(target) if word == "TARGET" else word for word in words))
    assert status == 2 and message in said and "Traceback" not in said, said
    assert not list(Path().glob("*.yaml")), "nothing is written"


def test_a_target_without_a_chat_template_is_refused(
    rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_target(tmp_path / "plain", "qwen3", template="")
    status, said = init(capsys, folder, "--data", rows)
    assert status == 2 and "has no chat template" in said


def test_rows_that_cannot_be_used_are_told(
    target: Path, rows: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(rows, "a") as file:
        file.write('{"messages": []}\n')
    status, said = init(capsys, target, "--data", rows, "--gpus", 1)
    assert status == 0 and "note: " in said and "line 41" in said
    assert load_recipe("tiny-qwen3.yaml").data.on_bad_row == "drop"
    assert "1 rows of the sample cannot be used" in plain("tiny-qwen3.yaml")
