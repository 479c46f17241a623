"""The recipe: one frozen object with all settings of a run.

Every section forbids unknown keys and checks types strictly. Here are the checks that need no other file.
docs/recipe.md explains every key.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from eagle3_ds.config.draft import DraftSection
from eagle3_ds.config.section import BelowOne, FloatDtype, Fraction, NonNegative, Positive, Section, Text
from eagle3_ds.config.sizes import LENGTH, TTT_STEPS
from eagle3_ds.config.target import TargetSection

# Names that other rooms take over: each list stands here alone.
Activation = Literal["keep", "recompute", "offload"]
ExchangeName = Literal["gather", "ring"]
ZeroGroup = Literal["all", "draft_dp"]
MaskAlignment = Literal["served", "reference", "predicted"]
BestBy = Literal["heldout_loss", "acceptance_length", "acceptance_length_decoded"]
TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


ALIGNMENTS: dict[str, tuple[MaskAlignment, ...]] = {
    "eagle3": ("served", "reference"),
    "peagle": ("served",),
    "dflash": ("served", "predicted"),
}
"""What `loss.mask_alignment` may be, by algorithm."""


class DataSection(Section):
    train: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    """JSON, JSONL or Parquet files, folders of them, saved or hub data sets, or the word `stdlib` (made from
    Python's standard library). Null: none, for a `RolloutTrainer`; a run needs some.
    """
    shape: Literal["auto", "messages", "sharegpt", "prompt_response", "alpaca", "tokenized"] = "auto"
    """Format of the rows. `auto` recognises it from the first row of each file."""
    supervise: Literal["all", "last"] = "all"
    """Supervise all turns of the assistant, or only the last one."""
    heldout: tuple[Text, ...] = ()
    """Held-out data, named as in `train`. Empty: `heldout_fraction` of the training conversations."""
    heldout_fraction: BelowOne = 0.02
    max_length: Positive = LENGTH
    """The most tokens of a pack: documents are laid end to end up to this length. Not given in a file: the
    target's positions where they are fewer (sizes.py).
    """
    max_conversations: Positive | None = None
    on_too_long: Literal["error", "drop", "truncate", "split"] = "error"
    """What to do with conversations longer than `max_length`; they are counted and reported."""
    on_bad_row: Literal["error", "drop"] = "error"
    """`error`: stop with a list of all bad rows. `drop`: leave them out, counted and reported."""
    chat_template: str | None = None
    """A Jinja file used instead of the tokenizer's own template."""
    chat_template_arguments: dict[str, bool | int | float | str] = {}
    """What the template gets besides the messages, as from a server; for example enable_thinking."""
    workers: Positive | None = None
    """How many processes tokenise; null: one per core. The documents are the same for any number."""
    cache_dir: str = "output/cache"
    """Folder of tokenised conversations and hidden-state stores, which are found again by their content."""
    hidden_states: Literal["offline", "online", "stream"] = "offline"
    """`offline`: captured into a store before training. `online`: computed in each step by the target, which
    is then on the same devices as the draft. `stream`: asked of `target.server` while the draft is trained.
    """
    hidden_dtype: Literal["float32", "bfloat16", "float16", "float8"] = "bfloat16"
    """Dtype of the store. float8 has one exponent per hidden state and takes half the disk of bfloat16."""
    seed: int = 0


class SamplingSection(Section):
    """How `data regenerate` draws answers. Null, where it may be: the server's own setting (`--server`)."""

    max_new_tokens: Positive = 1024
    """Tokens of the longest answer."""
    temperature: Annotated[float, Field(ge=0)] | None = 0.0
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: NonNegative | None = 0
    """Only the likeliest so many tokens are drawn from; 0: from all."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = 0


class ParallelSection(Section):
    ulysses: Positive = 1
    ring: Positive = 1
    draft_dp: Positive | None = None
    """Null: whatever the world size leaves, world / (ulysses * ring)."""
    zero_group: ZeroGroup = "all"
    kv_exchange: Literal["auto"] | ExchangeName = "auto"
    kv_bytes: NonNegative = 2**33
    """How many bytes a rank may hold, per draft layer, of other ranks' keys and values of TTT step 0 and of
    their gradients.
    """
    chunks_per_rank: Positive = 8
    """How many spans a ring rank's share of the sequence is cut into, to balance attention between ranks."""


class AttentionSection(Section):
    kernel: Literal[
        "auto",
        "reference",
        "blockwise",
        "cpu",
        "cuda",
        "cudnn",
        "npu",
        "flash_attn2",
        "flash_attn3",
        "flash_attn4",
    ] = "auto"


class LossSection(Section):
    kind: Literal["kl", "tv", "lk_alpha", "lk_lambda"] = "kl"
    """The loss between the draft's and the teacher's distribution: name of a file in eagle3_ds/losses."""
    lk_eta: Annotated[float, Field(ge=0.0)] = 3.0
    """For `lk_lambda`: how fast the loss changes from KL to total variation as acceptance grows."""
    decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    """Weight of TTT step k is decay**k, not renormalised."""
    mask_alignment: MaskAlignment = "served"
    """Which tokens must be the assistant's for a guess to count (docs/semantics.md, docs/dflash.md)."""
    reduction: Literal["supervised", "slots"] = "supervised"
    tile_bytes: Positive = 2**30
    """Bytes that the logits of one tile of the loss may take."""


class TrainSection(Section):
    steps: Positive | None = None
    epochs: Positive | None = None
    accumulation: Positive = 1
    """How many packs each draft_dp rank trains on in an optimizer step."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: NonNegative = 0
    min_lr_ratio: Fraction = 0.1
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    gradient_clipping: Annotated[float, Field(ge=0)] = 0.5
    """Largest global gradient norm; 0 turns clipping off."""
    activation: Activation = "recompute"
    tile_bytes: Positive = 2**30
    """Bytes that the intermediate tensors of one tile of slots may take in a draft layer."""
    eval_every: NonNegative = 0
    """Optimizer steps between held-out evaluations; 0: only at the end."""
    save_every: NonNegative = 0
    """Optimizer steps between checkpoints; 0: only at the end."""
    save_async: bool = False
    """Write a checkpoint while training goes on."""
    best_by: BestBy = "heldout_loss"
    """Which checkpoint is the best: of the lowest held-out loss, or the longest acceptance, simulated or
    decoded (`eval.during`).
    """
    keep_checkpoints: Positive | None = 2
    """How many of the newest checkpoints are kept; the best one is kept besides. Null: all."""
    timeout_minutes: Annotated[float, Field(gt=0)] | None = None
    """Stop with a checkpoint after this many minutes of training."""
    init_from: Text | None = None
    """Folder of an exported draft to start from, in either layout of the export section."""
    trackers: tuple[TrackerName, ...] = ()
    """Where rank 0 writes the lines of metrics.jsonl as well, each by its own package."""
    profile_steps: tuple[Positive, Positive] | None = None
    """The first and the last optimizer step, from 1, of which a trace is written. Null: none."""
    profile_ranks: Literal["first", "all"] = "first"
    """Which ranks write a trace."""
    seed: int = 0

    @model_validator(mode="after")
    def _steps_to_profile(self) -> TrainSection:
        if self.profile_steps is None:
            return self
        first, last = self.profile_steps
        if first > last or (self.steps is not None and last > self.steps):
            raise ValueError(
                f"profile_steps is {[first, last]}: they are the first and the last of the steps to profile, "
                f"from 1 to {self.steps or 'the last'}. Use for example [{min(10, self.steps or 10)}, "
                f"{min(12, self.steps or 12)}]."
            )
        return self

    @model_validator(mode="after")
    def _each_tracker_once(self) -> TrainSection:
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(
                f"trackers is {list(self.trackers)}, which names one twice, and each is written to once. "
                f"Use {list(dict.fromkeys(self.trackers))}."
            )
        return self

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"train.steps is {self.steps} and train.epochs is {self.epochs}: exactly one of them says "
                "how long to train. Set one and remove the other."
            )
        if self.steps is not None and self.warmup_steps > self.steps:
            raise ValueError(
                f"train.warmup_steps is {self.warmup_steps}, more than the {self.steps} steps of the run. "
                "Lower it."
            )
        return self


class FaultsSection(Section):
    watchdog_seconds: Annotated[float, Field(gt=0)] = 600.0
    """The run fails when a rank sends no heartbeat, or waits in one collective, for longer than this."""
    max_skipped: NonNegative = 3
    """How many optimizer steps in a row may be skipped because loss or gradient is not finite."""
    max_restarts: NonNegative = 0
    """How often the launch restarts a failed run, from the newest intact checkpoint."""
    check_every: NonNegative = 100
    """Optimizer steps between checks that replicas are equal on all ranks; 0: only before checkpoints."""


class EvalSection(Section):
    num_prompts: NonNegative = 16
    """Held-out prompts decoded speculatively after training; 0 skips the evaluation."""
    max_new_tokens: Positive = 128
    draft_tokens: Positive = TTT_STEPS
    """Not given in a file: as many as the draft is trained for (sizes.py)."""
    context_buckets: Annotated[tuple[Positive, ...], Field(min_length=1)] = (512, 2048, 8192, 32768, 131072)
    """Acceptance is reported by tokens of context; these are the upper ends of the buckets."""
    dtype: FloatDtype = "float32"
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Above 0, the prompts are decoded a second time, by speculative sampling at this temperature."""
    seed: NonNegative = 0
    """Of the tokens that are drawn."""
    during: NonNegative = 0
    """Optimizer steps between decodings of held-out prompts during training; 0: none."""
    during_prompts: Annotated[int, Field(gt=0, le=64)] = 4
    """How many prompts these decode; the other ranks wait for it."""
    during_max_context: Positive = 4096
    """Tokens of the longest prompt that is decoded during training, on one device."""

    @model_validator(mode="after")
    def _ascending_buckets(self) -> EvalSection:
        if list(self.context_buckets) != sorted(set(self.context_buckets)):
            raise ValueError(
                f"context_buckets is {list(self.context_buckets)}, but upper ends must ascend. Sort them."
            )
        return self


class ExportSection(Section):
    formats: tuple[Literal["vllm", "speculators"], ...] = ("vllm", "speculators")
    dtype: FloatDtype = "bfloat16"
    license: Text | None = None
    """What the model cards state; null: what the target's own card states, if it does."""


class LoggingSection(Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    """The lowest level that is logged, on the terminal and in the logs of the ranks."""


class Recipe(Section):
    """All settings of a run. `deepspeed` is the path of a DeepSpeed JSON, the name of a shipped one, or what
    would stand in it, which may have all keys but those that the recipe sets or this project refuses.
    """

    target: TargetSection
    draft: DraftSection = DraftSection()
    data: DataSection = DataSection()
    sampling: SamplingSection = SamplingSection()
    parallel: ParallelSection = ParallelSection()
    attention: AttentionSection = AttentionSection()
    loss: LossSection = LossSection()
    train: TrainSection
    faults: FaultsSection = FaultsSection()
    eval: EvalSection = EvalSection()
    export: ExportSection = ExportSection()
    logging: LoggingSection = LoggingSection()
    deepspeed: str | dict[str, Any] = "zero2"
    output_dir: Text

    @field_validator("deepspeed", mode="before")
    @classmethod
    def _file_or_keys(cls, value: object) -> object:
        if not isinstance(value, dict) and not (isinstance(value, str) and value):
            raise ValueError(
                f"the value is {json.dumps(value)}, but it should be the path of a DeepSpeed JSON, the name "
                "of a shipped one such as zero2, or a mapping with the keys of one. Change it in the recipe."
            )
        comet = value.get("comet") if isinstance(value, dict) else None
        if isinstance(comet, dict) and comet.get("api_key"):
            raise ValueError(
                "comet.api_key is given: a recipe is logged and saved. Put the key into the environment "
                "variable COMET_API_KEY, and remove it here."
            )
        return value

    @model_validator(mode="after")
    def _one_who_runs_the_target(self) -> Recipe:
        capture, states = self.target.capture, self.data.hidden_states
        if capture == "server" and states == "online":
            raise ValueError(
                "target.capture is server and data.hidden_states is online, which is the target on the "
                "ranks. Set data.hidden_states to stream (rows while the draft is trained) or offline (a "
                "store before), or target.capture to single."
            )
        if states == "stream" and capture != "server":
            raise ValueError(
                f"data.hidden_states is stream and target.capture is {capture}: the rows of a stream come "
                "from a server. Set target.capture to server, or data.hidden_states to offline or online."
            )
        return self

    @model_validator(mode="after")
    def _one_start(self) -> Recipe:
        if self.draft.start == "lookup" and self.train.init_from is not None:
            raise ValueError(
                f"draft.start is 'lookup' and train.init_from is {self.train.init_from!r}: a draft has its "
                "first weights from one of them. Remove the other."
            )
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> Recipe:
        if self.train.best_by != "acceptance_length_decoded":
            return self
        save_every, during = self.train.save_every, self.eval.during
        if during == 0 or save_every % during:
            raise ValueError(
                f"train.best_by is acceptance_length_decoded, train.save_every is {save_every} and "
                f"eval.during is {during}: a checkpoint is judged by a decoding of its own step. Set "
                "eval.during to a divisor of train.save_every, or train.best_by to acceptance_length, which "
                "is simulated."
            )
        return self

    @model_validator(mode="after")
    def _alignment_of_the_algorithm(self) -> Recipe:
        alignment, algorithm = self.loss.mask_alignment, self.draft.algorithm
        if alignment not in ALIGNMENTS[algorithm]:
            raise ValueError(
                f"loss.mask_alignment is {alignment} and draft.algorithm is {algorithm}, whose own trainers "
                f"have no such rule. Use {' or '.join(ALIGNMENTS[algorithm])}."
            )
        return self

    @model_validator(mode="after")
    def _blocks_are_trained_so(self) -> Recipe:
        if self.draft.algorithm != "dflash":
            return self
        if self.train.activation == "offload":
            raise ValueError(
                "train.activation is offload and draft.algorithm is dflash, whose pass moves nothing to the "
                "host. Use recompute, or keep."
            )
        if self.draft.anchor_share < 1 and self.data.hidden_states in ("stream", "online"):
            raise ValueError(
                f"draft.anchor_share is {self.draft.anchor_share} and data.hidden_states is "
                f"{self.data.hidden_states}: who reads which hidden states is decided before anchors are "
                "drawn. Use a store (data.hidden_states: offline), or anchor_share 1."
            )
        return self

    @model_validator(mode="after")
    def _rounds_of_whole_blocks(self) -> Recipe:
        draft, asked = self.draft, self.eval.draft_tokens
        guesses = draft.num_guesses
        if draft.algorithm != "dflash" or asked == guesses or (draft.block_causal and asked < guesses):
            return self
        raise ValueError(
            f"eval.draft_tokens is {asked} and draft.block_size is {draft.block_size}, which makes {guesses} "
            "guesses: "
            + (
                "no more of them are trained. Lower eval.draft_tokens."
                if draft.block_causal
                else "each input of a block sees all masks of it, so another number of them gives other "
                f"guesses than the trained ones. Set eval.draft_tokens to {guesses}."
            )
        )

    @model_validator(mode="after")
    def _norms_that_the_layout_takes(self) -> Recipe:
        if self.draft.aux_norm and self.draft.norm_before_fc and "speculators" in self.export.formats:
            raise ValueError(
                f"draft.aux_norm and draft.norm_before_fc are both true and export.formats is "
                f"{list(self.export.formats)}: speculators 0.9 loads drafts with one of the two norms. Set "
                "export.formats to [vllm], or one of the norms to false."
            )
        return self
