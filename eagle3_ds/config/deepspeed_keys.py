"""Which keys a DeepSpeed JSON may have, and why others are refused.

DeepSpeed silently ignores top-level keys that it does not know. To report misspelt keys, this module lists
all keys that DeepSpeed reads.
"""

from __future__ import annotations

from collections.abc import Mapping

Refusal = tuple[str, str]
"""(why the key is refused, what to do instead)."""

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
_COMMUNICATION = (
    "the recipe owns the precision, and gradients travel in train.dtype: rounded on their way they are other "
    "gradients",
    "Set train.dtype in the recipe and remove it.",
)
_SCALE = "it changes the scale of the gradients, which this project sets exactly", "Remove it."
_LOADER = "this project has its own deterministic loader", "Remove it."
_CHECKPOINT = (
    "this project writes its own checkpoints, and DeepSpeed none",
    "Set train.save_every in the recipe and remove it.",
)
_OPTIMIZER = (
    "the recipe owns the optimizer",
    "Set train.learning_rate, betas, eps and weight_decay; remove it.",
)
_GONE = "DeepSpeed has removed it, so it would do nothing", "Remove it."
_ROUNDED = "it rounds what travels between ranks, and this project trains exactly", "Remove it."

REFUSED: Mapping[str, Refusal] = {
    "mesh_param": _SP,
    "data_parallel_size": _SP,
    "sequence_parallel_size": _SP,
    "tensor_parallel": _MODEL_PARALLEL,
    "autotp_size": _MODEL_PARALLEL,
    "pipeline": _MODEL_PARALLEL,
    "expert_parallel": _MODEL_PARALLEL,
    "use_data_before_expert_parallelism": _MODEL_PARALLEL,
    "optimizer": _OPTIMIZER,
    "zero_allow_untested_optimizer": _OPTIMIZER,
    "zero_force_ds_cpu_optimizer": _OPTIMIZER,
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
    "weight_quantization": _PRECISION,
    "communication_data_type": _COMMUNICATION,
    "seq_parallel_communication_data_type": _COMMUNICATION,
    "prescale_gradients": _SCALE,
    "gradient_predivide_factor": _SCALE,
    "gradient_allreduce_op": _SCALE,
    "data_efficiency": _LOADER,
    "curriculum_learning": _LOADER,
    "dataloader_drop_last": _LOADER,
    "checkpoint": _CHECKPOINT,
    "datastates_ckpt": _CHECKPOINT,
    "nebula": _CHECKPOINT,
    "activation_checkpointing": (
        "the draft does not use DeepSpeed's, so it would do nothing",
        "Set train.activation in the recipe and remove it.",
    ),
    "compile": ("the engine is not compiled, so it would do nothing", "Remove it."),
    "hybrid_engine": ("the draft does not generate by DeepSpeed", "Remove it."),
    "elasticity": (
        "the mesh of a run is fixed",
        "Remove it; --resume can continue on another number of ranks.",
    ),
    "autotuning": ("batch sizes and stages are said by the recipe", "Remove it."),
    "compression_training": _GONE,
    "quantize_training": _GONE,
    "sparse_gradients": _GONE,
    "sparse_attention": _GONE,
    "eigenvalue": _GONE,
    "graph_harvesting": _GONE,
    "progressive_layer_drop": _GONE,
}

ALLOWED: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "aio", "comet", "comms_logger", "csv_monitor", "data_types", "flops_profiler", "tensorboard",
            "timers",
            "wandb", "zero_optimization",
        ),
        "section",
    ),
    **dict.fromkeys(
        ("disable_allgather", "disable_python_gc", "dump_state", "memory_breakdown", "wall_clock_breakdown"),
        "switch",
    ),
    "log_level": "text",
    "steps_per_print": "count",
    "vocabulary_size": "count",
}  # fmt: skip
"""{top-level key: the kind of its value}."""

SECTIONS: Mapping[str, Mapping[str, str]] = {
    "flops_profiler": {
        "enabled": "switch",
        "recompute_fwd_factor": "number",
        "profile_step": "count",
        "module_depth": "number",
        "top_modules": "count",
        "detailed": "switch",
        "output_file": "text",
    },
    "aio": {
        **dict.fromkeys(("block_size", "queue_depth", "intra_op_parallelism"), "count"),
        **dict.fromkeys(("single_submit", "overlap_events", "use_gds"), "switch"),
    },
    "timers": {"throughput": "object"},
}
"""{section: {key: the kind of its value}} for sections whose keys and values DeepSpeed does not check."""

DATA_TYPES_REFUSED: Mapping[str, Refusal] = {
    "param_dtype": _PRECISION,
    "buffer_dtype": _PRECISION,
    "keep_in_fp32_modules": _PRECISION,
}
MONITORS: Mapping[str, str] = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
"""{monitor: the package that rank 0 imports for it at the start}."""

# `fill_deepspeed_config` checks its value, which depends on the recipe.
DATA_TYPES_ALLOWED: Mapping[str, str] = {"grad_accum_dtype": "any"}


def _old_name(new: str) -> Refusal:
    return "it is an old name", f"Write {new} and remove it."


ZERO_REFUSED: Mapping[str, Refusal] = {
    "zero_quantized_weights": _ROUNDED,
    "zero_quantized_nontrainable_weights": _ROUNDED,
    "zero_quantized_gradients": _ROUNDED,
    "zeropp_loco_param": _GONE,
    "mics_shard_size": _GONE,
    "mics_hierarchical_params_gather": _GONE,
    "zenflow": (
        (
            "it updates most weights later than others with an optimizer of its own, and this project trains "
            "exactly"
        ),
        "Remove it; offload_optimizer alone keeps the optimizer's state in the host's memory.",
    ),
    "cpu_offload": _old_name('`"offload_optimizer": {"device": "cpu"}`'),
    "cpu_offload_param": _old_name('`"offload_param": {"device": "cpu"}`'),
    "cpu_offload_use_pin_memory": _old_name("`pin_memory` in offload_optimizer or offload_param"),
    "stage3_gather_fp16_weights_on_model_save": _old_name("`stage3_gather_16bit_weights_on_model_save`"),
    "legacy_stage1": _GONE,
    "elastic_checkpoint": _CHECKPOINT,
    "compute_grad_norm": ("gradients are clipped and watched by their norm", "Remove it."),
    "save_muon_momentum_buffer_in_memory": _OPTIMIZER,
}
_SWITCHES = (
    "contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce", "allgather_partitions",
    "overlap_comm",
    "load_from_fp32_weights", "ignore_unused_parameters", "round_robin_gradients", "parameter_alignment",
    "memory_efficient_linear", "pipeline_loading_checkpoint", "override_module_apply",
    "log_trace_cache_warnings",
    "enable_sanity_checks",
)  # fmt: skip
_SIZES = (
    "stage", "reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "zero_hpz_partition_size",
)  # fmt: skip
# DeepSpeed accepts these keys with and without the prefix `stage3_`.
_STAGE3_SWITCHES = (
    "gather_16bit_weights_on_model_save", "use_all_reduce_for_fetch_params", "allgather_sequential",
)  # fmt: skip
_STAGE3_SIZES = (
    "prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold",
    "max_live_parameters",
    "max_reuse_distance", "module_granularity_threshold",
)  # fmt: skip

ZERO_KINDS: Mapping[str, str] = {
    **dict.fromkeys(_SWITCHES, "switch"),
    **dict.fromkeys(_SIZES, "size"),
    **{prefix + name: "switch" for prefix in ("", "stage3_") for name in _STAGE3_SWITCHES},
    **{prefix + name: "size" for prefix in ("", "stage3_") for name in _STAGE3_SIZES},
    **dict.fromkeys(("offload_optimizer", "offload_param", "leaf_module"), "object"),
}
"""{key of `zero_optimization`: the kind of its value}."""

_HYBRID = (
    "DeepSpeed then demands an optimizer of its own, and the recipe owns the optimizer",
    "Remove it; the whole state is offloaded.",
)
_OFFLOAD_KINDS = {"device": "text", "nvme_path": "text", "buffer_count": "size", "pin_memory": "switch"}
OFFLOAD_KINDS: Mapping[str, Mapping[str, str]] = {
    "offload_optimizer": {
        **_OFFLOAD_KINDS,
        **dict.fromkeys(("pipeline_read", "pipeline_write", "fast_init"), "switch"),
    },
    "offload_param": {**_OFFLOAD_KINDS, "buffer_size": "size", "max_in_cpu": "size"},
}
OFFLOAD_REFUSED: Mapping[str, Refusal] = {
    "ratio": _HYBRID,
    "super_offload": _HYBRID,
    "cpuadam_cores_perc": _HYBRID,
}

ALREADY_SO: Mapping[str, object] = {
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "zero_quantized_gradients": False,
    "compute_grad_norm": True,
    "legacy_stage1": False,
    "elastic_checkpoint": False,
    "ratio": 1,
    "super_offload": False,
}
"""{refused key: the value that changes nothing, with which the key is accepted}."""
