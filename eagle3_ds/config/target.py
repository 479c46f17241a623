"""The recipe's `target`: the frozen model, how a small one is built, and a server of hidden states."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from eagle3_ds.config.section import FloatDtype, NonNegative, Positive, Section, Text


class TargetBuild(Section):
    """Sizes and training of a small Llama, for the quickstart and the tests."""

    text: Literal["stdlib", "exercises"] = "stdlib"
    """The corpus that it learns: the sources of Python's standard library, or computed exercises."""
    vocab_size: Positive = 4096
    hidden_size: Positive = 192
    intermediate_size: Positive = 512
    num_layers: Annotated[int, Field(ge=7)] = 8
    num_heads: Positive = 4
    num_kv_heads: Positive = 2
    max_positions: Positive = 8192
    sequence_length: Positive = 1024
    batch_size: Positive = 2
    steps: NonNegative = 300
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    seed: int = 0

    @model_validator(mode="after")
    def _whole_heads(self) -> TargetBuild:
        if self.hidden_size % self.num_heads or self.hidden_size // self.num_heads % 2:
            raise ValueError(
                f"hidden_size is {self.hidden_size} and num_heads is {self.num_heads}: heads must be equally "
                "wide, and of an even width. Choose hidden_size as a multiple of 2 * num_heads."
            )
        check_grouping(self.num_heads, self.num_kv_heads)
        return self


class ServerSection(Section):
    """A vLLM server that gives the hidden states, with `target.capture: server`."""

    url: Text | None = None
    """URL of a running server. Null: the run starts one on this host and stops it."""
    folder: Text | None = None
    """Where the server writes hidden states and the run reads them. Null: a temporary folder, for a server
    that the run starts.
    """
    python: Text | None = None
    """The Python that has vLLM. Null: the `vllm` on PATH."""
    arguments: tuple[Text, ...] = ()
    """Further words for `vllm serve`, for example --tensor-parallel-size, 8."""
    key_variable: Text | None = None
    """Name of the environment variable that holds the API key of the server at `url`."""
    concurrency: Positive = 16
    """How many documents are asked for at once."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    """How long one document may take."""
    start_seconds: Annotated[float, Field(gt=0)] = 1800.0
    """How long a server that the run starts may take to load the target."""
    retries: NonNegative = 5
    """How often a document is asked for again after a failure that may pass."""
    buffer_gib: Annotated[float, Field(gt=0)] = 8.0
    """GiB of `folder` that each draft_dp group fills ahead of training with `data.hidden_states: stream`."""

    @model_validator(mode="after")
    def _no_credentials(self) -> ServerSection:
        if self.url is not None and not _is_plain_url(self.url):
            raise ValueError(
                "url must be http://HOST:PORT or https://..., without user, password or query: a recipe is "
                "logged and saved. Put an API key into an environment variable, and its name into "
                "key_variable."
            )
        keys = [word for word in self.arguments if word.partition("=")[0] in ("--api-key", "--hf-token")]
        if keys:
            raise ValueError(
                f"arguments has {keys[0].partition('=')[0]}: a recipe is logged and saved. A server that "
                "the run "
                "starts needs no key; put a token for the hub into the environment variable HF_TOKEN."
            )
        return self

    @model_validator(mode="after")
    def _one_server(self) -> ServerSection:
        if self.url is not None and self.folder is None:
            raise ValueError(
                f"url is {self.url!r} and folder is null: name the folder that the server's connector "
                "writes to, on "
                "a file system that both hosts share."
            )
        own = {"python": self.python, "arguments": self.arguments}
        given = [name for name, value in own.items() if value]
        if self.url is not None and given:
            raise ValueError(
                f"url is {self.url!r}, and {' and '.join(given)} say how to start a server: remove one of "
                "them."
            )
        if self.url is None and self.key_variable is not None:
            raise ValueError(
                f"key_variable is {self.key_variable!r} and url is null: a server that the run starts has "
                "no key. "
                "Remove key_variable."
            )
        return self


def _is_plain_url(url: str) -> bool:
    parts = urlsplit(url)
    return (
        parts.scheme in ("http", "https")
        and bool(parts.hostname)
        and not (parts.username or parts.password or parts.query or parts.fragment)
    )


class TargetSection(Section):
    path: Text
    """Folder of a Hugging Face causal LM, or a hub name."""
    build: TargetBuild | None = None
    """Build the target at `path` if there is none. One that was built from other values is an error, and is
    not replaced.
    """
    aux_layers: Annotated[tuple[NonNegative, ...], Field(min_length=1, max_length=8)] | None = None
    """Layers whose inputs are captured, 1 to 8 of them. Null: the EAGLE-3 rule (2, n // 2, n - 3)."""
    dtype: FloatDtype = "bfloat16"
    capture: Literal["single", "parallel", "server"] = "single"
    """How hidden states are captured before training. `single`: one process runs the target document by
    document. `parallel`: all ranks run it over their spans of packed documents. `server`: a vLLM server runs
    it.
    """
    server: ServerSection = ServerSection()

    @model_validator(mode="after")
    def _server_is_asked(self) -> TargetSection:
        if self.capture != "server" and self.server != ServerSection():
            raise ValueError(
                f"server has settings and capture is {self.capture!r}: no server would be asked. Set "
                "capture to "
                "server, or remove the section."
            )
        return self


def check_grouping(num_heads: int, num_kv_heads: int) -> None:
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads is {num_heads} and num_kv_heads is {num_kv_heads}: every key/value head must serve "
            "equally many query heads. Choose num_kv_heads as a divisor of num_heads."
        )
