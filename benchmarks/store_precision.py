"""`python -m benchmarks.store_precision`: what the precision of stored hidden states does to the loss.

One small target, trained here; its hidden states are captured once in float32 and stored in every precision.
The same drafts (one per seed) learn the same packs in the same order from each store. The last column is what
counts: the trained draft on held-out packs with float32 hidden states, which is what a server would feed it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from eagle3_ds.config import Recipe
from eagle3_ds.data import PackedLoader, PreparedData
from eagle3_ds.data.loader import HeldoutPacks
from eagle3_ds.draft import VocabularyMap
from eagle3_ds.run.stages import prepare
from eagle3_ds.store import HiddenStateStore, HiddenStateWriter, RowFormat
from eagle3_ds.store.index import DTYPES
from eagle3_ds.train.rollout import RolloutTrainer
from judge.result_file import FOLDER, write_result

REFERENCE = "float32"
SIZES = {"hidden_size": 128, "intermediate_size": 384, "vocab_size": 2048, "num_layers": 8, "steps": 200}
MAX_LENGTH = 2048


@dataclass(frozen=True)
class Outcome:
    """One draft trained from one store. Losses are sums over the TTT steps, weighted as in training."""

    dtype: str
    seed: int
    bytes_per_token: int
    first_loss: float
    last_losses: float
    heldout_own: float
    heldout_float32: float
    heldout_tau: float


def make_recipe(folder: Path, steps: int, seed: int) -> Recipe:
    sections = {
        "target": {"path": str(folder / "target"), "dtype": "float32", "build": SIZES},
        "draft": {"vocab_size": 1024},
        "data": {
            "train": ("stdlib",),
            "max_length": MAX_LENGTH,
            "max_conversations": 300,
            "on_too_long": "drop",
            "heldout_fraction": 0.1,
            "hidden_dtype": REFERENCE,
            "cache_dir": str(folder / "cache"),
        },
        "train": {"steps": steps, "dtype": "float32", "learning_rate": 1e-3, "seed": seed},
        "eval": {"num_prompts": 0},
        "deepspeed": str(Path(__file__).parents[1] / "ds_configs" / "zero2.json"),
        "output_dir": str(folder),
    }
    return Recipe.model_validate(sections)


def convert(store: HiddenStateStore, dtype: str, path: Path) -> HiddenStateStore:
    """The store's rows in another precision."""
    if path.is_dir():
        return HiddenStateStore.open(path)
    layout = RowFormat(store.layout.aux_width, store.layout.teacher_width, dtype)
    writer = HiddenStateWriter(path, store.lengths, layout, store.fingerprint)
    for document in writer.missing():
        length = store.lengths[document]
        aux, teacher, token = (
            store.rows(document, name, 0, length) for name in ("aux", "teacher", "teacher_token")
        )
        writer.append(document, aux, teacher, token)
    return writer.finish()


def train(
    recipe: Recipe, data: PreparedData, store: HiddenStateStore, reference: HiddenStateStore
) -> Outcome:
    """A fresh draft, `train.steps` steps from `store`."""
    vocabulary = VocabularyMap.load(Path(recipe.output_dir) / "vocabulary.safetensors")
    trainer = RolloutTrainer(recipe, vocabulary=vocabulary).trainer
    loader = PackedLoader(data.train, store, MAX_LENGTH, seed=recipe.train.seed)
    steps = recipe.train.steps or 0
    losses = [trainer.step(loader.step(step)).loss for step in range(steps)]
    own, common = (
        trainer.evaluate(HeldoutPacks(PackedLoader(data.heldout, kind, MAX_LENGTH)))
        for kind in (store, reference)
    )
    return Outcome(
        dtype=store.layout.dtype,
        seed=recipe.train.seed,
        bytes_per_token=store.layout.row_bytes,
        first_loss=losses[0],
        last_losses=statistics.fmean(losses[-10:]),
        heldout_own=own.loss,
        heldout_float32=common.loss,
        heldout_tau=common.tau,
    )


def run(folder: Path, steps: int, seeds: int) -> Iterator[Outcome]:
    recipe = make_recipe(folder, steps, 0)
    folder.mkdir(parents=True, exist_ok=True)
    prepare(recipe)
    prepared = json.loads((folder / "prepared.json").read_text())
    data = PreparedData.open(Path(prepared["data"]), prepared["data_fingerprint"])
    reference = HiddenStateStore.open(prepared["store"], prepared["store_fingerprint"])
    stores = [
        reference if dtype == REFERENCE else convert(reference, dtype, folder / dtype) for dtype in DTYPES
    ]
    for seed in range(seeds):
        for store in stores:
            yield train(make_recipe(folder, steps, seed), data, store, reference)


def show(outcomes: Sequence[Outcome], steps: int) -> None:
    """Means over the seeds; in brackets the largest change of one seed against float32."""
    table = Table(
        "store",
        "bytes per token",
        "first step",
        f"steps {steps - 9} to {steps}",
        "held out",
        "held out, float32 rows",
        "tau",
    )
    reference = {one.seed: one for one in outcomes if one.dtype == REFERENCE}
    for dtype in DTYPES:
        of_dtype = [one for one in outcomes if one.dtype == dtype]
        cells = []
        for name in ("first_loss", "last_losses", "heldout_own", "heldout_float32", "heldout_tau"):
            change = max(abs(getattr(one, name) / getattr(reference[one.seed], name) - 1) for one in of_dtype)
            cells.append(f"{statistics.fmean(getattr(one, name) for one in of_dtype):.4f} ({change:.3%})")
        table.add_row(dtype, str(of_dtype[0].bytes_per_token), *cells)
    Console(width=160).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store_precision", description=__doc__)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--work", type=Path, default=Path("output/store-precision"), help="where target and stores go"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the JSON goes")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    outcomes = []
    for outcome in run(options.work, options.steps, options.seeds):
        outcomes.append(outcome)
        print(outcome, flush=True)
    show(outcomes, options.steps)
    body = {"steps": options.steps, "target": SIZES, "outcomes": [asdict(one) for one in outcomes]}
    print(write_result("store_precision", "python -m benchmarks.store_precision", body, options.folder))


if __name__ == "__main__":
    main()
