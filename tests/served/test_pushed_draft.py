"""A new draft in a vLLM that runs: it accepts what an engine accepts that was started with that draft, and
the answers are the target's own before and after.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle3_ds import serving
from eagle3_ds.algorithms.eagle3 import DraftModel, build_draft_config
from eagle3_ds.config import DraftSection, Recipe
from eagle3_ds.draft import VocabularyMap
from eagle3_ds.export import export_vllm, load_export
from eagle3_ds.train.rollout import RolloutTrainer
from judge.ranks import RankPools
from tests.served.pairs import (
    DRAFT_TOKENS,
    DRAFT_VOCABULARY,
    NEW_TOKENS,
    Pair,
    answered_prompts,
    make_pair,
    random_target,
)

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"


def written(target: str, drafts: dict[int, str], output: str) -> tuple[int, list[str]]:
    """Let ranks under ZeRO-3 write drafts for a server, by version; returns what this rank held whole."""
    recipe = Recipe.model_validate(
        {
            "target": {"path": target, "dtype": "float32"},
            "draft": {"vocab_size": DRAFT_VOCABULARY, "ttt_steps": 3},
            "parallel": {"ulysses": 2},
            "train": {"steps": 1, "dtype": "float32"},
            "deepspeed": str(DS_CONFIGS / "zero3.json"),
            "output_dir": output,
        }
    )
    held, paths = 0, []
    for version, folder in drafts.items():
        _, state, vocabulary = load_export(folder)
        trainer = RolloutTrainer(recipe, vocabulary=vocabulary, weights=state)
        held += len(trainer.trainer.state_dict(keep=trainer.trainer.topology.place.rank == 0))
        paths.append(str(trainer.write_draft(Path(output) / "pushed", version, "float32")))
    return held, paths


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pushed")
    model = random_target(folder / "target", "llama")
    return make_pair(model, folder / "target", folder / "trained", answered_prompts(model), {})


@pytest.fixture(scope="module")
def stale(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the same shape with other weights and another vocabulary."""
    config = load_export(pair.vllm)[0]
    generator = torch.Generator().manual_seed(7)
    state = {name: w + 0.04 * torch.randn(w.shape, generator=generator) for name, w in pair.draft.items()}
    vocabulary = VocabularyMap.from_counts(torch.arange(320), DRAFT_VOCABULARY)
    assert not vocabulary.equals(pair.vocabulary)
    return export_vllm(state, config, vocabulary, tmp_path_factory.mktemp("stale") / "draft", "float32")


@pytest.fixture
def pools() -> Iterator[RankPools]:
    made = RankPools()
    yield made
    made.close()


def refused_files(pair: Pair, folder: Path) -> dict[str, str]:
    """Files that the engine must not take: of a wider draft, and of no format."""
    config = build_draft_config(
        type(load_export(pair.vllm)[0])(**json.loads((pair.target / "config.json").read_text())),
        DraftSection(vocab_size=DRAFT_VOCABULARY, intermediate_size=256),
    )
    wider = DraftModel(config).state_dict()
    export_vllm(wider, config, pair.vocabulary, folder / "wider", "float32")
    (weights,) = (folder / "wider").glob("*.safetensors")
    files = {"other shape": folder / "wider.safetensors", "other format": folder / "plain.safetensors"}
    save_file(load_file(weights), files["other shape"], {"format": "eagle3_ds draft 1", "version": "5"})
    save_file(load_file(weights), files["other format"])
    return {name: str(file) for name, file in files.items()}


def test_a_running_engine_takes_a_new_draft(
    run_there: Callable[..., str], pools: RankPools, pair: Pair, stale: Path, tmp_path: Path
) -> None:
    drafts = {7: str(pair.vllm), 8: str(stale)}
    (held, paths), (nothing, same) = pools(2, written, str(pair.target), drafts, str(tmp_path))
    assert held and not nothing and paths == same, "the first rank alone holds whole drafts"
    jobs: dict[str, Any] = {
        "modules": str(Path(serving.__file__).parent),
        "model": str(pair.target),
        "start": str(stale),
        "other": str(pair.vllm),
        "file": paths[0],
        "back": paths[1],
        "refused": refused_files(pair, tmp_path),
        "prompts": pair.prompts,
        "max_new_tokens": NEW_TOKENS,
        "draft_tokens": DRAFT_TOKENS,
    }
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    run_there(Path(__file__).with_name("push_drafts.py"), tmp_path / "jobs.json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    for state in ("start", "still", "pushed", "back", "other"):
        assert found[state]["answers"] == pair.answers, f"{state}: the target's own greedy text"
    assert found["pushed"]["counts"] == found["other"]["counts"]
    assert found["still"]["counts"] == found["start"]["counts"] == found["back"]["counts"]
    assert found["versions"] == [[None], [7], [7]]
    start, pushed = (
        sum(each["accepted"] for each in found[state]["counts"]) for state in ("start", "pushed")
    )
    assert pushed > 1.5 * start, (start, pushed)
    refused = found["refused"]
    assert "midlayer.mlp.down_proj.weight is (128, 256), expected (128, 128)" in refused["other shape"]
    assert "is of format None and version None" in refused["other format"]
    assert "has version 7, and version 7 runs" in refused["not newer"]
