"""Whether a target's modules are where a capture looks for them, and whether its logits are the product of
head and hidden state, or a constant times it: found out from what the model does, not from names of families.

From the config alone, before a run starts: the model is built without weights (meta device), and small
tensors are sent through what lies around its decoder. After loading: by its own weights, on a short text.

Legend: L tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.modeling_outputs import MoeModelOutputWithPast

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 2e-2}
"""Largest relative difference between a target's logits and head x hidden state that is rounding."""
LOUD = 50.0
"""Logits of this size are tried as well: a soft cap changes small ones by less than rounding."""
UNMASKED = "eagle3_ds_unmasked"
"""An attention for which transformers builds no mask: a mask needs values, which the meta device has not."""
TRIED_TOKENS, TRIED_VOCABULARY = 12, 32
_FIX = (
    "The draft is taught from the softmax of head x hidden state: choose a target whose logits are that "
    "product, or a constant positive number times it."
)


def find_decoder(model: Any) -> Any:
    """The module that holds `layers`: what `get_decoder` gives, or the base model where that is the model
    itself.
    """
    found = model.get_decoder() if hasattr(model, "get_decoder") else model
    for candidate in (found, getattr(model, "base_model", None), getattr(model, "model", None)):
        if isinstance(getattr(candidate, "layers", None), nn.ModuleList):
            return candidate
    return found


def check_modules(model: Any, config: Any, path: str) -> None:
    """Look for what a capture hooks and reads. `config`: the text config; the model may be on any device.

    Raises:
        ValueError: layers, embedding or head are not where they are looked for, or are of another shape.
    """
    decoder = find_decoder(model)
    missing = _missing_modules(model, decoder, config)
    if missing:
        has = ", ".join(name for name, _ in decoder.named_children())
        raise ValueError(
            f"{_named(config, path)} ({type(model).__name__}), in which a capture looked for "
            f"{'; '.join(missing)}. {type(decoder).__name__} has {has}. Choose a target of stacked decoder "
            "layers; docs/targets.md names the tested families."
        )
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ValueError(
            f"target.path = {path!r} has a bias in its head: the draft is taught from the product of "
            "head and hidden state alone. Choose a target without one."
        )


def _missing_modules(model: Any, decoder: Any, config: Any) -> list[str]:
    """What was looked for and not found, in words."""
    missing = []
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != config.num_hidden_layers:
        missing.append(f"its {config.num_hidden_layers} layers as `layers` of {type(decoder).__name__}")
    wanted = (config.vocab_size, config.hidden_size)
    for what in ("input", "output"):
        weight = getattr(_given(getattr(model, f"get_{what}_embeddings")), "weight", None)
        if not isinstance(weight, Tensor):
            missing.append(f"get_{what}_embeddings with a weight")
        elif tuple(weight.shape) != wanted or weight.dtype not in TOLERANCE:
            found = f"{tuple(weight.shape)} of {weight.dtype}"
            missing.append(f"get_{what}_embeddings with {wanted} plain weights and found {found}")
    return missing


def check_config_structure(full_config: Any, path: str) -> None:
    """What can be found out without weights. `full_config`: as AutoConfig reads it.

    Raises:
        ValueError: as `check_modules`; layers that pass on another tensor than one hidden state per token;
            logits that are no constant positive number times head x hidden state.
    """
    config = full_config.get_text_config()
    model = build_empty(full_config, path)
    check_modules(model, config, path)
    _check_layer_inputs(model, config, path)
    factor = _factor_of(model, config, path)
    if factor != 1.0:
        logger.info("%s: logits are %g times head x hidden state; the head is read so", path, factor)


def logits_factor(full_config: Any, path: str) -> float:
    """The constant that stands between a target's logits and head x hidden state: 1 for most families,
    1 / `logits_scaling` for Granite. `full_config`: as AutoConfig reads it.

    It is measured without weights: a stand-in for the decoder hands the family's own code hidden states and a
    small head. 1 where that code needs more than those; `check_logits` then compares after loading.

    Raises:
        ValueError: the model cannot be built, or no constant positive number stands between them.
    """
    config = full_config.get_text_config()
    model = build_empty(full_config, path)
    return _factor_of(model, config, path)


def fold_factor(head: Tensor, factor: float) -> Tensor:
    """The head with which head x hidden state is the target's logits, in the dtype of `head`: exact for a
    power of two, rounded once per weight for another factor.
    """
    return head if factor == 1.0 else (head.float() * factor).to(head.dtype)


def _factor_of(model: Any, config: Any, path: str) -> float:
    """Spends the model: its decoder and head are stand-ins afterwards."""
    try:
        found, expected = _stand_in_logits(model, config.hidden_size)
    except Exception as error:  # a family's own code around the decoder, which may ask for anything
        logger.debug("%s: its logits are judged after loading (%s)", path, error)
        return 1.0
    factor = constant_factor(found, expected, TOLERANCE[torch.float32])
    if factor is None or factor <= 0:
        _refuse_logits(found, expected, config, path)
    # The nearest fp32 number takes back the rounding of the comparison: 0.0625 is then 0.0625.
    return float(torch.tensor(factor, dtype=torch.float32))


def check_logits(model: Any, config: Any, path: str, factor: float = 1.0) -> None:
    """Hold the logits of a loaded target against `factor` times head x hidden state, on one short document.

    Raises:
        ValueError: they differ by more than rounding.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, TRIED_TOKENS), generator=generator)
    ids = ids.to(model.get_input_embeddings().weight.device)
    head = model.get_output_embeddings()
    with torch.no_grad():
        hidden = find_decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
        expected = functional.linear(hidden, head.weight)
        logits = model(input_ids=ids, use_cache=False).logits
        _check_product(logits, expected * factor, config, path)
        loud = _Louder(LOUD / max(float(expected.float().std()), 1e-6))
        handle = head.register_forward_hook(loud)
        try:
            found = model(input_ids=ids, use_cache=False).logits
        finally:
            handle.remove()
    if loud.calls == 1:
        _check_product(found, expected * loud.factor * factor, config, path)


def build_empty(full_config: Any, path: str) -> Any:
    """The model without weights, on the meta device, as of plain ones where the checkpoint is quantized.

    Raises:
        ValueError: transformers cannot build it from its config.
    """
    config = copy.deepcopy(full_config)
    for part in (config, config.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # of a family's own code: a missing key, a size that does not divide another
        raise ValueError(
            f"{_named(config.get_text_config(), path)}: transformers cannot build it from its config.json "
            f"({type(error).__name__}: {error}). Correct config.json, or name a model that this version of "
            "transformers builds."
        ) from error
    return model.requires_grad_(False).eval()


class _Louder:
    """A forward hook of the head: its output times `factor`."""

    def __init__(self, factor: float) -> None:
        self.factor, self.calls = factor, 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        self.calls += 1
        return output * self.factor


class _ReachedError(Exception):
    """The first layer was reached: nothing after it matters."""


def _check_layer_inputs(model: Any, config: Any, path: str) -> None:
    """Raises ValueError when the first layer is handed something else than [1, L, H]."""
    decoder, shapes = find_decoder(model), list[tuple[int, ...] | None]()

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        shapes.append(tuple(hidden.shape) if isinstance(hidden, Tensor) else None)
        raise _ReachedError

    AttentionInterface.register(UNMASKED, _no_attention)
    handle = decoder.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        decoder.set_attn_implementation(UNMASKED)
        decoder(input_ids=torch.zeros(1, TRIED_TOKENS, dtype=torch.int64, device="meta"), use_cache=False)
    except Exception as error:  # _ReachedError, or code that needs values, which the meta device has not
        logger.debug("%s: up to its first layer: %s", path, type(error).__name__)
    finally:
        handle.remove()
    wanted = (1, TRIED_TOKENS, config.hidden_size)
    if shapes and shapes[0] != wanted:
        raise ValueError(
            f"{_named(config, path)}, whose layers pass on {shapes[0] or 'no tensor'} where a capture looked "
            f"for one hidden state per token, {wanted}. Choose a target of stacked decoder layers; "
            "docs/targets.md names the tested families."
        )


def _stand_in_logits(model: Any, hidden_size: int) -> tuple[Tensor, Tensor]:
    """What the model makes of hidden states that a stand-in decoder hands it with a small head, and their
    plain product.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, TRIED_TOKENS, hidden_size, generator=generator)
    head = nn.Linear(hidden_size, TRIED_VOCABULARY, bias=False, device="cpu", dtype=torch.float32)
    weight = torch.randn(TRIED_VOCABULARY, hidden_size, generator=generator)
    head.weight.data = weight * (LOUD / hidden_size**0.5)
    find_decoder(model).forward = _always(MoeModelOutputWithPast(last_hidden_state=hidden))
    model.set_output_embeddings(head)
    with torch.no_grad():
        found = model(inputs_embeds=torch.zeros_like(hidden), use_cache=False).logits
        return found, head(hidden)


def _no_attention(module: nn.Module, query: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, None]:
    return query.transpose(1, 2), None


def _always(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


def _check_product(found: Tensor, expected: Tensor, config: Any, path: str) -> None:
    """Raises ValueError when the logits `found` are not `expected`, head x hidden state."""
    if product_problem(found, expected, TOLERANCE[expected.dtype]) is not None:
        _refuse_logits(found, expected, config, path)


def _refuse_logits(found: Tensor, expected: Tensor, config: Any, path: str) -> NoReturn:
    problem = product_problem(found, expected, TOLERANCE[expected.dtype])
    settings = [f"{key} = {value}" for key, value in sorted(config.to_dict().items()) if _may_be(key, value)]
    told = f" (config.json has {', '.join(settings)})" if settings else ""
    raise ValueError(f"{_named(config, path)}, whose logits are {problem}{told}. {_FIX}")


def product_problem(found: Tensor, expected: Tensor, tolerance: float) -> str | None:
    """How the logits `found` differ from the product `expected`; None where only by rounding."""
    if found.shape != expected.shape:
        return f"{tuple(found.shape)} where head x hidden state is {tuple(expected.shape)}"
    found, expected = found.double(), expected.double()
    difference = float((found - expected).norm() / expected.norm())
    if difference <= tolerance:
        return None
    factor = constant_factor(found, expected, tolerance)
    if factor is not None:
        kind, times = ("sharp", 1 / factor) if abs(factor) < 1 else ("flat", factor)
        return f"{factor:.4g} times head x hidden state: the teacher would be {times:.4g} times too {kind}"
    return f"not head x hidden state (a relative difference of {difference:.2g}, no constant factor)"


def constant_factor(found: Tensor, expected: Tensor, tolerance: float) -> float | None:
    """The number that `found` is times `expected`, to rounding; None where there is none."""
    if found.shape != expected.shape:
        return None
    found, expected = found.double(), expected.double()
    factor = float((found * expected).sum() / (expected * expected).sum())
    rest = float((found - factor * expected).norm())
    return factor if rest <= tolerance * float(found.norm()) else None


def _may_be(key: str, value: Any) -> bool:
    """Whether a setting may be what changes logits: told in a message, judged by nobody."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and value != 1
    return is_number and any(word in key for word in ("logit", "lm_head", "dim_model"))


def _given(getter: Callable[[], Any]) -> Any:
    """What `getter` gives; something without weights where the family has none."""
    try:
        return getter()
    except (AttributeError, NotImplementedError):
        return SimpleNamespace()


def _named(config: Any, path: str) -> str:
    return f"target.path = {path!r} is a model of the family {config.model_type!r}"
