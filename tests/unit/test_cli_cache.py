"""`eagle3-ds cache`: whose a folder of the cache is, and that only what nobody uses is removed."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from eagle3_ds.cli.main import main
from eagle3_ds.config import Recipe, load_recipe
from eagle3_ds.run import cache, stages
from eagle3_ds.run.cache import Entry, entries, given_recipe
from eagle3_ds.run.cache_uses import in_use
from tests.unit.data_samples import write_jsonl
from tests.unit.tiny_target import CONVERSATIONS, build_tiny_target

DAY = 86400


def recipe_file(folder: Path, name: str, count: int) -> str:
    rows = write_jsonl(folder / f"{name}.jsonl", CONVERSATIONS[:count])
    path = folder / f"{name}.yaml"
    path.write_text(
        f"target: {{path: {folder / 'target'}, dtype: float32}}\ndraft: {{vocab_size: 128}}\n"
        f"data: {{train: [{rows}], cache_dir: {folder / 'cache'}}}\ntrain: {{steps: 1}}\n"
        f"eval: {{num_prompts: 0}}\ndeepspeed: none.json\noutput_dir: {folder / 'runs' / name}\n"
    )
    return str(path)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prepared recipes, `a` and `b`, that share a target and a cache."""
    folder = tmp_path_factory.mktemp("prepared")
    build_tiny_target(folder / "target")
    for name, count in (("a", 4), ("b", 6)):
        stages.prepare(recipe_file(folder, name, count))
    return folder


@pytest.fixture
def two(prepared: Path, tmp_path: Path) -> Path:
    """The folder of the recipes with a cache of the test's own, whose runs were noted by `prepare`."""
    shutil.copytree(prepared / "cache", tmp_path / "cache")
    return prepared


def loaded(two: Path, name: str, tmp_path: Path) -> Recipe:
    return load_recipe(two / f"{name}.yaml", [f"data.cache_dir={tmp_path / 'cache'}"])


def say(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    status = main(["cache", *map(str, words)])
    done = capsys.readouterr()
    return status, done.out + done.err


def age(cache_dir: Path, days: float) -> None:
    """Make all that lies in the cache, and the runs' notes, so much older."""
    then = time.time() - days * DAY
    for path in cache_dir.rglob("*"):
        os.utime(path, (then, then))
    for note in (cache_dir / ".runs").glob("*.json"):
        content = json.loads(note.read_text())
        note.write_text(json.dumps({**content, "used": then}))


def of(cache_dir: Path) -> dict[str, Entry]:
    return {entry.path.name: entry for entry in entries(cache_dir)}


def tree(cache_dir: Path) -> list[str]:
    return sorted(path.name for path in cache_dir.iterdir() if path.name != ".runs")


def names_of(two: Path, name: str, tmp_path: Path) -> set[str]:
    return {path.name for path in stages.places_in_cache(loaded(two, name, tmp_path))}


def test_the_places_of_a_recipe_are_those_that_prepare_has_filled(two: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        found = json.loads((two / "runs" / name / "prepared.json").read_text())
        assert names_of(two, name, tmp_path) == {Path(found["data"]).name, Path(found["store"]).name}
    assert len(names_of(two, "a", tmp_path) | names_of(two, "b", tmp_path)) == 4


def test_list_tells_size_tokens_age_and_whose(
    two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = of(tmp_path / "cache")
    assert len(found) == 4 and {entry.kind for entry in found.values()} == {"documents", "hidden states"}
    for entry in found.values():
        assert entry.bytes == sum(file.stat().st_size for file in entry.path.iterdir())
        assert not entry.problem and entry.holder is None and len(entry.uses) == 1
    tokens: dict[str, set[int | None]] = {}
    for entry in found.values():
        tokens.setdefault(entry.uses[0].output_dir.name, set()).add(entry.tokens)
    assert {name: len(counts) for name, counts in tokens.items()} == {"a": 1, "b": 1}, "documents = states"
    status, text = say(capsys, "list", two / "a.yaml", "--cache-dir", tmp_path / "cache")
    assert status == 0 and all(name in text for name in found)
    assert text.replace("\n", "").count("recipe ") == 2
    status, text = say(capsys, "list")
    assert status == 2 and "no cache is named" in text
    status, text = say(capsys, "list", "--cache-dir", tmp_path / "none")
    assert status == 2 and "is no folder" in text


def test_prune_removes_what_no_recipe_uses_and_only_with_yes(
    two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cache"
    before, of_b = tree(folder), names_of(two, "b", tmp_path)
    size = sum(entry.bytes for entry in of(folder).values() if entry.name in of_b)
    command = ("prune", two / "a.yaml", "--cache-dir", folder)
    status, text = say(capsys, *command)
    assert status == 0 and f"{size:,} bytes would go; nothing was removed" in text and tree(folder) == before
    status, text = say(capsys, *command, "--yes")
    assert status == 0 and f"{size:,} bytes removed" in text
    assert set(tree(folder)) == names_of(two, "a", tmp_path)
    stages.prepare(loaded(two, "a", tmp_path))
    assert set(tree(folder)) == names_of(two, "a", tmp_path), "what stays is found again"


def test_an_age_and_recipes_together_spare_more_than_either(
    two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cache"
    age(folder, 5)
    _, text = say(capsys, "prune", "--cache-dir", folder, "--older-than", 6)
    assert "0 bytes would go" in text and text.count("last used 5.0 days ago") == 4
    _, text = say(capsys, "prune", two / "a.yaml", "--cache-dir", folder, "--older-than", 6)
    assert "0 bytes would go" in text
    _, text = say(capsys, "prune", two / "a.yaml", "--cache-dir", folder, "--older-than", 4)
    assert text.count("would remove") == 2
    _, text = say(capsys, "prune", "--cache-dir", folder, "--older-than", 4, "--yes")
    assert tree(folder) == []
    status, text = say(capsys, "prune", "--cache-dir", folder)
    assert status == 2 and "nothing says what may go" in text


def test_what_a_running_run_holds_stays(
    two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, running = tmp_path / "cache", loaded(two, "b", tmp_path)
    age(folder, 5)
    command = ("prune", two / "a.yaml", "--cache-dir", folder, "--yes")
    with in_use(running) as use:
        use.preparing()
        status, text = say(capsys, *command)
        assert status == 2 and "is preparing" in text and len(tree(folder)) == 4
        stages.prepare(running)
        status, text = say(capsys, *command)
        assert status == 0 and text.count("is at work with it") == 2 and len(tree(folder)) == 4
        assert "(running)" in say(capsys, "list", "--cache-dir", folder)[1].replace("\n", "")
    status, text = say(capsys, *command)
    assert status == 0 and set(tree(folder)) == names_of(two, "a", tmp_path)


def test_what_is_not_recognised_stays_and_is_named(
    two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cache"
    (folder / "notes.txt").write_text("mine")
    (folder / "hidden-0123456789abcdef.old").mkdir()
    documents = next(path for path in folder.iterdir() if path.name.startswith("data-"))
    (documents / "thesis.tex").write_text("mine too")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / "hidden-00000000000000aa").symlink_to(elsewhere)
    _, text = say(capsys, "prune", "--cache-dir", folder, "--older-than", 0, "--yes")
    stays = {"notes.txt", "hidden-0123456789abcdef.old", documents.name, "hidden-00000000000000aa"}
    assert set(tree(folder)) == stays and text.count("not recognised") == 4 and "thesis.tex" in text
    assert elsewhere.is_dir() and (documents / "documents.arrow").is_file()


def test_what_is_unfinished_goes_after_a_day_and_damage_is_told(two: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    store = next(path for path in folder.iterdir() if path.name.startswith("hidden-"))
    partial = store.rename(folder / f"{store.name}.partial")
    aside = folder / ".data-0123456789abcdef-x1y2"
    aside.mkdir()
    (aside / "documents.arrow").write_bytes(b"half")
    (broken,) = [path for path in folder.iterdir() if path.name.startswith("hidden-") and path != partial]
    next(broken.glob("shard-*")).unlink()
    found = of(folder)
    assert found[partial.name].problem == found[aside.name].problem == "not finished"
    assert found[partial.name].name == store.name and found[partial.name].uses
    assert found[broken.name].problem.startswith("damaged: ") and found[broken.name].tokens is None
    kept = {entry.path.name: why for entry, why in cache.prune(folder, [], 0.0).kept}
    assert set(kept) == {partial.name, aside.name} and "within a day" in kept[aside.name]
    age(folder, 2)
    assert not cache.prune(folder, [], 0.0).kept


def test_a_prune_that_was_killed_is_finished_by_the_next(two: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    store = next(path for path in folder.iterdir() if path.name.startswith("hidden-"))
    store.rename(folder / f".removed-{store.name}-17")
    assert of(folder)[f".removed-{store.name}-17"].problem == "being removed"
    given = [given_recipe(name, loaded(two, name, tmp_path)) for name in ("a", "b")]
    cache.prune(folder, given, remove=True)
    assert len(tree(folder)) == 3 and not list(folder.glob(".removed-*"))


def test_a_recipe_whose_part_cannot_be_told_stops_prune(
    two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("prune", two / "a.yaml", f"target.path={tmp_path / 'gone'}", "--cache-dir", tmp_path / "cache")
    status, text = say(capsys, *words, "--yes")
    assert status == 2 and "cannot be told" in text and len(tree(tmp_path / "cache")) == 4


def test_runs_without_a_note_are_found_beside_the_cache(two: Path, tmp_path: Path) -> None:
    """Runs of an earlier version, as the default folders `output/cache` and `output/NAME` have them."""
    folder = tmp_path / "cache"
    shutil.rmtree(folder / ".runs")
    run = tmp_path / "old-run"
    run.mkdir()
    found = json.loads((two / "runs" / "a" / "prepared.json").read_text())
    moved = {key: str(folder / Path(found[key]).name) for key in ("data", "store")}
    (run / "prepared.json").write_text(json.dumps({**found, **moved}))
    users = {name: [use.output_dir for use in entry.uses] for name, entry in of(folder).items()}
    expected = names_of(two, "a", tmp_path)
    assert {name for name, runs in users.items() if runs == [run.resolve()]} == expected


def test_a_cache_that_takes_no_note_is_warned_of(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("eagle3_ds.run.cache_uses.locked", refuse)
    with in_use(loaded(two, "a", tmp_path)) as use:
        use.names([tmp_path])
    assert "cannot be noted" in caplog.text
