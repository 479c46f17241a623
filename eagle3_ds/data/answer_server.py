"""Answers of a target that an OpenAI-compatible server runs (vLLM, SGLang): token ids go there, and token ids
come back.

Prompts are rendered here, with the target's own template, so that no server's template, parser or detokenizer
stands between us and the tokens. vLLM returns token ids from /v1/completions where `return_token_ids` is set,
SGLang from its own /generate.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from eagle3_ds.config import SamplingSection
from eagle3_ds.patient_http import (
    TRIES,
    HalfAnswerError,
    NoAnswerError,
    PatientClient,
    ServerGoneError,
)

logger = logging.getLogger(__name__)

BOTH_KNOW = ("ignore_eos", "stop_token_ids")
"""Keys that vLLM reads in a request and SGLang among its sampling parameters."""
PROBE = "What is 2 + 2?"
"""Tokenised on both sides to compare vocabularies."""


class Served(NamedTuple):
    """A model of the server: its name in requests, the folder or hub name it was loaded from, and its longest
    context in tokens; None for what the server does not tell.
    """

    name: str
    root: str | None
    context: int | None


class _Spoken(NamedTuple):
    """Tokens, whether the model itself ended them, what the server says it ended them at, and what SGLang
    tells of the request beside (`meta_info`).
    """

    tokens: list[int]
    ended: bool
    matched: Any
    told: Mapping[str, Any] = MappingProxyType({})


class AnswerServer:
    """Asks one server for answers of the recipe's target. Threads may share it once it is connected.

    Args:
        client: the way to the server.
        sampling: how answers are drawn; what is None is left to the server.
        stops: token ids that end an answer.
        vocab_size: of the target; ids beyond it come from another model.
    """

    def __init__(
        self, client: PatientClient, sampling: SamplingSection, stops: Sequence[int], vocab_size: int
    ) -> None:
        self.client = client
        self.sampling = sampling
        self.stops = list(stops)
        self.vocab_size = vocab_size
        self.served = Served("", None, None)
        self.is_sglang = False

    # What the server is

    def connect(self, wanted: str | None, path: str, tokenizer: Any) -> Served:
        """Find the target among the server's models, and see that its tokens are ours.

        Args:
            wanted: the name that `--model` gives; None looks for the model that was loaded from `path`.
            path: the recipe's `target.path`.

        Raises:
            ServerGoneError: the server cannot be reached, serves another model, has another vocabulary, or
                gives no token ids.
        """
        try:
            models = self.client.request("GET", "/v1/models", None, _read_models, tries=1)
        except NoAnswerError as error:
            raise ServerGoneError(
                f"--server {self.client.url}: {error}. Name a server like vLLM's or SGLang's that is ready."
            ) from error
        self.served = self._choose(models, wanted, path)
        prompt = tokenizer(PROBE, add_special_tokens=False, verbose=False)["input_ids"]
        self._check_vocabulary(prompt)
        self._find_dialect(prompt)
        return self.served

    def _choose(self, models: Sequence[Served], wanted: str | None, path: str) -> Served:
        names = ", ".join(repr(model.name) for model in models) or "nothing"
        if wanted is not None:
            own = [model for model in models if model.name == wanted]
            if not own:
                raise ServerGoneError(
                    f"--model is {wanted!r}, but --server {self.client.url} serves {names}. Give one of "
                    "these."
                )
        else:
            own = [model for model in models if _same(model.name, path) or _same(model.root, path)]
            if not own:
                raise ServerGoneError(
                    f"--server {self.client.url} serves {names}, but the recipe's target.path is {path!r}. "
                    "Start the server with that target; if it is the same model under another name, give "
                    "that name by --model."
                )
        return own[0]

    def _check_vocabulary(self, prompt: list[int]) -> None:
        """Compare the tokens of a text, where the server has /tokenize (vLLM and SGLang do)."""
        body = {"model": self.served.name, "prompt": PROBE, "add_special_tokens": False}
        try:
            tokens = self.client.request("POST", "/tokenize", body, lambda answer: list(answer["tokens"]))
        except (NoAnswerError, ServerGoneError) as error:
            logger.info(
                f"vocabularies are compared by the range of token ids alone: no /tokenize there ({error})"
            )
            return
        if tokens != prompt:
            raise ServerGoneError(
                f"--server {self.client.url} has another vocabulary than target.path: {PROBE!r} is {tokens} "
                f"there and {prompt} here. Serve the recipe's target, or name the served one in target.path."
            )

    def _find_dialect(self, prompt: list[int]) -> None:
        """Find by an answer of one token how this server returns token ids."""
        said = []
        for self.is_sglang in (False, True):
            try:
                self._ask(prompt, 1, None)
                return
            except NoAnswerError as error:
                said.append(str(error))
            except ServerGoneError as error:
                if not self.is_sglang:
                    raise
                said.append(str(error))
        raise ServerGoneError(
            f"--server {self.client.url} returns no token ids, and its text need not become the same tokens "
            f"again. Use vLLM or SGLang of a version that returns them. Tried: {'; '.join(said)}"
        )

    # Answers

    def answer(self, prompt: list[int], seed: int | None) -> list[int]:
        """As `answer_and_told`, the tokens alone."""
        return self.answer_and_told(prompt, seed)[0]

    def answer_and_told(
        self,
        prompt: list[int],
        seed: int | None,
        tries: int = TRIES,
        more: Mapping[str, Any] = MappingProxyType({}),
    ) -> tuple[list[int], Mapping[str, Any]]:
        """The tokens after the prompt, the one that ends the answer included where it came to that; and what
        SGLang tells of the request beside (`meta_info`), nothing of vLLM.

        Args:
            tries: how often it is asked for before it counts as failed.
            more: further keys of vLLM's request; SGLang is given those that it has too.

        Raises:
            NoAnswerError: this prompt got none (ServerTroubleError: another time it may).
            ServerGoneError: no prompt gets one any more, or another model is behind the URL.
        """
        tokens, ended, matched, told = self._ask(prompt, self.sampling.max_new_tokens, seed, tries, more)
        strange = [token for token in tokens if not 0 <= token < self.vocab_size]
        if strange:
            raise ServerGoneError(
                f"--server {self.client.url} answered with token {strange[0]}, but the target has "
                f"{self.vocab_size} tokens: another model is behind the URL. Serve the recipe's target."
            )
        if ended and (not tokens or tokens[-1] not in self.stops):
            last = tokens[-1] if tokens else "none at all"
            raise NoAnswerError(
                f"the server ended the answer ({matched!r}) at token {last}, which is no end token of "
                f"target.path ({self.stops}): serve the same generation_config.json, and no stop words"
            )
        return tokens, told

    def _ask(
        self,
        prompt: list[int],
        longest: int,
        seed: int | None,
        tries: int = TRIES,
        more: Mapping[str, Any] = MappingProxyType({}),
    ) -> _Spoken:
        if self.is_sglang:
            seeded = {} if seed is None else {"sampling_seed": seed}
            known = {name: value for name, value in more.items() if name in BOTH_KNOW}
            choice = {"max_new_tokens": longest, **self._choice(), **seeded, **known}
            body = {"input_ids": prompt, "sampling_params": choice}
            return self.client.request("POST", "/generate", body, _read_generated, tries)
        asked: dict[str, Any] = {
            "model": self.served.name,
            "prompt": prompt,
            "max_tokens": longest,
            "return_token_ids": True,
            "add_special_tokens": False,
            **self._choice(),
            **({} if seed is None else {"seed": seed}),
            **more,
        }
        return self.client.request(
            "POST", "/v1/completions", asked, lambda answer: self._read_completion(answer, prompt), tries
        )

    def _choice(self) -> dict[str, Any]:
        """Settings that both dialects know by the same names. No repetition penalty, as where the target
        answers in this process: a draft learns the model's own distribution.
        """
        sampling = self.sampling
        top_k = -1 if sampling.top_k == 0 else sampling.top_k
        given = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": top_k}
        return {
            "stop_token_ids": self.stops,
            "skip_special_tokens": False,
            "repetition_penalty": 1.0,
            **{name: value for name, value in given.items() if value is not None},
        }

    def _read_completion(self, answer: Any, prompt: list[int]) -> _Spoken:
        choice = answer["choices"][0] if answer["choices"] else {}
        tokens = choice.get("token_ids")
        if choice and tokens is None:
            raise NoAnswerError("/v1/completions returns no token_ids")
        echoed = choice.get("prompt_token_ids")
        if echoed is not None and echoed != prompt:
            raise ServerGoneError(
                f"--server {self.client.url} read another prompt than it was sent: {len(prompt)} tokens were "
                f"sent and {len(echoed)} read. Start it without options that change or cut prompts."
            )
        return _whole(tokens, choice.get("finish_reason"), choice.get("stop_reason"), answer.get("usage"))


def _read_models(answer: Any) -> list[Served]:
    return [
        Served(str(entry["id"]), entry.get("root"), entry.get("max_model_len")) for entry in answer["data"]
    ]


def _read_generated(answer: Any) -> _Spoken:
    """SGLang's own form."""
    if answer.get("output_ids") is None:
        raise NoAnswerError("/generate returns no output_ids")
    meta = answer["meta_info"]
    reason = meta.get("finish_reason") or {}
    return _whole(answer["output_ids"], reason.get("type"), reason.get("matched"), meta)._replace(told=meta)


def _whole(tokens: Any, reason: Any, matched: Any, counts: Mapping[str, Any] | None) -> _Spoken:
    """The answer, if it is whole. Raises HalfAnswerError if it broke off or tokens are missing."""
    if reason not in ("stop", "length"):
        raise HalfAnswerError(f"it broke off, its finish reason is {reason!r}")
    if not all(type(token) is int for token in tokens):
        raise HalfAnswerError("its token ids are no integers")
    said = (counts or {}).get("completion_tokens", len(tokens))
    if reason == "stop" and type(matched) is int and tokens[-1:] != [matched] and said == len(tokens) + 1:
        tokens = [*tokens, matched]  # counted, but left out as the one that ends the answer
    if said != len(tokens):
        raise HalfAnswerError(f"{said} tokens were made and {len(tokens)} came")
    return _Spoken(list(tokens), reason == "stop", matched)


def _same(name: str | None, path: str) -> bool:
    """Whether a served name and the recipe's path are one model: equal, or one folder."""
    if name is None:
        return False
    folder = Path(path).expanduser()
    return name == path or (folder.is_dir() and folder.resolve() == Path(name).expanduser().resolve())
