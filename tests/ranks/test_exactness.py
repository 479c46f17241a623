"""The short exactness matrix, and the proof that its comparison can reject."""

import os
from unittest import mock

import pytest
import torch.distributed as dist

from eagle3_ds.kernels import base, selfcheck
from eagle3_ds.kernels.cpu import CpuKernel
from eagle3_ds.kernels.cudnn import CudnnKernel
from judge.cases import Case, make_inputs, short_matrix
from judge.exactness import COMPARED, judge, main, relative_error, run_case
from judge.mutations import MUTATIONS, OF_DFLASH, OF_PEAGLE
from judge.product import run_product
from judge.ranks import run_ranks

pytestmark = pytest.mark.ranks
TWO_RANKS = Case(ulysses=2)


NO_ANCHOR = Case(
    draft_dp=2,
    ulysses=2,
    documents="unsupervised_rank",
    ttt_steps=1,
    alignment="predicted",
    algorithm="dflash",
)
"""Two tokens of an answer are too few for an anchor: whole packs have none."""


@pytest.mark.parametrize("case", [*short_matrix(), NO_ANCHOR], ids=str)
def test_the_product_equals_the_dense_reference(case):
    verdict = judge(case)
    assert verdict.passed, verdict.failure or verdict.line()


def test_the_case_that_is_mutated_passes_unharmed():
    verdict = judge(TWO_RANKS)
    assert verdict.passed, verdict.failure or verdict.line()
    assert tuple(verdict.errors) == COMPARED


DFLASH = Case(ring=2, algorithm="dflash", block="causal", layers=2)
ANSWERS = Case(ring=2, documents="answers")
SHOWN_BY = {
    "lost_prompts": ANSWERS,
    "lost_blocks": Case(ring=2, kv_exchange="ring_kept"),
    "fixed_window": Case(ulysses=2, window=24),
    "unnormalised_overlap": Case(ulysses=2, loss="lk_lambda"),
    "lost_output_norm": Case(ulysses=2, norms="eagle3.1"),
    "whole_rotary": Case(ulysses=2, rope="partial"),
    "targets_theta": Case(ring=2, rope="partial"),
    "scale_of_width": Case(ulysses=2, shape="head_dim"),
    "lost_width": Case(ulysses=2, shape="mlp"),
    "narrow_teacher": Case(ulysses=2, shape="narrow"),
    **{mutation: Case(ulysses=2, algorithm="peagle") for mutation in OF_PEAGLE},
    **dict.fromkeys(OF_DFLASH, DFLASH),
}
MUTATED = [(mutation, SHOWN_BY.get(mutation, TWO_RANKS)) for mutation in MUTATIONS]
# A cut with slots that are not live has halos, documents and a scale of its own.
MUTATED += [(mutation, ANSWERS) for mutation in ("scale_by_sp", "dropped_halo", "leaking_document")]
MUTATED += [(mutation, DFLASH) for mutation in ("scale_by_sp", "dropped_halo", "leaking_document")]


@pytest.mark.parametrize(("mutation", "case"), MUTATED)
def test_a_mutation_is_rejected_for_its_numbers(mutation, case):
    verdict = judge(case, mutation=mutation)
    assert verdict.failure is None, verdict.failure
    assert not verdict.passed, verdict.line()
    assert verdict.errors["gradients"] > 1000 * TWO_RANKS.tolerance


def run_in_pieces(case, seed, mutation, lost=0):
    """On a rank: `run_case`, whose tiles are cut as the cudnn kernel cuts them, in small, without the last
    `lost` pieces. The CPU's kernel computes them, and is not checked before: it would be passed over.
    """
    cudnn, cut = CudnnKernel(least=2), 0

    def arranged(_kernel, tiles):
        nonlocal cut
        pieces = cudnn.arranged(tiles)
        cut += len(pieces) - len(tiles)
        return pieces[: len(pieces) - lost]

    base._planned.cache_clear()
    try:
        with (
            mock.patch.object(CpuKernel, "arranged", arranged),
            mock.patch.object(selfcheck, "_fault", return_value=None),
        ):
            result = run_case(case, seed, mutation)
    finally:
        base._planned.cache_clear()
    assert cut, "no tile was long enough to be cut"
    return result


def run_without_a_piece(case, seed, mutation):
    return run_in_pieces(case, seed, mutation, lost=1)


@pytest.mark.parametrize("case", [TWO_RANKS, ANSWERS, Case(ring=2, kv_exchange="ring_kept")], ids=str)
def test_the_pieces_of_the_cudnn_kernel_equal_the_dense_reference(case, monkeypatch):
    monkeypatch.setattr("judge.exactness.run_case", run_in_pieces)
    verdict = judge(case)
    assert verdict.passed, verdict.failure or verdict.line()
    monkeypatch.setattr("judge.exactness.run_case", run_without_a_piece)
    verdict = judge(case)
    assert verdict.failure is None, verdict.failure
    assert verdict.errors["gradients"] > 1000 * TWO_RANKS.tolerance


def has_left_shared_memory():
    """On a rank: whether DeepSpeed has made a buffer in /dev/shm for a training step. It never frees one."""
    before = set(os.listdir("/dev/shm"))
    # DeepSpeed's launcher says it so, and then the buffer would be made.
    os.environ["LOCAL_SIZE"] = str(dist.get_world_size())
    run_product(TWO_RANKS, make_inputs(TWO_RANKS))
    return any("deepspeed" in name for name in set(os.listdir("/dev/shm")) - before)


def test_no_shared_memory_outlives_the_ranks():
    assert run_ranks(2, has_left_shared_memory) == [False, False]


def test_an_unknown_mutation_is_a_failure_that_names_the_known_ones():
    verdict = judge(TWO_RANKS, mutation="nothing")
    assert not verdict.passed
    assert "mutation = 'nothing' is unknown. Use one of scale_by_sp" in str(verdict.failure)


def test_the_command_exits_1_and_still_writes_when_a_case_fails(tmp_path, monkeypatch):
    monkeypatch.setattr("judge.exactness.run_ranks", _no_ranks)
    path = tmp_path / "exactness.json"
    assert main(["--short", "--only", "1x1x1", "--json", str(path)]) == 1
    assert '"passed": 0' in path.read_text()


def _no_ranks(*_args, **_options):
    raise RuntimeError("no ranks today")


@pytest.mark.parametrize(
    ("value", "reference", "slack", "expected"),
    [
        (1.1, 1.0, 0.0, 0.1),
        (1.1, 1.0, 0.2, 0.0),
        (0.0, 0.0, 0.0, 0.0),
        (1e-9, 0.0, 0.0, float("inf")),
        ([1.0, 2.0], [1.0], 0.0, float("inf")),
        ([3.0, 4.0], [0.0, 4.0], 0.0, 0.75),
    ],
)
def test_relative_error(value, reference, slack, expected):
    assert relative_error(value, reference, slack) == pytest.approx(expected)
