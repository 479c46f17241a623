"""The configuration of a run: the recipe (YAML) and its DeepSpeed JSON. Mistakes in both are reported before
anything starts.
"""

from eagle3_ds.config.deepspeed import (
    deepspeed_file,
    deepspeed_name,
    fill_deepspeed_config,
    load_deepspeed_config,
    missing_packages,
)
from eagle3_ds.config.load import (
    RESOLVED,
    as_recipe,
    dump_recipe,
    load_recipe,
    read_recipe,
    recipe_differences,
    title_of,
)
from eagle3_ds.config.rope import PER_PAIR, SCALINGS, RopeSection, check_rotated, rotated_size
from eagle3_ds.config.schema import (
    Activation,
    AttentionSection,
    BestBy,
    DataSection,
    DraftSection,
    EvalSection,
    ExchangeName,
    ExportSection,
    LoggingSection,
    LossSection,
    MaskAlignment,
    ParallelSection,
    Recipe,
    SamplingSection,
    TrainSection,
    ZeroGroup,
)
from eagle3_ds.config.shipped import find_shipped, shipped
from eagle3_ds.config.target import TargetBuild, TargetSection
from eagle3_ds.config.yaml_strict import read_text

__all__ = [
    "PER_PAIR",
    "RESOLVED",
    "SCALINGS",
    "Activation",
    "BestBy",
    "ExchangeName",
    "MaskAlignment",
    "ZeroGroup",
    "AttentionSection",
    "DataSection",
    "DraftSection",
    "EvalSection",
    "ExportSection",
    "LoggingSection",
    "LossSection",
    "ParallelSection",
    "Recipe",
    "RopeSection",
    "SamplingSection",
    "TargetBuild",
    "TargetSection",
    "TrainSection",
    "as_recipe",
    "check_rotated",
    "deepspeed_file",
    "deepspeed_name",
    "dump_recipe",
    "fill_deepspeed_config",
    "find_shipped",
    "load_deepspeed_config",
    "load_recipe",
    "missing_packages",
    "read_recipe",
    "read_text",
    "recipe_differences",
    "rotated_size",
    "shipped",
    "title_of",
]
