"""A rank of the product with a fault put into it: `judge.faults.rank` in place of `eagle3_ds.train.main`.

What goes wrong, where and when stands in `fault.json` beside the recipe, which all hosts see; it is renamed
when the fault happens, so that the run that goes on is whole.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from eagle3_ds.guard import identity
from eagle3_ds.guard.heart import Heart
from eagle3_ds.train import main

FOR_EVER = 10**6
STEP_SECONDS = 10.0
# A file of the output folder, renamed when the fault happens: its time of change is that moment.
COMING, HAPPENED = "fault.json", "fault.done"


@dataclass(frozen=True)
class Fault:
    """What goes wrong.

    Attributes:
        deed: one of DEEDS or AT_START.
        rank: who does it.
        step: before which optimizer step, counted from 1.
        phase: what the rank is doing then.
    """

    deed: str
    rank: int = 0
    step: int = 1
    phase: str = "training"

    def put_into(self, output_dir: Path) -> None:
        """Where the ranks of the next run in this folder look for it."""
        (output_dir / HAPPENED).unlink(missing_ok=True)
        (output_dir / COMING).write_text(json.dumps(asdict(self)))


@dataclass
class Parts:
    """What a fault can take hold of."""

    trainer: Any = None
    loader: Any = None


def raise_an_error(parts: Parts) -> None:
    raise RuntimeError("a fault was injected")


def raise_in_backward(parts: Parts) -> None:
    next(parts.trainer.engine.module.parameters()).register_hook(lambda _: raise_an_error(parts))


def hang(parts: Parts) -> None:
    time.sleep(FOR_EVER)


def hold_the_lock(parts: Parts) -> None:
    """In C, with Python's lock held: no other thread of the rank runs. A signal ends `sleep`, not this."""
    while True:
        ctypes.PyDLL(None).sleep(FOR_EVER)


def run_out_of_host_memory(parts: Parts) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**24, resource.RLIM_INFINITY))
    torch.empty(2**28)


def run_out_of_device_memory(parts: Parts) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB (injected)")


def slow_down(parts: Parts) -> None:
    step = parts.trainer.step

    def slowly(*args: Any) -> Any:
        time.sleep(1.0)
        return step(*args)

    parts.trainer.step = slowly


def spoil_a_step(parts: Parts) -> None:
    _spoil(parts, times=1)


def spoil_every_step(parts: Parts) -> None:
    _spoil(parts, times=FOR_EVER)


def _spoil(parts: Parts, times: int) -> None:
    """The hidden states of the next packs are NaN, as after a bad capture."""
    step = parts.loader.step
    left = [times]

    def spoiled(index: int) -> Any:
        packs = step(index)
        if left[0] == 0:
            return packs
        left[0] -= 1
        return [
            replace(pack, aux=torch.full_like(pack.aux[: len(pack.token_ids)], math.nan)) for pack in packs
        ]

    parts.loader.step = spoiled


def spoil_a_gradient(parts: Parts) -> None:
    left = [1]

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        left[0] -= 1
        return gradient * math.inf if left[0] >= 0 else gradient

    next(parts.trainer.engine.module.parameters()).register_hook(spoil)


def flip_a_bit(parts: Parts) -> None:
    parameter = list(parts.trainer.engine.module.parameters())[-1]
    held = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
    words = held.detach().view(-1)[:1].view(torch.int32)
    words ^= 1 << 20


def flip_a_bit_of_the_target(parts: Parts) -> None:
    words = parts.trainer.frozen_tensors()[0].view(-1)[:1].view(torch.int32)
    words ^= 1 << 20


def draw_a_number(parts: Parts) -> None:
    torch.rand(1)


def lose_the_place(parts: Parts) -> None:
    """From the next step on: in this one, packs of another length would break a collective, and the run with
    it.
    """
    pack_indices, step = parts.loader.pack_indices, parts.loader.step

    def step_and_lose(index: int) -> Any:
        packs = step(index)
        parts.loader.pack_indices = lambda at: pack_indices(at + 1)
        return packs

    parts.loader.step = step_and_lose


def send(number: signal.Signals) -> Callable[[Parts], None]:
    return lambda parts: os.kill(os.getpid(), number)


def kill_the_supervisor(parts: Parts) -> None:
    os.kill(os.getppid(), signal.SIGKILL)


def kill_the_launcher(parts: Parts) -> None:
    """The launcher of this host, the parent of the supervisors.

    This step takes its time, as at 128k tokens: ranks train on until they are found to have lost their
    launcher, and a tiny run would come to its end meanwhile.
    """
    status = Path(f"/proc/{os.getppid()}/status").read_text().splitlines()
    (parent,) = (int(line.split()[1]) for line in status if line.startswith("PPid:"))
    os.kill(parent, signal.SIGKILL)
    time.sleep(STEP_SECONDS)


def kill_all_ranks(parts: Parts) -> None:
    """Of this run and host, this one last."""
    own = Path("/proc/self/cmdline").read_bytes().split(b"\0")
    (recipe,) = (argument for argument in own if argument.startswith(b"--recipe="))
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if (
            recipe in command
            and b"judge.faults.rank" in command
            and b"eagle3_ds.launch.supervisor" not in command
        ):
            pid = int(path.parent.name)
            if pid != os.getpid():
                os.kill(pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def fill_the_disk(parts: Parts) -> None:
    """With a file in the output folder, up to its last byte."""
    block = bytes(2**20)
    with (Path(parts.trainer.recipe.output_dir) / "filler").open("wb", buffering=0) as file:
        while block:
            try:
                file.write(block)
            except OSError:
                block = block[: len(block) // 2]


DEEDS: dict[str, Callable[[Parts], None]] = {
    "raise": raise_an_error,
    "raise in backward": raise_in_backward,
    "exit": lambda parts: os._exit(7),
    "SIGKILL": send(signal.SIGKILL),
    "SIGSEGV": send(signal.SIGSEGV),
    "SIGABRT": send(signal.SIGABRT),
    "SIGSTOP": send(signal.SIGSTOP),
    "hang": hang,
    "hold the lock": hold_the_lock,
    "host memory": run_out_of_host_memory,
    "device memory": run_out_of_device_memory,
    "kill the supervisor": kill_the_supervisor,
    "kill the launcher": kill_the_launcher,
    "kill all ranks": kill_all_ranks,
    "fill the disk": fill_the_disk,
    "nothing": lambda parts: None,
    "slow down": slow_down,
    "spoil a step": spoil_a_step,
    "spoil every step": spoil_every_step,
    "spoil a gradient": spoil_a_gradient,
    "flip a bit": flip_a_bit,
    "flip a bit of the target": flip_a_bit_of_the_target,
    "draw a number": draw_a_number,
    "lose the place": lose_the_place,
}
AT_START = {
    "other package": "torch",
    "other code": "code of eagle3_ds",
    "other data": "data",
    "other recipe": "recipe",
}


def put_in(fault: Fault, path: Path) -> None:
    """Put a fault into this process, which is the rank that shall have it."""
    parts = Parts()
    if fault.deed in AT_START:
        path.rename(path.with_name(HAPPENED))
        own = identity.own_identity
        mock.patch.object(
            identity, "own_identity", lambda recipe: {**own(recipe), AT_START[fault.deed]: "another"}
        ).start()
        return
    build_trainer, build_loaders, at = main.build_trainer, main.build_loaders, Heart.at

    def keep_trainer(*args: Any) -> Any:
        parts.trainer = build_trainer(*args)
        return parts.trainer

    def keep_loader(*args: Any) -> Any:
        parts.loader, heldout = build_loaders(*args)
        return parts.loader, heldout

    def at_with_fault(self: Heart, phase: str, step: int) -> None:
        at(self, phase, step)
        if (phase, step) == (fault.phase, fault.step - 1) and path.is_file():
            path.rename(path.with_name(HAPPENED))
            print(f"injecting: {fault}", flush=True)
            DEEDS[fault.deed](parts)

    mock.patch.object(main, "build_trainer", keep_trainer).start()
    mock.patch.object(main, "build_loaders", keep_loader).start()
    mock.patch.object(Heart, "at", at_with_fault).start()


if __name__ == "__main__":
    (recipe,) = (argument.partition("=")[2] for argument in sys.argv if argument.startswith("--recipe="))
    path = Path(recipe).with_name(COMING)
    if path.is_file():
        fault = Fault(**json.loads(path.read_text()))
        if fault.rank == int(os.environ["RANK"]):
            put_in(fault, path)
    main.main()
