"""What makes two ranks alike."""

from __future__ import annotations

from pathlib import Path

from eagle3_ds.config import load_recipe
from eagle3_ds.guard.identity import differences, own_identity
from eagle3_ds.launch.hosts import PACKAGES
from eagle3_ds.launch.probe import code_digest

ROOT = Path(__file__).parents[2]


def test_code_digest_sees_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    path = tmp_path / "room" / "a.py"
    path.write_text("x = 1\n")
    first = code_digest(tmp_path)
    (tmp_path / "room" / "notes.txt").write_text("no code")
    assert code_digest(tmp_path) == first
    path.write_text("x = 2\n")
    changed = code_digest(tmp_path)
    path.rename(path.with_name("b.py"))
    assert len({first, changed, code_digest(tmp_path)}) == 3


def test_identity_follows_recipe_and_data(tmp_path: Path) -> None:
    for name in ("prepared.json", "vocabulary.safetensors"):
        (tmp_path / name).write_bytes(b"1")
    overrides = [f"output_dir={tmp_path}", f"deepspeed={ROOT / 'ds_configs/zero2.json'}"]
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml", overrides)
    before = own_identity(recipe)
    assert set(PACKAGES) < set(before)
    (tmp_path / "prepared.json").write_bytes(b"2")
    after = own_identity(load_recipe(ROOT / "recipes/quickstart.yaml", [*overrides, "train.seed=1"]))
    assert {key for key, value in after.items() if value != before[key]} == {"recipe", "data"}


def test_every_value_is_told_with_its_ranks_and_hosts() -> None:
    ranks = [
        {"host": host, "recipe": value} for host, value in (("a", "1"), ("a", "1"), ("b", "2"), ("c", "1"))
    ]
    (line,) = differences(ranks)
    assert line == (
        "recipe: 1 on ranks [0, 1, 3] (a, c); 2 on ranks [2] (b). "
        "Put output_dir on storage that all hosts share."
    )
    assert differences(ranks[:2]) == []
