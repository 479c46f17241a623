"""Lets vLLM draft K guesses in parallel and writes what went into its draft and what came out.

Runs in the environment of `make_environment.sh`: `python peagle_by_vllm.py JOB RECORD`. JOB is a JSON file
{"target", "draft": folders, "prompts": [[token, ...], ...], "guesses": K, "new_tokens": n}; "draft" is null
where the target's folder is a speculators export that brings its own. RECORD is a file of safetensors: of
prompt p, `text.p` int64, prompt and answer; `fed.p` int64 [n], the token that each slot's state was made of,
and `aux.p` fp32 [n, A], its captured hidden states, both of which may go on behind the answer's end;
`slots.p` int64 [rounds], the last verified position of each round; `logits.p` fp32 [rounds, K, Vd].
`embedding` is the draft's, as it was loaded.

One process, so that the draft can be watched; one prompt at a time.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

os.environ.update(
    {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
)

import torch
from safetensors.torch import save_file
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer


class Watched:
    """What the draft of one prompt has been given and has answered, call by call."""

    def __init__(self) -> None:
        self.proposer: Any = None
        self.clear()

    def clear(self) -> None:
        self.fed: dict[int, int] = {}
        self.rows: dict[int, Tensor] = {}
        self.slots: list[int] = []
        self.logits: list[Tensor] = []

    def watch(self) -> None:
        """Wrap the draft's call. Nothing that it computes is changed."""
        propose = SpecDecodeBaseProposer.propose
        watched = self

        def wrapped(self: Any, *args: Any, **named: Any) -> Any:
            watched.proposer = self
            positions, rejected = named["target_positions"], named.get("num_rejected_tokens_gpu")
            seen = len(positions) - (0 if rejected is None else int(rejected[0]))
            states = named["target_hidden_states"].detach().float().clone()
            fed = [*named["target_token_ids"][1:seen].tolist(), int(named["next_token_ids"][0])]
            for at, token, row in zip(positions[:seen].tolist(), fed, states, strict=False):
                watched.fed[at], watched.rows[at] = token, row
            watched.slots.append(int(positions[seen - 1]))
            return propose(self, *args, **named)

        SpecDecodeBaseProposer.propose = wrapped
        sample = SpecDecodeBaseProposer._sample_draft_tokens

        def sampled(self: Any, hidden: Tensor, *args: Any) -> Any:
            logits = self.model.logits_processor(self.model.lm_head, hidden)
            watched.logits.append(logits.detach().float().clone())
            return sample(self, hidden, *args)

        SpecDecodeBaseProposer._sample_draft_tokens = sampled

    def record(self, text: list[int]) -> dict[str, Tensor]:
        slots = range(self.slots[-1] + 1)
        return {
            "text": torch.tensor(text),
            "fed": torch.tensor([self.fed[at] for at in slots]),
            "aux": torch.stack([self.rows[at] for at in slots]),
            "slots": torch.tensor(self.slots),
            "logits": torch.stack(self.logits),
        }


def main(job_file: str, record_file: str) -> None:
    """Serve, watch and write."""
    with open(job_file, encoding="utf-8") as file:
        job: Mapping[str, Any] = json.load(file)
    speculative = None
    if job["draft"] is not None:
        speculative = {
            "method": "eagle3",
            "model": job["draft"],
            "num_speculative_tokens": job["guesses"],
            "parallel_drafting": True,
        }
    watched = Watched()
    watched.watch()
    llm = LLM(
        job["target"],
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=1,
        max_model_len=256,
        enable_prefix_caching=False,
        speculative_config=speculative,
        skip_tokenizer_init=True,
        max_num_batched_tokens=job.get("chunk", 256),
    )
    sampling = SamplingParams(temperature=0, max_tokens=job["new_tokens"], ignore_eos=True, detokenize=False)
    found: dict[str, Tensor] = {}
    for number, prompt in enumerate(job["prompts"]):
        watched.clear()
        output = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0].outputs[0]
        record = watched.record([*prompt, *output.token_ids])
        found |= {f"{name}.{number}": tensor.contiguous() for name, tensor in record.items()}
    found["embedding"] = watched.proposer.model.model.embed_tokens.weight.detach().clone()
    save_file(found, record_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
