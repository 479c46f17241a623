"""`python -m benchmarks.memory`: predicted bytes of a rank beside the bytes counted in the real step.

Counted are tensor storages, on CPU ranks, in the second optimizer step: what is alive between two steps, and
the peak. The packs themselves, which a run reads from disk, are left out. Exit status 1 when a prediction is
off by more than TOLERANCE.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from eagle3_ds.algorithms.dflash.costs import DFlashShape
from eagle3_ds.algorithms.eagle3 import Eagle3Shape
from eagle3_ds.algorithms.peagle import PEagleShape
from eagle3_ds.plan import predict_memory
from judge.ranks import run_ranks
from judge.result_file import print_table, write_result
from judge.sample_run import SampleRun, small_buckets
from judge.tensor_bytes import TensorBytes

TOLERANCE = 0.05
DS_CONFIGS = Path(__file__).parents[1] / "ds_configs"
SHAPE = Eagle3Shape(256, 768, 8, 2, 32, 4096, 2048)


@dataclass(frozen=True)
class Counted:
    """Bytes of one rank: between steps, and at the peak of a step."""

    rest: int
    peak: int


def count(run: SampleRun) -> Counted:
    """On every rank. Collective."""
    topology = run.topology()
    packs = run.packs(topology.place.dp_rank)
    with TensorBytes(all_added=True) as counted:
        counted.add(tensor for pack in packs for tensor in vars(pack).values() if isinstance(tensor, Tensor))
        of_packs = counted.live
        trainer = run.trainer(topology)
        trainer.step(packs)
        gc.collect()
        counted.mark()
        trainer.step(packs)
    return Counted(counted.baseline - of_packs, counted.peak - of_packs)


def varied_runs() -> dict[str, SampleRun]:
    """Configurations that differ in everything the formulas know."""
    base = SampleRun(SHAPE, 2048, tile_bytes=2**21, loss_tile_bytes=2**21)

    def run(deepspeed: str, **changes: Any) -> SampleRun:
        config = json.loads((DS_CONFIGS / f"{deepspeed}.json").read_text())
        return replace(base, deepspeed=small_buckets(config), **changes)

    two_layers = replace(SHAPE, num_layers=2)
    narrow = replace(
        SHAPE, hidden_size=192, intermediate_size=512, num_heads=6, target_size=256, aux_size=768
    )
    masked = PEagleShape(**vars(SHAPE))
    # A block has 8 inputs, so fewer slots than EAGLE-3's keep as much.
    blocks = DFlashShape(256, 768, 8, 2, 32, 4096, 2048, num_layers=2, aux_size=768, own_mask=True)
    turned = replace(SHAPE, head_dim=64, rotated_size=16, aux_size=5 * 256)
    return {
        "one rank, fp32": run("zero0"),
        "one rank, bf16, keep": run("zero1", dtype="bfloat16", activation="keep", length=1024, ttt_steps=4),
        "ulysses 2, bf16": run("zero2", dtype="bfloat16", ulysses=2),
        "ring 2, gathered, fp32": run("zero3", ring=2),
        "ring 2, streamed, two layers": run(
            "zero2", ring=2, kv_exchange="ring", shape=two_layers, ttt_steps=3
        ),
        "two micro-batches, bf16": run("zero1", dtype="bfloat16", accumulation=2, length=1024, ttt_steps=3),
        "ulysses 2 x ring 2, bf16, two micro-batches": run(
            "zero3", dtype="bfloat16", ulysses=2, ring=2, accumulation=2
        ),
        "draft_dp 2 x ulysses 2, replicas": run(
            "zero2", draft_dp=2, ulysses=2, zero_group="draft_dp", ttt_steps=3
        ),
        "answers of a quarter, ulysses 2, bf16": run("zero2", dtype="bfloat16", ulysses=2, answered=0.25),
        "answers of a tenth, ring 2, gathered": run("zero2", ring=2, answered=0.1),
        "narrower than the target, ulysses 2": run("zero2", ulysses=2, shape=narrow),
        "wide heads turned in part, five captured layers, ring 2, bf16": run(
            "zero3", ring=2, dtype="bfloat16", shape=turned
        ),
        "P-EAGLE, ulysses 2, bf16": run("zero2", dtype="bfloat16", ulysses=2, shape=masked),
        "P-EAGLE, ring 2, fp32, keep, answers of a half": run(
            "zero3", ring=2, shape=masked, activation="keep", answered=0.5
        ),
        "P-EAGLE, ring 2, streamed, two layers": run(
            "zero2", ring=2, kv_exchange="ring", shape=replace(masked, num_layers=2), ttt_steps=3
        ),
        "DFlash, ulysses 2, bf16": run(
            "zero2", dtype="bfloat16", ulysses=2, shape=blocks, length=1024, ttt_steps=3
        ),
        "DFlash, ring 2, fp32, keep, answers of a half": run(
            "zero3", ring=2, shape=blocks, activation="keep", answered=0.5, length=1024, ttt_steps=3
        ),
        "DFlash, ring 2, gathered, a tenth of the anchors": run(
            "zero2", ring=2, shape=blocks, anchor_share=0.1
        ),
        "DFlash, ring 2, streamed, one layer": run(
            "zero2",
            ring=2,
            kv_exchange="ring",
            shape=replace(blocks, num_layers=1),
            length=1024,
            ttt_steps=3,
        ),
        "short, the model is all": run("zero2", length=64, ttt_steps=1, dtype="bfloat16"),
    }


def compare(name: str, run: SampleRun) -> dict[str, Any]:
    """One configuration, counted on all ranks (the largest counts) and predicted."""
    ranks = run_ranks(run.world_size, count, run)
    memory = predict_memory(run.setup())
    rest, peak = max(r.rest for r in ranks), max(r.peak for r in ranks)
    return {
        "name": name,
        "counted": {"rest": rest, "peak": peak},
        "predicted": {"rest": memory.states, "peak": memory.peak, "phase": memory.phase},
        "ratio": {"rest": round(memory.states / rest, 4), "peak": round(memory.peak / peak, 4)},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only configurations whose name contains TEXT"
    )
    options = parser.parse_args(arguments)
    runs = {name: run for name, run in varied_runs().items() if options.only in name}
    if not runs:
        parser.error(f"--only {options.only!r} matches no configuration: {', '.join(varied_runs())}.")
    rows = [compare(name, run) for name, run in runs.items()]
    print_table(
        "bytes of a rank, counted in the real step beside predicted; MiB",
        ("configuration", "rest", "predicted", "peak", "predicted", "ratio", "phase"),
        [
            (
                row["name"],
                *(f"{row[of][at] / 2**20:.2f}" for at in ("rest", "peak") for of in ("counted", "predicted")),
                f"{row['ratio']['peak']:.3f}",
                row["predicted"]["phase"],
            )
            for row in rows
        ],
    )
    off = [row["name"] for row in rows if any(abs(ratio - 1) > TOLERANCE for ratio in row["ratio"].values())]
    print(f"{len(rows) - len(off)} of {len(rows)} within {TOLERANCE:.0%}")
    # A part does not replace the record of all.
    if not options.only:
        body = {"tolerance": TOLERANCE, "rows": rows}
        print(write_result("memory", "python -m benchmarks.memory", body, threads=1))
    return 1 if off else 0


if __name__ == "__main__":
    raise SystemExit(main())
