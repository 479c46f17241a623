"""Greedy answers by vLLM, with a draft and without, and what vLLM counted meanwhile.

Runs inside the server's Python, as a file: `python decode.py JOBS ANSWERS`. That environment need not have
this package, so nothing of it is imported here.

JOBS is a JSON file: {"prompts": [[token, ...], ...], "max_new_tokens": n, "draft_tokens": k, "dtype": name,
"max_model_len": n or null, "end": the token that ends an answer, null or absent for none, "engines":
[{"name": ..., "model": folder, "draft": folder or null, "speculative": what vLLM is told of the draft's kind,
or absent for EAGLE-3}, ...]}. An engine whose model is a speculators export brings its target and draft by
itself; `draft` is null then.

ANSWERS maps each engine's name to what `judge` returns, or to {"error": ...} where vLLM refuses to load it.
It is written anew after every engine, so that a crash of one leaves those before it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

# Read by vLLM when it is imported. One process, so that its counters can be read; and nothing from a network.
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
COUNTED = {
    "rounds": "vllm:spec_decode_num_drafts",
    "guessed": "vllm:spec_decode_num_draft_tokens",
    "accepted": "vllm:spec_decode_num_accepted_tokens",
    "accepted_by_position": "vllm:spec_decode_num_accepted_tokens_per_pos",
}

MENDED = (
    "on a CPU this vLLM norms the context keys of all layers of a DFlash draft by the k_norm of the first. "
    "It was mended for this check: a server on a CPU accepts less of a draft of several layers."
)


def judge(engine: Mapping[str, Any], jobs: Mapping[str, Any]) -> dict[str, Any]:
    """Load one engine and let it answer every prompt, one after the other.

    Returns:
        `answers` [[token, ...], ...]; `seconds` of each, the first prompt answered once before to warm up;
        and, for each prompt, `counts`: rounds, tokens guessed and accepted, and accepted by position, null
        without a draft.
    """
    from vllm import LLM, SamplingParams
    from vllm.logger import init_logger

    speculative = None
    if engine["draft"] is not None:
        speculative = {
            # How drafts of its algorithm are served; EAGLE-3 where the job does not say.
            **engine.get("speculative", {"method": "eagle3"}),
            "model": engine["draft"],
            "num_speculative_tokens": jobs["draft_tokens"],
        }
    if (speculative or {}).get("method") == "dflash" and mend_context_norms():
        init_logger("vllm.serve_check").warning(MENDED)
    more = {} if jobs.get("max_model_len") is None else {"max_model_len": jobs["max_model_len"]}
    llm = LLM(
        engine["model"],
        dtype=jobs["dtype"],
        enforce_eager=True,
        max_num_seqs=1,
        enable_prefix_caching=False,
        disable_log_stats=False,
        speculative_config=speculative,
        skip_tokenizer_init=True,
        **more,
    )
    # The end token is said, and the model's own generation config does not count.
    end = jobs.get("end")
    sampling = SamplingParams(
        temperature=0,
        max_tokens=jobs["max_new_tokens"],
        ignore_eos=True,
        stop_token_ids=[] if end is None else [end],
        detokenize=False,
    )
    found: dict[str, Any] = {"answers": [], "seconds": [], "counts": []}
    before = counters(llm)
    for index, prompt in enumerate([jobs["prompts"][0], *jobs["prompts"]]):
        start = time.perf_counter()
        output = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0].outputs[0]
        seconds = time.perf_counter() - start
        after = counters(llm)
        if index > 0:
            found["answers"].append(list(output.token_ids))
            found["seconds"].append(seconds)
            found["counts"].append(difference(before, after))
        before = after
    return found


def mend_context_norms() -> bool:
    """Let a DFlash draft's context keys be normed by the weight of their own layer, and say whether that was
    needed.

    vLLM norms the keys of all layers, [layers, n, heads, D], in one call with the weights [layers, D] of all.
    The operator of its CPU backend (0.32) reads the first row of them for every layer: a draft of several
    layers is fed other keys than on a GPU, and than it was trained with.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False
    import torch
    from vllm import _custom_ops as ops
    from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model

    keys, weights = torch.ones(2, 1, 1, 8), torch.tensor([[1.0] * 8, [2.0] * 8])
    normed = torch.empty_like(keys)
    ops.rms_norm(normed, keys, weights, 1e-6)
    if torch.allclose(normed[1], 2 * normed[0]):
        return False

    def norm_by_layer(model: Any, all_k: torch.Tensor) -> torch.Tensor:
        normed = torch.empty_like(all_k)
        for layer, weight in enumerate(model._k_norm_weights):
            ops.rms_norm(normed[layer], all_k[layer], weight.contiguous(), model._rms_norm_eps)
        return normed

    DFlashQwen3Model._normalize_context_k = norm_by_layer
    return True


def counters(llm: Any) -> dict[str, Any]:
    """vLLM's counters of speculation up to now, by the names of `COUNTED`; empty where it has none."""
    values = {metric.name: metric for metric in llm.get_metrics()}
    return {
        name: list(values[theirs].values) if name == "accepted_by_position" else values[theirs].value
        for name, theirs in COUNTED.items()
        if theirs in values
    }


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was counted in between; None where the server does not speculate."""
    if not after:
        return None
    zero = {name: [0] * len(value) if isinstance(value, list) else 0 for name, value in after.items()}
    old = {**zero, **before}
    return {
        name: [new - was for new, was in zip(value, old[name], strict=True)]
        if isinstance(value, list)
        else value - old[name]
        for name, value in after.items()
    }


def release() -> None:
    """Forget an engine, so that the next one may set up its groups and its cache."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def main(arguments: Sequence[str]) -> None:
    """Answer by every engine of the file of jobs."""
    jobs_file, answers_file = arguments
    os.environ.update({**SETTINGS, **os.environ})
    with open(jobs_file, encoding="utf-8") as file:
        jobs = json.load(file)
    found: dict[str, Any] = {}
    for engine in jobs["engines"]:
        sys.stderr.write(f"decode.py: engine {engine['name']}\n")
        try:
            found[engine["name"]] = judge(engine, jobs)
        except Exception as error:
            traceback.print_exc()
            found[engine["name"]] = {"error": f"{type(error).__name__}: {error}"}
        release()
        with open(answers_file + ".part", "w", encoding="utf-8") as file:
            json.dump(found, file)
        os.replace(answers_file + ".part", answers_file)


if __name__ == "__main__":
    main(sys.argv[1:])
