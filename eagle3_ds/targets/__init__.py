"""The frozen target model: building a small one, loading any, and capturing its hidden states."""

from eagle3_ds.targets.build import build_target
from eagle3_ds.targets.capture import AuxCapture, capture_hidden_states, teacher_tokens
from eagle3_ds.targets.end import check_target_end, load_target_end
from eagle3_ds.targets.families import (
    attention_size,
    beyond_positions,
    check_parallel,
    check_quantization,
    check_supported,
    head_size,
    positions,
)
from eagle3_ds.targets.load import (
    Target,
    choose_aux_layers,
    empty_target,
    load_model,
    load_target,
    load_tokenizer,
    resolve_path,
    target_fingerprint,
)
from eagle3_ds.targets.packed import SpanForward, check_spans
from eagle3_ds.targets.servers import no_known_server
from eagle3_ds.targets.structure import check_config_structure, fold_factor, logits_factor
from eagle3_ds.targets.weights import (
    check_weight_names,
    load_embedding_and_head,
    load_full_config,
    load_text_config,
)

__all__ = [
    "AuxCapture",
    "SpanForward",
    "Target",
    "attention_size",
    "beyond_positions",
    "build_target",
    "capture_hidden_states",
    "check_config_structure",
    "check_parallel",
    "check_quantization",
    "check_spans",
    "check_supported",
    "check_target_end",
    "check_weight_names",
    "choose_aux_layers",
    "empty_target",
    "fold_factor",
    "head_size",
    "load_embedding_and_head",
    "load_full_config",
    "load_model",
    "load_target",
    "load_target_end",
    "load_text_config",
    "load_tokenizer",
    "logits_factor",
    "no_known_server",
    "positions",
    "resolve_path",
    "target_fingerprint",
    "teacher_tokens",
]
