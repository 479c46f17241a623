"""`python -m benchmarks.balance`: how evenly the span plan shares attention work over a ring of 8.

Packs of 131072 tokens with documents of log-normal length, all of it supervised or the last part of each
document, and one whole document. Work is that of the slots that are unrolled. Beside the product's plan stand
a contiguous cut and the zigzag cut (each rank takes one piece from the front and its mirror from the back),
which are how ring attention is usually balanced. The measure is the largest rank's attention work over the
mean: the ring waits for the largest.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

from eagle3_ds.colors import COLORS, MARKERS
from eagle3_ds.layout import SpanPlan, attention_work
from eagle3_ds.layout.plan import IntArray
from judge.result_file import FOLDER, PICTURES, print_table, write_result

LENGTH, RING, SPREAD = 131_072, 8, 1.0
MEDIANS = (4_000, 16_000, 48_000)
# Of a document, at its end: what is supervised where documents are a long question and its answer.
ANSWER = 0.15
CUTS = ("span plan", "zigzag", "contiguous")


@dataclass(frozen=True)
class Balance:
    """One kind of pack. `ratios` is largest over mean work by cut, a number per pack; `planning_ms` the
    product's time.
    """

    documents: str
    ratios: dict[str, list[float]]
    planning_ms: list[float]

    def quantile(self, cut: str, share: float) -> float:
        return round(float(np.quantile(self.ratios[cut], share)), 4)

    def as_dict(self) -> dict[str, object]:
        """The summary that the table shows."""
        cuts = {
            cut: {"median": self.quantile(cut, 0.5), "90th_percentile": self.quantile(cut, 0.9)}
            for cut in CUTS
        }
        planning = {
            "median": round(float(np.median(self.planning_ms)), 2),
            "largest": round(max(self.planning_ms), 2),
        }
        return {"documents": self.documents, "packs": len(self.planning_ms), **cuts, "planning_ms": planning}


def simulated_pack(median: int, seed: int) -> list[int]:
    """Document lengths that fill a pack: log-normal, the last one cut at the end."""
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    room = LENGTH
    while room:
        lengths.append(min(room, max(1, int(rng.lognormal(np.log(median), SPREAD)))))
        room -= lengths[-1]
    return lengths


def measure(documents: str, packs: Sequence[Sequence[int]], answer: float = 1.0) -> Balance:
    """Balance of every cut on every pack. `answer`: share of each document, at its end, that is live."""
    ratios: dict[str, list[float]] = {cut: [] for cut in CUTS}
    planning_ms = []
    for lengths in packs:
        live = np.concatenate([np.arange(length) >= round((1 - answer) * length) for length in lengths])
        started = time.perf_counter()
        plan = SpanPlan.make(lengths, ring=RING, live=live)
        planning_ms.append(1e3 * (time.perf_counter() - started))
        work = attention_work(plan.position, plan.document >= 0)[:LENGTH] * live
        for cut, of_rank in zip(
            CUTS, (plan.ring_work(), _zigzag(work), work.reshape(RING, -1).sum(1)), strict=True
        ):
            ratios[cut].append(float(of_rank.max() / of_rank.mean()))
    return Balance(documents, ratios, planning_ms)


def _zigzag(work: IntArray) -> IntArray:
    pieces = work.reshape(2 * RING, -1).sum(1)
    return pieces[:RING] + pieces[: RING - 1 : -1]


def run(num_packs: int) -> list[Balance]:
    """Every kind of pack, `num_packs` of each that is drawn by chance."""
    simulated = [
        measure(f"median {median // 1000}k", [simulated_pack(median, seed) for seed in range(num_packs)])
        for median in MEDIANS
    ]
    answers = measure(
        "median 16k, answers", [simulated_pack(16_000, seed) for seed in range(num_packs)], ANSWER
    )
    return [*simulated, answers, measure("one document", [[LENGTH]])]


def draw(found: Sequence[Balance], path: Path) -> None:
    """A row for each kind of pack, a point and its number for each cut: the median of the packs, with a bar
    from the 10th to the 90th percentile.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for place, (cut, color, marker) in enumerate(zip(CUTS, COLORS, MARKERS, strict=False)):
        rows = np.arange(len(found)) + (place - 1) * 0.26
        low, median, high = ([balance.quantile(cut, share) for balance in found] for share in (0.1, 0.5, 0.9))
        axes.hlines(rows, low, high, color=color, linewidth=2)
        axes.plot(median, rows, marker, color=color, markersize=7, label=cut)
        for row, value, end in zip(rows, median, high, strict=True):
            axes.annotate(f"{value:.2f}", (end, row), (7, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(found)), [balance.documents for balance in found])
    axes.invert_yaxis()
    axes.set_ylabel("documents of a pack")
    axes.set_xlabel(
        "largest / mean attention work of a rank (1 is perfect); median, bar from 10th to 90th percentile"
    )
    axes.set_title(f"Attention work of {RING} ring ranks, packs of {LENGTH:,} tokens, by how they are cut")
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _row(balance: Balance, cut: str) -> tuple[object, ...]:
    planning = (
        (f"{np.median(balance.planning_ms):.1f}", f"{max(balance.planning_ms):.1f}")
        if cut == CUTS[0]
        else (None, None)
    )
    return balance.documents, cut, balance.quantile(cut, 0.5), balance.quantile(cut, 0.9), *planning


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.balance", description=__doc__)
    parser.add_argument("--packs", type=int, default=200, help="simulated packs of each kind")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the JSON goes")
    parser.add_argument("--pictures", type=Path, default=PICTURES, help="where the picture goes")
    options = parser.parse_args(arguments)
    found = run(options.packs)
    print_table(
        f"largest / mean attention work of {RING} ring ranks, packs of {LENGTH} tokens",
        ("documents", "cut", "median", "90th percentile", "planning ms, median", "largest"),
        [_row(balance, cut) for balance in found for cut in CUTS],
    )
    body = {
        "length": LENGTH,
        "ring": RING,
        "log_normal_sigma": SPREAD,
        "balance": [balance.as_dict() for balance in found],
    }
    path = write_result("balance", "python -m benchmarks.balance", body, options.folder)
    picture = options.pictures / "balance.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(found, picture)
    print(f"{path} and {picture}")


if __name__ == "__main__":
    main()
