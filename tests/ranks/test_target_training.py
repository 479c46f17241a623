"""The target on many ranks, end to end: the store that they capture, and training beside it, against one
process's capture.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eagle3_ds.config import Recipe, dump_recipe, load_recipe
from eagle3_ds.guard.heart import Heart
from eagle3_ds.run.stages import prepare
from eagle3_ds.store import HiddenStateStore
from eagle3_ds.topology import maybe_setup_distributed
from eagle3_ds.train.capture import capture
from eagle3_ds.train.main import build_loaders, build_trainer, open_states
from tests.unit.tiny_target import CONVERSATIONS, build_tiny_target

pytestmark = pytest.mark.ranks
STEPS = 3
RECIPE = """
target: {path: TARGET, dtype: float32}
draft: {vocab_size: 128, ttt_steps: 3}
data: {train: [ROOT/conversations.jsonl], heldout_fraction: 0.2, max_length: 160, hidden_dtype: float32,
       cache_dir: ROOT/single}
train: {steps: 3, dtype: float32, learning_rate: 1e-2, schedule: constant}
eval: {num_prompts: 0}
deepspeed: ds_configs/zero2.json
output_dir: ROOT/output
"""


class Job:
    """A recipe over a small data set in a folder of its own; its hidden states captured by one process."""

    def __init__(self, root: Path) -> None:
        self.root = root
        # A few long conversations beside the short ones, so that documents cross the borders of spans.
        rows = [
            {"messages": turns * (1 + 3 * (number % 5 == 0))} for number, turns in enumerate(CONVERSATIONS)
        ]
        (root / "conversations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        target = build_tiny_target(root / "target")
        (root / "recipe.yaml").write_text(RECIPE.replace("TARGET", str(target)).replace("ROOT", str(root)))
        self.prepared(self.recipe())

    def recipe(self, *overrides: str) -> Recipe:
        return load_recipe(self.root / "recipe.yaml", overrides)

    def prepared(self, recipe: Recipe) -> str:
        """The path of a recipe whose documents are prepared, for the ranks."""
        output = Path(recipe.output_dir)
        output.mkdir(exist_ok=True)
        prepare(recipe)
        (output / "recipe.resolved.yaml").write_text(dump_recipe(recipe))
        return str(output / "recipe.resolved.yaml")

    def store(self, name: str) -> HiddenStateStore:
        (folder,) = (self.root / name).glob("hidden-*")
        store = HiddenStateStore.open(folder)
        store.verify()
        return store


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("target"))


def rank_of_capture(path: str) -> None:
    capture(load_recipe(path), Heart(None))


def assert_equal(found: HiddenStateStore, expected: HiddenStateStore) -> None:
    assert found.lengths == expected.lengths and found.fingerprint == expected.fingerprint
    for document, length in expected.lengths.items():
        for name in ("aux", "teacher", "teacher_token"):
            wanted = expected.rows(document, name, 0, length).double()
            error = (found.rows(document, name, 0, length).double() - wanted).norm() / wanted.norm()
            assert error <= 1e-5, f"{name} of document {document}: relative error {error:.2e}"


def test_ranks_capture_what_one_process_captures_and_go_on_after_a_crash(job: Job, run_ranks: Any) -> None:
    cut = (
        "data.cache_dir=" + str(job.root / "ranks"),
        "target.capture=parallel",
        "output_dir=" + str(job.root / "capture"),
    )
    path = job.prepared(job.recipe(*cut, "parallel.ring=2", "parallel.ulysses=2"))
    run_ranks(4, rank_of_capture, path)
    assert_equal(job.store("ranks"), job.store("single"))
    # A crash: no index, and one rank's rows are lost. Two ranks with other spans go on.
    store = job.store("ranks").path
    partial = store.rename(store.with_name(f"{store.name}.partial"))
    (partial / "index.json").unlink()
    (lost,) = partial.glob("shard-0002-*")
    lost.unlink()
    kept = {file.name: file.read_bytes() for file in partial.iterdir()}
    run_ranks(2, rank_of_capture, job.prepared(job.recipe(*cut, "parallel.ulysses=2")))
    assert_equal(job.store("ranks"), job.store("single"))
    assert kept.items() <= {file.name: file.read_bytes() for file in store.iterdir()}.items()


def rank_of_training(path: str) -> list[tuple[float, float | None, int]]:
    """Loss, gradient norm and tokens of three steps and of a held-out evaluation."""
    torch.set_num_threads(1)
    recipe = load_recipe(path)
    topology = maybe_setup_distributed(
        recipe.parallel.ulysses, recipe.parallel.ring, recipe.parallel.draft_dp
    )
    states = open_states(recipe, topology)
    trainer = build_trainer(recipe, topology)
    loader, heldout = build_loaders(recipe, topology, states)
    reports = [trainer.step(loader.step(index)) for index in range(STEPS)]
    reports.append(trainer.evaluate(heldout))
    return [(report.loss, report.grad_norm, report.tokens) for report in reports]


@pytest.mark.parametrize(
    "mesh",
    [
        ("parallel.ring=2", "parallel.ulysses=2"),
        ("parallel.ring=2", "parallel.draft_dp=2", "parallel.zero_group=draft_dp"),
    ],
    ids=["ring2-ulysses2", "dp2-ring2-zero_group_draft_dp"],
)
def test_training_beside_the_target_equals_training_from_the_store(
    job: Job, run_ranks: Any, mesh: tuple[str, ...]
) -> None:
    results = []
    for states in ("offline", "online"):
        cache = job.root / ("single" if states == "offline" else "nothing")
        changes = (
            f"data.hidden_states={states}",
            f"data.cache_dir={cache}",
            f"output_dir={job.root / states}",
        )
        results.append(run_ranks(4, rank_of_training, job.prepared(job.recipe(*changes, *mesh))))
    assert not list((job.root / "nothing").glob("hidden-*"))
    for offline, online in zip(*results, strict=True):
        for (loss, norm, tokens), (other_loss, other_norm, other_tokens) in zip(offline, online, strict=True):
            assert tokens == other_tokens
            assert other_loss == pytest.approx(loss, rel=1e-5)
            assert norm is None or other_norm == pytest.approx(norm, rel=1e-4)
    assert results[0][0][0][0] != results[0][0][1][0], "three steps, and nothing was learnt"
