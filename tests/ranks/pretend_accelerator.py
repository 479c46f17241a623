"""A kind of accelerator that no vendor sells, `pretend` (pretend_accelerator.cpp), given to torch, DeepSpeed
and the table of kinds; and the trainer's whole step on it, or on a CPU.

`python -m tests.ranks.pretend_accelerator KIND ACTIVATION DEEPSPEED` prints what it came to as JSON; on the
pretended kind also what a judge says of the order of its streams, and of a step that lacks one of its waits.

The module `torch.pretend` and `torch.cuda` know who asks them. The trainer's rooms may not ask either.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d
from torch.utils import cpp_extension

from tests.ranks import stream_order
from tests.ranks.stream_order import KIND, Order

PACKAGE = Path(__file__).parents[2] / "eagle3_ds"
MAY_ASK = (PACKAGE / "device", PACKAGE / "kernels")
STEPS = 3
ROWS_PER_TILE = 13
"""Of 48 rows that stream to the device."""
# torch's stubs know neither what a group in Python returns nor that it may have fewer arguments.
_C10D: Any = _distributed_c10d
_Group: Any = dist.ProcessGroup


class Lost(NamedTuple):
    """A wait, or a tensor's recording, that a function does not ask for.

    Attributes:
        computing: where it does for two streams, whether it is the one that computes.
    """

    method: str
    function: str
    computing: bool | None = None


STREAMED = [
    Lost("wait_event", "stream_rows", computing=True),
    Lost("wait_event", "stream_rows", computing=False),
]
OFFLOADED = [
    Lost(method, function)
    for method in ("wait_stream", "record_stream")
    for function in ("_copy_out", "take")
]


class Watched(ModuleType):
    """A module of torch's that counts what is asked of it by the files of this package, and refuses all but
    two rooms.
    """

    asked: Counter[str] = Counter()

    def __getattribute__(self, name: str) -> Any:
        caller = Path(sys._getframe(1).f_code.co_filename)
        if caller.is_relative_to(PACKAGE) and not name.startswith("_"):
            told = f"{ModuleType.__getattribute__(self, '__name__')}.{name}"
            if not any(caller.is_relative_to(room) for room in MAY_ASK):
                raise AssertionError(f"{caller.relative_to(PACKAGE)} asks for {told}")
            Watched.asked[told] += 1
        return ModuleType.__getattribute__(self, name)


class Alone(_Group):
    """The process group of one rank, for a device that has no library of collectives."""

    @classmethod
    def make(cls, store: Any, rank: int, size: int, timeout: Any) -> Alone:
        assert size == 1, "this backend has one rank"
        return cls(rank, size)

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        return _done(tensors)

    broadcast = reduce = allreduce_coalesced = allreduce

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        for (output,), one in zip(outputs, inputs, strict=True):
            output.copy_(one)
        return _done(outputs)

    def _allgather_base(self, output: Any, one: Any, opts: Any = None) -> Any:
        return _done(output.copy_(one.view_as(output)))

    all_gather_single = _reduce_scatter_base = reduce_scatter_single = _allgather_base

    def barrier(self, opts: Any = None) -> Any:
        return _done(None)

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        return "alone"


def _done(result: Any) -> Any:
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(result)
    return _C10D._create_work_from_future(future)


def install() -> None:
    """Let torch and DeepSpeed find one device of the kind. For a process of its own: there is no way back."""
    device = cpp_extension.load(
        "pretend_accelerator",
        [str(Path(__file__).with_suffix(".cpp"))],
        extra_cflags=["-O0"],  # the compiler takes longer than the step
    )
    torch.utils.rename_privateuse1_backend(KIND)
    torch._register_device_module(KIND, _module(device))
    dist.Backend.register_backend("alone", Alone.make, devices=["cpu", KIND])
    torch.cuda.__class__ = Watched
    stream_order.CURRENT.append(stream_order.Stream(f"{KIND}:0"))
    _tell_deepspeed()

    from eagle3_ds.device import kinds

    kinds.KINDS[KIND] = kinds.Kind("alone")  # type: ignore[index]


def _module(device: Any) -> Watched:
    state = torch.zeros(8, dtype=torch.uint8)
    module = Watched(f"torch.{KIND}")
    module.__dict__.update(
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=_only_the_first,
        synchronize=lambda device=None: stream_order.synchronize(),
        Stream=stream_order.Stream,
        current_stream=lambda device=None: stream_order.CURRENT[-1],
        stream=stream_order.put_on,
        empty_cache=lambda: None,
        memory_allocated=lambda asked=None: device.allocated(),
        max_memory_allocated=lambda asked=None: device.peak(),
        get_rng_state=lambda device=None: state.clone(),
        set_rng_state=lambda new, device=None: state.copy_(new),
        operations=device.operations,
        number=device.number,
        freed=device.freed,
        _is_in_bad_fork=lambda: False,
        manual_seed_all=lambda seed: None,
        get_amp_supported_dtype=lambda: [torch.bfloat16],
    )
    return module


def _only_the_first(device: int | torch.device) -> None:
    assert device in (0, torch.device(KIND, 0)), f"there is no {device} of {KIND}"


def _tell_deepspeed() -> None:
    from deepspeed.accelerator import real_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class Pretended(CPU_Accelerator):
        """DeepSpeed's CPU with tensors elsewhere."""

        def __init__(self) -> None:
            super().__init__()
            self._name, self._communication_backend_name = KIND, "alone"

        def device_name(self, device_index: int | None = None) -> str:
            return KIND if device_index is None else f"{KIND}:{device_index}"

        def device(self, device_index: int | None = None) -> Any:
            return torch.device(KIND, device_index or 0)

        def set_device(self, device_index: int | torch.device) -> None:
            _only_the_first(device_index)

        def current_device(self) -> int:
            return 0

        def current_device_name(self) -> str:
            return f"{KIND}:0"

        def device_count(self) -> int:
            return 1

        def on_accelerator(self, tensor: torch.Tensor) -> bool:
            return tensor.device.type == KIND

    real_accelerator.set_accelerator(Pretended())


def order_of(step: Callable[[], Any], lost: Lost | None = None) -> dict[str, Any]:
    """What the judge of streams finds in a step, which may lack one of its waits."""
    with stream_order.judged(Order()) as order, _without(lost):
        step()
    return {"faults": list(order.faults), "crossed": order.crossed}


@contextmanager
def _without(lost: Lost | None) -> Iterator[None]:
    if lost is None:
        yield
        return
    owner: Any = torch.Tensor if lost.method == "record_stream" else stream_order.Stream
    method = getattr(owner, lost.method)
    dropped = 0

    def unless_lost(self: Any, *args: Any) -> Any:
        nonlocal dropped
        here = sys._getframe(1).f_code.co_name == lost.function
        if here and lost.computing in (None, self is stream_order.CURRENT[0]):
            dropped += 1
            return None
        return method(self, *args)

    with patch.object(owner, lost.method, unless_lost):
        yield
    assert dropped, f"nobody asked for {lost}"


def refused(attempt: Callable[[], Any]) -> str:
    """What is said to an attempt that must fail."""
    try:
        attempt()
    except (AssertionError, RuntimeError) as error:
        return str(error)
    return "nothing"


def ask_as(room: str, source: str) -> None:
    """Run a line as if it stood in a file of a room."""
    exec(compile(source, str(PACKAGE / room / "line.py"), "exec"), {"torch": torch})


def main(arguments: Sequence[str]) -> None:
    kind, activation, deepspeed_config = arguments
    # The third rank of a host to which the scheduler shows one device.
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    os.environ["DS_ACCELERATOR"] = kind
    if kind == KIND:
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed reads it on import, and knows no such kind
        install()
        os.environ["DS_ACCELERATOR"] = kind
    from eagle3_ds.algorithms.eagle3 import Eagle3Shape
    from eagle3_ds.checkpoint.rng import random_states, restore_random_states
    from eagle3_ds.draft import stream
    from eagle3_ds.train.device_memory import SleepingMemory, tensors_of
    from eagle3_ds.train.metrics import peak_memory_bytes
    from judge.product_step import ProductStep
    from judge.step_inputs import HiddenRows, StepShape, make_model, make_pack

    torch.manual_seed(0)
    # A draft as small as this one has its rows in one tile.
    stream.ARRIVING_BYTES = ROWS_PER_TILE * 192 * (4 if deepspeed_config == "zero0" else 2)
    shape = Eagle3Shape(
        64, 96, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=160, draft_vocab_size=128
    )
    model = make_model(StepShape(shape, ttt_steps=3))
    dtype = "float32" if deepspeed_config == "zero0" else "bfloat16"
    side = ProductStep(model, dtype, activation, "reference", deepspeed_config)
    trainer, device = side.trainer, side.device
    pack = make_pack(model, 48, HiddenRows(torch.randn(48, 192), torch.randn(48, 64)))

    def step() -> dict[str, Any]:
        return trainer.step([pack], learning_rate=1e-3).as_dict()

    gradients = {name: gradient.tolist() for name, gradient in side.gradients(pack).items()}
    reports = [step() for _ in range(STEPS - 1)]
    states = random_states(device)
    restore_random_states(states, device)
    asleep = SleepingMemory(tensors_of(trainer.engine), device)
    slept = asleep.num_bytes
    asleep.wake()
    reports.append(step())
    weights = list(trainer.engine.module.parameters())
    found = {
        "device": str(device),
        "weights_on": sorted({str(weight.device) for weight in weights}),
        "weights": [weight.detach().double().cpu().norm().item() for weight in weights],
        "gradients": gradients,
        "reports": reports,
        "peak": peak_memory_bytes(device)[0],
        "slept": slept,
        "states": sorted(states),
        "local_rank": os.environ["LOCAL_RANK"],
        "asked": dict(Watched.asked),
    }
    if kind == KIND:
        found["order"] = order_of(step)
        lost = [*STREAMED, *(OFFLOADED if activation == "offload" else [])]
        found["lost"] = {str(tuple(each)): order_of(step, each)["faults"] for each in lost}
        found["operations"] = getattr(torch, KIND).operations()
        found["refused"] = [
            refused(lambda: ask_as("train", "torch.cuda.is_available()")),
            refused(lambda: ask_as("draft", f"torch.{KIND}.current_stream()")),
            refused(lambda: torch.ones(2, 2, device=device) @ torch.ones(2, 2)),
        ]
        ask_as("device", "torch.cuda.is_available()")
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    # torch's thread of the device is not ended by the interpreter's shutdown.
    os._exit(0)
