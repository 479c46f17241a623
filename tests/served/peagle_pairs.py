"""P-EAGLE drafts of one small random target, in both layouts, made in seconds for servers that nobody here
wrote.

The product does not train P-EAGLE yet: a draft is trained by the dense reference itself, on the target's own
answers, until some of its guesses are accepted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig

from eagle3_ds.draft import VocabularyMap
from eagle3_ds.targets import Target, capture_hidden_states, choose_aux_layers
from judge.cases import parameter_shapes
from judge.dense_reference import Frozen, MicroBatch
from judge.peagle_reference import peagle_guesses
from tests.served.pairs import (
    DRAFT_VOCABULARY,
    LLAMA3,
    PROMPTS,
    SIZES,
    VOCABULARY,
    answered_prompts,
    random_target,
)

MASK_TOKEN, GUESSES, TRAIN_STEPS = 2, 5, 40
"""No prompt and no answer is likely to hold the mask token; prompts begin at 3."""
NORMS = ("norm_before_fc", "fc_norm", "norm_before_residual")


@dataclass(frozen=True)
class PEagleDraft:
    """A draft in memory: weights by the reference's names, fp32; frozen: embedding, head and map of its
    target.
    """

    config: LlamaConfig
    weights: dict[str, Tensor]
    frozen: Frozen
    vocabulary: VocabularyMap


@dataclass(frozen=True)
class Workshop:
    """The target in its folder, and texts of it: prompts with its own greedy answers."""

    path: Path
    target: Target
    prompts: list[list[int]]
    answers: list[list[int]] = field(repr=False)

    @classmethod
    def open(cls, folder: Path) -> Workshop:
        path = folder / "target"
        model = random_target(path, "llama", rope_parameters=LLAMA3)
        config = model.config
        target = Target(model, None, config, choose_aux_layers(config.num_hidden_layers))
        prompts, answers = answered_prompts(model)
        return cls(path, target, prompts, answers)

    @property
    def judged(self) -> list[list[int]]:
        return self.prompts[:PROMPTS]

    def draft(self, layers: int = 1, window: int | None = None, norms: tuple[str, ...] = ()) -> PEagleDraft:
        """A draft of these sizes, trained on all texts for a few steps."""
        config = draft_config(layers, window, norms)
        counts = torch.bincount(torch.tensor(self.answers).flatten(), minlength=VOCABULARY)
        vocabulary = VocabularyMap.from_counts(counts, DRAFT_VOCABULARY)
        frozen = Frozen(self.target.embedding, self.target.model.lm_head.weight, vocabulary.d2t)
        draft = PEagleDraft(config, random_weights(config), frozen, vocabulary)
        self._train(draft)
        return draft

    def _train(self, draft: PEagleDraft) -> None:
        """Adam on the cross entropy of the target's own tokens, in place."""
        to_draft = torch.full((VOCABULARY,), -100)
        to_draft[draft.vocabulary.draft_to_target] = torch.arange(DRAFT_VOCABULARY)
        batches = []
        for prompt, answer in zip(self.prompts, self.answers, strict=True):
            tokens = torch.tensor(prompt + answer)
            aux, teacher = capture_hidden_states(self.target, tokens)
            batches.append(MicroBatch(tokens, torch.ones(len(tokens)).bool(), (len(tokens),), aux, teacher))
        for weight in draft.weights.values():
            weight.requires_grad_()
        optimizer = torch.optim.Adam(draft.weights.values(), lr=3e-3)
        for step in range(TRAIN_STEPS):
            for batch in batches[step % 3 :: 3]:
                guesses = peagle_guesses(draft.weights, draft.config, draft.frozen, batch, GUESSES)
                wanted = to_draft[batch.token_ids]
                torch.stack(
                    [
                        functional.cross_entropy(logits[: -2 - k], wanted[2 + k :])
                        for k, logits in enumerate(guesses)
                    ]
                ).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        for weight in draft.weights.values():
            weight.requires_grad_(False)


def draft_config(layers: int, window: int | None, norms: tuple[str, ...]) -> LlamaConfig:
    sizes = {name: size for name, size in SIZES.items() if name != "num_hidden_layers"}
    limits = (
        {"sliding_window": window, "layer_types": ["sliding_attention"] * layers, "use_sliding_window": True}
        if window
        else {}
    )
    return LlamaConfig(
        **sizes,
        num_hidden_layers=layers,
        draft_vocab_size=DRAFT_VOCABULARY,
        rms_norm_eps=1e-6,
        rope_parameters=LLAMA3,
        tie_word_embeddings=False,
        num_aux_layers=3,
        mask_token_id=MASK_TOKEN,
        **limits,
        **dict.fromkeys(norms, True),
    )


def random_weights(config: LlamaConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {
        **parameter_shapes(config),
        "mask_embedding": (config.hidden_size,),
        "mask_hidden": (config.num_aux_layers * config.hidden_size,),
    }
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        is_norm = len(shape) == 1 and not name.startswith("mask_")
        weights[name] = 1 + 0.2 * noise if is_norm else noise * (shape[-1] ** -0.5 if len(shape) > 1 else 1)
    return weights


def own_embedding(draft: PEagleDraft) -> Tensor:
    """The target's embedding with the mask token's row learned, [V, H]."""
    embedding = draft.frozen.embedding.clone()
    embedding[MASK_TOKEN] = draft.weights["mask_embedding"]
    return embedding


def write_vllm(draft: PEagleDraft, folder: Path, leave_out: str | None = None) -> Path:
    """The draft in vLLM's layout (docs/peagle.md), without the tensor `leave_out`."""
    tensors = {
        name.replace("layers.0.", "midlayer."): weight
        for name, weight in draft.weights.items()
        if name != "mask_embedding"
    }
    keys = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "ptd_token_id": MASK_TOKEN,
        "draft_vocab_size": DRAFT_VOCABULARY,
        **_geometry(draft.config),
        **{name: True for name in NORMS if getattr(draft.config, name, False)},
    }
    return _write(folder, keys, _with_common(tensors, draft), leave_out)


def write_speculators(draft: PEagleDraft, folder: Path, target: Path) -> Path:
    """The draft in speculators' layout, which names its target."""
    tensors = {name: weight for name, weight in draft.weights.items() if name != "mask_embedding"}
    proposal = {"proposal_type": "greedy", "speculative_tokens": GUESSES}
    verifier = {"name_or_path": str(target), "architectures": ["LlamaForCausalLM"]}
    keys = {
        "architectures": ["PEagleSpeculator"],
        "speculators_model_type": "peagle",
        "speculators_version": "0.9.0",
        "mask_token_id": MASK_TOKEN,
        "draft_vocab_size": DRAFT_VOCABULARY,
        "transformer_layer_config": _geometry(draft.config),
        "speculators_config": {
            "algorithm": "peagle",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": verifier,
        },
        **{name: bool(getattr(draft.config, name, False)) for name in NORMS},
    }
    return _write(folder, keys, _with_common(tensors, draft), None)


def _with_common(tensors: dict[str, Tensor], draft: PEagleDraft) -> dict[str, Tensor]:
    common = {
        "mask_hidden": tensors["mask_hidden"].view(1, 1, -1),
        "embed_tokens.weight": own_embedding(draft),
    }
    return {**tensors, **common, **draft.vocabulary.exported()}


def _geometry(config: LlamaConfig) -> dict[str, Any]:
    ours = {"draft_vocab_size", "num_aux_layers", "mask_token_id", "architectures", "dtype", *NORMS}
    return {name: value for name, value in config.to_dict().items() if name not in ours}


def _write(folder: Path, keys: dict[str, Any], tensors: dict[str, Tensor], leave_out: str | None) -> Path:
    folder.mkdir(parents=True)
    kept = {name: tensor.detach().contiguous() for name, tensor in tensors.items() if name != leave_out}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"dtype": "float32", **keys}))
    return folder
