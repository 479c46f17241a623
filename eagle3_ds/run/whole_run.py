"""What a whole run takes by the planner's count: steps and hours of training, hours and disk of a capture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle3_ds.config import Recipe
from eagle3_ds.data import PreparedData
from eagle3_ds.plan import Device
from eagle3_ds.plan.devices import estimates
from eagle3_ds.run.counted_setup import weight_bytes
from eagle3_ds.run.stages import places_in_cache
from eagle3_ds.targets import attention_size

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""By these names configs say that only some of the weights work on a token."""
GIB = 2**30


@dataclass(frozen=True)
class Counted:
    """The prepared documents of a recipe as it stands.

    Attributes:
        lengths: tokens of each document, training and held-out.
        packs: packed sequences of an epoch.
        is_captured: whether the store of their hidden states is whole.
    """

    lengths: tuple[int, ...]
    packs: int
    is_captured: bool

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True)
class Uncounted:
    """Attributes:
    why: there are no prepared documents to count, as the end of a sentence about the documents.
    """

    why: str


def counted_documents(recipe: Recipe) -> Counted | Uncounted:
    """The documents that an earlier `prepare` of this recipe made, unless there are none, or the recipe has
    changed so that they are others.

    A plan needs the target's config alone. So whatever else is missing here (the target's weights or its
    tokenizer, a source of the data) is told, and the plan goes on without these counts.
    """
    unprepared = "not prepared for this recipe as it stands: `eagle3-ds prepare` makes and counts them"
    # Without the first nothing was prepared; a hub name would be downloaded only to be counted.
    prepared = Path(recipe.output_dir) / "prepared.json"
    if not prepared.is_file() or not Path(recipe.target.path).expanduser().is_dir():
        return Uncounted(unprepared)
    try:
        folder, store = places_in_cache(recipe)
        if not folder.is_dir():
            return Uncounted(unprepared)
        data = PreparedData.open(folder, "")
    except ValueError as error:
        return Uncounted(f"not counted: {error}")
    return Counted(tuple(data.lengths().values()), data.statistics.packs, store.is_dir())


def run_text(recipe: Recipe, counted: Counted | Uncounted, draft_dp: int, step_seconds: float) -> str:
    """Steps and time of training."""
    train = recipe.train
    if train.steps is not None:
        steps, why = train.steps, "train.steps"
    elif isinstance(counted, Counted):
        epochs = train.epochs or 1
        # As data/loader.py counts them: every pack is seen so often at least.
        steps = -(-epochs * counted.packs // (train.accumulation * draft_dp))
        why = f"train.epochs {epochs} of {counted.packs} packs, {train.accumulation * draft_dp} in a step"
    else:
        return (
            f"whole run: its steps follow from train.epochs = {train.epochs or 1} and the data (or set "
            f"train.steps), which are {counted.why}"
        )
    return (
        f"whole run: {steps} steps ({why}) of {figure(step_seconds)} s, {duration(steps * step_seconds)} by "
        "the predicted step, full packs; evaluation, checkpoints and waits for data are not in it"
    )


def capture_text(
    recipe: Recipe, counted: Counted | Uncounted, target: Any, device: Device, ranks: int, row_bytes: int
) -> str:
    """Time and disk of the hidden states of the data set; empty where none are stored."""
    if recipe.data.hidden_states != "offline":
        return ""
    if isinstance(counted, Uncounted):
        return f"capture of the hidden states: its time and disk need the documents, which are {counted.why}"
    of = f"capture of the hidden states of {len(counted.lengths)} documents, {counted.tokens} tokens"
    disk = f"{counted.tokens * row_bytes / 1e9:.3g} GB on disk as {recipe.data.hidden_dtype}"
    if counted.is_captured:
        return f"{of}: done already, {disk}"
    if recipe.target.capture == "server":
        return f"{of}: {disk}; how long the server takes is not predicted"
    if any(getattr(target, name, None) for name in EXPERTS):
        return f"{of}: {disk}; the time of a target with experts is not predicted"
    devices = ranks if recipe.target.capture == "parallel" else 1
    seconds = capture_seconds(recipe, counted.lengths, target, device) / devices
    on = f"{devices} {device.name}" if devices > 1 else f"one {device.name}"
    return f"{of}: {duration(seconds)} on {on} (target.capture), writing not counted; {disk}"


def capture_seconds(recipe: Recipe, lengths: Iterable[int], target: Any, device: Device) -> float:
    """Seconds of the target's forward over these documents on one device: two FLOPs for each weight that
    works on a token, and four for each query-key pair and channel, by the planner's shares of the peak.
    """
    lengths = tuple(lengths)
    weights = weight_bytes(target, "bfloat16") // 2
    if not target.tie_word_embeddings:
        weights -= target.vocab_size * target.hidden_size  # rows of the embedding are looked up
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    channels = target.num_hidden_layers * target.num_attention_heads * attention_size(target)
    peak = 1e12 * (device.single_tflops if recipe.target.dtype == "float32" else device.half_tflops)
    assume = estimates(device)
    products = 2 * weights * sum(lengths) / assume.matmul
    return (products + 4 * channels * pairs / assume.attention_forward) / peak


def duration(seconds: float) -> str:
    """For people: seconds up to two minutes, minutes up to two hours, hours."""
    for unit, size in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{figure(seconds)} s"


def figure(seconds: float) -> str:
    """Seconds with three digits after the point, or, where these would say nothing, with one that counts."""
    return f"{seconds:.3f}" if seconds >= 5e-4 else f"{seconds:.1g}"
