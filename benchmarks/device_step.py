"""`python -m benchmarks.device_step`: what one training step would launch on a GPU, counted without one.

The step of an 8B-shaped EAGLE-3 draft in bf16, one document, by part: launches, FLOPs, bytes, and the
seconds that a device needs at least. It is `DraftTrainer.step` of one rank, with the product's own modules,
over meta tensors (judge/device_counts.py); DeepSpeed and the optimizer are left out, and so is the sum of the
gradients over the ranks. The attention kernel is `cuda`. torch's fused norm and the product's Triton kernels
are counted stand-ins (judge/pretend_device.py). Of several ranks, rank 0 is counted.

The seconds add up those of the launches, nothing overlapped. A launch takes the larger of FLOPs over the rate
and bytes over the bandwidth of the device's memory, a copy from the host its bytes over the link: at the
peaks, and at the shares of the peaks that the planner assumes. The fixed time of a launch is not in them.
Beside them stands what `eagle3_ds.plan.predict_time` says of the same. Prints tables, writes JSON.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.gpu import SHAPE_8B
from eagle3_ds.algorithms.eagle3 import DraftModel
from eagle3_ds.algorithms.eagle3.supervision import TTTSupervision
from eagle3_ds.config import Recipe
from eagle3_ds.costs import Setup
from eagle3_ds.layout import PackedSequence, live_slots
from eagle3_ds.parts import OPTIMIZER
from eagle3_ds.plan import DEVICES, Device, StepTime, attention_pairs, predict_time, step_flops
from eagle3_ds.plan.devices import estimates
from eagle3_ds.topology import Topology, maybe_setup_distributed
from eagle3_ds.train.scale import ScaleCheck
from eagle3_ds.train.trainer import DraftTrainer
from judge.dense_reference import Frozen
from judge.device_counts import DEVICE, Amount, DeviceCounts, Kind
from judge.pretend_device import CountedCudaKernel, pretend_cuda
from judge.product import vocabulary_map
from judge.result_file import FOLDER, print_table, write_result
from judge.step_inputs import HiddenRows, StepModel, StepShape, answers_mask, make_pack

LENGTHS = (32768, 131072)
TILE_BYTES = 2**30
"""Of a tile of slots and of a tile of the loss, as in a recipe that does not say."""
_NOT_COUNTED = (OPTIMIZER, "zero exchange")


@dataclass(frozen=True)
class Step:
    """The step that is counted.

    Attributes:
        length: tokens of its one document.
        supervised: share of them that is in the loss, in turns.
        tile_bytes: of a tile of slots and of a tile of the loss.
    """

    shape: StepShape
    length: int
    supervised: float = 1.0
    ring: int = 1
    ulysses: int = 1
    tile_bytes: int = TILE_BYTES

    def recipe(self) -> Recipe:
        shape = self.shape
        sections: dict[str, Any] = {
            "target": {"path": "none"},
            "data": {"train": ("none",), "max_length": self.length},
            "draft": {"ttt_steps": shape.ttt_steps, "vocab_size": shape.draft.draft_vocab_size},
            "parallel": {"ring": self.ring, "ulysses": self.ulysses},
            "attention": {"kernel": "cuda"},
            "loss": {"decay": shape.decay, "tile_bytes": self.tile_bytes},
            "train": {"steps": 1, "dtype": "bfloat16", "tile_bytes": self.tile_bytes},
            "deepspeed": "none",
            "output_dir": "none",
        }
        return Recipe.model_validate(sections)

    def setup(self) -> Setup:
        """The planner's description of it."""
        live = live_slots(
            (self.length,), answers_mask(self.length, self.supervised), TTTSupervision(self.shape.ttt_steps)
        )
        setup = Setup.of(self.recipe(), {}, self.shape.draft, draft_dp=1)
        return replace(setup, supervised=float(live.mean()))


@dataclass(frozen=True)
class Counted:
    """A step counted, and what the planner says of it.

    Attributes:
        parts: what each part comes to; total: all of them.
        needed_flops: what the step cannot do without: all but the products that it repeats.
        peak_share, expected_share: these, over the seconds at the peaks or at the planner's shares and the
            device's peak.
        planned_seconds: the planner's, by what they go to, without what is not counted.
    """

    step: Step
    parts: dict[str, Amount]
    total: Amount
    needed_flops: int
    peak_share: float
    expected_share: float
    planned_seconds: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        step = asdict(self.step)
        del step["shape"]
        return {**asdict(self), "step": step}


def count_step(step: Step) -> DeviceCounts:
    """Take the step over meta tensors, on rank 0 of its mesh."""
    counts = DeviceCounts()
    with _place(step) as topology, _without_engine(counts):
        trainer = _trainer(step, topology)
        with counts, pretend_cuda(counts):
            trainer.step([_pack(step)])
    return counts


def compare(step: Step, counts: DeviceCounts, device: Device) -> Counted:
    """A counted step beside the planner's figures, on `device`."""
    setup = step.setup()
    pairs = attention_pairs(setup)
    flops, total = step_flops(setup, pairs), counts.amount(device, estimates(device))
    needed, peak = flops.layers + flops.loss + total.attention_flops, 1e12 * device.half_tflops
    planned: StepTime = predict_time(setup, device, pairs)
    return Counted(
        step,
        {part: counts.amount(device, estimates(device), part) for part in counts.parts()},
        total,
        needed,
        needed / total.peak_seconds / peak,
        needed / total.expected_seconds / peak,
        {part: seconds for part, seconds in planned.parts.items() if part not in _NOT_COUNTED},
    )


@contextmanager
def _place(step: Step) -> Iterator[Topology]:
    """Rank 0 of the step's mesh, whose other ranks do not exist."""
    ranks = step.ring * step.ulysses
    if ranks > 1:
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield replace(maybe_setup_distributed(step.ulysses, step.ring), device=DEVICE)
    finally:
        if ranks > 1:
            dist.destroy_process_group()


class _Engine:
    """In place of DeepSpeed's engine: forward and backward, and no optimizer."""

    def __init__(self, model: nn.Module) -> None:
        self.module = model
        self.optimizer = SimpleNamespace(param_groups=[], _global_grad_norm=0.0)

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def train(self) -> None:
        self.module.train()

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()

    def step(self) -> None:
        """The optimizer is left out."""

    def get_global_grad_norm(self) -> float:
        return 0.0


@contextmanager
def _without_engine(counts: DeviceCounts) -> Iterator[None]:
    def build(
        recipe: Recipe, settings: Any, topology: Topology, model: nn.Module
    ) -> tuple[_Engine, float, ScaleCheck]:
        check = ScaleCheck(model, torch.bfloat16, recipe.parallel.zero_group)
        # It belongs to the first step alone, and there is no DeepSpeed to ask.
        check.stop()
        return _Engine(model.to(torch.bfloat16)), float(topology.mesh.world_size), check

    with (
        patch("eagle3_ds.train.trainer.build_engine", build),
        patch("eagle3_ds.train.trainer.checked_kernel", lambda *asked: CountedCudaKernel(counts)),
    ):
        yield


def _trainer(step: Step, topology: Topology) -> DraftTrainer:
    with DEVICE:
        draft = DraftModel(step.shape.config())
    frozen = _model(step.shape).frozen
    return DraftTrainer(
        step.recipe(), {}, topology, draft, frozen.embedding, frozen.head, vocabulary_map(frozen)
    )


def _model(shape: StepShape) -> StepModel:
    """The target's two matrices without values, and the first tokens as the draft vocabulary."""
    draft = shape.draft
    size = (draft.vocab_size, draft.hidden_size)
    embedding, head = (torch.empty(size, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    return StepModel(
        shape, {}, Frozen(embedding, head, torch.zeros(draft.draft_vocab_size, dtype=torch.int64))
    )


def _pack(step: Step) -> PackedSequence:
    """One document, whose hidden states are one row of zeros in memory."""
    hidden = step.shape.draft.hidden_size
    rows = (torch.zeros(1, width, dtype=torch.bfloat16) for width in (3 * hidden, hidden))
    rows_of_all = HiddenRows(*(row.expand(step.length, -1) for row in rows))
    return make_pack(_model(step.shape), step.length, rows_of_all, step.supervised)


def rooflines(counts: DeviceCounts) -> dict[str, dict[str, float]]:
    """Seconds at the peaks of every device that the planner knows, by device and part; "all" is their sum."""
    parts = {part: part for part in counts.parts()} | {"all": None}
    return {
        name: {
            told: round(counts.amount(device, estimates(device), part).peak_seconds, 4)
            for told, part in parts.items()
        }
        for name, device in DEVICES.items()
    }


def attention_calls(counts: DeviceCounts) -> dict[str, int]:
    """How often the attention kernel is called in forward and backward; both are of one step."""
    kinds: tuple[Kind, Kind] = ("attention forward", "attention backward")
    return {kind: sum(times for one, times in counts.launches.items() if one.kind == kind) for kind in kinds}


def show_rooflines(step: Step, found: Mapping[str, Mapping[str, float]]) -> None:
    """The table of `rooflines`."""
    parts = next(iter(found.values()))
    rows = [(part, *(f"{of_device[part]:.3f}" for of_device in found.values())) for part in parts]
    print_table(f"{step.length} slots, seconds at the peaks of", ["part", *found], rows)


def show(counted: Counted, device: Device) -> None:
    """The table of one step, and a line that compares it with the planner."""

    def cells(name: str, one: Amount) -> tuple[object, ...]:
        return (
            name,
            one.launches,
            f"{one.matmul_flops / 1e12:.1f}",
            f"{one.attention_flops / 1e12:.1f}",
            f"{one.moved_bytes / 1e9:.0f}",
            f"{one.elementwise_bytes / 1e9:.0f}",
            f"{one.host_bytes / 1e9:.2f}",
            f"{one.sent_bytes / 1e9:.2f}",
            f"{one.peak_seconds:.3f}",
            f"{one.expected_seconds:.3f}",
        )

    step, total = counted.step, counted.total
    columns = (
        "part",
        "launches",
        "matmul TFLOP",
        "attention TFLOP",
        "GB",
        "of it elementwise",
        "host GB",
        "sent GB",
        "s at peaks",
        "s at shares",
    )
    rows = [cells(name, amount) for name, amount in counted.parts.items()]
    title = (
        f"{step.length} slots, {step.supervised:.0%} supervised, rank 0 of ring {step.ring} x ulysses "
        f"{step.ulysses}, {device.name}"
    )
    print_table(title, columns, [*rows, cells("all", total)])
    planned = ", ".join(
        f"{name} {seconds:.3f}" for name, seconds in counted.planned_seconds.items() if seconds
    )
    print(
        f"{total.peak_seconds:.2f} s at the peaks, {counted.peak_share:.0%} of the matmul peak; "
        f"{total.expected_seconds:.2f} s at the planner's shares, {counted.expected_share:.0%}; "
        f"the planner says {sum(counted.planned_seconds.values()):.2f} s: {planned}\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(arguments)
    device = DEVICES[options.device]
    found = []
    for length in options.length:
        step = Step(SHAPE_8B, length, options.supervised, options.ring, options.ulysses)
        counts = count_step(step)
        counted, of_devices = compare(step, counts, device), rooflines(counts)
        show(counted, device)
        show_rooflines(step, of_devices)
        calls = attention_calls(counts)
        print(f"calls of the attention kernel: {calls}\n")
        of_step = {"attention_calls": calls, "peak_seconds_of_devices": of_devices}
        found.append({**counted.as_dict(), **of_step})
    record = {
        "shape": asdict(SHAPE_8B),
        "dtype": "bfloat16",
        "kernel": "cuda",
        "device": asdict(device),
        "shares": asdict(estimates(device)),
        "steps": found,
    }
    command = " ".join(("python -m benchmarks.device_step", *arguments))
    print(write_result("device_step", command, record, options.folder))
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device_step", description=__doc__)
    parser.add_argument("--length", type=int, nargs="+", default=LENGTHS, metavar="L")
    parser.add_argument(
        "--supervised", type=float, default=1.0, metavar="SHARE", help="of the tokens, in the loss"
    )
    parser.add_argument("--ring", type=int, default=1, metavar="R")
    parser.add_argument("--ulysses", type=int, default=1, metavar="U")
    parser.add_argument("--device", choices=sorted(DEVICES), default="H200", help="whose peaks count")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the JSON goes")
    options = parser.parse_args(arguments)
    if min(*options.length, options.ring, options.ulysses) < 1:
        parser.error(
            f"--length {options.length}, --ring {options.ring} and --ulysses {options.ulysses} must be "
            "positive."
        )
    if not 0 < options.supervised <= 1:
        parser.error(f"--supervised {options.supervised}: give a share above 0 and up to 1.")
    heads = SHAPE_8B.draft.num_kv_heads
    if heads % options.ulysses:
        parser.error(f"--ulysses {options.ulysses} must divide the {heads} key heads. Give 1, 2, 4 or 8.")
    return options


if __name__ == "__main__":
    sys.exit(main())
