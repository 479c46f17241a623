"""The kernels for GPUs and NPUs without one: real operator schemas and package signatures, with an emulation
behind them.

Their calls are checked against what the operators and packages document (docs/kernels.md, docs/ascend.md);
the arithmetic is checked where a GPU is, by tests/gpu, and that of NPUs nowhere yet.
"""

from __future__ import annotations

import inspect
import re
import sys
import types
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import eagle3_ds.kernels.cudnn as cudnn_module
from eagle3_ds.kernels import KERNELS, AttentionKernel, Tile, select_kernel
from eagle3_ds.kernels.base import TileKernel
from tests.unit import emulated_npu, emulated_nvidia
from tests.unit import kernel_conformance as conformance
from tests.unit.kernel_conformance import Case, each_case

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
TAKEN_CASES = (
    "causal rectangle",
    "one row",
    "chunks of documents",
    "rows in several tiles",
    "window over documents",
)
"""With every kind of call among them: one and several sequences, full, causal, windows, single rows."""

NAMES = ("cuda", "cudnn", "npu", "flash_attn2", "flash_attn3", "flash_attn4")


def kernel_called(name: str) -> AttentionKernel:
    return next(kernel for kernel in KERNELS if kernel.name == name).for_short_tiles()


def module_with(name: str, **functions: object) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(functions)
    return module


class Recorder:
    """Passes calls on to emulated operators and keeps them: operator and its arguments by name."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., Any], dict[str, Any]]] = []

    def __call__(self, operator: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(operator)

        def recorded(*arguments: Any, **options: Any) -> Any:
            bound = signature.bind(*arguments, **options)
            named = {**bound.arguments, **bound.arguments.get("others", {})}
            named.pop("others", None)
            self.calls.append((operator, named))
            return operator(*arguments, **options)

        return recorded

    def first(self, operator: Callable[..., Any]) -> dict[str, Any]:
        return next(arguments for called, arguments in self.calls if called is operator)


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Every operator and package behind these kernels, on the CPU, with what they are documented to take."""
    recorder = Recorder()
    forward, backward = (
        {name: recorder(pair[i]) for name, pair in emulated_nvidia.OPERATORS.items()} for i in (0, 1)
    )
    aten = torch.library.Library("aten", "IMPL")
    fa3 = torch.library.Library("flash_attn_3", "FRAGMENT")
    try:
        aten.impl("_flash_attention_forward", forward["cuda"], "CPU")
        aten.impl("_flash_attention_backward", backward["cuda"], "CPU")
        aten.impl("_scaled_dot_product_cudnn_attention", forward["cudnn"], "CPU")
        aten.impl("_scaled_dot_product_cudnn_attention_backward", backward["cudnn"], "CPU")
        fa3.define(emulated_nvidia.FA3_FORWARD)
        fa3.define(emulated_nvidia.FA3_BACKWARD)
        fa3.impl("fwd", emulated_nvidia.by_name("fwd", forward["flash_attn3"]), "CPU")
        fa3.impl("bwd", emulated_nvidia.by_name("bwd", backward["flash_attn3"]), "CPU")
        modules: dict[str, dict[str, Any]] = {
            "flash_attn.flash_attn_interface": {
                "_flash_attn_varlen_forward": forward["flash_attn2"],
                "_flash_attn_varlen_backward": backward["flash_attn2"],
            },
            "flash_attn_3._C": {},
            "flash_attn.cute.interface": {
                "_flash_attn_fwd": forward["flash_attn4"],
                "_flash_attn_bwd": backward["flash_attn4"],
            },
            "torch_npu": emulated_npu.OPERATORS,
        }
        for name, functions in modules.items():
            monkeypatch.setitem(sys.modules, name, module_with(name, **functions))
        monkeypatch.setattr(cudnn_module, "LEAST_IN_CHECKS", 8)
        yield recorder
    finally:
        aten._destroy()
        fa3._destroy()
        cudnn_module._statistics_dim.cache_clear()


@pytest.fixture
def emulated(operators: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators that take fp32 as well, so that masks and formulas are held to 1e-5."""
    monkeypatch.setattr(emulated_nvidia, "dtypes", (*emulated_nvidia.HALF_DTYPES, torch.float32))


@each_case
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("emulated")
def test_calls_are_right(name: str, case: Case) -> None:
    conformance.check_forward(kernel_called(name), "cpu", torch.float32, case)
    conformance.check_backward(kernel_called(name), "cpu", torch.float32, case, with_others=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("emulated")
def test_operands_may_be_strided_and_gradients_zero(name: str) -> None:
    conformance.check_strided_operands(kernel_called(name), "cpu", torch.float32)
    conformance.check_rows_without_gradient(kernel_called(name), "cpu", torch.float32)


@pytest.mark.parametrize("dim", [3, 4])
@pytest.mark.usefixtures("emulated")
def test_cudnn_follows_the_shape_of_the_statistics(monkeypatch: pytest.MonkeyPatch, dim: int) -> None:
    monkeypatch.setattr(emulated_nvidia, "statistics_dim", dim)
    q = torch.zeros(12, 2, 16)
    lse = torch.arange(24.0).view(12, 2)
    assert torch.equal(cudnn_module._statistics(lse, q), lse.T[None, ..., None] if dim == 4 else lse.T[None])
    case = conformance.CASES["causal square"]
    conformance.check_forward(kernel_called("cudnn"), "cpu", torch.float32, case)
    conformance.check_backward(kernel_called("cudnn"), "cpu", torch.float32, case, with_others=True)


NVIDIA = tuple(emulated_nvidia.OPERATORS)
VARLEN = tuple(name for name in NVIDIA if name != "cudnn")


def arguments_of(operator: Any) -> list[str]:
    return [argument.name for argument in operator._schema.arguments]


@pytest.mark.usefixtures("operators")
def test_the_page_lists_the_arguments_in_their_order() -> None:
    """Each operator's in the installed torch; those of packages as the emulations have them."""
    text = PAGE.read_text("utf-8")
    listed = {
        name: [part.strip() for part in arguments.replace("*,", "").split(",")]
        for block in re.findall(r"```signatures\n(.*?)```", text, flags=re.DOTALL)
        for name, arguments in re.findall(r"^(\w+)\((.*?)\)$", block, flags=re.DOTALL | re.MULTILINE)
    }
    aten, fa3 = torch.ops.aten, torch.ops.flash_attn_3
    for name in ("_flash_attention_backward", "_scaled_dot_product_cudnn_attention"):
        assert listed[name] == arguments_of(getattr(aten, name).default)
    backward = aten._scaled_dot_product_cudnn_attention_backward.default
    assert listed["_scaled_dot_product_cudnn_attention_backward"] == arguments_of(backward)
    forward = arguments_of(aten._flash_attention_forward.default)
    # torch 2.13 has two more at the end.
    assert listed["_flash_attention_forward"] == forward[:15]
    assert set(forward[15:]) <= {"block_table", "num_splits"}
    assert listed["fwd"] == arguments_of(fa3.fwd.default)
    assert listed["bwd"] == arguments_of(fa3.bwd.default)
    for name, operator in (
        ("_flash_attn_varlen_forward", emulated_nvidia.fa2_forward),
        ("_flash_attn_varlen_backward", emulated_nvidia.fa2_backward),
        ("_flash_attn_fwd", emulated_nvidia.fa4_forward),
        ("_flash_attn_bwd", emulated_nvidia.fa4_backward),
    ):
        given = [argument for argument in inspect.signature(operator).parameters if argument in listed[name]]
        assert given == [argument for argument in listed[name] if argument in given]
        assert given == list(inspect.signature(operator).parameters)


@pytest.mark.parametrize("dtype", emulated_nvidia.HALF_DTYPES, ids=str)
@pytest.mark.parametrize("case", TAKEN_CASES)
@pytest.mark.parametrize("name", NVIDIA)
@pytest.mark.usefixtures("operators")
def test_every_call_is_one_that_the_operators_take(name: str, case: str, dtype: torch.dtype) -> None:
    conformance.check_forward(kernel_called(name), "cpu", dtype, conformance.CASES[case])
    conformance.check_backward(kernel_called(name), "cpu", dtype, conformance.CASES[case], with_others=True)


@pytest.mark.parametrize("name", NVIDIA)
@pytest.mark.usefixtures("operators")
def test_strided_operands_are_ones_that_the_operators_take(name: str) -> None:
    conformance.check_strided_operands(kernel_called(name), "cpu", torch.bfloat16)


def run_both(name: str, operators: Recorder, case: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first call of the forward and of the backward that a kernel makes for a case, which were taken."""
    conformance.check_forward(kernel_called(name), "cpu", torch.bfloat16, conformance.CASES[case])
    conformance.check_backward(
        kernel_called(name), "cpu", torch.bfloat16, conformance.CASES[case], with_others=True
    )
    forward, backward = (operators.first(operator) for operator in emulated_nvidia.OPERATORS[name])
    return forward, backward


def named(call: dict[str, Any], *names: str) -> str:
    """Which of these names an operator gives to an argument."""
    return next(name for name in names if name in call)


def refused(operator: Callable[..., Any], call: dict[str, Any], rule: str, **changed: Any) -> None:
    """The operator takes the call, and refuses it with some arguments changed, by the rule."""
    operator(**call)
    with pytest.raises(AssertionError, match=rule):
        operator(**{**call, **changed})


def spread(x: Tensor) -> Tensor:
    """The same values with a stride in the last dimension."""
    return torch.stack((x, x), dim=-1)[..., 0]


@pytest.mark.parametrize("name", NVIDIA)
def test_wrong_operands_are_refused(name: str, operators: Recorder) -> None:
    for operator, call in zip(
        emulated_nvidia.OPERATORS[name], run_both(name, operators, "causal square"), strict=True
    ):
        q, k, v = (named(call, short, long) for short, long in (("q", "query"), ("k", "key"), ("v", "value")))
        operands = {key: call[key] for key in (q, k, v)}
        heads = call[q].dim() - 2 if name != "cudnn" else 1
        refused(operator, call, "dtype", **{key: x.float() for key, x in operands.items()})
        refused(operator, call, "dtype", **{v: call[v].half()})
        refused(operator, call, "last dimension", **{k: spread(call[k])})
        refused(operator, call, "head size 12", **{key: x[..., :12] for key, x in operands.items()})
        wide = {key: torch.cat([x] * 17, dim=-1) for key, x in operands.items()}
        refused(operator, call, "head size 272", **wide)
        three = {key: call[key].narrow(heads, 0, 3) for key in (k, v)}
        refused(operator, call, "heads", **three)


@pytest.mark.parametrize("name", NVIDIA)
def test_a_wrong_output_or_log_sum_exp_is_refused(name: str, operators: Recorder) -> None:
    operator = emulated_nvidia.OPERATORS[name][1]
    _, call = run_both(name, operators, "causal square")
    lse, dout = named(call, "lse", "softmax_lse", "logsumexp"), named(call, "dout", "grad_out")
    right = call[lse]
    refused(operator, call, "log-sum-exp of torch.float64", **{lse: right.double()})
    refused(operator, call, "log-sum-exp of torch.bfloat16", **{lse: right.bfloat16()})
    refused(operator, call, "log-sum-exp of shape", **{lse: right.transpose(-1, -2).contiguous()})
    refused(operator, call, "log-sum-exp of shape", **{lse: right[None]})
    refused(operator, call, "log-sum-exp with strides", **{lse: spread(right)})
    refused(operator, call, "dtype", out=call["out"].float())
    refused(operator, call, "dtype", **{dout: call[dout].half()})
    refused(operator, call, "last dimension of dout", **{dout: spread(call[dout])})
    refused(operator, call, "shape", out=call["out"][..., :8])


@pytest.mark.parametrize("name", VARLEN)
def test_wrong_lengths_are_refused(name: str, operators: Recorder) -> None:
    operator = emulated_nvidia.OPERATORS[name][0]
    call, _ = run_both(name, operators, "documents")
    cu_q, cu_k = named(call, "cu_seqlens_q", "cum_seq_q"), named(call, "cu_seqlens_k", "cum_seq_k")
    max_q, max_k = named(call, "max_seqlen_q", "max_q"), named(call, "max_seqlen_k", "max_k")
    assert call[cu_q].tolist() == call[cu_k].tolist() == [0, 21, 22, 60] and call[max_q] == 38

    def lengths(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    refused(operator, call, "cumulated lengths of torch.int64", **{cu_q: call[cu_q].long()})
    refused(operator, call, "cumulated lengths", **{cu_k: spread(call[cu_k])})
    refused(operator, call, "do not cover", **{cu_k: lengths(0, 21, 22, 59)})
    refused(operator, call, "do not cover", **{cu_q: lengths(1, 21, 22, 60)})
    refused(operator, call, "not as many", **{cu_k: lengths(0, 22, 60)})
    refused(operator, call, "an empty sequence", **{cu_q: lengths(0, 22, 22, 60)})
    refused(operator, call, "longest sequence: 37", **{max_q: 37})
    refused(operator, call, "longest sequence: 39", **{max_k: 39})
    refused(operator, call, "empty row", **{cu_k: lengths(0, 20, 22, 60)})


@pytest.mark.parametrize("name", ["flash_attn2", "flash_attn3"])
def test_wrong_places_for_gradients_are_refused(name: str, operators: Recorder) -> None:
    operator = emulated_nvidia.OPERATORS[name][1]
    _, call = run_both(name, operators, "causal square")
    refused(operator, call, "dtype", dq=call["dq"].float())
    refused(operator, call, "shape", dk=call["dk"][1:])
    refused(operator, call, "last dimension of a gradient", dv=spread(call["dv"]))


def test_what_else_cudnn_refuses(operators: Recorder) -> None:
    forward, backward = emulated_nvidia.OPERATORS["cudnn"]
    of_forward, of_backward = run_both("cudnn", operators, "causal square")
    one_key = {name: of_forward[name][:, :, :1] for name in ("key", "value")}
    refused(forward, of_forward, "a single key", **one_key, is_causal=False)
    refused(forward, of_forward, "strides", query=of_forward["query"].contiguous())
    refused(backward, of_backward, "strides", grad_out=of_backward["grad_out"].contiguous())
    refused(backward, of_backward, "longest sequence", max_q=7)


def test_what_else_flash_attn_refuses(operators: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    _, call = run_both("flash_attn3", operators, "causal square")
    backward = emulated_nvidia.OPERATORS["flash_attn3"][1]
    refused(backward, call, "must be provided", max_seqlen_k=None)
    wide = {
        name: torch.cat([call[name]] * 16, dim=-1)
        for name in ("dout", "q", "k", "v", "out", "dq", "dk", "dv")
    }
    backward(**{**call, **wide})
    with monkeypatch.context() as patch:
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        refused(backward, {**call, "deterministic": True}, "is not deterministic", **wide)
    forward, alone = run_both("flash_attn4", operators, "documents")
    several = {name: forward[name] for name in ("cu_seqlens_q", "cu_seqlens_k")}
    refused(emulated_nvidia.OPERATORS["flash_attn4"][1], alone, "several sequences", **several)


@pytest.mark.parametrize("name", NAMES)
def test_a_pack_of_documents_is_one_call(name: str) -> None:
    kernel = kernel_called(name)
    assert isinstance(kernel, TileKernel)
    documents = [Tile(10 * i, 10 * i + 10, 10 * i, 10 * i + 10, True, 4) for i in range(50)]
    (call,) = kernel.calls(documents)
    assert call.rows.ranges == call.keys.ranges == (slice(0, 500),)
    # Two chunks of one document share keys, and so do not fit into one call.
    chunks = [Tile(0, 10, 0, 10, True), Tile(10, 20, 0, 20, True), Tile(20, 30, 20, 30, True)]
    assert [len(call.tiles) for call in kernel.calls(chunks)] == [2, 1]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that says it has a Hopper GPU and none of the packages."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    return monkeypatch


def install(monkeypatch: pytest.MonkeyPatch, package: str, version: str, module: str | None) -> None:
    """Make one package look installed; without a module, it does not import."""

    def installed(name: str) -> str:
        if name != package:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", installed)
    if module is not None:
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))


PACKAGES = {
    "flash_attn2": ("flash-attn", "2.8.3", "flash_attn.flash_attn_interface", (8, 0)),
    "flash_attn3": ("flash-attn-3", "3.0.0", "flash_attn_3._C", (9, 0)),
    "flash_attn4": ("flash-attn-4", "4.0.0b36", "flash_attn.cute.interface", (10, 0)),
}


def why_not(name: str, dtype: torch.dtype, head_dim: int) -> str:
    """What a kernel says that cannot run."""
    reason = kernel_called(name).unavailable_reason(torch.device("cuda"), dtype, head_dim)
    assert reason is not None
    return reason


@pytest.mark.parametrize("name", PACKAGES)
def test_package_kernels_need_their_package(gpu: pytest.MonkeyPatch, name: str) -> None:
    package, version, module, capability = PACKAGES[name]
    gpu.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    device, kernel = torch.device("cuda"), kernel_called(name)
    assert why_not(name, torch.bfloat16, 128).endswith("is not installed")
    install(gpu, package, "1.9", None)
    assert why_not(name, torch.bfloat16, 128).endswith("and 1.9 is installed")
    install(gpu, package, version, None)
    assert f"{module} does not import" in why_not(name, torch.bfloat16, 128)
    install(gpu, package, version, module)
    assert kernel.unavailable_reason(device, torch.bfloat16, 128) is None
    assert select_kernel("auto", device, torch.bfloat16, 128) is kernel
    with pytest.raises(
        ValueError, match=f"'{name}' cannot run with torch.float32 .* torch.bfloat16 or torch.float16"
    ):
        select_kernel(name, device, torch.float32, 128)


def test_auto_takes_what_torch_brings_without_a_package(gpu: pytest.MonkeyPatch) -> None:
    assert select_kernel("auto", torch.device("cuda"), torch.bfloat16, 128).name == "cudnn"
    assert select_kernel("auto", torch.device("cuda"), torch.bfloat16, 192).name == "cuda"
    with gpu.context() as older:
        older.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
        assert select_kernel("auto", torch.device("cuda"), torch.bfloat16, 128).name == "cuda"
    assert select_kernel("auto", torch.device("cuda"), torch.float32, 128).name == "blockwise"


@pytest.mark.parametrize(
    ("name", "capability", "dtype", "head_dim", "reason"),
    [
        ("cuda", (8, 0), torch.bfloat16, 128, None),
        ("cuda", (9, 0), torch.float16, 256, None),
        ("cuda", (9, 0), torch.float32, 128, "not torch.float32"),
        ("cuda", (9, 0), torch.bfloat16, 100, "multiple of 8"),
        ("cuda", (9, 0), torch.bfloat16, 264, "at most 256"),
        ("cuda", (7, 5), torch.bfloat16, 64, "7.5"),
        ("cuda", (8, 9), torch.bfloat16, 224, "no backward"),
        ("cudnn", (9, 0), torch.bfloat16, 128, None),
        ("cudnn", (9, 0), torch.bfloat16, 192, "at most 128"),
        ("flash_attn3", (10, 0), torch.bfloat16, 128, "Hopper"),
        ("flash_attn4", (8, 0), torch.bfloat16, 128, "9.0"),
        ("flash_attn4", (9, 0), torch.bfloat16, 192, "at most 128"),
    ],
)
def test_says_where_it_runs(
    gpu: pytest.MonkeyPatch,
    name: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    reason: str | None,
) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    said = kernel_called(name).unavailable_reason(torch.device("cuda"), dtype, head_dim)
    assert said is None if reason is None else said is not None and reason in said


def test_cudnn_says_which_version_it_needs(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.backends.cudnn, "version", lambda: 90100)
    assert "9.5.1" in why_not("cudnn", torch.bfloat16, 128)


@pytest.mark.parametrize(
    ("name", "head_dim", "capability"),
    [("cudnn", 128, (9, 0)), ("flash_attn3", 256, (9, 0)), ("flash_attn4", 128, (12, 0))],
)
def test_says_that_it_is_not_deterministic(
    gpu: pytest.MonkeyPatch, name: str, head_dim: int, capability: tuple[int, int]
) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    gpu.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert "deterministic" in why_not(name, torch.bfloat16, head_dim)
