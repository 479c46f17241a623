"""Training: the DeepSpeed engine, the step, the loop. The only room that imports deepspeed."""

from eagle3_ds.train.rollout import Rollout, RolloutTrainer
from eagle3_ds.train.trainer import DraftTrainer, StepReport, learning_rate_at

__all__ = ["DraftTrainer", "Rollout", "RolloutTrainer", "StepReport", "learning_rate_at"]
