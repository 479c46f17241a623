"""Training a small Llama and its tokenizer from scratch on given texts, for machines without a real target.

Legend: B rows of a batch, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional

from eagle3_ds.config import TargetBuild, TargetSection
from eagle3_ds.say import progress_bar
from eagle3_ds.targets.load import choose_aux_layers

Messages = list[dict[str, str]]

RECORD = "build.json"
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHARACTERS_PER_TOKEN = 4
"""Characters of text to gather per training token: an upper estimate for code and a byte-level BPE of a few
thousand tokens.
"""
WARMUP_SHARE = 0.1
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML. `generation` marks what the loss mask covers: the assistant's content and the token that ends its
turn, without the newline that follows.
"""


def build_target(
    section: TargetSection,
    texts: Iterable[str],
    conversations: Iterable[Messages] = (),
    progress: bool = True,
    device: torch.device | str = "cpu",
) -> Path:
    """Train the target of `section.build` and save it at `section.path`, unless it is there already.

    Args:
        texts: plain documents; no more are read than the training needs.
        conversations: lists of messages (role, content), rendered with the chat template. They make up half
            of the training text.
        device: trains it; the weights that are drawn first are the same on all.

    Returns:
        The folder, as `save_pretrained` writes it, with fp32 weights, and with the values of `section.build`
        in build.json.

    Raises:
        ValueError: `section.build` is null; the folder exists and was not built, or from other values; there
            is too little text; or `target.aux_layers` or the vocabulary size do not fit the model.
    """
    if section.build is None:
        raise ValueError(
            f"target.build is null: it says how to build the target at {section.path!r}. Set it."
        )
    build, folder = section.build, Path(section.path).expanduser()
    if folder.exists():
        _check_same_build(folder, build)
        return folder
    choose_aux_layers(build.num_layers, section.aux_layers)  # raises before minutes of training are spent
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written under another name and renamed: an interrupted build leaves no folder that looks complete.
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        aside.chmod(0o755)
        documents = _gather(build, texts, conversations)
        tokenizer = train_tokenizer(build, documents)
        rows = _tokenise(build, tokenizer, documents)
        model, losses = _train_model(build, tokenizer, rows, progress, torch.device(device))
        model.save_pretrained(aside)
        for weights in aside.glob("*.safetensors"):
            weights.chmod(0o644)  # safetensors writes them readable by their owner only
        tokenizer.save_pretrained(aside)
        record = {
            "build": build.model_dump(),
            "tokens": rows.numel(),
            "unigram_loss": unigram_loss(rows),
            "losses": losses,
        }
        (aside / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        os.rename(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return folder


def unigram_loss(rows: Tensor) -> float:
    """Cross entropy, in nats per token, of always predicting the token frequencies of `rows` (integers of any
    shape): the best loss that a model without context reaches.
    """
    counts = torch.bincount(rows.flatten()).double()
    share = counts[counts > 0] / counts.sum()
    return float(-(share * share.log()).sum())


def _check_same_build(folder: Path, build: TargetBuild) -> None:
    record = folder / RECORD
    if not record.is_file():
        raise ValueError(
            f"target.path = {str(folder)!r} exists, but was not built from target.build (no {RECORD}): it is "
            "not replaced. Remove target.build to use it as it is, or name another path."
        )
    # A key that is newer than the folder had its default.
    found = TargetBuild().model_dump() | json.loads(record.read_text(encoding="utf-8"))["build"]
    wanted = build.model_dump()
    changed = [
        f"{key} {found.get(key)} there, {wanted.get(key)} wanted"
        for key in wanted
        if found.get(key) != wanted[key]
    ]
    if changed:
        raise ValueError(
            f"target.path = {str(folder)!r} was built from other values ({'; '.join(changed)}): it is not "
            "replaced. Name another path, remove the folder, or restore target.build."
        )


def _gather(
    build: TargetBuild, texts: Iterable[str], conversations: Iterable[Messages]
) -> list[str | Messages]:
    """Gather as much text as the training reads once: half of the characters from plain texts and half from
    conversations, until one of them has no more.
    """
    wanted = max(1, build.steps) * build.batch_size * (build.sequence_length + 1) * CHARACTERS_PER_TOKEN
    plain, chat = iter(texts), iter(conversations)
    sizes = {"plain": 0, "chat": 0}
    documents: list[str | Messages] = []
    while sum(sizes.values()) < wanted:
        # The kind that has fewer characters so far is next.
        kind = "plain" if sizes["plain"] <= sizes["chat"] else "chat"
        document: str | Messages | None = next(plain, None) if kind == "plain" else next(chat, None)
        if document is None:
            kind = "chat" if kind == "plain" else "plain"
            document = next(plain, None) if kind == "plain" else next(chat, None)
        if document is None:
            break
        documents.append(document)
        sizes[kind] += (
            len(document) if isinstance(document, str) else sum(len(m["content"]) for m in document)
        )
    return documents


def train_tokenizer(
    build: TargetBuild, documents: list[str | Messages]
) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE, which can encode any text, with the special tokens and template of the chat."""
    special = [END_OF_TEXT, TURN_START, TURN_END]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if build.vocab_size < len(alphabet) + len(special):
        raise ValueError(
            f"target.build.vocab_size = {build.vocab_size} is less than the {len(alphabet)} bytes and "
            f"{len(special)} special tokens that every tokenizer has. Use at least "
            f"{len(alphabet) + len(special)}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=build.vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    plain = (
        "\n".join(message["content"] for message in doc) if isinstance(doc, list) else doc
        for doc in documents
    )
    tokenizer.train_from_iterator(plain, trainer)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        model_max_length=build.max_positions,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def _tokenise(
    build: TargetBuild, tokenizer: transformers.PreTrainedTokenizerFast, documents: list[str | Messages]
) -> Tensor:
    """Join the tokens of all documents, separated by the padding token, and cut them into rows: int64
    [N, sequence_length + 1].
    """
    rendered = [
        tokenizer.apply_chat_template(doc, tokenize=False) if isinstance(doc, list) else doc
        for doc in documents
    ]
    separator = tokenizer.pad_token_id
    stream: list[int] = []
    for ids in tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"] if rendered else []:
        stream += ids
        stream.append(separator)
    width = build.sequence_length + 1
    if len(stream) < width:
        raise ValueError(
            f"the texts for target.build give {len(stream)} tokens, less than one training row of "
            f"sequence_length + 1 = {width}. Give more text or lower target.build.sequence_length."
        )
    whole = len(stream) // width
    return torch.tensor(stream[: whole * width]).view(whole, width)


def _train_model(
    build: TargetBuild,
    tokenizer: transformers.PreTrainedTokenizerFast,
    rows: Tensor,
    progress: bool,
    device: torch.device,
) -> tuple[transformers.LlamaForCausalLM, list[float]]:
    """Train with AdamW, a short warm-up, a cosine schedule to zero, and gradients clipped at norm 1. The
    caller's random state does not change.

    Args:
        rows: int64 [N, sequence_length + 1].

    Returns:
        The model in eval mode, on `device`, and the loss of each step.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(build.seed)
        model = transformers.LlamaForCausalLM(model_config(build, tokenizer)).float().to(device)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=build.learning_rate, betas=(0.9, 0.95))
    losses: list[float] = []
    bar = progress_bar(
        _batches(build, rows),
        total=build.steps,
        desc="building the target",
        disable=not progress,
        unit="step",
    )
    model.train()
    for step, batch in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = build.learning_rate * _schedule(step, build.steps)
        ids = batch.to(device)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        bar.set_postfix(loss=f"{losses[-1]:.2f}", refresh=False)
    return model.eval(), losses


def model_config(build: TargetBuild, tokenizer: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=build.vocab_size,
        hidden_size=build.hidden_size,
        intermediate_size=build.intermediate_size,
        num_hidden_layers=build.num_layers,
        num_attention_heads=build.num_heads,
        num_key_value_heads=build.num_kv_heads,
        max_position_embeddings=build.max_positions,
        initializer_range=build.hidden_size
        ** -0.5,  # with the usual 0.02 narrow layers take many steps before the loss falls
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _batches(build: TargetBuild, rows: Tensor) -> Iterator[Tensor]:
    """Yield `steps` batches int64 [B, T + 1]. Each pass takes every row once, in an order that depends on
    `build.seed`.
    """
    rng, order = random.Random(build.seed), list[int]()
    for _ in range(build.steps):
        while len(order) < build.batch_size:
            order += rng.sample(range(len(rows)), len(rows))
        chosen, order = order[: build.batch_size], order[build.batch_size :]
        yield rows[chosen]


def _schedule(step: int, steps: int) -> float:
    warmup = max(1, round(steps * WARMUP_SHARE))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
