"""Whether a server is known that serves EAGLE-3 drafts for a target."""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from eagle3_ds.targets.servers_data import READ_ON, VLLM_ARCHITECTURES, VLLM_VERSION


def no_known_server(full_config: Any) -> str | None:
    """What to warn of when no server is known for drafts of this target. `full_config`: as AutoConfig reads
    it.
    """
    names = list(getattr(full_config, "architectures", None) or ())
    if not names:
        given = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(full_config.model_type, full_config.model_type)
        names = [given] if isinstance(given, str) else list(given)
    if VLLM_ARCHITECTURES & set(names):
        return None
    return (
        f"no server is known to serve EAGLE-3 drafts for {', '.join(names)}: vLLM {VLLM_VERSION} (read on "
        f"{READ_ON}) has no such support in its own model of it. Its models by transformers "
        "(--model-impl transformers) may have it, and so may a later version: try before a long training."
    )
