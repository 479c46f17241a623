"""What the ranks' logs are spared, and that nothing else is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest

from eagle3_ds.train import target_engine, trainer
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


@pytest.mark.parametrize(
    ("module", "build"),
    [
        (trainer, lambda: trainer.DraftTrainer(*[None] * 7)),  # type: ignore[arg-type]
        (target_engine, lambda: target_engine.TargetEngine(None, None)),  # type: ignore[arg-type]
    ],
)
def test_whatever_builds_an_engine_sees_to_it_first(
    module: Any, build: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    class SeenToError(Exception):
        pass

    def see_to_it() -> None:
        raise SeenToError

    monkeypatch.setattr(module, "ignore_renamed_collectives", see_to_it)
    with pytest.raises(SeenToError):
        build()
