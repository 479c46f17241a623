"""What the ranks' logs are spared, and that nothing else is."""

from __future__ import annotations

import warnings

import pytest

from eagle3_ds.train.quiet import ignore_renamed_collectives


@pytest.mark.parametrize(
    ("text", "category", "heard"),
    [
        (
            "`torch.distributed.all_gather_into_tensor` is deprecated. Please use `all_gather_single`.",
            FutureWarning,
            False,
        ),
        (
            "`torch.distributed.reduce_scatter_tensor` is deprecated. Please use another.",
            FutureWarning,
            False,
        ),
        ("`torch.distributed.reduce_op` is deprecated, please use another.", FutureWarning, True),
        ("`torch.distributed.all_gather_into_tensor` is deprecated.", UserWarning, True),
    ],
)
def test_only_the_two_renamed_collectives_are_not_heard_of(
    text: str, category: type[Warning], heard: bool
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ignore_renamed_collectives()
        warnings.warn(text, category, stacklevel=1)
    assert bool(caught) == heard
