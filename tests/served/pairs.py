"""Small targets with drafts that some of them accept, made in seconds, for servers that nobody here wrote.

The target is random: its greedy answers are texts like any others to a server. The draft is trained on some
of these answers for a few steps, teacher-forced and without its unroll, which is enough that its first guess
is often right and its later ones sometimes: acceptance is neither nothing nor everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from eagle3_ds.algorithms import ALGORITHMS
from eagle3_ds.algorithms.eagle3 import DraftModel, build_draft_config
from eagle3_ds.algorithms.peagle import PEagleModel
from eagle3_ds.algorithms.peagle import build_draft_config as build_peagle_config
from eagle3_ds.config import DraftSection
from eagle3_ds.draft import DraftCache, VocabularyMap
from eagle3_ds.eval import Round, decode_alone, speculative_decode
from eagle3_ds.export import export_speculators, export_vllm
from eagle3_ds.targets import Target, capture_hidden_states, choose_aux_layers
from judge.dense_reference import Frozen, MicroBatch
from judge.family_configs import tiny_config
from judge.peagle_reference import peagle_guesses
from tests.unit.tiny_families import FAMILIES, family_config

# Heads of 32 are the least that vLLM has on a CPU; a draft vocabulary smaller than the target's.
VOCABULARY = 320
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DRAFT_VOCABULARY, DRAFT_TOKENS, NEW_TOKENS = 200, 5, 40
DRAFTS: Mapping[str, Callable[[Any, DraftSection, int], DraftModel]] = {
    "eagle3": lambda *sizes: DraftModel(build_draft_config(*sizes)),
    "peagle": lambda *sizes: PEagleModel(build_peagle_config(*sizes)),
}
"""A fresh draft by its algorithm, from the target's config, the draft's section and the captured layers."""
TRAINED_PROMPTS, PROMPTS, TRAIN_STEPS = 12, 6, 60


@dataclass(frozen=True)
class Pair:
    """A target with one draft, both exports of it, and what this package's own decoding found.

    Attributes:
        draft: the weights, by our names; vocabulary: its map; embedding: [V, H], the target's.
        answers: the target's own greedy answers to `prompts`; rounds: of each, with the draft.
    """

    target: Path
    vllm: Path
    speculators: Path
    draft: dict[str, Tensor]
    vocabulary: VocabularyMap
    embedding: Tensor
    prompts: list[list[int]]
    answers: list[list[int]]
    rounds: list[list[Round]]


def random_target(folder: Path, family: str, **changes: Any) -> Any:
    """A random model of a family, written to `folder` as transformers does; returned too."""
    make = family_config if family in FAMILIES else tiny_config
    config = make(family, **{**SIZES, **changes})
    config.architectures = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
            else:
                torch.nn.init.normal_(parameter, 0.7, 0.2)
    model.requires_grad_(False).eval().save_pretrained(folder)
    return model


def answered_prompts(model: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Random prompts and the target's own greedy answers: those that are judged, then others."""
    config = model.config
    target = Target(model, None, config, choose_aux_layers(config.num_hidden_layers))
    generator = torch.Generator().manual_seed(1)
    lengths = [4 + 5 * (i % 7) for i in range(PROMPTS + TRAINED_PROMPTS)]
    prompts = [torch.randint(3, config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    return prompts, [decode_alone(target, prompt, NEW_TOKENS, None) for prompt in prompts]


def make_pair(
    model: Any,
    path: Path,
    folder: Path,
    texts: tuple[list[list[int]], list[list[int]]],
    draft_settings: Mapping[str, Any],
    aux_layers: Sequence[int] | None = None,
) -> Pair:
    """Train a draft for `model`, which lies in `path`, and write both its exports under `folder`.

    Args:
        texts: of `answered_prompts`.
    """
    config = model.config
    target = Target(model, None, config, choose_aux_layers(config.num_hidden_layers, aux_layers))
    prompts, answers = texts
    counts = torch.bincount(torch.tensor(answers).flatten(), minlength=config.vocab_size)
    section = DraftSection(**{"vocab_size": DRAFT_VOCABULARY, **draft_settings})
    algorithm = ALGORITHMS[section.algorithm]
    vocabulary = VocabularyMap.from_counts(counts, section.vocab_size)
    torch.manual_seed(2)
    draft = DRAFTS[section.algorithm](config, section, len(target.aux_layers))
    draft.start_from(target.embedding)
    # Half of the prompts that are judged are among those trained on: some rounds accept much, some little.
    learnt = [prompts[i] + answers[i] for i in range(PROMPTS // 2, PROMPTS + TRAINED_PROMPTS)]
    if isinstance(draft, PEagleModel):
        train_in_parallel(draft, target, vocabulary, learnt)
    else:
        train_on_answers(draft, target, vocabulary, learnt)
    layers = None if aux_layers is None else target.aux_layers
    common = (draft.state_dict(), draft.config, vocabulary)
    brings = algorithm.layouts["vllm"].brings_embedding(draft.config)
    vllm = export_vllm(
        *common,
        folder / "vllm",
        "float32",
        aux_layers=layers,
        algorithm=section.algorithm,
        embedding=target.embedding if brings else None,
    )
    speculators = export_speculators(
        *common,
        target.embedding,
        folder / "speculators",
        str(path),
        [type(model).__name__],
        "float32",
        aux_layers=layers,
        algorithm=section.algorithm,
    )
    rounds = []
    for prompt, answer in zip(prompts[:PROMPTS], answers, strict=False):
        guesser = algorithm.guesser(draft, target.embedding, vocabulary)
        rounds.append(speculative_decode(target, guesser, prompt, NEW_TOKENS, DRAFT_TOKENS, None, answer)[1])
    state = {name: tensor.detach() for name, tensor in draft.state_dict().items()}
    return Pair(
        path,
        vllm,
        speculators,
        state,
        vocabulary,
        target.embedding,
        prompts[:PROMPTS],
        answers[:PROMPTS],
        rounds,
    )


def train_in_parallel(
    draft: PEagleModel, target: Target, vocabulary: VocabularyMap, texts: Sequence[Sequence[int]]
) -> None:
    """Adam on the cross entropy of every guess of every slot, by the reference's arithmetic."""
    to_draft = draft_ids(vocabulary)
    frozen = Frozen(target.embedding, target.model.lm_head.weight, vocabulary.d2t)
    batches = []
    for text in texts:
        tokens = torch.tensor(text)
        aux, teacher = capture_hidden_states(target, tokens)
        batches.append(MicroBatch(tokens, torch.ones(len(tokens)).bool(), (len(tokens),), aux, teacher))
    weights = dict(draft.named_parameters())
    optimizer = torch.optim.Adam(weights.values(), lr=3e-3)
    for step in range(TRAIN_STEPS):
        for batch in batches[step % 3 :: 3]:
            guesses = peagle_guesses(weights, draft.config, frozen, batch, DRAFT_TOKENS)
            wanted = to_draft[batch.token_ids]
            losses = [functional.cross_entropy(g[: -2 - k], wanted[2 + k :]) for k, g in enumerate(guesses)]
            torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    draft.eval().requires_grad_(False)


def draft_ids(vocabulary: VocabularyMap) -> Tensor:
    """The draft's id of each token of the target, int64 [V]; -100 where it has none."""
    to_draft = torch.full((len(vocabulary.t2d),), -100)
    to_draft[vocabulary.draft_to_target] = torch.arange(len(vocabulary.d2t))
    return to_draft


def train_on_answers(
    draft: DraftModel, target: Target, vocabulary: VocabularyMap, texts: Sequence[Sequence[int]]
) -> None:
    """Adam on the cross entropy of the target's token two places later, slots of one text at a time."""
    to_draft = draft_ids(vocabulary)
    rows = []
    for text in texts:
        tokens = torch.tensor(text)
        aux, _ = capture_hidden_states(target, tokens)
        rows.append((aux[:-2], target.embedding[tokens[1:-1]], to_draft[tokens[2:]]))
    optimizer = torch.optim.Adam(draft.parameters(), lr=3e-3)
    draft.train()
    for step in range(TRAIN_STEPS):
        for aux, embeds, wanted in rows[step % 3 :: 3]:
            cache, places = DraftCache(draft.config.num_hidden_layers), torch.arange(len(aux))
            hidden = draft.decode(embeds, draft.project_aux(aux), places, cache)
            functional.cross_entropy(draft.logits(hidden), wanted).backward()
        optimizer.step()
        optimizer.zero_grad()
    draft.eval().requires_grad_(False)
