"""The user's DeepSpeed JSON. It is passed on to DeepSpeed, except that keys which the recipe sets, or which
would make gradients inexact, are refused.
"""

from __future__ import annotations

import copy
import difflib
import importlib.util
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from eagle3_ds.config.deepspeed_keys import (
    ALLOWED,
    ALREADY_SO,
    DATA_TYPES_ALLOWED,
    DATA_TYPES_REFUSED,
    MONITORS,
    OFFLOAD_KINDS,
    OFFLOAD_REFUSED,
    REFUSED,
    SECTIONS,
    ZERO_KINDS,
    ZERO_REFUSED,
    Refusal,
)
from eagle3_ds.config.schema import Recipe
from eagle3_ds.config.shipped import find_shipped, names_near, shipped
from eagle3_ds.config.yaml_strict import read_text

# The recipe's name of a dtype -> DeepSpeed's names.
_DTYPES: Mapping[str, tuple[str, ...]] = {
    "float32": ("fp32", "float32", "float", "torch.float32"),
    "bfloat16": ("bf16", "bfloat16", "torch.bfloat16"),
    "float16": ("fp16", "float16", "half", "torch.float16"),
}


def deepspeed_file(source: str | Path) -> Path:
    """The file that a recipe's `deepspeed` means: a path, or the name of a shipped one.

    Raises:
        ValueError: there is no such file.
    """
    path = Path(source)
    if path.is_file():
        return path
    found = find_shipped("ds_configs", source)
    if found is None:
        raise ValueError(
            f"deepspeed: {path} is not a file, neither from the working directory ({Path.cwd()}) nor from "
            "the recipe's folder or the one above it, and none of that name is shipped. Give a path from "
            "one of them, the keys themselves as a mapping, or a shipped name: "
            f"{names_near(source, shipped('ds_configs'))}."
        )
    return found


def deepspeed_name(source: str | Path | Mapping[str, Any]) -> str:
    """What messages call the DeepSpeed configuration of a recipe."""
    return "the recipe's deepspeed section" if isinstance(source, Mapping) else str(source)


def load_deepspeed_config(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Read and check a DeepSpeed JSON; returned as the user wrote it.

    Args:
        source: a path, the name of a shipped one, or what stands in such a file.

    Raises:
        ValueError: the file is missing or no JSON object, a key is given twice, or keys are refused, unknown,
            in the wrong place, or have values of the wrong kind. The message lists all these keys.
    """
    config = copy.deepcopy(dict(source)) if isinstance(source, Mapping) else _read(deepspeed_file(source))
    problems = deepspeed_problems(config)
    if problems:
        raise ValueError("\n  ".join([f"{deepspeed_name(source)}:", *problems]))
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_text(path), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: a DeepSpeed configuration is a JSON object, not {type(config).__name__}.")
    return config


def deepspeed_problems(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with a DeepSpeed JSON, as far as that does not depend on the recipe: one line for each
    problem, with its key and the fix.
    """
    zero = config.get("zero_optimization", {})
    inner = zero if isinstance(zero, Mapping) else {}
    parts: list[tuple[str, Any, Mapping[str, str], Mapping[str, Refusal]]] = [
        ("", config, ALLOWED, REFUSED),
        ("data_types.", config.get("data_types"), DATA_TYPES_ALLOWED, DATA_TYPES_REFUSED),
        *((f"{name}.", config.get(name), kinds, {}) for name, kinds in SECTIONS.items()),
        ("zero_optimization.", zero, ZERO_KINDS, ZERO_REFUSED),
        *(
            (f"zero_optimization.{name}.", inner.get(name), kinds, OFFLOAD_REFUSED)
            for name, kinds in OFFLOAD_KINDS.items()
        ),
    ]
    problems = []
    for prefix, part, kinds, refused in parts:
        if isinstance(part, Mapping):
            problems += [*_wrong_keys(part, prefix, kinds, refused), *_wrong_values(part, prefix, kinds)]
    problems += _autos(config, "")
    # The check for the ZeRO stage needs keys and values that are of the right kind.
    return problems or _wrong_for_stage(zero)


def missing_packages(config: Mapping[str, Any]) -> list[str]:
    """One line, with the fix, for each monitor that is enabled but whose package is not installed here."""
    return [
        f"`{name}.enabled` is true, but the package {package} is not installed here. Install it "
        f"(pip install {package}), or set it to false."
        for name, package in MONITORS.items()
        if isinstance(section := config.get(name), Mapping)
        and section.get("enabled")
        and importlib.util.find_spec(package) is None
    ]


def _wrong_keys(
    part: Mapping[str, Any], prefix: str, allowed: Collection[str], refused: Mapping[str, Refusal]
) -> list[str]:
    """Problems with the keys of one section of the JSON: those that are refused or unknown."""
    problems = []
    for key, value in part.items():
        if key in refused:
            if key not in ALREADY_SO or not _is_same(value, ALREADY_SO[key]):
                reason, fix = refused[key]
                said = "" if isinstance(value, Mapping | list) else f" (it is {json.dumps(value)})"
                problems.append(f"`{prefix}{key}` is refused: {reason}{said}. {fix}")
        elif key not in allowed:
            problems.append(
                f"`{prefix}{key}` is no key that DeepSpeed reads there. {_suggestion(key, allowed)}"
            )
    return problems


def _is_same(value: Any, other: object) -> bool:
    """Whether two values are equal in JSON, where 1.0 is 1 but true is not."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other


def _suggestion(key: str, allowed: Collection[str]) -> str:
    """In which section the key belongs, or which similar key may have been meant."""
    places: dict[str, Collection[str]] = {
        "zero_optimization": ZERO_KINDS,
        **{f"zero_optimization.{name}": kinds for name, kinds in OFFLOAD_KINDS.items()},
        "data_types": DATA_TYPES_ALLOWED,
        "": ALLOWED,
    }
    for place, keys in places.items():
        if key in keys:
            where = f"into `{place}`" if place else "at the top"
            return f"It belongs {where}: move it there."
    near = difflib.get_close_matches(key, allowed, n=1)
    return f"Did you mean `{near[0]}`? Rename or remove it." if near else "Remove it."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "switch": ("true or false", lambda value: value is None or isinstance(value, bool)),
    "size": (
        "a whole number from 0 on, without quotes",
        lambda value: _is_number(value) and 0 <= value < 2**63 and value % 1 == 0,
    ),
    "count": (
        "a whole number from 1 on, without quotes",
        lambda value: value is None or (_is_number(value) and 1 <= value < 2**63 and value % 1 == 0),
    ),
    "number": ("a number, without quotes", _is_number),
    "any": ("a value", lambda value: True),
    "text": ("a text", lambda value: value is None or isinstance(value, str)),
    "section": ("a JSON object {...}", lambda value: isinstance(value, Mapping)),
    "object": ("a JSON object {...}", lambda value: value is None or isinstance(value, Mapping)),
}


def _wrong_values(part: Mapping[str, Any], prefix: str, kinds: Mapping[str, str]) -> list[str]:
    """Problems with the values of one section of the JSON: those of the wrong kind, but not `auto`, which
    `_autos` reports.
    """
    problems = []
    for key, value in part.items():
        if key in kinds and value != "auto":
            wanted, fits = _KINDS[kinds[key]]
            if not fits(value):
                problems.append(
                    f"`{prefix}{key}` is {json.dumps(value)}: it must be {wanted}. Write one, or remove it."
                )
    return problems


def _autos(value: Any, path: str) -> list[str]:
    """Problems with every key, however deep, whose value is `auto`."""
    if value == "auto":
        return [
            f'`{path}` is "auto", which only Hugging Face\'s Trainer fills in. Write a value, or remove it '
            "for DeepSpeed's own."
        ]
    if not isinstance(value, Mapping):
        return []
    return [line for key, inner in value.items() for line in _autos(inner, f"{path}.{key}" if path else key)]


def _wrong_for_stage(zero: Mapping[str, Any]) -> list[str]:
    """Problems with settings that DeepSpeed would silently ignore at this ZeRO stage."""
    stage = zero.get("stage", 0)
    if stage not in range(4):
        return [f"`zero_optimization.stage` is {stage}: there are 0, 1, 2 and 3. Write one."]
    problems = []
    for name, least in (("offload_optimizer", 1), ("offload_param", 3)):
        device = (zero.get(name) or {}).get("device") or "none"
        key = f"zero_optimization.{name}"
        if device not in ("none", "cpu", "nvme"):
            problems.append(f'`{key}.device` is {device!r}: there are "none", "cpu" and "nvme". Write "cpu".')
        elif device != "none" and stage < least:
            problems.append(
                f"`{key}` offloads nothing at ZeRO stage {stage}. Set stage to {least} or more, or remove it."
            )
    if zero.get("zero_hpz_partition_size", 1) != 1 and stage < 3:
        problems.append(
            f"`zero_optimization.zero_hpz_partition_size` does nothing at ZeRO stage {stage}. Set stage to "
            "3, or remove it."
        )
    return problems


def _no_object(key: str, value: Any) -> str:
    return (
        f"`{key}` is {json.dumps(value)}: it must be a JSON object. Write {{...}} with its keys, "
        f"or remove it."
    )


def fill_deepspeed_config(
    user: Mapping[str, Any], recipe: Recipe, world: int, draft_dp: int
) -> dict[str, Any]:
    """The complete configuration for `deepspeed.initialize`: the user's JSON with the settings of the recipe.

    DeepSpeed checks train_batch_size against the number of ranks that it takes for data-parallel: all ranks
    when it gets no mpu (`zero_group: all`), else those of the draft_dp group.

    Args:
        user: the user's JSON, from `load_deepspeed_config`.
        world: number of ranks.
        draft_dp: the draft's data-parallel degree.

    Raises:
        ValueError: `zero_hpz_partition_size` (ZeRO++) does not fit the ranks, the optimizer is offloaded to
            NVMe, or `data_types.grad_accum_dtype` is not possible at this ZeRO stage.
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
    # torch's AdamW is not in DeepSpeed's list of tested ZeRO optimizers, and with offload DeepSpeed refuses
    # every optimizer but its own CPU Adam unless it is told not to.
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
    """Refuse accumulation dtypes that DeepSpeed itself refuses only once the ranks run, and those for which
    it takes an optimizer whose state our checkpoints cannot hold.
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
    """A section of the JSON; empty when it is missing.

    Raises:
        ValueError: it is no JSON object.
    """
    value = config.get(key, {})
    if not isinstance(value, Mapping):
        raise ValueError(_no_object(key, value))
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
