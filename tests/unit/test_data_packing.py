"""Packing: every document exactly once, no bin over its length, little air."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle3_ds.data.packing import fill, pack


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 300).flatmap(
        lambda size: st.tuples(st.just(size), st.lists(st.integers(1, size), max_size=80))
    ),
    st.integers(0, 2**32),
)
def test_every_document_once_and_no_bin_over(case, seed):
    max_length, lengths = case
    bins = pack(lengths, max_length, seed)
    assert sorted(document for documents in bins for document in documents) == list(range(len(lengths)))
    assert all(documents and sum(lengths[i] for i in documents) <= max_length for documents in bins)
    assert bins == pack(lengths, max_length, seed)
    # Best fit never leaves two bins that could be one.
    loads = sorted(sum(lengths[i] for i in documents) for documents in bins)
    assert len(loads) < 2 or loads[0] + loads[1] > max_length


@pytest.mark.parametrize("seed", range(3))
def test_fill_on_log_normal_lengths(seed):
    lengths = np.clip(np.random.default_rng(seed).lognormal(6.3, 0.9, 4000), 1, 4096).astype(int).tolist()
    assert fill(lengths, 4096, pack(lengths, 4096, seed)) >= 0.97


@settings(max_examples=30, deadline=None)
@given(st.floats(5.0, 7.0), st.floats(0.5, 1.5), st.integers(0, 2**32 - 1))
def test_fill_on_any_log_normal_lengths(mean, deviation, seed):
    lengths = (
        np.clip(np.random.default_rng(seed).lognormal(mean, deviation, 2000), 1, 4096).astype(int).tolist()
    )
    bins = pack(lengths, 4096, seed)
    assert fill(lengths, 4096, bins) >= 0.97
    assert sorted(document for documents in bins for document in documents) == list(range(len(lengths)))


def test_seed_changes_the_bins():
    lengths = [10] * 40
    assert pack(lengths, 40, 0) != pack(lengths, 40, 1)


def test_nothing_to_pack():
    assert pack([], 8, 0) == []
    assert fill([], 8, []) == 0.0


@pytest.mark.parametrize("length", [0, 9])
def test_a_length_that_cannot_fit_is_refused(length):
    with pytest.raises(ValueError, match=rf"document 1 has {length} tokens .* 1 to 8: raise data.max_length"):
        pack([3, length], 8, 0)
