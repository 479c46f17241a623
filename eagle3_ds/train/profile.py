"""`train.profile_steps`: a trace of some optimizer steps, and where their time goes.

In `OUTPUT/profile/`, for each rank that is profiled: `rank-00000.trace.json`, which https://ui.perfetto.dev
and chrome://tracing open, and `rank-00000.parts.json`, the table by parts of the step (parts.py). A part's
time is what is spent in it and in no part inside it: on a CPU, the host's time; on an accelerator that
torch's profiler sees, that of the kernels that it starts, where kernels side by side on two streams count
twice.

FLOPs are those of the matrix products, by the shapes that the profiler has seen, and of the attention by the
planner's formula for the query-key pairs of this rank. They are compared with the rate of one large matrix
product in `train.dtype`, measured beforehand on the same device.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from eagle3_ds.config import Recipe
from eagle3_ds.device.kinds import CPU
from eagle3_ds.device.runtime import profiler_activity
from eagle3_ds.layout import PackedSequence
from eagle3_ds.parts import ATTENTION, BACKWARD, PREFIX
from eagle3_ds.train.spans import plan_spans
from eagle3_ds.train.trainer import DraftTrainer

FOLDER = "profile"
STEP = "optimizer step "
OTHER = "other"
logger = logging.getLogger(__name__)
PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::baddbmm": 1}
"""Operations that are one matrix product, and which of their arguments is its first factor."""


@dataclass(frozen=True)
class PartOfStep:
    """Attributes:
    seconds: of all profiled steps together.
    share: of the time of all parts.
    flops: of matrix products and attention.
    of_matmul: its FLOPs per second over those of a large matrix product alone; None for a part without.
    """

    seconds: float
    share: float
    flops: int
    of_matmul: float | None


class StepProfile:
    """Profiles the steps that the recipe names, on this rank.

    Args:
        trainer: of this rank.
        output_dir: of the run.
    """

    def __init__(self, trainer: DraftTrainer, output_dir: Path) -> None:
        assert trainer.recipe.train.profile_steps is not None
        self.trainer, self.folder = trainer, output_dir / FOLDER
        self.first, self.last = trainer.recipe.train.profile_steps
        self._device = trainer.topology.device
        self._sees = profiler_activity(self._device)
        self._profile: profile | None = None
        self._packs: list[Sequence[PackedSequence]] = []
        self._steps: list[int] = []
        self._rate = 0.0

    @classmethod
    def of(cls, trainer: DraftTrainer, output_dir: Path) -> StepProfile | None:
        """None where this rank has nothing to profile."""
        train, rank = trainer.recipe.train, trainer.topology.place.rank
        if train.profile_steps is None or (rank and train.profile_ranks == "first"):
            return None
        return cls(trainer, output_dir)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Optimizer step `number`, from 1, is taken within."""
        if not self.first <= number <= self.last:
            yield
            return
        if self._profile is None:
            self._rate = matmul_rate(self._device, self.trainer.dtype)
            self._profile = profile(activities=self._activities(), record_shapes=True)
            self._profile.start()
        with record_function(f"{STEP}{number}"):
            yield
        self._steps.append(number)
        if number == self.last:
            self.close()

    def _activities(self) -> list[ProfilerActivity]:
        if self._device.type != CPU and self._sees is None:
            logger.warning(
                "train.profile_steps: torch's profiler does not see the work of %s; the parts get the host's "
                "time, which says where the host waits and not what the device does",
                self._device,
            )
        return [ProfilerActivity.CPU, *([] if self._sees is None else [self._sees])]

    def count(self, packs: Sequence[PackedSequence]) -> None:
        """What the step of this moment trains on."""
        if self._profile is not None:
            self._packs.append(packs)

    def close(self) -> None:
        """Write what was profiled, also of a run that was stopped before the last of the steps."""
        if self._profile is None:
            return
        self._profile.stop()
        finished, self._profile = self._profile, None
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"rank-{self.trainer.topology.place.rank:05}"
        trace = self.folder / f"{name}.trace.json"
        finished.export_chrome_trace(str(trace))
        seconds, flops = by_part(finished.events(), of_device=self._sees is not None)
        flops[ATTENTION] += attention_flops(self.trainer, self._packs)
        parts = table(seconds, flops, self._rate)
        found = {
            "steps": self._steps,
            "device": self._device.type,
            "seconds_of": "host" if self._sees is None else "device",
            "matmul_flops_per_s": self._rate,
            "parts": {name: asdict(one) for name, one in parts.items()},
        }
        (self.folder / f"{name}.parts.json").write_text(json.dumps(found, indent=2) + "\n")
        if self.trainer.topology.place.rank == 0:
            for line in lines(parts, len(self._steps), self._rate):
                logger.info("profile: %s", line)
            logger.info("profile: %s, for ui.perfetto.dev or chrome://tracing", trace)


@contextmanager
def profiled_step(found: StepProfile | None, number: int) -> Iterator[None]:
    """`StepProfile.step` of a rank that may have none."""
    with ExitStack() as stack:
        if found is not None:
            stack.enter_context(found.step(number))
        yield


def check_profile(recipe: Recipe, done: int, last: int) -> None:
    """Raises ValueError when the run of `last` steps has none of `train.profile_steps` left after `done`."""
    steps = recipe.train.profile_steps
    if steps is not None and steps[1] > last:
        raise ValueError(
            f"train.profile_steps is {list(steps)}, and the run has {last} steps. Name some of these, "
            "or remove it."
        )
    if steps is not None and steps[0] <= done:
        logger.warning(
            "train.profile_steps: steps %d to %d were taken before this resume, and are not profiled again",
            steps[0],
            min(done, steps[1]),
        )


def by_part(events: Any, of_device: bool) -> tuple[Counter[str], Counter[str]]:
    """Seconds, the device's or the host's, and FLOPs of matrix products by part, from the profiler's events
    within the steps.
    """
    seconds: Counter[str] = Counter()
    flops: Counter[str] = Counter()
    for event in events:
        if event.device_type != DeviceType.CPU or event.is_async:
            continue
        name = _part_of(event)
        if name is None:
            continue
        spent = event.self_device_time_total if of_device else event.self_cpu_time_total
        seconds[name] += spent / 1e6
        flops[name] += product_flops(event.name, event.input_shapes)
    return seconds, flops


def _part_of(event: Any) -> str | None:
    """The innermost part around an event; None outside of the steps."""
    around, root, inner = event, event, None
    while around is not None:
        root = around
        if inner is None and around.name.startswith(PREFIX):
            inner = str(around.name.removeprefix(PREFIX))
        if around.name.startswith(STEP):
            return inner or OTHER
        around = around.cpu_parent
    # A GPU's backward runs in autograd's own threads, where the step is not around its operations.
    return inner or BACKWARD if root.name.startswith("autograd::engine::") else None


def product_flops(name: str, shapes: Sequence[Sequence[int]]) -> int:
    """FLOPs of an operation that is a matrix product, [.., m, k] times [.., k, n]; 0 of any other."""
    place = PRODUCTS.get(name)
    if place is None:
        return 0
    (*batch, rows, inner), columns = shapes[place], shapes[place + 1][-1]
    count = 2 * rows * inner * columns
    for size in batch:
        count *= size
    return count


def attention_flops(trainer: DraftTrainer, packs: Sequence[Sequence[PackedSequence]]) -> int:
    """FLOPs of this rank's attention to exchanged keys, forward and backward, by the planner's formula."""
    total, recipe, ring_rank = 0, trainer.recipe, trainer.topology.place.ring_rank
    for pack in (pack for of_step in packs for pack in of_step):
        plan = plan_spans(recipe, pack.lengths, pack.loss_mask, pack.anchors)
        setup = replace(trainer.setup, length=plan.length)
        counted = setup.shape.flops(setup, int(plan.ring_work()[ring_rank]))
        total += counted.attention_forward + counted.attention_backward
    return total


def table(seconds: Counter[str], flops: Counter[str], rate: float) -> dict[str, PartOfStep]:
    """The parts, the longest first."""
    whole = sum(seconds.values())
    return {
        name: PartOfStep(
            spent, spent / whole, flops[name], flops[name] / spent / rate if flops[name] and spent else None
        )
        for name, spent in seconds.most_common()
    }


def lines(parts: dict[str, PartOfStep], steps: int, rate: float) -> Iterator[str]:
    """The table, for people."""
    yield f"{steps} steps; a large matrix product alone reaches {rate / 1e12:.3g} TFLOP/s here"
    yield f"{'part':<16} {'s/step':>9} {'share':>6} {'TFLOP':>9} {'of matmul':>9}"
    for name, one in parts.items():
        reached = "" if one.of_matmul is None else f"{one.of_matmul:.0%}"
        tera = f"{one.flops / steps / 1e12:.3g}" if one.flops else ""
        yield f"{name:<16} {one.seconds / steps:>9.4f} {one.share:>6.1%} {tera:>9} {reached:>9}"


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a large matrix product, the best of five."""
    size = 512 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):  # the first warms up
        started = time.perf_counter()
        float((a @ b)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
