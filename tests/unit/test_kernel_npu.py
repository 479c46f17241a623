"""The npu kernel beyond the list that all kernels share: the operator's limits, and where it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest
import torch

from eagle3_ds.config import load_recipe
from eagle3_ds.kernels import KERNELS, FoldedKernel, Tile, select_kernel
from eagle3_ds.kernels import npu as npu_module
from eagle3_ds.kernels.npu import NpuKernel
from eagle3_ds.kernels.selfcheck import TOLERANCE, measured_error
from tests.unit import emulated_npu
from tests.unit import kernel_conformance as conformance
from tests.unit.kernel_conformance import Case

ROOT = Path(__file__).parents[2]
KERNEL = next(kernel for kernel in KERNELS if isinstance(kernel, NpuKernel))


class Ascend(NamedTuple):
    """Stands for torch.device("npu:0"), which only torch_npu can make."""

    type: str = "npu"

    def __str__(self) -> str:
        return "npu:0"


DEVICE = cast(torch.device, Ascend())


@pytest.fixture
def torch_npu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The package, with emulated operators and an Atlas A2."""
    module = ModuleType("torch_npu")
    chip = SimpleNamespace(get_device_name=lambda device: "Ascend910B3")
    vars(module).update(emulated_npu.OPERATORS, npu=chip)
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    return module


def check(case: Case) -> None:
    conformance.check_forward(KERNEL, "cpu", torch.float32, case)
    conformance.check_backward(KERNEL, "cpu", torch.float32, case, with_others=True)


def count_calls(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> list[dict[str, Any]]:
    """The options of each later call of an operator."""
    calls: list[dict[str, Any]] = []
    operator = getattr(module, name)

    def counted(*operands: Any, **options: Any) -> Any:
        calls.append(options)
        return operator(*operands, **options)

    monkeypatch.setattr(module, name, counted)
    return calls


@pytest.mark.usefixtures("torch_npu")
@pytest.mark.parametrize("num_keys", [9, 14])
def test_a_window_of_one_token(num_keys: int) -> None:
    """The operator's gradient refuses the band of a single key."""
    check(Case(9, num_keys, 4, 2, (Tile(0, 9, 0, num_keys, True, 0),)))


@pytest.mark.parametrize("num_heads", [8, 12, 20])
def test_more_heads_than_a_call_takes(
    torch_npu: ModuleType, monkeypatch: pytest.MonkeyPatch, num_heads: int
) -> None:
    """The blocks of DFlash have as many query heads as inputs times heads."""
    monkeypatch.setattr(npu_module, "_MOST_HEADS", 10)
    calls = count_calls(monkeypatch, torch_npu, "npu_fusion_attention")
    check(Case(20, 30, num_heads, 4, (Tile(0, 20, 0, 30, True),)))
    assert len(calls) == {8: 1, 12: 2, 20: 2}[num_heads]
    with pytest.raises(ValueError, match="at most 10 query heads for a key head, and the draft has 11"):
        check(Case(5, 5, 22, 2, (Tile(0, 5, 0, 5, True),)))


def test_no_call_has_more_tiles_than_it_may(torch_npu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    short = [Tile(i, i + 1, i, i + 1, True) for i in range(2500)]
    assert [len(call.tiles) for call in KERNEL.calls(short)] == [1024, 1024, 452]
    monkeypatch.setattr(npu_module, "_MOST_TILES", 3)
    calls = count_calls(monkeypatch, torch_npu, "npu_fusion_attention_grad")
    check(Case(35, 35, 2, 1, tuple(Tile(5 * i, 5 * i + 5, 5 * i, 5 * i + 5, True) for i in range(7))))
    assert [len(options["actual_seq_qlen"]) for options in calls] == [3, 3, 1]


@pytest.mark.usefixtures("torch_npu")
def test_no_call_has_more_tokens_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    long = [Tile(0, 1_300_000, 0, 2_100_000, True), Tile(1_300_000, 1_900_000, 2_100_000, 2_700_000, True)]
    calls = KERNEL.calls(KERNEL.arranged(long))
    for call in calls:
        assert sum(tile.num_queries for tile in call.tiles) <= 10**6
        assert sum(tile.num_keys for tile in call.tiles) <= 10**6
    monkeypatch.setattr(npu_module, "_MOST_TOKENS", 16)
    check(Case(40, 70, 2, 1, (Tile(0, 25, 0, 45, True), Tile(25, 40, 45, 70, True, 9))))


def test_the_masks_are_the_operators(torch_npu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch, torch_npu, "npu_fusion_attention")
    tiles = (
        Tile(0, 4, 0, 9, False),
        Tile(4, 8, 9, 15, True),
        Tile(8, 12, 15, 22, True, 2),
        Tile(12, 16, 22, 30, False, 3),
    )
    check(Case(16, 30, 2, 1, tuple(tiles)))
    modes = [
        tuple(options.get(name) for name in ("sparse_mode", "pre_tockens", "next_tockens"))
        for options in calls
    ]
    assert modes == [(None, None, None), (3, None, None), (4, 2, 0), (4, 3, 8)]
    mask = calls[1]["atten_mask"]
    assert mask.shape == (2048, 2048) and mask[0, 1] and not mask[1, 1] and calls[2]["atten_mask"] is mask


def test_the_emulation_refuses_what_the_operator_refuses(torch_npu: ModuleType) -> None:
    q, k = torch.randn(6, 2, 16), torch.randn(8, 1, 16)
    mask = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    right = {"actual_seq_qlen": [2, 6], "actual_seq_kvlen": [2, 8], "softmax_layout": "TND"}
    causal = {**right, "atten_mask": mask, "sparse_mode": 3}

    def call(**options: Any) -> Any:
        return torch_npu.npu_fusion_attention(q, k, k, 2, "TND", **options)

    call(**causal)
    for wrong in (
        {"actual_seq_qlen": None},
        {"actual_seq_qlen": [2, 5]},
        {"actual_seq_qlen": [0, 2, 6]},
        {"actual_seq_kvlen": torch.tensor([2, 8])},
        {"actual_seq_qlen": [4, 6]},
        {"atten_mask": mask[:6, :8]},
        {"atten_mask": mask.float()},
        {"atten_mask": ~mask},
    ):
        with pytest.raises(AssertionError):
            call(**{**causal, **wrong})
    with pytest.raises(AssertionError):
        torch_npu.npu_fusion_attention(q.double(), k.double(), k.double(), 2, "TND", **right)


def test_the_default_layout_of_the_statistics_is_another(torch_npu: ModuleType) -> None:
    """Which is why the kernel asks for TND: read as [T, N] the default's numbers are those of other rows."""
    q, k = torch.randn(6, 2, 16), torch.randn(8, 1, 16)
    lengths = {"actual_seq_qlen": [2, 6], "actual_seq_kvlen": [2, 8]}
    asked = torch_npu.npu_fusion_attention(q, k, k, 2, "TND", **lengths, softmax_layout="TND")[1]
    default = torch_npu.npu_fusion_attention(q, k, k, 2, "TND", **lengths)[1]
    assert asked.shape == default.shape == (6, 2, 8) and not torch.equal(asked, default)
    assert torch.equal(default.view(-1, 8)[4:].view(2, 4, 8), asked[2:].transpose(0, 1))


@pytest.mark.usefixtures("torch_npu")
def test_auto_takes_it_on_an_npu_and_blockwise_where_it_does_not_run() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert select_kernel("auto", DEVICE, dtype, 128).name == "npu"
    assert select_kernel("auto", DEVICE, torch.bfloat16, 576).name == "blockwise"
    assert select_kernel("auto", torch.device("cpu"), torch.float32, 128).name == "cpu"
    with pytest.raises(ValueError, match="'npu' cannot run .* NPUs, and the device is cpu. Use auto"):
        select_kernel("npu", torch.device("cpu"), torch.float32, 128)


@pytest.mark.parametrize(
    ("chip", "runs"),
    [
        ("Ascend910B2C", True),
        ("Ascend910_9392", True),
        ("Ascend950DT_9591", True),
        ("Ascend910B", False),
        ("Ascend910ProA", False),
        ("Ascend310P3", False),
    ],
)
def test_says_which_chips_it_is_made_for(torch_npu: ModuleType, chip: str, runs: bool) -> None:
    vars(torch_npu)["npu"] = SimpleNamespace(get_device_name=lambda device: chip)
    said = KERNEL.unavailable_reason(DEVICE, torch.bfloat16, 128)
    assert said is None if runs else said is not None and said.endswith(f"npu:0 is {chip}")


@pytest.mark.usefixtures("torch_npu")
def test_says_which_dtypes_and_sizes_it_takes() -> None:
    assert KERNEL.unavailable_reason(DEVICE, torch.bfloat16, 512) is None
    too_wide = KERNEL.unavailable_reason(DEVICE, torch.bfloat16, 520)
    assert too_wide == "head_dim must be at most 512, and is 520"
    wrong_dtype = KERNEL.unavailable_reason(DEVICE, torch.float64, 64)
    assert wrong_dtype is not None and wrong_dtype.endswith("not torch.float64")


@pytest.mark.usefixtures("torch_npu")
def test_says_that_its_fp32_backward_is_not_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert KERNEL.unavailable_reason(DEVICE, torch.bfloat16, 128) is None
    assert "deterministic" in str(KERNEL.unavailable_reason(DEVICE, torch.float32, 128))


@pytest.mark.usefixtures("torch_npu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_passes_the_check_before_training(dtype: torch.dtype) -> None:
    assert measured_error(KERNEL, torch.device("cpu"), dtype, 64) <= TOLERANCE[dtype]
    conformance.check_rows_without_gradient(KERNEL, "cpu", dtype)


@pytest.mark.usefixtures("torch_npu")
def test_folds_the_rows_of_blocks() -> None:
    """DFlash's scattered anchors, many heads of one row each."""
    case = Case(40, 90, 12, 2, (Tile(0, 1, 0, 20, True), Tile(1, 3, 0, 50, True), Tile(3, 40, 0, 90, True)))
    inputs = conformance.make_inputs(case, "cpu", torch.float32)
    out, lse = FoldedKernel(KERNEL).forward(inputs.q, inputs.k, inputs.v, case.tiles, scale=conformance.SCALE)
    wanted_out, wanted_lse, *_ = conformance.expected(inputs, case, with_others=False)
    assert conformance.error(out, wanted_out) < 1e-5 and conformance.error(lse, wanted_lse) < 1e-5


def test_the_recipe_of_the_page_is_a_recipe(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "ascend.md").read_text("utf-8")
    path = tmp_path / "ascend.yaml"
    path.write_text(page.split("```yaml\n")[1].split("```")[0])
    recipe = load_recipe(path)
    assert (recipe.attention.kernel, recipe.parallel.ulysses, recipe.data.max_length) == ("auto", 8, 131072)
    path.write_text(path.read_text().replace("kernel: auto", "kernel: npu"))
    assert load_recipe(path).attention.kernel == "npu"


def test_says_that_torch_npu_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    assert "torch_npu does not import" in str(KERNEL.unavailable_reason(DEVICE, torch.bfloat16, 128))
