"""A tiny tokenizer and tiny conversations for the tests of the data room."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from eagle3_ds.config.schema import Recipe

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] "
    "}}|>{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] "
    "}}<|end|>{% endgeneration %}{% else %}{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
)
SPECIAL = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"]


def tiny_tokenizer(chat_template=TEMPLATE):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox answers the question of the user"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=chat_template
    )


def chat(*contents, system=None):
    """Messages with the contents given to user and assistant in turn."""
    messages = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return messages + [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def write_jsonl(path, conversations):
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    return str(path)


def data_recipe(tmp_path, **data):
    data.setdefault("cache_dir", str(tmp_path / "cache"))
    return Recipe.model_validate(
        {
            "target": {"path": "unused"},
            "data": data,
            "train": {"steps": 1},
            "deepspeed": "unused.json",
            "output_dir": str(tmp_path / "out"),
        }
    )
