"""The product's training step on one rank, with the time of its optimizer measured separately."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eagle3_ds.algorithms.eagle3 import DraftModel
from eagle3_ds.config import Recipe, fill_deepspeed_config, load_deepspeed_config
from eagle3_ds.costs import Setup
from eagle3_ds.costs.setup import DeviceSort
from eagle3_ds.device.kinds import CPU
from eagle3_ds.draft import Draft
from eagle3_ds.layout import PackedSequence
from eagle3_ds.topology import maybe_setup_distributed
from eagle3_ds.train.trainer import DraftTrainer
from judge.dense_reference import Frozen
from judge.product import DS_CONFIGS, record_gradients, vocabulary_map
from judge.result_file import now
from judge.step_inputs import StepModel, TimedStep


class TrainerStep:
    """A trainer with the learning rate 0, so that every step starts from the same weights."""

    def __init__(self, recipe: Recipe, draft: Draft, frozen: Frozen) -> None:
        """Needs a world of one rank (`ranks.run_ranks`)."""
        self._deepspeed_config = load_deepspeed_config(recipe.deepspeed)
        settings = fill_deepspeed_config(self._deepspeed_config, recipe, world=1, draft_dp=1)
        self.trainer = DraftTrainer(
            recipe,
            settings,
            maybe_setup_distributed(),
            draft,
            frozen.embedding,
            frozen.head,
            vocabulary_map(frozen),
        )
        self.device = self.trainer.topology.device
        self._optimizer_seconds = 0.0
        self._time_the_optimizer()

    def run(self, pack: PackedSequence) -> TimedStep:
        """Time one training step: cutting the pack, forward, backward, gradient norm, report. `engine.step`
        (clipping, AdamW, zeroing the gradients) is timed separately.
        """
        self._optimizer_seconds = 0.0
        started = now(self.device)
        report = self.trainer.step([pack], learning_rate=0.0)
        seconds = now(self.device) - started
        assert report.grad_norm is not None
        return TimedStep(
            report.loss, report.grad_norm, seconds - self._optimizer_seconds, self._optimizer_seconds
        )

    def gradients(self, pack: PackedSequence) -> dict[str, Tensor]:
        """Every parameter's whole gradient, flattened, in fp64 on the host."""
        timed = self.trainer.engine.step
        found: list[dict[str, Tensor]] = []
        record_gradients(self.trainer, found)
        self.trainer.step([pack], learning_rate=0.0)
        self.trainer.engine.step = timed
        return found[0]

    def _time_the_optimizer(self) -> None:
        step = self.trainer.engine.step

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = now(self.device)
            result = step(*args, **kwargs)
            self._optimizer_seconds += now(self.device) - started
            return result

        self.trainer.engine.step = timed


class ProductStep(TrainerStep):
    """The step of an EAGLE-3 draft."""

    def __init__(
        self,
        model: StepModel,
        dtype: str,
        activation: str,
        kernel: str = "auto",
        deepspeed_config: str = "zero0",
    ) -> None:
        """Needs a world of one rank (`ranks.run_ranks`). `deepspeed_config` is a file of ds_configs."""
        self._shape = model.shape.draft
        with torch.device(
            "meta"
        ):  # Initialising the draft of an 8B target takes longer than a step, and its values are replaced.
            draft = DraftModel(model.shape.config())
        draft.load_state_dict({name: weight.clone() for name, weight in model.weights.items()}, assign=True)
        super().__init__(_recipe(model, dtype, activation, kernel, deepspeed_config), draft, model.frozen)

    def setup(self, length: int) -> Setup:
        """The planner's description of a step over a pack of `length` tokens."""
        kind: DeviceSort = "cpu" if self.device.type == CPU else "accelerator"
        return replace(
            Setup.of(self.trainer.recipe, self._deepspeed_config, self._shape, 1, kind), length=length
        )


def _recipe(model: StepModel, dtype: str, activation: str, kernel: str, deepspeed_config: str) -> Recipe:
    shape = model.shape
    sections = {
        "target": {"path": "none"},
        "data": {"train": ("none",)},
        "draft": {"ttt_steps": shape.ttt_steps, "vocab_size": shape.draft.draft_vocab_size},
        "attention": {"kernel": kernel},
        "loss": {"decay": shape.decay},
        "train": {"steps": 1, "dtype": dtype, "activation": activation, "gradient_clipping": 0.0},
        "deepspeed": str(DS_CONFIGS / f"{deepspeed_config}.json"),
        "output_dir": "none",
    }
    return Recipe.model_validate(sections)
