"""The exactness matrix: cases that together have every pair of values of any two factors, and their inputs.

Legend: L tokens of a micro-batch, H hidden size of the draft, A = layers * the target's.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from judge.dense_reference import Frozen, LossRules, MicroBatch, Optimization
from judge.dflash_reference import sampled_anchors

Value = tuple[str, Any]
# The generator of cases fills earlier factors first. `topology` is (draft_dp, ring, ulysses), `deepspeed` a
# file of ds_configs/
FACTORS: Mapping[str, tuple[Any, ...]] = {
    "topology": (
        (1, 1, 1), (1, 1, 2), (1, 2, 1), (1, 2, 2), (2, 1, 2), (2, 2, 1), (1, 4, 1), (1, 1, 4), (2, 2, 2),
    ),
    "deepspeed": ("zero0", "zero1", "zero2", "zero3"),
    "documents": ("one", "many_unaligned", "unsupervised_rank", "indivisible", "answers"),
    "ttt_steps": (7, 3, 1),
    "zero_group": ("all", "draft_dp"),
    "accumulation": (1, 2),
    "heads": ("gqa", "mha"),
    "kv_exchange": ("gather", "ring", "ring_kept"),
    "dtype": ("float32", "bfloat16"),
    "alignment": ("served", "reference", "predicted"),
    "reduction": ("supervised", "slots"),
    "layers": (1, 2),
    "activation": ("recompute", "keep", "offload"),
    "tiles": ("one", "many"),
    "kernel": ("auto", "blockwise"),
    "rope": ("default", "llama3", "linear", "dynamic", "longrope", "partial"),
    "shape": ("target", "head_dim", "mlp", "narrow", "wide"),
    "window": (None, 24),
    "loss": ("kl", "tv", "lk_alpha", "lk_lambda"),
    "aux_layers": (3, 1, 5),
    "norms": ("none", "eagle3.1", "before_fc", "before_residual", "all", "all_before"),
    "algorithm": ("eagle3", "peagle", "dflash"),
    "block": ("both ways", "causal", "own mask"),
}  # fmt: skip
# What an algorithm's page of semantics refuses: P-EAGLE has no shift of the mask but a server's, and no step
# that reads an output. Blocks are DFlash's, which has none of EAGLE-3's norms, and nothing that offloads.
REFUSED: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "eagle3": {"alignment": ("predicted",), "block": ("causal", "own mask")},
    "peagle": {
        "alignment": ("reference", "predicted"),
        "norms": ("eagle3.1", "all"),
        "block": ("causal", "own mask"),
    },
    "dflash": {
        "alignment": ("reference",),
        "norms": ("eagle3.1", "before_fc", "before_residual", "all", "all_before"),
        "activation": ("offload",),
    },
}
ANCHOR_SHARE = 0.6
NORMS: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "eagle3.1": ("fc_norm", "norm_output"),
    "before_fc": ("norm_before_fc",),
    "before_residual": ("norm_before_residual",),
    "all": ("fc_norm", "norm_output", "norm_before_fc", "norm_before_residual"),
    "all_before": ("fc_norm", "norm_before_fc", "norm_before_residual"),
}
HEADS = {"gqa": (4, 2), "mha": (4, 4)}
# The draft's hidden size, its MLP width, and the channels of a head beyond its equal part of the hidden size.
SHAPE = {
    "target": (64, 96, 0), "head_dim": (64, 96, 8),
    "mlp": (64, 160, 0), "narrow": (48, 96, 0), "wide": (80, 96, 0),
}  # fmt: skip
# The original length is short, so that the test's documents reach all three of llama3's ranges.
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
ROPE: Mapping[str, Mapping[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    # Scores grow by 1.2, as they do for Phi-3.
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 1024},
    "llama3": LLAMA3,
    # A theta of its own, half of each head, and a scaling.
    "partial": {**LLAMA3, "rope_theta": 500.0, "partial_rotary_factor": 0.5},
}
LONG_FACTORS = (1.0, 1.1, 1.3, 1.7, 2.5, 4.0, 6.0, 9.0)
"""Of longrope, for the pairs of channels, again and again."""
_ALONE = {"unsupervised_rank": "many_unaligned"}
"""What stands for documents that one rank alone cannot have."""
HIDDEN, VOCABULARY, DRAFT_VOCABULARY = 64, 160, 128
MASK_TOKEN = 7
"""Texts hold it now and then, which no user's should: they must read the learned row too."""
NUM_STEPS = 3
# With a large epsilon Adam's step is proportional to small gradients, so that a wrong scale of the gradient
# changes the weights too.
OPTIMIZATION = Optimization(lr=2e-3, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.1, clip=1.0)


@dataclass(frozen=True)
class Case:
    """One row of the matrix: a value for each factor."""

    draft_dp: int = 1
    ring: int = 1
    ulysses: int = 1
    deepspeed: str = "zero2"
    zero_group: str = "all"
    accumulation: int = 1
    documents: str = "many_unaligned"
    heads: str = "gqa"
    kv_exchange: str = "gather"
    ttt_steps: int = 3
    dtype: str = "float32"
    alignment: str = "served"
    reduction: str = "supervised"
    layers: int = 1
    activation: str = "recompute"
    tiles: str = "many"
    kernel: str = "auto"
    rope: str = "llama3"
    shape: str = "target"
    window: int | None = None
    loss: str = "kl"
    aux_layers: int = 3
    norms: str = "none"
    algorithm: str = "eagle3"
    block: str = "both ways"

    @property
    def world_size(self) -> int:
        return self.draft_dp * self.ring * self.ulysses

    @property
    def tolerance(self) -> float:
        """The largest relative error that is allowed."""
        return 1e-5 if self.dtype == "float32" else 2e-2

    @property
    def rules(self) -> LossRules:
        return LossRules(self.ttt_steps, 0.8, self.alignment, self.reduction, self.loss)

    def factors(self) -> dict[str, Any]:
        """Value of each factor of the matrix."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"topology": (self.draft_dp, self.ring, self.ulysses), **values}

    def __str__(self) -> str:
        mesh = f"{self.draft_dp}x{self.ring}x{self.ulysses}"
        return (
            f"{mesh} {self.deepspeed}/{self.zero_group} acc{self.accumulation} {self.documents} {self.heads} "
            f"{self.kv_exchange} K{self.ttt_steps} {self.dtype} {self.alignment} {self.reduction} "
            f"layers{self.layers} {self.activation} tiles-{self.tiles} {self.kernel} rope-{self.rope} "
            f"shape-{self.shape} window-{self.window} {self.loss} aux{self.aux_layers} norms-{self.norms} "
            f"{self.algorithm} {self.block}"
        )


@dataclass(frozen=True)
class Inputs:
    """All inputs of a case. `steps[s][r]` are the micro-batches of draft_dp rank r at optimizer step s."""

    config: LlamaConfig
    weights: dict[str, Tensor]
    frozen: Frozen
    steps: list[list[list[MicroBatch]]]

    def step_batches(self) -> list[list[MicroBatch]]:
        """For each optimizer step, the micro-batches of all draft_dp ranks."""
        return [[batch for of_rank in step for batch in of_rank] for step in self.steps]


def is_allowed(values: Mapping[str, Any]) -> bool:
    """Whether the factors given so far can stand together."""
    if values.get("dtype") == "bfloat16" and values.get("loss", "kl") != "kl":
        # The gradient of min(p, q) jumps where the draft's probability of a token passes the teacher's, and
        # bf16 decides otherwise than fp64 on which side it is: fp32 is exact here, and
        # tests/unit/test_loss.py compares bf16 gradients of the same rounded logits.
        return False
    algorithms = [values["algorithm"]] if "algorithm" in values else REFUSED
    if all(_refuses(REFUSED[algorithm], values) for algorithm in algorithms):
        return False
    mesh = values.get("topology")
    if mesh is None:
        return True
    if "heads" in values and HEADS[values["heads"]][1] % mesh[2]:
        return False  # Ulysses must divide the key heads.
    # With one rank there is no other rank that could be supervised.
    return not (values.get("documents") == "unsupervised_rank" and mesh == (1, 1, 1))


def _refuses(refused: Mapping[str, tuple[Any, ...]], values: Mapping[str, Any]) -> bool:
    return any(name in values and values[name] in of_name for name, of_name in refused.items())


def allowed_pairs() -> set[tuple[Value, Value]]:
    """All pairs of values of two factors that one case can have."""
    return {
        ((a, x), (b, y))
        for a, b in itertools.combinations(FACTORS, 2)
        for x, y in itertools.product(FACTORS[a], FACTORS[b])
        if is_allowed({a: x, b: y})
    }


def covered_pairs(case: Case) -> set[tuple[Value, Value]]:
    """The pairs of values of two factors that a case has."""
    values = case.factors()
    return set(itertools.combinations([(name, values[name]) for name in FACTORS], 2))


def full_matrix() -> list[Case]:
    """Cases that together have every allowed pair. They are found greedily: each is built from the first pair
    that no case has yet.
    """
    missing = allowed_pairs()
    cases = []
    while missing:
        first = min(missing, key=lambda pair: [_rank(value) for value in pair])
        case = _build_case(dict(first), missing)
        missing -= covered_pairs(case)
        cases.append(case)
    return cases


def short_matrix(max_world: int = 4) -> list[Case]:
    """A few cases of the full matrix, of at most `max_world` ranks, that together have every value of every
    factor that is possible there.
    """
    cases = [case for case in full_matrix() if case.world_size <= max_world]
    missing = {value for case in cases for value in _values(case)}
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(missing & _values(case)))
        missing -= _values(best)
        chosen.append(best)
    return chosen


def on_one_device(cases: Sequence[Case]) -> list[Case]:
    """The same cases without other ranks, each once: what one GPU can be asked."""
    folded = (
        replace(
            case,
            draft_dp=1,
            ring=1,
            ulysses=1,
            zero_group="all",
            kv_exchange="gather",
            documents=_ALONE.get(case.documents, case.documents),
        )
        for case in cases
    )
    return list(dict.fromkeys(folded))


def _values(case: Case) -> set[Value]:
    values = case.factors()
    return {(name, values[name]) for name in FACTORS}


def _rank(value: Value) -> tuple[int, int]:
    return list(FACTORS).index(value[0]), FACTORS[value[0]].index(value[1])


def _build_case(chosen: dict[str, Any], missing: set[Any]) -> Case:
    """Choose the other factors one after the other: each gets the value that forms the most missing pairs
    with the values chosen so far.
    """
    for name in FACTORS:
        if name in chosen:
            continue
        options = [value for value in FACTORS[name] if is_allowed({**chosen, name: value})]
        chosen[name] = max(options, key=lambda value: _gain(name, value, chosen, missing))
    draft_dp, ring, ulysses = chosen.pop("topology")
    return Case(draft_dp=draft_dp, ring=ring, ulysses=ulysses, **chosen)


def _gain(name: str, value: Any, chosen: Mapping[str, Any], missing: set[Any]) -> int:
    pairs = (
        sorted([(name, value), item], key=lambda v: list(FACTORS).index(v[0])) for item in chosen.items()
    )
    return sum(tuple(pair) in missing for pair in pairs)


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """The inputs of a case in fp32; for a bf16 case their values are exact in bf16. A pure function of case
    and seed.
    """
    generator = torch.Generator().manual_seed(seed)
    config = _config(case)
    round_to = getattr(torch, case.dtype)
    head = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(round_to).float()
    embedding = torch.randn(VOCABULARY, config.hidden_size, generator=generator).to(round_to).float()
    kept = torch.randperm(VOCABULARY, generator=generator)[:DRAFT_VOCABULARY].sort().values
    frozen = Frozen(embedding, head, kept - torch.arange(DRAFT_VOCABULARY))
    weights = {name: w.to(round_to).float() for name, w in _weights(config, head[kept], generator).items()}
    steps = [
        [
            [_micro_batch(case, rank, index, head, generator, round_to) for index in range(case.accumulation)]
            for rank in range(case.draft_dp)
        ]
        for _ in range(NUM_STEPS)
    ]
    return Inputs(config, weights, frozen, steps)


def _config(case: Case) -> LlamaConfig:
    num_heads, num_kv_heads = HEADS[case.heads]
    hidden, inner, more = SHAPE[case.shape]
    head_dim = hidden // num_heads + more
    return LlamaConfig(
        vocab_size=VOCABULARY,
        draft_vocab_size=DRAFT_VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=case.layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=4096,
        # Longer than the positions, and than any document: what a pack holds must not matter.
        rotary_length=10_000,
        rms_norm_eps=1e-5,
        rope_parameters=_rope_parameters(case.rope, head_dim),
        tie_word_embeddings=False,
        num_aux_layers=case.aux_layers,
        target_hidden_size=HIDDEN,
        **dict.fromkeys(NORMS[case.norms], True),
        **({"mask_token_id": MASK_TOKEN} if case.algorithm in ("peagle", "dflash") else {}),
        **(
            {
                "block_size": case.ttt_steps + 1,
                "block_causal": case.block == "causal",
                "mask_embedding": case.block == "own mask",
            }
            if case.algorithm == "dflash"
            else {}
        ),
        **(
            {"sliding_window": case.window, "layer_types": ["sliding_attention"] * case.layers}
            if case.window
            else {}
        ),
    )


def _rope_parameters(kind: str, head_dim: int) -> dict[str, Any]:
    parameters = {"rope_theta": 10000.0, **ROPE[kind]}
    if kind == "longrope":
        factors = itertools.islice(itertools.cycle(LONG_FACTORS), head_dim // 2)
        parameters |= {"short_factor": [1.0] * (head_dim // 2), "long_factor": list(factors)}
    return parameters


def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the draft's parameters."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    target = getattr(config, "target_hidden_size", hidden)
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, getattr(config, "num_aux_layers", 3) * target)
    }
    if getattr(config, "norm_before_fc", False):
        shapes["input_norm.weight"] = shapes["fc.weight"][1:]
    if getattr(config, "fc_norm", False):
        shapes |= {f"fc_norm.{i}.weight": (target,) for i in range(config.num_aux_layers)}
    is_block = getattr(config, "block_size", None) is not None
    if is_block:
        shapes["hidden_norm.weight"] = (hidden,)
    for layer in range(config.num_hidden_layers):
        is_first = layer == 0 and not is_block
        wide = hidden * (2 if is_first else 1)
        norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
        of_layer: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (q, wide),
            "self_attn.k_proj": (kv, wide),
            "self_attn.v_proj": (kv, wide),
            "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            **{norm: (hidden,) for norm in norms if is_first or norm != "hidden_norm"},
        }
        if is_block:
            of_layer |= {f"self_attn.{norm}": (config.head_dim,) for norm in ("q_norm", "k_norm")}
        shapes |= {f"layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
    shapes |= {"norm.weight": (hidden,), "lm_head.weight": (config.draft_vocab_size, hidden)}
    if config.mask_embedding if is_block else getattr(config, "mask_token_id", None) is not None:
        shapes["mask_embedding"] = (hidden,)
        if not is_block:
            shapes["mask_hidden"] = (shapes["fc.weight"][1],)
    return shapes


def _weights(config: LlamaConfig, draft_head: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Weights of a draft that guesses about half of the tokens: fc passes a noisy teacher on, and the head is
    the target's. So accuracies are not near zero and argmaxes not near ties. A better draft would have
    gradients that are differences of almost equal probabilities, which no bf16 implementation can compute
    within the tolerance."""
    weights = {}
    for name, shape in parameter_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        is_norm = len(shape) == 1 and not name.startswith("mask_")
        weights[name] = 1.0 + 0.1 * noise if is_norm else noise * 0.3 * shape[-1] ** -0.5
    for name in weights.keys() & {"mask_embedding", "mask_hidden"}:
        # As large as what they stand for: rows of the embedding, and captured states.
        weights[name] = weights[name] / (0.3 * weights[name].numel() ** -0.5)
    weights["fc.weight"] = weights["fc.weight"] * 0.3
    weights["fc.weight"][:, -HIDDEN:] += torch.eye(config.hidden_size, HIDDEN)
    # A wider draft has channels that no column of the target's head meets; a narrower one lacks the last.
    common = min(HIDDEN, config.hidden_size)
    weights["lm_head.weight"] = 0.05 * 0.1 * weights["lm_head.weight"]
    weights["lm_head.weight"][:, :common] += 0.05 * draft_head[:, :common]
    return weights


def document_lengths(kind: str, index: int) -> tuple[int, ...]:
    """Document lengths of the `index`-th micro-batch of a step. Where the kind allows it, consecutive ones
    differ.
    """
    choices: Mapping[str, Sequence[tuple[int, ...]]] = {
        "one": [(128,), (96,)],
        "many_unaligned": [(37, 5, 61, 1, 24), (2, 45, 29, 52)],
        "unsupervised_rank": [(9, 79, 40)],
        "indivisible": [(90, 41), (41, 62)],
        "answers": [(67, 93), (41, 6, 130)],
    }
    return choices[kind][index % len(choices[kind])]


def _micro_batch(
    case: Case, rank: int, index: int, head: Tensor, generator: torch.Generator, round_to: torch.dtype
) -> MicroBatch:
    lengths = document_lengths(case.documents, rank + index)
    length = sum(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    # The teacher favours the same token for some slots. The aux states of a slot are a noisy copy of the
    # teacher at later slots, so that the draft can guess.
    favourite = torch.randint(0, VOCABULARY, (length,), generator=generator)
    changes = torch.rand(length, generator=generator) < 0.25
    changes[0] = True
    favourite = favourite[torch.where(changes, torch.arange(length), 0).cummax(0).values]
    teacher = 0.12 * head[favourite] + 0.12 * normal(length, HIDDEN)
    ahead = teacher[(torch.arange(length) + 1).clamp(max=length - 1)]
    aux = torch.cat(
        (normal(length, (case.aux_layers - 1) * HIDDEN), 8.0 * ahead + normal(length, HIDDEN)), dim=-1
    )
    mask = torch.rand(length, generator=generator) < 0.6
    if case.documents == "unsupervised_rank":
        # Only the first, short document of the first draft_dp rank is supervised.
        mask = (torch.arange(length) < lengths[0]) & (torch.arange(length) >= 2) & torch.tensor(rank == 0)
    if case.documents == "answers":
        # Short answers to long questions: less than half of the slots are live.
        mask = torch.arange(length) % 40 >= 32
    batch = MicroBatch(
        token_ids=torch.randint(0, VOCABULARY, (length,), generator=generator),
        loss_mask=mask,
        lengths=lengths,
        aux=aux.to(round_to).float(),
        teacher=teacher.to(round_to).float(),
    )
    if case.algorithm != "dflash":
        return batch
    # Another visit for each micro-batch: its documents are not those of another.
    documents = range(len(lengths))
    return replace(batch, anchors=sampled_anchors(batch, case.rules, ANCHOR_SHARE, rank, index, documents))
