"""Runs inside the server's Python: `python push_drafts.py JOBS ANSWERS`. One engine answers, takes another
draft, and answers again.

JOBS: {"modules": folder of this package's files for servers, "model", "start": folders, "file": the draft to
push, "prompts", "max_new_tokens", "draft_tokens"}. With "refused": {name: file}, "back", another draft to
push, and "other", the folder of a draft, that engine is offered more, and another one starts with that draft.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any


def engine(model: str, draft: str, draft_tokens: int) -> Any:
    from vllm import LLM

    return LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=1,
        max_model_len=256,
        enable_prefix_caching=False,
        disable_log_stats=False,
        skip_tokenizer_init=True,
        worker_extension_cls="draft_loader.DraftLoader",
        speculative_config={"method": "eagle3", "model": draft, "num_speculative_tokens": draft_tokens},
    )


def answers(decode: Any, llm: Any, jobs: dict[str, Any]) -> dict[str, Any]:
    """The answer to each prompt, and what vLLM counted meanwhile."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=jobs["max_new_tokens"], ignore_eos=True, detokenize=False
    )
    found: dict[str, Any] = {"answers": [], "counts": []}
    for prompt in jobs["prompts"]:
        before = decode.counters(llm)
        output = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0].outputs[0]
        found["answers"].append(list(output.token_ids))
        found["counts"].append(decode.difference(before, decode.counters(llm)))
    return found


def refusal(llm: Any, file: str) -> str:
    try:
        llm.collective_rpc("load_draft", args=(file,))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "it was taken"


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    sys.path.insert(0, jobs["modules"])
    decode = importlib.import_module("decode")
    os.environ.update({**decode.SETTINGS, **os.environ})
    found: dict[str, Any] = {}
    llm = engine(jobs["model"], jobs["start"], jobs["draft_tokens"])
    answers(decode, llm, jobs)  # vLLM's first answers warm it up, and are counted apart
    found["start"] = answers(decode, llm, jobs)
    if "refused" in jobs:
        found["refused"] = {name: refusal(llm, file) for name, file in jobs["refused"].items()}
        found["still"] = answers(decode, llm, jobs)
    found["versions"] = [llm.collective_rpc("draft_version")]
    found["versions"].append(llm.collective_rpc("load_draft", args=(jobs["file"],)))
    found["versions"].append(llm.collective_rpc("draft_version"))
    found["pushed"] = answers(decode, llm, jobs)
    if "refused" in jobs:
        found["refused"]["not newer"] = refusal(llm, jobs["file"])
    if "back" in jobs:
        llm.collective_rpc("load_draft", args=(jobs["back"],))
        found["back"] = answers(decode, llm, jobs)
    if "other" in jobs:
        del llm
        decode.release()
        other = engine(jobs["model"], jobs["other"], jobs["draft_tokens"])
        answers(decode, other, jobs)
        found["other"] = answers(decode, other, jobs)
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
