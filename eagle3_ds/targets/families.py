"""Which targets a draft can learn from, and which of them can run cut into spans. Both are decided from the
config alone.

Any causal LM of transformers that passes these checks is accepted. docs/targets.md lists the families whose
hidden states the tests compare with the plain forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NEEDED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "max_position_embeddings",
)
"""What the target's config must say; the rest of the draft's shape has rules for where it does not."""
LAYER_KINDS = ("full_attention", "sliding_attention")
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Rotary scalings whose angles depend on the largest position in the forward, which on a rank is not the
document's length.
"""


def head_size(config: Any) -> int:
    """Channels of one attention head of a text config."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def attention_size(config: Any) -> int:
    """Channels of a head as the kernels see it: of keys or values, whichever has more."""
    keys = (getattr(config, "qk_nope_head_dim", None) or 0) + (getattr(config, "qk_rope_head_dim", None) or 0)
    return max(keys, getattr(config, "v_head_dim", None) or 0) or head_size(config)


def positions(config: Any) -> int:
    """Tokens that the target was made for, as servers count them. `config`: a text config.

    Linear and dynamic scaling stretch `max_position_embeddings`; the others' configs name the stretched
    length, but for YaRN, where both are in use.
    """
    longest = int(config.max_position_embeddings)
    stretched = [longest]
    for rope in _ropes(config):
        kind, factor = rope.get("rope_type"), rope.get("factor") or 1.0
        if kind == "yarn":
            stretched.append(int((rope.get("original_max_position_embeddings") or 0) * factor))
        elif kind in ("linear", "dynamic") and "rope_type" in config.rope_parameters:
            stretched.append(int(longest * factor))
    return max(stretched)


def beyond_positions(longest: int, known: int) -> str | None:
    """What to warn of when documents of up to `longest` tokens (data.max_length) meet a target of `known`."""
    if longest <= known:
        return None
    return (
        f"data.max_length is {longest}, and the target knows {known} positions (max_position_embeddings): "
        "what it computes beyond them is not what it was trained for, and a draft learns that. Set "
        f"data.max_length={known}, or give the target's config the rotary scaling that it is served with."
    )


def check_supported(config: Any, path: str) -> None:
    """Check that a draft can learn from the target.

    Args:
        config: the target's text config.
        path: `target.path`, for messages.

    Raises:
        ValueError: an encoder-decoder, or a config without the sizes that every decoder has.
    """
    named = f"target.path = {path!r} is a model of the family {config.model_type!r}"
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{named}, an encoder-decoder: a draft follows a decoder-only model. Choose one.")
    missing = [name for name in NEEDED if getattr(config, name, None) is None]
    if missing:
        raise ValueError(
            f"{named}, whose config lacks {', '.join(missing)}: without them there is no saying what the "
            "draft reads and how far it is served. Choose a decoder-only model whose config has them; "
            "docs/targets.md names the tested families."
        )


def check_parallel(full_config: Any, path: str, ulysses: int, longest: int) -> None:
    """Check that the target can run cut into spans over several ranks.

    Args:
        full_config: the config as AutoConfig reads it.
        path: `target.path`, for messages.
        ulysses: `parallel.ulysses`.
        longest: `data.max_length`.

    Raises:
        ValueError: the attention does not go through transformers' attention interface, is capped or
            bidirectional; a layer is neither full nor sliding attention; the weights are quantized;
            `ulysses` does not divide the query heads; or the rotary angles depend on the document's length.
    """
    config = full_config.get_text_config()
    named = f"target.path = {path!r} ({config.model_type}) cannot run on several ranks"
    fix = (
        "Capture it with target.capture: single, which runs it as transformers does, "
        "or choose another target."
    )
    if not _has_attention_interface(full_config):
        raise ValueError(
            f"{named}: its attention does not go through transformers' attention interface. {fix}"
        )
    softcap = getattr(config, "attn_logit_softcapping", None)
    if softcap is not None:
        raise ValueError(
            f"{named}: its attention scores are capped (attn_logit_softcapping = {softcap}), no kernel does "
            f"that. {fix}"
        )
    kinds = getattr(config, "layer_types", None) or ()
    other = sorted(set(kinds) - set(LAYER_KINDS))
    if other:
        raise ValueError(
            f"{named}: it has layers of the kind {', '.join(other)}, only {' and '.join(LAYER_KINDS)} are "
            f"known. {fix}"
        )
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        raise ValueError(f"{named}: its attention is bidirectional. {fix}")
    if _quantization(full_config) is not None:
        raise ValueError(
            f"{named}: its weights are quantized, and ZeRO-3 shards plain ones. Name the unquantized model, "
            f"or: {fix}"
        )
    if config.num_attention_heads % ulysses:
        fitting = max(degree for degree in range(1, ulysses) if config.num_attention_heads % degree == 0)
        raise ValueError(
            f"parallel.ulysses is {ulysses}, which does not divide the {config.num_attention_heads} query "
            f"heads of the target. Set it to {fitting}; the rest of the sequence parallelism belongs to "
            "parallel.ring."
        )
    _check_rope(config, longest, named, fix)


def check_quantization(full_config: Any, path: str) -> None:
    """Refuse quantized weights that this machine cannot read. `full_config`: as AutoConfig reads it.

    Raises:
        ValueError: a method that transformers does not know, or whose package or device is not here.
    """
    settings = _quantization(full_config)
    if settings is None:
        return
    from transformers.quantizers import AutoHfQuantizer

    given = settings if isinstance(settings, dict) else settings.to_dict()
    try:
        AutoHfQuantizer.from_config(dict(given), pre_quantized=True).validate_environment(device_map=None)
    except Exception as error:  # each method's own: a missing package, device, key or an unknown method
        raise ValueError(
            f"target.path = {path!r} ({full_config.model_type}) has quantized weights (quantization_config."
            f"quant_method = {given.get('quant_method')!r}), which cannot be loaded here: {error} Install "
            "what it asks for, or name the unquantized model."
        ) from error


def _quantization(full_config: Any) -> Any:
    """The quantization of the checkpoint, which a vision-language config may hold in its text part."""
    parts = (full_config, full_config.get_text_config())
    return next((found for part in parts if (found := getattr(part, "quantization_config", None))), None)


def _check_rope(config: Any, longest: int, named: str, fix: str) -> None:
    for rope in _ropes(config):
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if rope.get("rope_type") in LENGTH_DEPENDENT_ROPE and longest > original:
            raise ValueError(
                f"{named}: the angles of its {rope['rope_type']} rotary scaling depend on the length of the "
                f"document, which no rank holds whole, from {original} tokens on (data.max_length is "
                f"{longest}). {fix}"
            )


def _ropes(config: Any) -> list[Mapping[str, Any]]:
    """The rotary settings of a config: one for all layers, or one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return [parameters] if "rope_type" in parameters else [part for part in parameters.values() if part]


def _has_attention_interface(full_config: Any) -> bool:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(full_config), None)
    return bool(getattr(model_class, "_supports_attention_backend", False))
