"""The user's DeepSpeed JSON: passed through but for the keys that the recipe owns or that would break
exactness.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eagle3_ds.config.schema import Recipe
from eagle3_ds.config.yaml_strict import read_text

_BATCH = (
    "batch sizes follow from the packing and the mesh",
    "Set train.accumulation in the recipe and remove it.",
)
_SP = (
    (
        "it makes DeepSpeed scale gradients for a sequence parallelism of its own, and weights diverge "
        "between ranks"
    ),
    (
        "Remove it; parallel.ulysses, parallel.ring and parallel.zero_group in the recipe say how sequences "
        "are cut."
    ),
)
_MODEL_PARALLEL = (
    "the draft is not cut over layers or heads' weights",
    "Remove it; ZeRO shards the training state.",
)
_PRECISION = "the recipe owns the precision", "Set train.dtype in the recipe and remove it."
_SCALE = "it changes the scale of the gradients, which this project sets exactly", "Remove it."
_LOADER = "this project has its own deterministic loader", "Remove it."

# The recipe's name of a dtype -> DeepSpeed's names.
_DTYPES: Mapping[str, tuple[str, ...]] = {
    "float32": ("fp32", "float32", "float", "torch.float32"),
    "bfloat16": ("bf16", "bfloat16", "torch.bfloat16"),
    "float16": ("fp16", "float16", "half", "torch.float16"),
}

# key -> (reason, fix)
REFUSED: Mapping[str, tuple[str, str]] = {
    "mesh_param": _SP,
    "data_parallel_size": _SP,
    "sequence_parallel_size": _SP,
    "tensor_parallel": _MODEL_PARALLEL,
    "autotp_size": _MODEL_PARALLEL,
    "pipeline": _MODEL_PARALLEL,
    "optimizer": (
        "the recipe owns the optimizer",
        "Set train.learning_rate, betas, eps and weight_decay; remove it.",
    ),
    "scheduler": (
        "the recipe owns the schedule",
        "Set train.schedule, warmup_steps and min_lr_ratio; remove it.",
    ),
    "train_batch_size": _BATCH,
    "train_micro_batch_size_per_gpu": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "managed_gradient_accumulation": _BATCH,
    "gradient_clipping": (
        "the recipe owns clipping",
        "Set train.gradient_clipping in the recipe and remove it.",
    ),
    "bf16": _PRECISION,
    "bfloat16": _PRECISION,
    "fp16": _PRECISION,
    "amp": _PRECISION,
    "torch_autocast": _PRECISION,
    "prescale_gradients": _SCALE,
    "gradient_predivide_factor": _SCALE,
    "gradient_allreduce_op": _SCALE,
    "data_efficiency": _LOADER,
    "curriculum_learning": _LOADER,
    "elasticity": (
        "the mesh of a run is fixed",
        "Remove it; --resume can continue on another number of ranks.",
    ),
    "autotuning": ("batch sizes and stages are said by the recipe", "Remove it."),
}


def load_deepspeed_config(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON as the user wrote it.

    Raises:
        ValueError: no such file, not a JSON object, a key given twice, or a refused key (all of them are
            named).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"deepspeed: {path} is not a file. Give a path from here, for example ds_configs/zero2.json."
        )
    try:
        config = json.loads(read_text(path), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: a DeepSpeed configuration is a JSON object, not {type(config).__name__}.")
    refused = [
        f"`{key}` is refused: {REFUSED[key][0]}. {REFUSED[key][1]}" for key in config if key in REFUSED
    ]
    if refused:
        raise ValueError("\n  ".join([f"{path}:", *refused]))
    return config


def fill_deepspeed_config(
    user: Mapping[str, Any], recipe: Recipe, world: int, draft_dp: int
) -> dict[str, Any]:
    """The configuration handed to `deepspeed.initialize`: the user's, and what the recipe says.

    DeepSpeed checks train_batch_size against the data-parallel world it believes in: all ranks when no mpu is
    given (`zero_group: all`), the draft_dp group otherwise.

    Raises:
        ValueError: ZeRO++ secondary partitions (`zero_hpz_partition_size`) that do not fit the ranks, an
            optimizer on NVMe, or gradients accumulated in a dtype (`data_types.grad_accum_dtype`) that the
            ZeRO stage cannot have.
    """
    config = copy.deepcopy(dict(user))
    _check_secondary_partition(config, recipe, world)
    _check_offload(config)
    _check_grad_accum_dtype(config, recipe)
    data_parallel = world if recipe.parallel.zero_group == "all" else draft_dp
    config["train_micro_batch_size_per_gpu"] = 1
    config["gradient_accumulation_steps"] = recipe.train.accumulation
    config["train_batch_size"] = recipe.train.accumulation * data_parallel
    config["gradient_clipping"] = recipe.train.gradient_clipping
    config["bf16"] = {"enabled": recipe.train.dtype == "bfloat16"}
    # The optimizer is torch's AdamW, which DeepSpeed has not listed as tested, and must not be swapped under
    # offload.
    config.setdefault("zero_allow_untested_optimizer", True)
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    return config


def _check_offload(config: Mapping[str, Any]) -> None:
    if _offload_device(config) == "nvme":
        raise ValueError(
            "zero_optimization.offload_optimizer.device is nvme: a checkpoint cannot hold what DeepSpeed "
            "keeps in files of its own. Set it to cpu."
        )


def _check_grad_accum_dtype(config: Mapping[str, Any], recipe: Recipe) -> None:
    """DeepSpeed refuses some of these only once the ranks run; others get an optimizer whose state no
    checkpoint can hold.
    """
    asked, train = _object(config, "data_types").get("grad_accum_dtype"), recipe.train.dtype
    if asked is None:
        return
    dtype = next((dtype for dtype, names in _DTYPES.items() if asked in names), None)
    if dtype is None:
        allowed = ", ".join(name for names in _DTYPES.values() for name in names)
        raise ValueError(
            f"data_types.grad_accum_dtype is {asked!r}, which is no dtype of DeepSpeed's. Set it to one of "
            f"{allowed}."
        )
    stage = _zero(config).get("stage", 0)
    where = f"data_types.grad_accum_dtype is {asked!r} with train.dtype {train} at ZeRO stage {stage}"
    fix = "Remove it, or use stage 2 or 3, for example ds_configs/zero2.json."
    if stage == 0 and dtype != train:
        raise ValueError(
            f"{where}: without ZeRO, DeepSpeed accumulates gradients in train.dtype alone. {fix}"
        )
    if stage == 1 and _offload_device(config) != "cpu" and (train, dtype) == ("bfloat16", "float32"):
        raise ValueError(
            f"{where}: DeepSpeed then takes an optimizer of its own, whose state no checkpoint here can "
            f"hold. {fix}"
        )


def _zero(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return _object(config, "zero_optimization")


def _offload_device(config: Mapping[str, Any]) -> Any:
    zero = _zero(config)
    return None if zero.get("offload_optimizer") is None else _object(zero, "offload_optimizer").get("device")


def _object(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A part of the JSON, empty when it is not there. Raises ValueError when it is no object."""
    value = config.get(key, {})
    if not isinstance(value, Mapping):
        raise ValueError(
            f"`{key}` is {value!r}: it must be a JSON object. Write {{...}} with its keys, or remove it."
        )
    return value


def _check_secondary_partition(config: Mapping[str, Any], recipe: Recipe, world: int) -> None:
    size = _zero(config).get("zero_hpz_partition_size", 1)
    if size == 1:
        return
    if recipe.parallel.zero_group != "all":
        raise ValueError(
            f"zero_optimization.zero_hpz_partition_size is {size} with parallel.zero_group draft_dp: "
            "DeepSpeed builds these partitions from neighbouring ranks, which are not in one draft_dp group. "
            "Set parallel.zero_group: all, or use ds_configs/zero3.json."
        )
    if world % size:
        raise ValueError(
            f"zero_optimization.zero_hpz_partition_size is {size}, which does not divide the {world} ranks. "
            "Set it to the number of ranks of one node, or use ds_configs/zero3.json."
        )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"the key `{twice[0]}` is given twice. Keep one of the two.")
    return dict(pairs)
