"""One training step of speculators' or SpecForge's own code, on weights and rows that are given.

Runs in the environment of tests/served/make_environment.sh, from the root of this repository:
`python -m judge.block_peers PACKAGE THREADS`. Reads questions, a line of JSON each, and answers each with
one: `load` (a case of `block_steps.for_peer`, and a form of attention), `run` (a timed step), `bytes` (a
step's peak bytes of tensors), `gradients` (of the last step, to a file). An exception is answered with
`error`. Models, losses and metrics are the package's own, as its trainer calls them on a CPU. Replaced is
only what is drawn by chance: the anchors of DFlash, and P-EAGLE's guesses unless the case leaves them drawn.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from judge.tensor_bytes import TensorBytes

Case = dict[str, Any]


@dataclass(frozen=True)
class Loaded:
    """A model with its case.

    Attributes:
        loss: forward, up to the loss.
        parameters: all that is trained, by the product's names.
    """

    loss: Callable[[], Tensor]
    parameters: dict[str, Tensor]


def dflash_by_speculators(case: Case, attention: str) -> Loaded:
    from speculators.losses import resolve_loss_config
    from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig, core
    from transformers import Qwen3Config

    layer = Qwen3Config(**case["layer"])
    layer._attn_implementation = attention
    width = layer.hidden_size
    config = DFlashSpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=len(case["kept"]),
        block_size=case["block_size"],
        mask_token_id=case["mask_token_id"],
        aux_hidden_state_layer_ids=list(range(1, 1 + case["aux"].shape[1] // width)),
    )
    model = DFlashDraftModel(config).float().train()
    _fill(model, case, case["embedding"])
    anchors = case["anchors"] + 1
    core.select_anchors = lambda *_: (anchors, torch.ones(len(anchors), dtype=torch.bool))
    length = len(case["tokens"])
    inputs: dict[str, Any] = {
        "hidden_states": case["aux"][None],
        "input_ids": case["tokens"][None],
        "loss_mask": torch.ones(1, length, dtype=torch.long),
        "verifier_last_hidden_states": case["hidden"][None],
        "document_ids": torch.zeros(1, length, dtype=torch.long),
        "position_ids": torch.arange(length)[None],
        "loss_config": resolve_loss_config("kl_div", "eager"),
        "gamma": -1 / math.log(case["decay"]),
        "max_anchors": len(anchors),
    }
    return Loaded(lambda: model(**inputs)[1], _trained(model))


def dflash_by_specforge(case: Case, attention: str) -> Loaded:
    from specforge.algorithms.common.dflash_family_model import OnlineDFlashModel
    from specforge.modeling.draft.dflash import DFlashDraftModel
    from transformers import Qwen3Config

    config = Qwen3Config(**case["layer"])
    config._attn_implementation = attention
    config.block_size, config.num_target_layers = case["block_size"], 12
    layers = list(range(case["aux"].shape[1] // config.hidden_size))
    config.dflash_config = {"mask_token_id": case["mask_token_id"], "target_layer_ids": layers}
    draft = DFlashDraftModel(config).float().train()
    of_head = "lm_head.weight"
    draft.load_state_dict({name: w for name, w in case["weights"].items() if name != of_head})
    vocabulary, width = case["weights"][of_head].shape
    head = torch.nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
    head.weight.copy_(case["weights"][of_head])
    model = OnlineDFlashModel(
        draft,
        head,
        torch.nn.Embedding.from_pretrained(case["embedding"]),
        case["mask_token_id"],
        case["block_size"],
        attention_backend=attention,
        loss_decay_gamma=-1 / math.log(case["decay"]),
    )
    anchors = case["anchors"][None] + 1
    model._sample_anchor_positions = lambda *_: (anchors, torch.ones_like(anchors, dtype=torch.bool))
    inputs = (case["tokens"][None], case["aux"][None], torch.ones(1, len(case["tokens"])))
    return Loaded(lambda: model(*inputs)[0], _trained(draft))


def peagle_by_speculators(case: Case, attention: str) -> Loaded:
    from speculators.losses import resolve_loss_config
    from speculators.models.eagle3.data import shift_batch
    from speculators.models.peagle import PEagleSpeculatorConfig, core
    from transformers import LlamaConfig

    layer = LlamaConfig(**case["layer"])
    layer._attn_implementation = attention
    config = PEagleSpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=len(case["kept"]),
        mask_token_id=case["mask_token_id"],
        eagle_aux_hidden_state_layer_ids=list(range(1, 1 + case["aux"].shape[1] // layer.hidden_size)),
    )
    model = core.PEagleDraftModel(config).float().train()
    embedding = case["embedding"].clone()
    embedding[case["mask_token_id"]] = case["weights"]["mask_embedding"]
    _fill(model, case, embedding)
    length = len(case["tokens"])
    mask = torch.ones(length, dtype=torch.long)
    if case["drawn"]:
        mask[:2] = 0  # A supervised first slot would make a chain of slot -1.
        guesses: AbstractContextManager[Any] = nullcontext()
    else:
        every = _every_guess(length - 1, case["guesses"])
        guesses = mock.patch.object(core, "generate_cod_sample_indices", lambda **_: every)
    batch = shift_batch(
        {
            "input_ids": case["tokens"],
            "hidden_states": case["aux"],
            "verifier_last_hidden_states": case["hidden"],
            "loss_mask": mask,
            "lengths": torch.tensor([length]),
            "position_ids": torch.arange(length),
        }
    )
    names = ("hidden_states", "input_ids", "loss_mask", "verifier_last_hidden_states")
    inputs: dict[str, Any] = {name: batch[name][None] for name in names}
    inputs["document_ids"] = torch.zeros(1, length - 1, dtype=torch.long)
    inputs["loss_config"] = resolve_loss_config("kl_div", "eager")

    def loss() -> Tensor:
        torch.manual_seed(0)
        with guesses:
            return model(**inputs, num_depths=case["guesses"])[1]

    return Loaded(loss, _trained(model))


BUILDERS: dict[tuple[str, str], Callable[[Case, str], Loaded]] = {
    ("speculators", "dflash"): dflash_by_speculators,
    ("specforge", "dflash"): dflash_by_specforge,
    ("speculators", "peagle"): peagle_by_speculators,
}


def _fill(model: Any, case: Case, embedding: Tensor) -> None:
    """Give speculators' model all its weights, and fp32 buffers of the vocabulary."""
    kept, vocabulary = case["kept"], len(case["head"])
    if len(kept) != vocabulary:
        t2d = torch.zeros(vocabulary, dtype=torch.bool)
        t2d[kept] = True
        model.load_vocab_mappings(t2d, kept - torch.arange(len(kept)))
    weights = {name: w for name, w in case["weights"].items() if name != "mask_embedding"}
    if "mask_hidden" in weights:
        weights["mask_hidden"] = weights["mask_hidden"].view(1, 1, -1)
    of_target = {"embed_tokens.weight": embedding, "verifier_norm.weight": case["norm"]}
    of_target["verifier_lm_head.weight"] = case["head"][kept]
    found = model.load_state_dict({**weights, **of_target}, strict=False)
    assert not found.unexpected_keys and set(found.missing_keys) <= {"t2d", "d2t"}, found


def _every_guess(slots: int, guesses: int) -> tuple[Tensor, Tensor]:
    """Slots and numbers of all guesses that lie in a document of so many slots."""
    counts = [slots - guess for guess in range(guesses)]
    return (
        torch.cat([torch.arange(count) for count in counts]),
        torch.repeat_interleave(torch.arange(guesses), torch.tensor(counts)),
    )


def _trained(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class Worker:
    """Answers questions about one package."""

    def __init__(self, package: str) -> None:
        self._package = package
        self._loaded: Loaded | None = None
        self._case: Case = {}

    def load(self, case: str, attention: str) -> dict[str, Any]:
        self._loaded = None
        self._case = torch.load(case)
        self._loaded = BUILDERS[self._package, self._case["algorithm"]](self._case, attention)
        return {}

    def run(self) -> dict[str, Any]:
        """A step from the rows in memory to the loss and the norm of whole gradients."""
        assert self._loaded is not None
        parameters = self._loaded.parameters.values()
        for parameter in parameters:
            parameter.grad = None
        started = time.perf_counter()
        loss = self._loaded.loss()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()
        return {"loss": loss.item(), "grad_norm": norm, "seconds": time.perf_counter() - started}

    def bytes(self) -> dict[str, Any]:
        with TensorBytes() as counted:
            self.run()
        return {"peak_bytes": counted.above_baseline}

    def gradients(self, to: str) -> dict[str, Any]:
        """Those that the product has too, flattened, by its names."""
        assert self._loaded is not None
        found = {name: p.grad for name, p in self._loaded.parameters.items() if p.grad is not None}
        if self._case["algorithm"] == "peagle":
            found["mask_embedding"] = found.pop("embed_tokens.weight")[self._case["mask_token_id"]]
        torch.save({name: gradient.double().flatten() for name, gradient in found.items()}, to)
        return {}

    def versions(self) -> dict[str, Any]:
        from importlib.metadata import version

        return {name: version(name) for name in (self._package, "torch", "transformers")}


def main(package: str, threads: str) -> None:
    """Answer until the questions end. What packages print goes to the error stream."""
    torch.set_num_threads(int(threads))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(package)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = getattr(worker, asked.pop("what"))(**asked)
        except Exception as error:
            first, *_ = [*str(error).strip().splitlines(), ""]
            answer = {"error": f"{type(error).__name__}: {first}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
