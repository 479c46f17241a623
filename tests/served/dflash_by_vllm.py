"""Lets vLLM answer with a DFlash draft and writes down what its draft was fed and what logits it returned.

Runs in the environment of `make_environment.sh`: `python dflash_by_vllm.py JOBS ANSWERS`, both JSON files.
JOBS is {"prompts": [[token, ...], ...], "max_new_tokens": n, "engines": [{"name", "model", "draft",
"draft_tokens", "mended"}, ...]}; "mended" mends vLLM's norms as serving/decode.py does.

ANSWERS maps each engine's name to {"answers": [[token, ...], ...], "calls": [[call, ...], ...]}, one list of
calls for each prompt, or to {"error": ...}. A call is one block of the draft: "tokens" and "positions", the
inputs [1 + n]; "logits", [n, V], null outside the draft vocabulary.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Read by vLLM when it is imported. One process, so that its draft can be watched; and nothing from a network.
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

SPEC = importlib.util.spec_from_file_location(
    "decode", Path(__file__).parents[2] / "eagle3_ds" / "serving" / "decode.py"
)
assert SPEC is not None and SPEC.loader is not None
DECODE = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(DECODE)


class Watched:
    """Wraps the draft's two entries, which vLLM calls one after the other: forward, then its logits."""

    def __init__(self) -> None:
        from vllm.model_executor.models.qwen3_dflash import DFlashQwen3ForCausalLM, DFlashQwen3Model

        self.norm = DFlashQwen3Model._normalize_context_k
        self.calls: list[dict[str, Any]] = []
        self._fed: dict[str, list[int]] = {}
        forward, logits = DFlashQwen3ForCausalLM.forward, DFlashQwen3ForCausalLM.compute_logits

        def watched_forward(model: Any, input_ids: Any, positions: Any, *more: Any, **named: Any) -> Any:
            self._fed = {"tokens": input_ids.tolist(), "positions": positions.tolist()}
            return forward(model, input_ids, positions, *more, **named)

        def watched_logits(model: Any, hidden_states: Any) -> Any:
            result = logits(model, hidden_states)
            # -inf, which JSON has not, stands for tokens outside the draft vocabulary.
            kept = [[None if x == float("-inf") else x for x in row] for row in result.tolist()]
            self.calls.append({**self._fed, "logits": kept})
            return result

        DFlashQwen3ForCausalLM.forward = watched_forward
        DFlashQwen3ForCausalLM.compute_logits = watched_logits


def answer(engine: Mapping[str, Any], jobs: Mapping[str, Any], watched: Watched) -> dict[str, Any]:
    """Load one engine and let it answer every prompt, one after the other."""
    from vllm import LLM, SamplingParams
    from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model

    DFlashQwen3Model._normalize_context_k = watched.norm
    if engine["mended"]:
        DECODE.mend_context_norms()
    llm = LLM(
        engine["model"],
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=1,
        max_model_len=256,
        enable_prefix_caching=False,
        disable_log_stats=False,
        skip_tokenizer_init=True,
        speculative_config={
            "method": "dflash",
            "model": engine["draft"],
            "num_speculative_tokens": engine["draft_tokens"],
        },
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=jobs["max_new_tokens"], ignore_eos=True, detokenize=False
    )
    found: dict[str, Any] = {"answers": [], "calls": []}
    for prompt in jobs["prompts"]:
        watched.calls.clear()
        output = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0].outputs[0]
        found["answers"].append(list(output.token_ids))
        found["calls"].append(list(watched.calls))
    return found


def main(arguments: Sequence[str]) -> None:
    """Answer by every engine of the file of jobs."""
    jobs_file, answers_file = arguments
    os.environ.update({**SETTINGS, **os.environ})
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    with open(jobs_file, encoding="utf-8") as file:
        jobs = json.load(file)
    watched, found = Watched(), {}
    for engine in jobs["engines"]:
        try:
            found[engine["name"]] = answer(engine, jobs, watched)
        except Exception as error:
            traceback.print_exc()
            found[engine["name"]] = {"error": f"{type(error).__name__}: {error}"}
        gc.collect()
        cleanup_dist_env_and_memory()
    with open(answers_file, "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1:])
