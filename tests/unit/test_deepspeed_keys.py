"""Which keys of a DeepSpeed JSON pass, and that the tables know all that the installed DeepSpeed reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)

from eagle3_ds.config import load_deepspeed_config
from eagle3_ds.config.deepspeed_keys import (
    ALLOWED,
    ALREADY_SO,
    OFFLOAD_KINDS,
    OFFLOAD_REFUSED,
    REFUSED,
    SECTIONS,
    ZERO_KINDS,
    ZERO_REFUSED,
)


def message(folder: Path, config: object) -> str:
    """What is said about a JSON; empty when it passes."""
    path = folder / "ds.json"
    path.write_text(json.dumps(config))
    try:
        load_deepspeed_config(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}:")
        return str(error)
    return ""


class Watched(dict[str, Any]):
    """A configuration that remembers which keys were looked for."""

    seen: set[object]

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.seen = set()

    def get(self, key: Any, default: Any = None) -> Any:
        self.seen.add(key)
        return super().get(key, default)

    def __getitem__(self, key: Any) -> Any:
        self.seen.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.seen.add(key)
        return super().__contains__(key)

    def keys(self) -> Any:
        return self

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    def __copy__(self) -> Watched:
        return self


def test_every_key_that_deepspeed_reads_is_in_the_tables() -> None:
    watched = Watched(train_batch_size=1, train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1)
    DeepSpeedConfig(watched)
    assert {"zero_optimization", "communication_data_type", "wandb"} <= watched.seen
    assert watched.seen <= {*ALLOWED, *REFUSED}
    assert watched.seen >= set(ALLOWED)
    assert not set(ALLOWED) & set(REFUSED)


@pytest.mark.parametrize(
    ("model", "known"),
    [
        (DeepSpeedZeroConfig, {*ZERO_KINDS, *ZERO_REFUSED}),
        (DeepSpeedZeroOffloadOptimizerConfig, {*OFFLOAD_KINDS["offload_optimizer"], *OFFLOAD_REFUSED}),
        (DeepSpeedZeroOffloadParamConfig, {*OFFLOAD_KINDS["offload_param"]}),
    ],
)
def test_every_key_of_a_zero_section_is_in_the_tables(model: Any, known: set[str]) -> None:
    names = set(model.model_fields) | {field.alias for field in model.model_fields.values() if field.alias}
    assert names <= known
    gone = {key for key in known if key.startswith(("mics_", "zeropp_"))}
    assert known - gone <= names


PRECISION = [
    ({"communication_data_type": "fp16"}, "communication_data_type"),
    ({"communication_data_type": "bf16"}, "communication_data_type"),
    ({"communication_data_type": "fp32"}, "communication_data_type"),
    ({"seq_parallel_communication_data_type": "bf16"}, "seq_parallel_communication_data_type"),
    ({"data_types": {"param_dtype": "bf16"}}, "data_types.param_dtype"),
    ({"data_types": {"buffer_dtype": "fp16"}}, "data_types.buffer_dtype"),
    ({"data_types": {"keep_in_fp32_modules": "auto"}}, "data_types.keep_in_fp32_modules"),
    ({"weight_quantization": {}}, "weight_quantization"),
    (
        {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
        "zero_optimization.zero_quantized_weights",
    ),
    (
        {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
        "zero_optimization.zero_quantized_gradients",
    ),
    ({"zero_optimization": {"stage": 2, "zenflow": {}}}, "zero_optimization.zenflow"),
]


@pytest.mark.parametrize(("config", "key"), PRECISION)
def test_what_would_train_in_another_precision_is_refused(tmp_path: Path, config: object, key: str) -> None:
    assert f"`{key}` is refused: " in message(tmp_path, config)


CPU = {"device": "cpu"}
UNKNOWN = [
    ({"offload_optimizer": CPU}, "`offload_optimizer`", "belongs into `zero_optimization`: move it there"),
    ({"offload_param": CPU}, "`offload_param`", "belongs into `zero_optimization`: move it there"),
    ({"stage": 2}, "`stage`", "belongs into `zero_optimization`"),
    ({"overlap_comm": True}, "`overlap_comm`", "belongs into `zero_optimization`"),
    ({"pin_memory": True}, "`pin_memory`", "belongs into `zero_optimization.offload_optimizer`"),
    ({"grad_accum_dtype": "fp32"}, "`grad_accum_dtype`", "belongs into `data_types`"),
    ({"zero_optimisation": {"stage": 2}}, "`zero_optimisation`", "Did you mean `zero_optimization`?"),
    ({"wall_clock_breakdwn": True}, "`wall_clock_breakdwn`", "Did you mean `wall_clock_breakdown`?"),
    ({"zzz": 1}, "`zzz`", "Remove it."),
    (
        {"zero_optimization": {"stage": 2, "offload_optimzer": CPU}},
        "`zero_optimization.offload_optimzer`",
        "Did you mean `offload_optimizer`?",
    ),
    (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {**CPU, "pin_memry": True}}},
        "`zero_optimization.offload_optimizer.pin_memry`",
        "Did you mean `pin_memory`?",
    ),
    (
        {"zero_optimization": {"stage": 2, "steps_per_print": 5}},
        "`zero_optimization.steps_per_print`",
        "belongs at the top",
    ),
    ({"flops_profiler": {"profil_step": 3}}, "`flops_profiler.profil_step`", "Did you mean `profile_step`?"),
    ({"aio": {"blocksize": 3}}, "`aio.blocksize`", "Did you mean `block_size`?"),
    ({"timers": {"throughputs": {}}}, "`timers.throughputs`", "Did you mean `throughput`?"),
    ({"data_types": {"grad_acum_dtype": "fp32"}}, "`data_types.grad_acum_dtype`", "mean `grad_accum_dtype`?"),
]


@pytest.mark.parametrize(("config", "key", "fix"), UNKNOWN)
def test_a_key_that_deepspeed_would_pass_over_is_refused_by_name(
    tmp_path: Path, config: object, key: str, fix: str
) -> None:
    said = message(tmp_path, config)
    assert f"{key} is no key that DeepSpeed reads there" in said and fix in said


@pytest.mark.parametrize("name", ["flops_profiler", "aio"])
def test_the_sections_that_deepspeed_does_not_check(name: str) -> None:
    section = Watched(none=None)
    batch = dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), 1
    )
    DeepSpeedConfig({**batch, name: section})
    assert section.seen == set(SECTIONS[name])


def test_all_wrong_keys_are_named_at_once(tmp_path: Path) -> None:
    config = {"zero_optimization": {"stage": "2", "overlap": True}, "offload_param": CPU, "fp16": {}}
    said = message(tmp_path, config)
    assert [word in said for word in ("stage", "overlap", "offload_param", "fp16")] == [True] * 4


WRONG = [
    ({"zero_optimization": True}, "`zero_optimization` is true: it must be a JSON object"),
    ({"zero_optimization": None}, "`zero_optimization` is null: it must be a JSON object"),
    ({"zero_optimization": 2}, "`zero_optimization` is 2: it must be a JSON object"),
    ({"zero_optimization": {"stage": "2"}}, '`zero_optimization.stage` is "2": it must be a whole number'),
    ({"zero_optimization": {"stage": None}}, "`zero_optimization.stage` is null: it must be a whole number"),
    ({"zero_optimization": {"stage": True}}, "`zero_optimization.stage` is true: it must be a whole number"),
    ({"zero_optimization": {"stage": 4}}, "`zero_optimization.stage` is 4: there are 0, 1, 2 and 3"),
    ({"zero_optimization": {"stage": 2.5}}, "`zero_optimization.stage` is 2.5: it must be a whole number"),
    ({"zero_optimization": {"stage": 2, "overlap_comm": "yes"}}, "`zero_optimization.overlap_comm` is"),
    (
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": "5e8"}},
        "`zero_optimization.reduce_bucket_size` is",
    ),
    (
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}},
        "`zero_optimization.reduce_bucket_size` is -1",
    ),
    (
        {"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}},
        '`zero_optimization.offload_optimizer` is "cpu": it must be a JSON object',
    ),
    (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}},
        "`zero_optimization.offload_optimizer.device` is 'gpu': there are",
    ),
    ({"data_types": []}, "`data_types` is []: it must be a JSON object"),
    (
        {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}},
        '`zero_optimization.reduce_bucket_size` is "auto", which only Hugging Face\'s Trainer fills in',
    ),
    ({"steps_per_print": "10"}, '`steps_per_print` is "10": it must be a whole number from 1 on'),
    ({"steps_per_print": 0}, "`steps_per_print` is 0: it must be a whole number from 1 on"),
    ({"wall_clock_breakdown": "false"}, '`wall_clock_breakdown` is "false": it must be true or false'),
    ({"flops_profiler": {"enabled": "yes"}}, '`flops_profiler.enabled` is "yes": it must be true or false'),
    ({"comms_logger": True}, "`comms_logger` is true: it must be a JSON object"),
    ({"wandb": "on"}, '`wandb` is "on": it must be a JSON object'),
    ({"steps_per_print": "auto"}, '`steps_per_print` is "auto"'),
    ({"zero_optimization": "auto"}, '`zero_optimization` is "auto"'),
    ({"wandb": {"enabled": "auto"}}, '`wandb.enabled` is "auto"'),
    ({"zero_optimization": {"stage": "auto"}}, '`zero_optimization.stage` is "auto"'),
]


@pytest.mark.parametrize(("config", "words"), WRONG)
def test_a_value_that_is_none_of_its_key_is_refused(tmp_path: Path, config: object, words: str) -> None:
    assert words in message(tmp_path, config)


OFFLOAD = [
    ({"stage": 2, "cpu_offload": True}, '`"offload_optimizer": {"device": "cpu"}`'),
    ({"stage": 3, "cpu_offload_param": True}, '`"offload_param": {"device": "cpu"}`'),
    ({"stage": 2, "cpu_offload_use_pin_memory": True}, "`pin_memory`"),
    (
        {"stage": 3, "stage3_gather_fp16_weights_on_model_save": True},
        "`stage3_gather_16bit_weights_on_model_save`",
    ),
    ({"stage": 3, "offload_optimizer": {**CPU, "ratio": 0.3}}, "offload_optimizer.ratio` is refused"),
    ({"stage": 3, "offload_optimizer": {**CPU, "super_offload": True}}, "super_offload` is refused"),
    ({"stage": 2, "zenflow": {"topk_ratio": 0.1}, "offload_optimizer": CPU}, "zenflow` is refused"),
    (
        {"stage": 0, "offload_optimizer": CPU},
        "`zero_optimization.offload_optimizer` offloads nothing at ZeRO stage 0",
    ),
    ({"offload_optimizer": CPU}, "offloads nothing at ZeRO stage 0"),
    (
        {"stage": 2, "offload_param": CPU},
        "`zero_optimization.offload_param` offloads nothing at ZeRO stage 2",
    ),
    ({"stage": 2, "zero_hpz_partition_size": 2}, "`zero_optimization.zero_hpz_partition_size` does nothing"),
]


@pytest.mark.parametrize(("zero", "words"), OFFLOAD)
def test_offloading_that_the_planner_does_not_see_is_refused(
    tmp_path: Path, zero: dict[str, object], words: str
) -> None:
    assert words in message(tmp_path, {"zero_optimization": zero})


def test_what_says_only_what_is_so_anyway_passes(tmp_path: Path) -> None:
    offload = {"device": "cpu", "pin_memory": True, "ratio": 1.0, "super_offload": False}
    zero = {
        "stage": 3,
        "offload_optimizer": offload,
        "offload_param": {"device": "none"},
        "overlap_comm": None,
        "reduce_bucket_size": 5e8,
        "param_persistence_threshold": 10,
        "zero_quantized_weights": False,
    }
    assert message(tmp_path, {"zero_optimization": zero, "zero_allow_untested_optimizer": True}) == ""
    assert message(tmp_path, {"zero_optimization": {"stage": 2, "offload_optimizer": None}}) == ""
    assert message(tmp_path, {"steps_per_print": 2000, "wall_clock_breakdown": False}) == ""
    assert "zero_force_ds_cpu_optimizer" in message(tmp_path, {"zero_force_ds_cpu_optimizer": True})
    known = {*REFUSED, *ZERO_REFUSED, *OFFLOAD_REFUSED}
    assert set(ALREADY_SO) <= known
