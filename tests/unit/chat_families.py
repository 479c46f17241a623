"""Templates and tokenizers that behave like those of well-known families, small enough to make in a test."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "data" / "templates"
CORPUS = [
    (
        "The quick brown fox answers the question of the user.\n\nIs it the capital of France? It is "
        "Paris.\n\n\nThe weather"
    ),
    (
        '{"name": "weather", "arguments": {"city": "Paris", "days": 3}}\n</think>\n\nThe answer is 42.\n\n'
        "  indented   code\n\n"
    ),
] * 4
SPLIT = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = {
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
               "<|eot_id|>", "<|eom_id|>", "<|python_tag|>", "<|reserved_special_token_0|>"],
    "qwen2.5": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "mistral": ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]",
                "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"],
    "gemma": ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
    "phi": ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"],
    "gpt-oss": ["<|startoftext|>", "<|endoftext|>", "<|return|>", "<|channel|>", "<|start|>", "<|end|>",
                "<|message|>", "<|call|>"],
}  # fmt: skip
NAMED = {
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "qwen2.5": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "qwen3": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "mistral": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "gemma": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "phi": {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>"},
    "gpt-oss": {"bos_token": "<|startoftext|>", "eos_token": "<|return|>"},
}
WORDS = {
    "qwen2.5": ["<tool_call>", "</tool_call>"],
    "qwen3": ["<tool_call>", "</tool_call>", "<think>", "</think>"],
}
"""Added tokens that are no special ones."""
SENTENCEPIECE = ("mistral", "gemma", "phi")


def family_tokenizer(family: str, chat_template: str | None = None) -> Any:
    """A tokenizer trained on a few lines, cut and joined as the family's, with its special tokens and
    template.
    """
    text = template(family) if chat_template is None else chat_template
    return PreTrainedTokenizerFast(
        tokenizer_object=_backend(family),
        chat_template=text,
        clean_up_tokenization_spaces=False,
        **NAMED[family],
    )


@cache
def _backend(family: str) -> Tokenizer:
    tokenizer = _sentencepiece(family) if family in SENTENCEPIECE else _byte_level()
    # Phi-3 takes the white space after its markers into them
    stripping = family == "phi"
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False, rstrip=stripping and token[1] == "|")
            for token in SPECIAL[family]
        ]
    )
    tokenizer.add_tokens(
        [AddedToken(token, special=False, normalized=False) for token in WORDS.get(family, [])]
    )
    return tokenizer


def template(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(SPLIT, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def _sentencepiece(family: str) -> Tokenizer:
    """BPE over text whose spaces are underlined, with bytes for what is unknown; what stands before a text
    differs.
    """
    underline: normalizers.Normalizer = normalizers.Replace(" ", "▁")
    if family == "phi":
        underline = normalizers.Sequence([normalizers.Prepend("▁"), underline])
    trained = Tokenizer(models.BPE())
    trained.normalizer = underline
    trained.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=200, max_token_length=12, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    tokens = [
        "<unk>",
        *(f"<0x{value:02X}>" for value in range(256)),
        *sorted(model["vocab"], key=model["vocab"].get),
    ]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if family == "mistral":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = underline
    opening = [decoders.Strip(" ", 1, 0)] if family != "gemma" else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *opening]
    )
    return tokenizer
