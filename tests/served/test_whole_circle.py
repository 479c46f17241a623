"""A loop's whole circle with real servers: one vLLM answers prompts and gives their hidden states, ranks
train a draft on them, and another vLLM, which drafts, takes the new draft as it runs and accepts more of it.

Two engines, because vLLM 0.32 has one speculative method per engine, and giving hidden states is one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from eagle3_ds import serving
from eagle3_ds.algorithms import algorithm_of
from eagle3_ds.config import Recipe, SamplingSection, TargetSection
from eagle3_ds.config.target import ServerSection
from eagle3_ds.data.answer_server import AnswerServer
from eagle3_ds.export import export_vllm
from eagle3_ds.patient_http import PatientClient
from eagle3_ds.serving.process import OwnServer, own_server
from eagle3_ds.targets import build_target, choose_aux_layers, load_text_config, load_tokenizer
from eagle3_ds.train.rollout import RolloutTrainer
from eagle3_ds.train.rollout_inputs import Texts
from judge.ranks import RankPools
from tests.served.on_cpu import ON_CPU
from tests.served.pairs import DRAFT_TOKENS, DRAFT_VOCABULARY, NEW_TOKENS
from tests.unit.tiny_target import CONVERSATIONS, TEXTS, tiny_build

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"
VOCABULARY = 320
LEARNT, JUDGED = 20, 8
"""Prompts whose answers are trained on, and others, by which the draft is judged."""
ROLLOUT, PASSES = 5, 20
"""Documents of a rollout, and how often each rollout is trained on."""


@pytest.fixture
def pools() -> Iterator[RankPools]:
    made = RankPools()
    yield made
    made.close()


@pytest.fixture
def section(tmp_path: Path) -> TargetSection:
    """A target that has learnt a little, with heads of 32, vLLM's least."""
    build = tiny_build(hidden_size=128, intermediate_size=128, steps=60)
    target = TargetSection(path=str(tmp_path / "target"), build=build, dtype="float32")
    build_target(target, TEXTS, CONVERSATIONS, progress=False)
    return target


@pytest.fixture
def rollout_engine(
    served_python: str, section: TargetSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[OwnServer]:
    """A vLLM of the target with our connector."""
    for name, value in ON_CPU.items():
        monkeypatch.setenv(name, value)
    settings = ServerSection(
        python=served_python, arguments=("--enforce-eager", "--max-num-seqs=8"), start_seconds=300
    )
    folder = Path(section.path)
    layers = load_text_config(folder).num_hidden_layers
    ids = (*choose_aux_layers(layers), layers)
    with own_server(settings, folder, "float32", ids, 200, tmp_path / "server.log") as server:
        yield server


def answered(section: TargetSection, url: str) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, and the rollout engine's own greedy answers to them, token for token."""
    tokenizer = load_tokenizer(section)
    asks = [
        tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
        for chat in CONVERSATIONS[: LEARNT + JUDGED]
    ]
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in asks]
    sampling = SamplingSection(max_new_tokens=NEW_TOKENS)
    server = AnswerServer(PatientClient(url, 4, 120.0), sampling, [tokenizer.eos_token_id], VOCABULARY)
    server.connect(None, section.path, tokenizer)
    return prompts, [server.answer(prompt, None) for prompt in prompts]


def texts(prompts: list[list[int]], answers: list[list[int]]) -> Texts:
    whole = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
    masks = [torch.arange(len(text)) >= len(prompt) for text, prompt in zip(whole, prompts, strict=True)]
    return Texts(torch.cat(whole), torch.cat(masks), tuple(map(len, whole)))


def trained(
    target: str, learnt: list[Texts], url: str, rows: str, output: str
) -> tuple[str, str, list[float], int]:
    """A rank of the trainer: the first draft as an export, the trained one as a file to push, the losses of
    the first and the last pass, and how many files of rows were left.
    """
    recipe = Recipe.model_validate(
        {
            "target": {"path": target, "dtype": "float32"},
            "draft": {"vocab_size": DRAFT_VOCABULARY, "ttt_steps": 4},
            "parallel": {"ulysses": 2},
            "train": {"steps": 1, "dtype": "float32", "learning_rate": 3e-3},
            "deepspeed": str(DS_CONFIGS / "zero2.json"),
            "output_dir": output,
        }
    )
    answered = torch.cat([text.token_ids[text.loss_mask] for text in learnt])
    trainer = RolloutTrainer(recipe, vocabulary=torch.bincount(answered, minlength=VOCABULARY))
    first = Path(output) / "first"
    state = trainer.state_dict()
    if trainer.trainer.topology.place.rank == 0:
        config = algorithm_of(recipe).build_config(load_text_config(Path(target)), recipe)
        export_vllm(state, config, trainer.vocabulary, first, "float32")
    client = trainer.connect(url, rows)
    rollouts = [trainer.ask(client, text) for text in learnt]
    passes = []
    for _ in range(PASSES):
        passes.append(sum(trainer.step(rollout).loss for rollout in rollouts) / len(rollouts))
    torch.distributed.barrier()
    for rollout in rollouts:
        trainer.discard(rollout)
    torch.distributed.barrier()
    path = trainer.write_draft(Path(output) / "pushed", 1, "float32")
    return str(first), str(path), [passes[0], passes[-1]], len(list(Path(rows).iterdir()))


def test_a_draft_trained_on_an_engines_rows_is_accepted_more_by_the_engine_that_drafts(
    run_there: Callable[..., str],
    pools: RankPools,
    section: TargetSection,
    rollout_engine: OwnServer,
    tmp_path: Path,
) -> None:
    prompts, answers = answered(section, rollout_engine.url)
    learnt = [
        texts(prompts[start : start + ROLLOUT], answers[start : start + ROLLOUT])
        for start in range(0, LEARNT, ROLLOUT)
    ]
    place = (rollout_engine.url, str(rollout_engine.folder), str(tmp_path / "output"))
    ranks = pools(2, trained, section.path, learnt, *place)
    assert ranks[0] == ranks[1]
    first, pushed, (before, after), left = ranks[0]
    assert after < 0.7 * before and left == 0, ranks[0]
    shortest = min(map(len, answers[LEARNT:]))
    assert shortest > DRAFT_TOKENS + 1, "no answer is long enough to be drafted"
    jobs: dict[str, Any] = {
        "modules": str(Path(serving.__file__).parent),
        "model": section.path,
        "start": first,
        "file": pushed,
        "prompts": prompts[LEARNT:],
        # This engine goes on after the end of an answer, which no rollout does.
        "max_new_tokens": shortest,
        "draft_tokens": DRAFT_TOKENS,
    }
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    run_there(Path(__file__).with_name("push_drafts.py"), tmp_path / "jobs.json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["versions"] == [[None], [1], [1]]
    expected = [answer[:shortest] for answer in answers[LEARNT:]]
    for state in ("start", "pushed"):
        assert found[state]["answers"] == expected, f"{state}: both engines answer alike"
    old, new = (
        1 + sum(each["accepted"] for each in counts) / sum(each["rounds"] for each in counts)
        for counts in (found["start"]["counts"], found["pushed"]["counts"])
    )
    print(f"acceptance length before the push {old:.2f}, after it {new:.2f}")
    assert new > old + 1, (old, new)
