"""The recipe: one frozen object that says everything about a run.

Every section forbids unknown keys and is strict about types; what needs no other file to be judged is judged
here. The meaning of every key is told in docs/recipe.md.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Text = Annotated[str, Field(min_length=1)]
FloatDtype = Literal["float32", "bfloat16", "float16"]
# Names that other rooms take over: each list stands here alone.
Activation = Literal["keep", "recompute", "offload"]
ExchangeName = Literal["gather", "ring"]
ZeroGroup = Literal["all", "draft_dp"]
MaskAlignment = Literal["served", "reference"]
BestBy = Literal["heldout_loss", "acceptance_length"]


class Section(BaseModel):
    """Base of every recipe section: immutable, strict, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class TargetBuild(Section):
    """A small Llama trained on the running Python's standard library, for the quickstart and the tests."""

    vocab_size: Positive = 4096
    hidden_size: Positive = 192
    intermediate_size: Positive = 512
    num_layers: Annotated[int, Field(ge=7)] = 8
    num_heads: Positive = 4
    num_kv_heads: Positive = 2
    max_positions: Positive = 8192
    sequence_length: Positive = 1024
    batch_size: Positive = 2
    steps: NonNegative = 300
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    seed: int = 0

    @model_validator(mode="after")
    def _whole_heads(self) -> TargetBuild:
        if self.hidden_size % self.num_heads or self.hidden_size // self.num_heads % 2:
            raise ValueError(
                f"hidden_size is {self.hidden_size} and num_heads is {self.num_heads}: heads must be equally "
                "wide, and of an even width. Choose hidden_size as a multiple of 2 * num_heads."
            )
        _check_grouping(self.num_heads, self.num_kv_heads)
        return self


class TargetSection(Section):
    path: Text
    """Folder of a Hugging Face causal LM, or a hub name."""
    build: TargetBuild | None = None
    """Build the target at `path` when it is not there yet; one built from other values is refused, not
    replaced.
    """
    aux_layers: Annotated[tuple[NonNegative, ...], Field(min_length=1, max_length=8)] | None = None
    """Layers whose inputs are captured, 1 to 8; null is the EAGLE-3 rule (2, n // 2, n - 3)."""
    dtype: FloatDtype = "bfloat16"
    capture: Literal["single", "parallel"] = "single"
    """Who captures hidden states before training: one process, document by document, or all ranks, cut as
    training is.
    """


class DraftSection(Section):
    algorithm: Literal["eagle3"] = "eagle3"
    """How the draft guesses: a folder of eagle3_ds/algorithms."""
    vocab_size: Positive = 32000
    ttt_steps: Annotated[int, Field(ge=1, le=16)] = 7
    num_layers: Positive = 1
    intermediate_size: Positive | None = None
    num_heads: Positive | None = None
    num_kv_heads: Positive | None = None
    aux_norm: bool = False
    """An RMSNorm of its own for each captured layer, before `fc` (EAGLE-3.1)."""
    norm_before_fc: bool = False
    """One RMSNorm over all captured layers side by side, before `fc` and before `aux_norm`."""
    norm_before_residual: bool = False
    """The first layer's residual is the normed hidden state instead of the hidden state."""
    norm_output: bool = False
    """The next guess reads the output behind the final norm instead of before it (EAGLE-3.1)."""
    sliding_window: Positive | None = None
    """Keys that a position of the draft sees at most, its own among them; null: all before it."""

    @model_validator(mode="after")
    def _window_holds_the_unroll(self) -> DraftSection:
        if self.sliding_window is not None and self.sliding_window < self.ttt_steps:
            raise ValueError(
                f"sliding_window = {self.sliding_window} is less than ttt_steps = {self.ttt_steps}: a guess "
                "must at least see those before it. Use a window of thousands of tokens, or null for full "
                "attention."
            )
        return self

    @model_validator(mode="after")
    def _whole_groups(self) -> DraftSection:
        if self.num_heads is not None and self.num_kv_heads is not None:
            _check_grouping(self.num_heads, self.num_kv_heads)
        return self


class DataSection(Section):
    train: Annotated[tuple[Text, ...], Field(min_length=1)]
    """JSON, JSONL or Parquet files, folders of them, saved or hub data sets, or the word `stdlib` (made from
    Python's standard library).
    """
    shape: Literal["auto", "messages", "sharegpt", "prompt_response", "alpaca", "tokenized"] = "auto"
    """Of the rows; `auto` recognises it by the first row of each file."""
    supervise: Literal["all", "last"] = "all"
    """Learn from every turn of the assistant, or from the last one alone."""
    heldout: tuple[Text, ...] = ()
    """Same as `train`; empty means `heldout_fraction` of the training conversations, split by conversation.
    """
    heldout_fraction: BelowOne = 0.02
    max_length: Positive = 4096
    """Packing length in tokens."""
    max_conversations: Positive | None = None
    on_too_long: Literal["error", "drop", "truncate", "split"] = "error"
    """What to do with a conversation longer than `max_length`; counted and reported."""
    on_bad_row: Literal["error", "drop"] = "error"
    """Refuse the data with a list of all bad rows, or leave them out, counted and reported."""
    chat_template: str | None = None
    """A Jinja file used instead of the tokenizer's own template."""
    chat_template_arguments: dict[str, bool | int | float | str] = {}
    """What the template is rendered with besides the messages, as a server does: enable_thinking,
    date_string.
    """
    workers: Positive | None = None
    """Processes that tokenise; null: the cores. The documents do not depend on it."""
    cache_dir: str = "output/cache"
    """Tokenised conversations and hidden-state stores, keyed by content."""
    hidden_states: Literal["offline", "online"] = "offline"
    """Captured before training into a store, or computed in each step by the target, which then lives beside
    the draft.
    """
    hidden_dtype: Literal["float32", "bfloat16", "float16", "float8"] = "bfloat16"
    """float8 has an exponent per hidden state and takes half the disk of bfloat16."""
    seed: int = 0


class ParallelSection(Section):
    ulysses: Positive = 1
    ring: Positive = 1
    draft_dp: Positive | None = None
    """Null: whatever the world size leaves, world / (ulysses * ring)."""
    zero_group: ZeroGroup = "all"
    kv_exchange: Literal["auto"] | ExchangeName = "auto"
    kv_bytes: NonNegative = 2**33
    """Bytes of other ranks' step-0 keys and values, and of their gradients, that a rank may hold in each
    layer.
    """
    chunks_per_rank: Positive = 8
    """Pieces a ring rank's share of the sequence is cut into for balance."""


class AttentionSection(Section):
    kernel: Literal[
        "auto", "reference", "blockwise", "cpu", "cuda", "cudnn", "flash_attn2", "flash_attn3", "flash_attn4"
    ] = "auto"


class LossSection(Section):
    kind: Literal["kl", "tv", "lk_alpha", "lk_lambda"] = "kl"
    """Of a guess against the teacher: a file of eagle3_ds/losses."""
    lk_eta: Annotated[float, Field(ge=0.0)] = 3.0
    """For `lk_lambda`: how soon total variation takes over from KL as a guess gets accepted."""
    decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    """Weight of TTT step k is decay**k, not renormalised."""
    mask_alignment: MaskAlignment = "served"
    reduction: Literal["supervised", "slots"] = "supervised"
    tile_bytes: Positive = 2**28
    """Byte budget of the transient logits of one loss tile."""


class TrainSection(Section):
    steps: Positive | None = None
    epochs: Positive | None = None
    accumulation: Positive = 1
    """Packed sequences per draft_dp rank and optimizer step."""
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
    """Byte budget of the transient tensors of one tile of slots in a draft layer."""
    eval_every: NonNegative = 0
    """Optimizer steps between held-out evaluations; 0: only at the end."""
    save_every: NonNegative = 0
    """Optimizer steps between checkpoints; 0: only at the end."""
    save_async: bool = False
    """Write a checkpoint while training goes on."""
    best_by: BestBy = "heldout_loss"
    """Which checkpoint is the best: of the lowest held-out loss, or the longest simulated acceptance."""
    keep_checkpoints: Positive | None = 2
    """The newest so many, and the best (`best_by`) besides; null: all."""
    timeout_minutes: Annotated[float, Field(gt=0)] | None = None
    """Stop with a checkpoint after so many minutes of training."""
    init_from: Text | None = None
    """Folder of an exported draft to start from, in either layout of the export section."""
    seed: int = 0

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
    """A rank that is silent, or in one collective, for longer has failed, and with it the run."""
    max_skipped: NonNegative = 3
    """Optimizer steps in a row that may be skipped because loss or gradient is not finite."""
    max_restarts: NonNegative = 0
    """How often the launch starts a failed run again by itself, from the newest intact checkpoint."""
    check_every: NonNegative = 100
    """Optimizer steps between checks that all ranks hold the same; 0: only before checkpoints."""


class EvalSection(Section):
    num_prompts: NonNegative = 16
    """Held-out prompts decoded speculatively after training; 0 skips the evaluation."""
    max_new_tokens: Positive = 128
    draft_tokens: Positive = 7
    context_buckets: Annotated[tuple[Positive, ...], Field(min_length=1)] = (512, 2048, 8192, 32768, 131072)
    """Upper ends, in tokens of context, of the buckets that acceptance is reported by."""
    dtype: FloatDtype = "float32"

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


class LoggingSection(Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least important lines that are told, on the terminal and in the logs of the ranks."""


class Recipe(Section):
    """One run. `deepspeed` is the path of a DeepSpeed JSON, passed through but for the keys we fill in or
    refuse.
    """

    target: TargetSection
    draft: DraftSection = DraftSection()
    data: DataSection
    parallel: ParallelSection = ParallelSection()
    attention: AttentionSection = AttentionSection()
    loss: LossSection = LossSection()
    train: TrainSection
    faults: FaultsSection = FaultsSection()
    eval: EvalSection = EvalSection()
    export: ExportSection = ExportSection()
    logging: LoggingSection = LoggingSection()
    deepspeed: Text
    output_dir: Text


def _check_grouping(num_heads: int, num_kv_heads: int) -> None:
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads is {num_heads} and num_kv_heads is {num_kv_heads}: every key/value head must serve "
            "equally many query heads. Choose num_kv_heads as a divisor of num_heads."
        )
