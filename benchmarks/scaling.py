"""`python -m benchmarks.scaling`: one sequence cut over 1, 2 and 4 ranks: bytes of a rank and seconds of a
step.

Bytes are tensor storages counted in the real step (benchmarks.memory), split into what is alive between
steps, the model states, and what the step adds at its peak; that is what sequence parallelism shares. The
seconds are those of ranks on one machine: on fewer cores than ranks they cannot fall.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from benchmarks.memory import count
from eagle3_ds.algorithms.eagle3 import Eagle3Shape
from eagle3_ds.plan import predict_memory
from judge.ranks import run_ranks
from judge.result_file import print_table, write_result
from judge.sample_run import SampleRun, small_buckets

# Four query heads to a key head, as Llama 3.1 and Qwen 3 of 8B have.
SHAPE = Eagle3Shape(128, 384, 16, 4, 8, 2048, 1024)
LENGTH, DOCUMENTS = 16384, 16


@dataclass(frozen=True)
class Cut:
    """How the sequence is cut: parts of it over a ring, heads over Ulysses."""

    ulysses: int
    ring: int
    kv_exchange: str

    @property
    def sp(self) -> int:
        return self.ulysses * self.ring

    def __str__(self) -> str:
        return f"ulysses {self.ulysses} x ring {self.ring}" + (
            f", {self.kv_exchange}" if self.ring > 1 else ""
        )


CUTS = (
    Cut(1, 1, "gather"),
    Cut(2, 1, "gather"),
    Cut(1, 2, "gather"),
    Cut(4, 1, "gather"),
    Cut(2, 2, "gather"),
    Cut(2, 2, "ring"),
    Cut(1, 4, "gather"),
    Cut(1, 4, "ring"),
)


def timed_step(run: SampleRun) -> float:
    """On every rank: seconds of the second optimizer step. Collective."""
    topology = run.topology()
    trainer, packs = run.trainer(topology), run.packs(topology.place.dp_rank)
    trainer.step(packs)
    dist.barrier()
    started = time.perf_counter()
    trainer.step(packs)
    dist.barrier()
    return time.perf_counter() - started


def measure(cut: Cut, length: int) -> dict[str, Any]:
    """One cut: counted bytes (the largest rank's), predicted ones and seconds."""
    run = SampleRun(
        SHAPE,
        length,
        lengths=(length // DOCUMENTS,) * DOCUMENTS,
        ulysses=cut.ulysses,
        ring=cut.ring,
        kv_exchange=cut.kv_exchange,
        deepspeed=small_buckets({"zero_optimization": {"stage": 2}}),
        tile_bytes=2**21,
        loss_tile_bytes=2**21,
    )
    ranks = run_ranks(run.world_size, count, run)
    memory = predict_memory(run.setup())
    states = max(rank.rest for rank in ranks)
    return {
        "cut": str(cut),
        "sp": cut.sp,
        "states": states,
        "beyond_states": max(rank.peak for rank in ranks) - states,
        "predicted_beyond_states": memory.peak - memory.states,
        "seconds": round(max(run_ranks(run.world_size, timed_step, replace(run))), 3),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--length", type=int, default=LENGTH, help=f"tokens of the sequence (else {LENGTH})")
    options = parser.parse_args(arguments)
    if options.length < DOCUMENTS or options.length % DOCUMENTS:
        parser.error(
            f"--length {options.length} must be a multiple of {DOCUMENTS}, the documents of the sequence."
        )
    rows = [measure(cut, options.length) for cut in CUTS]
    alone = rows[0]["beyond_states"]
    for row in rows:
        row["share_of_one_rank"] = round(row["beyond_states"] / alone, 4)
    print_table(
        (
            f"one sequence of {options.length} tokens in {DOCUMENTS} documents, K 7, fp32, hidden "
            f"{SHAPE.hidden_size}"
        ),
        ("cut", "sp", "states MiB", "beyond them MiB", "predicted", "share of one rank", "seconds"),
        [
            (
                row["cut"],
                row["sp"],
                *(
                    f"{row[key] / 2**20:.1f}"
                    for key in ("states", "beyond_states", "predicted_beyond_states")
                ),
                f"{row['share_of_one_rank']:.3f}",
                row["seconds"],
            )
            for row in rows
        ],
    )
    print(
        write_result(
            "scaling",
            "python -m benchmarks.scaling",
            {"length": options.length, "documents": DOCUMENTS, "rows": rows},
            threads=1,
        )
    )


if __name__ == "__main__":
    main()
