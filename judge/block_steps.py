"""A training step of DFlash or P-EAGLE as benchmarks take it: inputs, the product's side, and what another
package is handed to compute the same.

One document, all of whose tokens are supervised, and a teacher whose favourite is the text's next token, as
in answers of the target itself. Where packages differ the settings are those on which all agree
(docs/dflash.md, docs/peagle.md): with the factor of `Comparable` the losses and gradients are one.

Legend: L tokens, H hidden size, A entries of a slot's captured hidden states, V target vocabulary, Vd draft
vocabulary, K guesses, Q slots with guesses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LlamaConfig

from eagle3_ds.algorithms import ALGORITHMS
from eagle3_ds.config import Recipe
from eagle3_ds.draft import Draft
from eagle3_ds.layout import PackedSequence
from judge.dense_reference import Frozen
from judge.product import DS_CONFIGS
from judge.product_step import TrainerStep

MASK_TOKEN, DECAY, EPS = 0, 0.8, 1e-6
"""The mask token, which no text holds; the weight of a DFlash guess beside that of the guess before."""
_ROWS = 256
"""Rows whose logits over a whole vocabulary exist at a time."""
_TARGET_LAYERS = 12
_SOFT, _SURE = (9.0, 1.0), (1e6, 6.0)
"""How far the teacher's hidden state leads to its favourite, where noise goes as far as the root of the
hidden size, and the scale of its logits. SpecForge learns the text itself: a teacher that is sure of it has
the same loss.
"""


@dataclass(frozen=True)
class Sizes:
    """Of the drafts and of their target, which is as wide."""

    hidden: int = 512
    inner: int = 1536
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    vocabulary: int = 32000
    draft_vocabulary: int = 8192
    block: int = 8
    dflash_layers: int = 3
    dflash_captured: int = 5
    guesses: int = 5
    peagle_layers: int = 1
    peagle_captured: int = 3


@dataclass(frozen=True)
class Pair:
    """A package and an algorithm that it trains too."""

    package: Literal["speculators", "specforge"]
    algorithm: Literal["dflash", "peagle"]

    def draft_vocabulary(self, sizes: Sizes) -> int:
        """SpecForge's DFlash has the target's head and vocabulary."""
        return sizes.vocabulary if self.package == "specforge" else sizes.draft_vocabulary

    def guesses(self, sizes: Sizes) -> int:
        return sizes.block - 1 if self.algorithm == "dflash" else sizes.guesses

    def captured(self, sizes: Sizes) -> int:
        return sizes.dflash_captured if self.algorithm == "dflash" else sizes.peagle_captured


@dataclass(frozen=True)
class StepCase:
    """One step to take.

    Attributes:
        anchors: of DFlash, how many.
        drawn: of P-EAGLE, whether the other side trains the guesses that its rule draws instead of all.
    """

    length: int
    anchors: int | None = None
    drawn: bool = False


@dataclass(frozen=True)
class Comparable:
    """The other side's loss is `factor` times ours less `entropy`; its gradients are `factor` times ours."""

    factor: float
    entropy: float


@dataclass(frozen=True)
class BlockModel:
    """What does not depend on the case: the draft's weights in fp32 by their names, and the target's."""

    pair: Pair
    sizes: Sizes
    recipe: Recipe
    config: LlamaConfig
    weights: dict[str, Tensor]
    frozen: Frozen

    @property
    def kept(self) -> Tensor:
        """The target's ids of the draft vocabulary, int64 [Vd]."""
        return self.frozen.d2t + torch.arange(len(self.frozen.d2t))

    def product(self) -> TrainerStep:
        """The product's side. Needs a world of one rank."""
        return TrainerStep(self.recipe, self._draft(), self.frozen)

    def _draft(self) -> Draft:
        draft = ALGORITHMS[self.pair.algorithm].build(self.config)
        draft.load_state_dict(self.weights)
        return draft


@dataclass(frozen=True)
class StepInputs:
    """A case in tensors.

    Attributes:
        hidden: fp32 [L, H], the target's hidden states before its final norm, whose weight is `norm` [H].
        pack: the same as the product reads it.
    """

    case: StepCase
    hidden: Tensor
    norm: Tensor
    pack: PackedSequence


def make_model(pair: Pair, sizes: Sizes, activation: str = "recompute") -> BlockModel:
    """Random weights, wide enough that attention is no mean."""
    recipe = _recipe(pair, sizes, activation)
    algorithm = ALGORITHMS[pair.algorithm]
    config = algorithm.build_config(_target(sizes), recipe)
    torch.manual_seed(0)
    draft = algorithm.build(config)
    weights = {
        name: w.detach().clone() if w.dim() == 1 else torch.randn_like(w) * w.shape[1] ** -0.5
        for name, w in draft.named_parameters()
    }
    embedding = torch.randn(sizes.vocabulary, sizes.hidden)
    head = torch.randn(sizes.vocabulary, sizes.hidden) * sizes.hidden**-0.5
    size = pair.draft_vocabulary(sizes)
    kept = torch.randperm(sizes.vocabulary)[:size].sort().values
    return BlockModel(
        pair, sizes, recipe, config, weights, Frozen(embedding, head, kept - torch.arange(size))
    )


def make_inputs(model: BlockModel, case: StepCase) -> StepInputs:
    """One document.

    Raises:
        ValueError: it has no room for the anchors, or a teacher's favourite is not the next token.
    """
    pair, sizes, frozen = model.pair, model.sizes, model.frozen
    generator = torch.Generator().manual_seed(case.length)
    texts = model.kept[model.kept != MASK_TOKEN]
    tokens = texts[torch.randint(len(texts), (case.length,), generator=generator)]
    aux = torch.randn(case.length, pair.captured(sizes) * sizes.hidden, generator=generator)
    strength, gain = _SURE if pair.package == "specforge" else _SOFT
    favourite = tokens.roll(-1)
    towards = torch.nn.functional.normalize(frozen.head[favourite], dim=-1)
    hidden = torch.randn(case.length, sizes.hidden, generator=generator) + strength * towards
    norm = gain * (1 + 0.1 * torch.randn(sizes.hidden, generator=generator))
    teacher = hidden * (hidden.square().mean(-1, keepdim=True) + EPS).rsqrt() * norm
    best = torch.cat([(rows @ frozen.head.T).argmax(-1) for rows in teacher.split(_ROWS)])
    if not torch.equal(best, favourite):
        raise ValueError(
            f"{int((best != favourite).sum())} of {case.length} teachers prefer another token than the "
            "text's next one. Give the model a larger hidden size."
        )
    mask = torch.ones(case.length, dtype=torch.bool)
    anchors = None
    if case.anchors is not None:
        # Of these all guesses lie in the document, and every package takes them.
        places = case.length - sizes.block
        if case.anchors > places:
            raise ValueError(
                f"{case.anchors} anchors in {case.length} tokens: a document has room for {places}. "
                "Give fewer."
            )
        anchors = torch.zeros(case.length, dtype=torch.bool)
        anchors[torch.randperm(places, generator=generator)[: case.anchors]] = True
    pack = PackedSequence(tokens, mask, (case.length,), best, aux, teacher, anchors)
    return StepInputs(case, hidden, norm, pack)


def for_peer(model: BlockModel, inputs: StepInputs) -> dict[str, Any]:
    """The step as `block_peers.py` reads it, by torch.save."""
    config, pack, frozen = model.config, inputs.pack, model.frozen
    names: tuple[str, ...] = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps")
    names += ("max_position_embeddings", "rope_parameters")
    assert isinstance(pack.aux, Tensor)
    return {
        "algorithm": model.pair.algorithm,
        "layer": {name: getattr(config, name) for name in names},
        "weights": model.weights,
        "embedding": frozen.embedding,
        "head": frozen.head,
        "kept": model.kept,
        "mask_token_id": MASK_TOKEN,
        "block_size": model.sizes.block,
        "guesses": model.pair.guesses(model.sizes),
        "decay": DECAY,
        "tokens": pack.token_ids,
        "aux": pack.aux,
        "hidden": inputs.hidden,
        "norm": inputs.norm,
        "anchors": None if pack.anchors is None else pack.anchors.nonzero()[:, 0],
        "drawn": inputs.case.drawn,
    }


def comparable(model: BlockModel, inputs: StepInputs) -> Comparable:
    """How the other side's loss follows from ours.

    Its mean is one over all guesses, ours one for each guess and their weighted sum. speculators' loss is the
    divergence, less than the cross entropy by the teacher's entropy.
    """
    pack, K, length = inputs.pack, model.pair.guesses(model.sizes), inputs.case.length
    slots = torch.arange(length - 1) if pack.anchors is None else pack.anchors.nonzero()[:, 0]
    rows = slots[:, None] + 1 + torch.arange(K)
    inside = rows < length
    decay = DECAY if model.pair.algorithm == "dflash" else 1.0
    weight = decay ** torch.arange(K, dtype=torch.float64)
    counted = weight if model.pair.package == "specforge" else torch.ones_like(weight)
    denominator = float((inside * counted).sum())
    # `loss.reduction: slots`: anchors, or all slots of the document.
    ours = length if pack.anchors is None else len(slots)
    if model.pair.package == "specforge":
        return Comparable(ours / denominator, 0.0)
    of_rows = _entropies(model, inputs)
    of_guesses = torch.where(inside, of_rows[rows.clamp(max=length - 1)], 0.0)
    return Comparable(ours / denominator, float((of_guesses * weight).sum()) / denominator)


def _entropies(model: BlockModel, inputs: StepInputs) -> Tensor:
    """Of each row's teacher over the draft vocabulary, fp64 [L]."""
    head, teacher = model.frozen.head[model.kept].double(), inputs.pack.teacher
    assert isinstance(teacher, Tensor)
    found = []
    for rows in teacher.split(_ROWS):
        log = (rows.double() @ head.T).log_softmax(-1)
        found.append(-(log.exp() * log).sum(-1))
    return torch.cat(found)


def _target(sizes: Sizes) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.inner,
        num_hidden_layers=_TARGET_LAYERS,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=2**20,
        rms_norm_eps=EPS,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
    )


def _recipe(pair: Pair, sizes: Sizes, activation: str) -> Recipe:
    """Loss, sums and counted guesses are those on which the packages agree with the product."""
    of_algorithm: dict[str, Any]
    if pair.algorithm == "dflash":
        of_algorithm = {"block_size": sizes.block, "num_layers": sizes.dflash_layers}
        loss = {"decay": DECAY, "mask_alignment": "predicted", "reduction": "slots"}
    else:
        of_algorithm = {"ttt_steps": sizes.guesses, "num_layers": sizes.peagle_layers}
        loss = {"decay": 1.0, "reduction": "slots"}
    sections = {
        "target": {"path": "none", "aux_layers": tuple(range(1, 1 + pair.captured(sizes)))},
        "data": {"train": ("none",)},
        "draft": {
            "algorithm": pair.algorithm,
            "vocab_size": pair.draft_vocabulary(sizes),
            "mask_token_id": MASK_TOKEN,
            **of_algorithm,
        },
        "eval": {"draft_tokens": pair.guesses(sizes)},
        "loss": loss,
        "train": {"steps": 1, "dtype": "float32", "activation": activation, "gradient_clipping": 0.0},
        "deepspeed": str(DS_CONFIGS / "zero0.json"),
        "output_dir": "none",
    }
    return Recipe.model_validate(sections)
