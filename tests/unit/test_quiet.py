"""What the ranks' logs are spared, and that nothing else is."""

from __future__ import annotations

import ast
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoConfig

from eagle3_ds.targets import load_text_config
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
    ("rope", "heard"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, ""),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 16,
                "long_factor": [2.0] * 16,
                "original_max_position_embeddings": 4096,
            },
            "",
        ),
        ({"rope_type": "linear", "factor": 0.5}, "factor field must be a float or int >= 1, got 0.5"),
    ],
)
def test_what_only_the_makers_of_a_config_could_mend_is_not_heard_of(
    rope: dict[str, Any], heard: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    positions = {"max_position_embeddings": 40960, "rope_parameters": {"rope_theta": 1e4, **rope}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes, **positions}))
    remarks = logging.getLogger("transformers.modeling_rope_utils")
    for filter_ in tuple(remarks.filters):
        remarks.removeFilter(filter_)
    # Transformers says each of them once in a process.
    transformers.utils.logging.warning_once.cache_clear()
    AutoConfig.from_pretrained(tmp_path)
    assert caplog.text != ""
    caplog.clear()
    transformers.utils.logging.warning_once.cache_clear()
    load_text_config(tmp_path)
    assert heard in caplog.text and bool(heard) == bool(caplog.text)


def test_the_launcher_has_one_warning() -> None:
    """So that leaving its warnings out leaves nothing out but that there is no hostfile."""
    import deepspeed.launcher

    sources = Path(deepspeed.launcher.__path__[0]).glob("*.py")
    said = [
        ast.unparse(call.args[0])
        for source in sources
        for call in ast.walk(ast.parse(source.read_text("utf-8")))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and ast.unparse(call.func).startswith("logger.warn")
    ]
    assert len(said) == 1 and "Unable to find hostfile" in said[0]


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


def test_a_target_over_ranks_forbids_the_unused_extension_before_its_weights_are_sharded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sharding sets up DeepSpeed's communication, which would compile and load it."""
    done: list[str] = []

    class SeenToError(Exception):
        pass

    def shard(*_: object) -> None:
        done.append("shard")
        raise SeenToError

    monkeypatch.setattr(target_engine, "prepare_extensions", lambda: done.append("extensions"))
    monkeypatch.setattr(target_engine, "_load_sharded", shard)
    for check in ("resolve_path", "load_full_config", "check_parallel"):
        monkeypatch.setattr(target_engine, check, lambda *_: None)
    recipe: Any = type("AnyRecipe", (), {"__getattr__": lambda self, name: self})()
    with pytest.raises(SeenToError):
        target_engine.TargetEngine(recipe, recipe)
    assert done == ["extensions", "shard"]
