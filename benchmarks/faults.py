"""Faults injected into real runs by the real command: how soon they are noticed, what is lost, whether the
run goes on exactly.

    python -m benchmarks.faults

Runs of two ranks under DeepSpeed's launcher are struck by one fault after the other, and each time brought
back by `--resume auto`. In the end losses and weights must be bitwise those of a run that nothing happened
to. Where the machine can play two hosts, hosts are struck too. Exit status 1 when a fault is missed, when
more is lost than the steps since the last intact checkpoint, or when anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from eagle3_ds.config import dump_recipe
from eagle3_ds.launch.command import plan_launch
from judge.faults.catalogue import SAVE_EVERY, chains
from judge.faults.hosts import strike_hosts
from judge.faults.runs import WATCHDOG_SECONDS, Struck, fill_disk, launch, run_chain, slow_down, struck_recipe
from judge.result_file import print_table, write_result
from judge.resume_runs import prepare_inputs
from judge.two_hosts import why_not

COLUMNS = (
    "fault",
    "where",
    "tried",
    "detected in (s)",
    "run ended in (s)",
    "steps lost",
    "went on exactly",
    "failures",
)


def measure(folder: Path, first: int, last: int | None) -> list[Struck]:
    """Everything, in `folder`; of the chains, only those from `first` to before `last`."""
    inputs = folder / "inputs"
    inputs.mkdir()
    prepare_inputs(inputs)

    def place(name: str) -> tuple[Path, Path]:
        """The recipe file of a run, and its output folder."""
        recipe, output = folder / f"{name}.yaml", folder / name
        recipe.write_text(dump_recipe(struck_recipe(inputs, output)))
        return recipe, output

    recipe, reference = place("left-alone")
    status, told = launch(recipe)
    assert status == 0, told
    found: list[Struck] = []
    for number, chain in list(enumerate(chains()))[first:last]:
        found += _told(run_chain(*place(f"chain-{number}"), chain, reference))
    found += _told(slow_down(*place("slow"), reference))
    found += _told(fill_disk(*place("full"), reference))
    reason = why_not()
    if reason is None:
        (folder / "two-hosts").mkdir()
        found += _told(strike_hosts(*place("hosts"), reference))
    else:
        print(f"two hosts: not tried, {reason}")
    return found


def _told(found: list[Struck]) -> list[Struck]:
    for struck in found:
        print(f"{struck.name}, {struck.where}: {'; '.join(struck.problems) or 'as it should be'}", flush=True)
    return found


def summarise(found: Sequence[Struck]) -> list[tuple[object, ...]]:
    """One row for each kind of fault and place, in the order of COLUMNS; times are the longest."""
    kinds: dict[tuple[str, str], list[Struck]] = {}
    for struck in found:
        kinds.setdefault((struck.name, struck.where), []).append(struck)
    rows: list[tuple[object, ...]] = []
    for (name, where), tries in kinds.items():
        detected = [one.detected for one in tries if one.detected is not None]
        ended = [one.ended for one in tries if one.ended is not None]
        seconds = [f"{max(times):.1f}" if times else None for times in (detected, ended)]
        lost = max(one.lost for one in tries)
        exact = "yes" if all(one.exact for one in tries) else "no"
        rows.append(
            (name, where, len(tries), *seconds, lost, exact, sum(bool(one.problems) for one in tries))
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--first", type=int, default=0, help="the first chain of faults to try")
    parser.add_argument(
        "--last", type=int, help="the one after the last; with either, no result file is written"
    )
    options = parser.parse_args(arguments)
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    # Every rank runs the product behind a door that lets faults in.
    plan_launch.__defaults__ = ("judge.faults.rank",)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        found = measure(Path(folder), options.first, options.last)
    rows = summarise(found)
    print_table(
        f"{len(found)} faults; watchdog {WATCHDOG_SECONDS:.0f} s, a checkpoint every {SAVE_EVERY} steps",
        COLUMNS,
        rows,
    )
    failures = [f"{one.name}, {one.where}: {problem}" for one in found for problem in one.problems]
    if options.first == 0 and options.last is None:
        body = {"faults": [dict(zip(COLUMNS, row, strict=True)) for row in rows], "failures": failures}
        write_result("faults", "python -m benchmarks.faults", body)
    print(json.dumps(failures, indent=1) if failures else "all as it should be")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
