"""The frozen target model: building a small one, loading any, and capturing what the draft learns from."""

from eagle3_ds.target.build import build_target
from eagle3_ds.target.capture import AuxCapture, capture_hidden_states, teacher_tokens
from eagle3_ds.target.load import (
    Target,
    check_supported,
    choose_aux_layers,
    load_target,
    load_tokenizer,
    resolve_path,
    target_fingerprint,
)
from eagle3_ds.target.weights import load_embedding_and_head, load_text_config

__all__ = [
    "AuxCapture",
    "Target",
    "build_target",
    "capture_hidden_states",
    "check_supported",
    "choose_aux_layers",
    "load_embedding_and_head",
    "load_target",
    "load_text_config",
    "load_tokenizer",
    "resolve_path",
    "target_fingerprint",
    "teacher_tokens",
]
