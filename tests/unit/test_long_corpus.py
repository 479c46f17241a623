"""The texts of benchmarks.long_context: what is answered stands far back, and conversations are the same
again; and its target, which finds what it saw before it is trained.
"""

from __future__ import annotations

import re

import pytest
import torch
import transformers

from benchmarks import long_target
from benchmarks.long_corpus import ANSWERED_SHARE, conversation
from benchmarks.long_lookup import UNTOLD, copied_row, loss_of_copies
from benchmarks.long_start import wire_lookup
from eagle3_ds.targets.build import model_config, train_tokenizer

SIZES = long_target.sizes(512).model_copy(
    update={"vocab_size": 512, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "num_kv_heads": 1}
)


@pytest.mark.parametrize("characters", [1500, 6000, 48_000])
def test_answers_are_quotations(characters: int) -> None:
    for number in range(5):
        system, *turns = conversation(number, characters)["messages"]
        repository, asked = system["content"], [turn["content"] for turn in turns[::2]]
        assert len(set(asked)) == len(asked) and turns and len(turns) % 2 == 0
        assert {turn["role"] for turn in turns[::2]} == {"user"}
        for turn in turns[1::2]:
            answer = turn["content"]
            if answer.startswith("```python\n"):
                assert answer.removeprefix("```python\n").removesuffix("\n```") in repository
            elif answer.startswith('"""'):
                assert answer.strip('"').strip() in repository
            else:
                lines = answer.split("\n")
                assert all(re.fullmatch(r"The key of \w+-\d\d is [A-Z]{4}-\d{4}\.", line) for line in lines)
                assert all(f"# {line}" in repository for line in lines)
        size = len(repository) + sum(len(turn["content"]) for turn in turns)
        assert 0.8 * characters < size < 1.3 * characters + 1500
        answered = sum(len(turn["content"]) for turn in turns) / size
        assert answered < ANSWERED_SHARE + 1500 / characters


def test_a_conversation_depends_on_its_number_alone() -> None:
    assert conversation(3, 4000) == conversation(3, 4000) != conversation(4, 4000)


def test_rows_fit_and_the_last_answer_is_found() -> None:
    texts = [conversation(number, 3000)["messages"] for number in range(40)]
    tokenizer = train_tokenizer(SIZES, texts)
    for ids, mask in long_target.fitting(tokenizer, 900, 6, 7, 0.2):
        assert 810 <= len(ids) == len(mask) <= 900
        start, end = long_target.last_answer(mask)
        assert all(mask[start:end]) and not mask[start - 1] and not any(mask[end:])
        assert ids[end - 1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:start]).endswith("assistant\n")


def test_the_loss_by_context_sees_no_more_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_tokenizer(SIZES, [conversation(number, 3000)["messages"] for number in range(40)])
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(model_config(SIZES, tokenizer)).eval()
    seen: list[int] = []
    real = long_target.token_losses

    def noted(model: object, ids: torch.Tensor) -> torch.Tensor:
        seen.append(ids.shape[1])
        return real(model, ids)

    monkeypatch.setattr(long_target, "token_losses", noted)
    rows = long_target.loss_by_context(model, tokenizer, 500, [50, 400], 2)
    assert [row["context"] for row in rows] == [50, 400]
    assert rows[0]["tokens"] == rows[1]["tokens"] and rows[0]["loss"] != rows[1]["loss"]
    assert max(seen[:2]) < max(seen[2:])
    by_place = long_target.loss_by_position(model, tokenizer, 500, [100, 500], 2)
    assert by_place[0]["tokens"] == 200 and 700 < by_place[1]["tokens"] <= 800


@pytest.mark.parametrize("length", [64, 512, 5000])
def test_a_copied_token_is_told_by_the_two_before_it(length: int) -> None:
    shares = []
    for number in range(8):
        ids, told = copied_row(number, length, 2048, 3)
        assert len(ids) == len(told) == length + 1 and min(ids) >= 3 and max(ids) < 2048
        after: dict[tuple[int, ...], set[int]] = {}
        for place, token in enumerate(ids):
            pair = tuple(ids[max(0, place - UNTOLD) : place])
            assert not told[place] or token in after[pair]
            after.setdefault(pair, set()).add(token)
        shares.append(sum(told) / length)
    assert 0.1 < min(shares) < max(shares) < 0.95
    assert copied_row(1, length, 2048, 3) == copied_row(1, length, 2048, 3) != copied_row(2, length, 2048, 3)


def test_a_target_finds_copies_before_it_is_trained() -> None:
    tokenizer = train_tokenizer(SIZES, [conversation(number, 3000)["messages"] for number in range(40)])
    first_token = long_target.first_token(tokenizer)
    assert tokenizer.convert_ids_to_tokens(first_token) not in tokenizer.all_special_tokens
    config = model_config(long_target.sizes(8192), tokenizer)
    config.rope_parameters = {"rope_type": "default", "rope_theta": long_target.ROPE_THETA}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    for row in loss_of_copies(model, first_token, [64, 1024], 2):
        assert row["second"] > 0.9 * row["first"]
    wire_lookup(model, 0)
    for row in loss_of_copies(model, first_token, [64, 1024, 4096], 2):
        assert row["second"] < 0.2 * row["first"]


def test_stretched_positions_reach_as_far_as_they_may() -> None:
    assert torch.equal(long_target.stretched(3, 64, 64), torch.arange(64))
    ends = []
    for number in range(40):
        places = long_target.stretched(number, 64, 4096)
        steps = places.diff()
        assert places[0] == 0 and (steps >= 1).all()
        assert (steps > 1).sum() <= long_target.JUMPS
        ends.append(int(places[-1]))
    assert 64 <= min(ends) < 100 and 2000 < max(ends) < 4096
    assert torch.equal(places, long_target.stretched(39, 64, 4096))


def test_a_stretched_row_is_one_document() -> None:
    """A token before a jump is seen after it, and further back than it stands."""
    tokenizer = train_tokenizer(SIZES, [conversation(number, 3000)["messages"] for number in range(40)])
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(model_config(SIZES, tokenizer)).eval()
    places = torch.cat([torch.arange(10), torch.arange(200, 210)])[None]
    ids = torch.randint(3, 512, (1, 21))
    other = ids.clone()
    other[0, 3] += 1
    losses, changed = (long_target.token_losses(model, each, places)[0] for each in (ids, other))
    assert (losses[10:] != changed[10:]).all()
    assert (long_target.token_losses(model, ids)[0][10:] != losses[10:]).all()


@pytest.mark.parametrize(
    "wrong", [{"num_layers": 1}, {"num_heads": 2}, {"num_kv_heads": 1}, {"hidden_size": 32}, None]
)
def test_a_look_up_takes_room(wrong: dict[str, int] | None) -> None:
    tokenizer = train_tokenizer(SIZES, [conversation(number, 3000)["messages"] for number in range(40)])
    config = model_config(long_target.sizes(512).model_copy(update=wrong or {}), tokenizer)
    config.tie_word_embeddings = wrong is None
    with pytest.raises(ValueError, match=r"num_layers >= 2, num_heads >= 4, num_kv_heads >= 2"):
        wire_lookup(transformers.LlamaForCausalLM(config), 0)
