"""Running a case with the product's trainer and DeepSpeed engine, on every rank of the case's world."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from eagle3_ds.algorithms import ALGORITHMS
from eagle3_ds.config import Recipe, fill_deepspeed_config, load_deepspeed_config
from eagle3_ds.draft import VocabularyMap
from eagle3_ds.layout import PackedSequence
from eagle3_ds.topology import maybe_setup_distributed
from eagle3_ds.train.trainer import DraftTrainer, StepReport
from judge.cases import OPTIMIZATION, Case, Inputs, make_inputs
from judge.dense_reference import Frozen, MicroBatch
from judge.mutations import mutate, mutate_trainer

DS_CONFIGS = Path(__file__).parents[1] / "ds_configs"
# So small that a tile of the loss has about ten slots, one of a layer about twenty; and so large that all
# blocks of the ring are kept.
LOSS_TILE_BYTES, TILE_BYTES, KEPT_BYTES = 40_000, 120_000, 2**30


@dataclass(frozen=True)
class ProductResult:
    """The result of NUM_STEPS optimizer steps on one rank.

    Attributes:
        reports: the trainer's report of each step.
        gradients: for each step, every parameter's whole gradient before clipping; empty except on rank 0.
        weights: the whole weights after the last step; empty except on rank 0.
        weights_digest: digest of this rank's weights.
    """

    reports: list[StepReport]
    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]
    weights_digest: str


def run_case(case: Case, seed: int, mutation: str | None) -> ProductResult:
    """Make the inputs of a case and run it; every rank calls this. Collective over the case's world."""
    with mutate(mutation, case):
        return run_product(case, make_inputs(case, seed), mutation)


def run_product(case: Case, inputs: Inputs, mutation: str | None = None) -> ProductResult:
    """Train the product on a case. Collective over the case's world."""
    trainer = make_trainer(case, inputs)
    topology, frozen = trainer.topology, inputs.frozen
    mutate_trainer(mutation, trainer)
    gradients: list[dict[str, Tensor]] = []
    record_gradients(trainer, gradients)
    of_rank = [step[topology.place.dp_rank] for step in inputs.steps]
    reports = [trainer.step([as_pack(batch, frozen) for batch in batches]) for batches in of_rank]
    weights = trainer.state_dict()
    is_first = topology.place.rank == 0
    return ProductResult(reports, gradients if is_first else [], weights if is_first else {}, digest(weights))


def make_trainer(case: Case, inputs: Inputs) -> DraftTrainer:
    """The trainer of a case, with its weights. Collective over the case's world."""
    topology = maybe_setup_distributed(case.ulysses, case.ring, case.draft_dp)
    recipe = make_recipe(case)
    settings = fill_deepspeed_config(
        load_deepspeed_config(recipe.deepspeed), recipe, topology.mesh.world_size, topology.draft_dp
    )
    draft = ALGORITHMS[case.algorithm].build(inputs.config)
    draft.load_state_dict(inputs.weights)
    frozen = inputs.frozen
    return DraftTrainer(
        recipe, settings, topology, draft, frozen.embedding, frozen.head, vocabulary_map(frozen)
    )


def make_recipe(case: Case) -> Recipe:
    """The recipe of a case. Nothing opens what its required sections `target` and `data` name."""
    optimization = OPTIMIZATION
    sections: dict[str, Any] = {
        "target": {"path": "none"},
        "data": {"train": ("none",)},
        "draft": {
            "algorithm": case.algorithm,
            "num_layers": case.layers,
            "sliding_window": case.window,
            **(
                {"block_size": case.ttt_steps + 1, "block_causal": case.block == "causal"}
                if case.algorithm == "dflash"
                else {"ttt_steps": case.ttt_steps}
            ),
        },
        "eval": {"draft_tokens": case.ttt_steps},
        "parallel": {
            "draft_dp": case.draft_dp,
            "ring": case.ring,
            "ulysses": case.ulysses,
            "zero_group": case.zero_group,
            "kv_exchange": case.kv_exchange.removesuffix("_kept"),
            "kv_bytes": KEPT_BYTES if case.kv_exchange == "ring_kept" else 0,
        },
        "attention": {"kernel": case.kernel},
        "loss": {
            "kind": case.loss,
            "mask_alignment": case.alignment,
            "reduction": case.reduction,
            "decay": case.rules.decay,
            **({"tile_bytes": LOSS_TILE_BYTES} if case.tiles == "many" else {}),
        },
        "train": {
            "steps": 3,
            "accumulation": case.accumulation,
            "dtype": case.dtype,
            "learning_rate": optimization.lr,
            "schedule": "constant",
            "betas": optimization.betas,
            "eps": optimization.eps,
            "weight_decay": optimization.weight_decay,
            "gradient_clipping": optimization.clip,
            "activation": case.activation,
            **({"tile_bytes": TILE_BYTES} if case.tiles == "many" else {}),
        },
        "deepspeed": str(DS_CONFIGS / f"{case.deepspeed}.json"),
        "output_dir": "none",
    }
    return Recipe.model_validate(sections)


def as_pack(batch: MicroBatch, frozen: Frozen) -> PackedSequence:
    """A whole micro-batch as the loader's pack, with the teacher's tokens computed as in a capture."""
    token = (batch.teacher.double() @ frozen.head.double().T).argmax(-1)
    return PackedSequence(
        batch.token_ids, batch.loss_mask, batch.lengths, token, batch.aux, batch.teacher, batch.anchors
    )


def vocabulary_map(frozen: Frozen) -> VocabularyMap:
    t2d = torch.zeros(len(frozen.head), dtype=torch.bool)
    t2d[frozen.d2t + torch.arange(len(frozen.d2t))] = True
    return VocabularyMap(frozen.d2t, t2d)


def digest(weights: dict[str, Tensor]) -> str:
    """A hash of the bits of all weights."""
    value = hashlib.sha256()
    for name in sorted(weights):
        value.update(name.encode() + weights[name].float().contiguous().numpy().tobytes())
    return value.hexdigest()


def record_gradients(trainer: DraftTrainer, found: list[dict[str, Tensor]]) -> None:
    """Make the trainer append every parameter's whole gradient to `found` before each optimizer step; reading
    it is collective.
    """
    engine, step = trainer.engine, trainer.engine.step

    def step_with_record(*args: Any, **kwargs: Any) -> Any:
        if engine.is_gradient_accumulation_boundary():
            found.append(_whole_gradients(engine.module.named_parameters()))
        return step(*args, **kwargs)

    engine.step = step_with_record


def _whole_gradients(parameters: Sequence[tuple[str, Any]] | Any) -> dict[str, Tensor]:
    whole = {}
    for name, parameter in parameters:
        gradient = safe_get_full_grad(parameter)
        assert gradient is not None, f"DeepSpeed has no gradient of {name}"
        whole[name.removeprefix("draft.")] = gradient.detach().cpu().double().reshape(-1)
    return whole
