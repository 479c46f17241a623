"""The training step that is measured: its sizes, its floating-point operations, and random inputs of any
length.

Legend: L slots, H hidden size, V target vocabulary, Vd draft vocabulary, K TTT steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import LlamaConfig

from eagle3_ds.algorithms.eagle3 import Eagle3Shape
from eagle3_ds.algorithms.eagle3.supervision import TTTSupervision
from eagle3_ds.costs import Setup
from eagle3_ds.layout import PackedSequence, live_slots
from eagle3_ds.plan import attention_pairs, step_flops
from judge.cases import parameter_shapes
from judge.dense_reference import Frozen, LossRules, MicroBatch

# Logit of a teacher's favourite; the largest of V unit normals stays below 6, so the favourite is always the
# argmax.
_FAVOURITE_LOGIT = 16.0
TURN = 512
"""Tokens of a question and its answer, where not all tokens are supervised."""
PATTERN_ROWS = 1024
"""Hidden states repeat after so many rows: random numbers for half a million would take longer than the step.
"""


@dataclass(frozen=True)
class StepShape:
    """A training step, but for its length. The target is as wide as the draft."""

    draft: Eagle3Shape
    ttt_steps: int = 7
    decay: float = 0.8

    @property
    def rules(self) -> LossRules:
        return LossRules(self.ttt_steps, self.decay)

    def config(self) -> LlamaConfig:
        draft = self.draft
        return LlamaConfig(
            vocab_size=draft.vocab_size,
            draft_vocab_size=draft.draft_vocab_size,
            hidden_size=draft.hidden_size,
            intermediate_size=draft.intermediate_size,
            num_hidden_layers=draft.num_layers,
            num_attention_heads=draft.num_heads,
            num_key_value_heads=draft.num_kv_heads,
            head_dim=draft.head_dim,
            max_position_embeddings=2**20,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            tie_word_embeddings=False,
        )

    def flops(self, length: int, supervised: float = 1.0) -> int:
        """Floating-point operations that one step cannot do without, over one document of `length` tokens.

        The planner's count without its recomputation. Attention backward is 2.5 times forward, because scores
        are not kept.
        """
        live = live_slots((length,), answers_mask(length, supervised), TTTSupervision(self.ttt_steps))
        setup = Setup(self.draft, length, self.ttt_steps, supervised=float(live.mean()))
        counted = step_flops(setup, attention_pairs(setup))
        return counted.total - counted.recompute


@dataclass(frozen=True)
class StepModel:
    """What does not depend on the length: `weights` by the names of DraftModel, in fp32, and the target's,
    all on the host.
    """

    shape: StepShape
    weights: dict[str, Tensor]
    frozen: Frozen


class HiddenRows(NamedTuple):
    """What the target left: aux [L, 3H] and teacher [L, H], on the host."""

    aux: Tensor
    teacher: Tensor


@dataclass(frozen=True)
class TimedStep:
    """One training step of either side.

    Attributes:
        seconds: from the packed sequence in hand to the loss and the norm of whole gradients: forward and
            backward.
        optimizer_seconds: what the optimizer took, which `seconds` leaves out; None where there is none.
    """

    loss: float
    grad_norm: float
    seconds: float
    optimizer_seconds: float | None = None


class Side(Protocol):
    """The product or the dense implementation."""

    def run(self, pack: PackedSequence) -> TimedStep: ...


def make_model(
    shape: StepShape, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> StepModel:
    """Random weights that `dtype` can hold, drawn on `device`, which decides which ones, and kept on the
    host.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, std: float) -> Tensor:
        return torch.randn(size, generator=generator, device=device).mul_(std).to(dtype).cpu()

    vocabulary, hidden = shape.draft.vocab_size, shape.draft.hidden_size
    head, embedding = normal(vocabulary, hidden, std=hidden**-0.5), normal(vocabulary, hidden, std=1.0)
    permuted = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0))
    kept = permuted[: shape.draft.draft_vocab_size].sort().values
    weights = {
        name: torch.ones(size) if len(size) == 1 else normal(*size, std=size[1] ** -0.5).float()
        for name, size in parameter_shapes(shape.config()).items()
    }
    return StepModel(shape, weights, Frozen(embedding, head, kept - torch.arange(len(kept))))


def answers_mask(length: int, supervised: float) -> Tensor:
    """bool [L]: turns of a chat of TURN tokens each, whose last `supervised` part is the answer."""
    return torch.arange(length) % TURN >= round((1 - supervised) * TURN)


def make_pack(model: StepModel, length: int, rows: HiddenRows, supervised: float = 1.0) -> PackedSequence:
    """One document of `length` tokens, every teacher's favourite in the draft vocabulary.

    Args:
        rows: at least `length` of them.
        supervised: share of the tokens, in turns.
    """
    generator = torch.Generator().manual_seed(length)
    return PackedSequence(
        token_ids=torch.randint(0, model.shape.draft.vocab_size, (length,), generator=generator),
        loss_mask=answers_mask(length, supervised),
        lengths=(length,),
        teacher_token=_favourites(model, length),
        aux=rows.aux[0:length],
        teacher=rows.teacher[0:length],
    )


def as_batch(pack: PackedSequence) -> MicroBatch:
    """The same sequence as the dense side takes it."""
    assert isinstance(pack.aux, Tensor) and isinstance(pack.teacher, Tensor)
    return MicroBatch(pack.token_ids, pack.loss_mask, pack.lengths, pack.aux, pack.teacher)


def make_rows(model: StepModel, length: int) -> HiddenRows:
    """Random hidden states in memory, fp32."""
    pattern = _pattern(model)
    repeats = -(-length // PATTERN_ROWS)
    return HiddenRows(*(rows.repeat(repeats, 1)[:length] for rows in pattern))


def map_rows(model: StepModel, length: int, folder: Path, dtype: torch.dtype) -> HiddenRows:
    """The same in two files that are mapped into memory, as a hidden-state store hands them out; written if
    not yet there.

    The files hold whole patterns; the rows behind `length` are never read.
    """
    repeats = -(-length // PATTERN_ROWS)
    mapped = []
    for name, rows in zip(HiddenRows._fields, _pattern(model), strict=True):
        path = folder / f"{name}.rows"
        piece = rows.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
        if not path.exists() or path.stat().st_size != repeats * len(piece):
            with path.open("wb") as stream:
                for _ in range(repeats):
                    stream.write(piece)
        size = repeats * rows.numel()
        mapped.append(
            torch.from_file(str(path), size=size, dtype=dtype, shared=False).view(-1, rows.shape[1])[:length]
        )
    return HiddenRows(*mapped)


def _pattern(model: StepModel) -> HiddenRows:
    """PATTERN_ROWS rows: auxiliary hidden states without meaning, and a teacher with a clear favourite at
    each position.
    """
    hidden, generator = model.shape.draft.hidden_size, torch.Generator().manual_seed(2)
    aux = torch.randn(PATTERN_ROWS, 3 * hidden, generator=generator)
    favourite = model.frozen.head[_favourites(model, PATTERN_ROWS)].float()
    noise = torch.randn(PATTERN_ROWS, hidden, generator=generator)
    return HiddenRows(aux, noise + _FAVOURITE_LOGIT * favourite / favourite.square().sum(-1, keepdim=True))


def _favourites(model: StepModel, length: int) -> Tensor:
    """The target's argmax at each position, int64 [L], a pattern that repeats."""
    d2t = model.frozen.d2t
    drawn = torch.randint(0, len(d2t), (PATTERN_ROWS,), generator=torch.Generator().manual_seed(1))
    return (drawn + d2t[drawn]).repeat(-(-length // PATTERN_ROWS))[:length]
