"""`python -m benchmarks.comm`: calls and bytes of one training step, counted by (ulysses, ring, K, strategy).

Each row runs the real step on CPU ranks with a small draft and counts every torch.distributed call of rank 0.
Beside it stands what `eagle3_ds.plan` predicts, and the exit status is 1 when they differ. A second table
gives the proven formulas for an 8B-shaped draft at 131072 tokens, beside the plain designs: q, k, v and out
exchanged each on its own at every TTT step, and keys and values passed round the ring at every TTT step.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from eagle3_ds.algorithms.eagle3 import Eagle3Shape
from eagle3_ds.costs import Setup, Traffic
from eagle3_ds.plan import attention_traffic, separate_all_to_alls
from judge.collective_calls import CollectiveCalls
from judge.ranks import run_ranks
from judge.result_file import print_table, write_result
from judge.sample_run import SampleRun, small_buckets

SMALL = Eagle3Shape(64, 96, 8, 4, 8, 256, 128)
LARGE = Eagle3Shape(4096, 14336, 32, 8, 128, 128256, 32000)
MESHES = ((2, 1), (1, 2), (2, 2), (4, 1), (1, 4))  # (ulysses, ring)
STEPS = (1, 3, 7)
LARGE_MESHES = ((8, 1), (4, 2), (2, 4), (1, 8))
Row = dict[str, Any]


def counted_step(run: SampleRun) -> dict[tuple[str, str], tuple[int, int]]:
    """On every rank: the second step's calls and payload by (axis, kind). Collective."""
    topology = run.topology()
    trainer, packs = run.trainer(topology), run.packs(topology.place.dp_rank)
    trainer.step(packs)
    groups = {"ulysses": topology.ulysses_group, "ring": topology.ring_group}
    with CollectiveCalls(groups, everywhere=True) as calls:
        trainer.step(packs)
    return {key: (count.calls, count.payload) for key, count in calls.counts.items()}


def count_row(run: SampleRun) -> Row:
    """One configuration, counted and predicted."""
    counted = run_ranks(run.world_size, counted_step, run)[0]
    predicted = {(t.axis, t.kind): (t.calls, t.payload) for t in attention_traffic(run.setup())}
    attention = {key: value for key, value in counted.items() if key[0] != "world"}
    return {
        "ulysses": run.ulysses,
        "ring": run.ring,
        "ttt_steps": run.ttt_steps,
        "strategy": run.kv_exchange if run.ring > 1 else "-",
        "counted": _by_name(attention),
        "predicted": _by_name(predicted),
        "equal": attention == predicted,
        "zero_and_reports": _by_name({key: value for key, value in counted.items() if key[0] == "world"}),
    }


def _by_name(counts: dict[tuple[str, str], tuple[int, int]]) -> dict[str, list[int]]:
    return {f"{axis} {kind}": list(value) for (axis, kind), value in sorted(counts.items())}


def small_runs() -> list[SampleRun]:
    """Every mesh and K; on a ring both strategies."""
    runs = []
    for (ulysses, ring), steps in itertools.product(MESHES, STEPS):
        base = SampleRun(SMALL, 128, ttt_steps=steps, ulysses=ulysses, ring=ring, deepspeed=small_buckets({}))
        runs += [
            replace(base, kv_exchange=strategy)
            for strategy in (("gather", "ring") if ring > 1 else ("gather",))
        ]
    return runs


def large_row(ulysses: int, ring: int) -> Row:
    """Sent by one rank at 131072 tokens, K = 7, bf16: ours by strategy, and the plain designs."""
    setup = Setup(LARGE, 131_072, ulysses=ulysses, ring=ring)
    streamed = replace(setup, kv_exchange="ring", kv_bytes=0)
    return {
        "ulysses": ulysses,
        "ring": ring,
        "all_to_alls": _calls(attention_traffic(setup), "ulysses"),
        "plain_all_to_alls": separate_all_to_alls(setup),
        "gather_bytes": _sent(attention_traffic(setup), "ring"),
        "ring_every_step_bytes": _sent(attention_traffic(streamed), "ring"),
        "ulysses_bytes": _sent(attention_traffic(setup), "ulysses"),
    }


def _calls(traffic: Sequence[Traffic], axis: str) -> int:
    return sum(t.calls for t in traffic if t.axis == axis)


def _sent(traffic: Sequence[Traffic], axis: str) -> int:
    return round(sum(t.sent for t in traffic if t.axis == axis))


def main(arguments: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m benchmarks.comm", description=__doc__).parse_args(arguments)
    rows = [count_row(run) for run in small_runs()]
    large = [large_row(*mesh) for mesh in LARGE_MESHES]
    print_table(
        "one step of rank 0, one layer",
        ("ulysses", "ring", "K", "strategy", "counted: calls, bytes", "formula"),
        [
            (
                *(row[key] for key in ("ulysses", "ring", "ttt_steps", "strategy")),
                "\n".join(f"{name} {calls}, {size}" for name, (calls, size) in row["counted"].items()),
                "equal" if row["equal"] else row["predicted"],
            )
            for row in rows
        ],
    )
    print_table(
        "8B-shaped draft, 131072 tokens, K 7, bf16: sent by one rank in a step, GB",
        ("ulysses", "ring", "all-to-alls", "plain", "gathered once", "ring at every step", "ulysses"),
        [
            (
                *(row[key] for key in ("ulysses", "ring", "all_to_alls", "plain_all_to_alls")),
                *(
                    f"{row[key] / 1e9:.2f}"
                    for key in ("gather_bytes", "ring_every_step_bytes", "ulysses_bytes")
                ),
            )
            for row in large
        ],
    )
    path = write_result("comm", "python -m benchmarks.comm", {"counted": rows, "large": large})
    differing = sum(not row["equal"] for row in rows)
    print(f"{len(rows) - differing} of {len(rows)} rows equal their formula to the byte; {path}")
    return 1 if differing else 0


if __name__ == "__main__":
    raise SystemExit(main())
