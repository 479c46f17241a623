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


def judge(engine: Mapping[str, Any], jobs: Mapping[str, Any]) -> dict[str, Any]:
    """Load one engine and let it answer every prompt, one after the other.

    Returns:
        `answers` [[token, ...], ...]; `seconds` of each, the first prompt answered once before to warm up;
        and, for each prompt, `counts`: rounds, tokens guessed and accepted, and accepted by position, null
        without a draft.
    """
    from vllm import LLM, SamplingParams

    speculative = None
    if engine["draft"] is not None:
        speculative = {
            # How drafts of its algorithm are served; EAGLE-3 where the job does not say.
            **engine.get("speculative", {"method": "eagle3"}),
            "model": engine["draft"],
            "num_speculative_tokens": jobs["draft_tokens"],
        }
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
