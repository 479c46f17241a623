"""Both layouts in a real vLLM: each loads, as the draft and alone, and the answers are the target's own.

vLLM wants an environment of its own: name its Python in EAGLE3_DS_VLLM_PYTHON.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from eagle3_ds.algorithms.eagle3 import DraftModel, build_draft_config
from eagle3_ds.config import DraftSection, TargetSection
from eagle3_ds.draft import VocabularyMap
from eagle3_ds.export import export_speculators, export_vllm
from eagle3_ds.targets import build_target, load_embedding_and_head, load_text_config
from tests.unit.tiny_target import CONVERSATIONS, TEXTS, tiny_build

PYTHON = os.environ.get("EAGLE3_DS_VLLM_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="EAGLE3_DS_VLLM_PYTHON names no Python with vLLM")
ON_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
SERVE = """
import json, sys
from vllm import LLM, SamplingParams
model, draft, answers = sys.argv[1:]
speculative = {"method": "eagle3", "model": draft, "num_speculative_tokens": 5} if draft else None
llm = LLM(model, dtype="float32", enforce_eager=True, max_num_seqs=8, enable_prefix_caching=False,
          disable_log_stats=False, speculative_config=speculative)
prompts = [{"prompt_token_ids": [1, 5, 9, 20 + i, 33]} for i in range(4)]
outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
drafted = sum(m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_draft_tokens")
json.dump([drafted, *([*output.outputs[0].token_ids] for output in outputs)], open(answers, "w"))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`target`, and a random draft as `vllm`, `speculators` and `other-layers`. Heads of 32: vLLM's least."""
    folder = tmp_path_factory.mktemp("served")
    build = tiny_build(hidden_size=128, intermediate_size=128)
    target = build_target(
        TargetSection(path=str(folder / "target"), build=build), TEXTS, CONVERSATIONS, progress=False
    )
    config = load_text_config(target)
    torch.manual_seed(0)
    draft = DraftModel(build_draft_config(config, DraftSection(vocab_size=160)))
    counts = torch.randint(0, 50, (config.vocab_size,))
    common = (draft.state_dict(), draft.config, VocabularyMap.from_counts(counts, 160))
    export_vllm(*common, folder / "vllm", "float32")
    export_vllm(*common, folder / "other-layers", "float32", aux_layers=(2, 3, 5))
    embedding, _ = load_embedding_and_head(target)
    verifier = (str(target), config.architectures)
    export_speculators(*common, embedding, folder / "speculators", *verifier, "float32")
    return folder


def answers(folder: Path, model: str, draft: str) -> tuple[int, list[list[int]]]:
    """The tokens that were guessed, and the answers."""
    written = folder / "answers.json"
    line = [str(PYTHON), "-c", SERVE, str(folder / model), str(folder / draft) if draft else "", str(written)]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(line, check=False, cwd=folder, env=clean | ON_CPU, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    drafted, *texts = json.loads(written.read_text())
    return drafted, texts


@pytest.fixture(scope="module")
def expected(exported: Path) -> list[list[int]]:
    return answers(exported, "target", "")[1]


@pytest.mark.parametrize(
    ("model", "draft"),
    [("target", "vllm"), ("target", "other-layers"), ("target", "speculators"), ("speculators", "")],
)
def test_the_draft_loads_and_the_answers_are_the_targets(
    model: str, draft: str, exported: Path, expected: list[list[int]]
) -> None:
    drafted, found = answers(exported, model, draft)
    assert found == expected
    assert drafted > 0
