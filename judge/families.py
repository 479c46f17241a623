"""Which families of targets can be captured, and how: each family of causal language models that transformers
knows is built tiny, with random weights, and our capture is compared with the model's own outputs.

`python -m judge.families` judges all families and prints a line for each; `--write docs/families.md` writes
the table.

RIGHT for `single`: everything that a run checks before its first process let the family pass, and aux
rows, last hidden states, tokens, embedding and head (both as read from the files) equal what the model itself
gives.
RIGHT for ranks, which `target.capture: parallel` and `data.hidden_states: online` share: the same for the
checks of ranks, and the forward over spans of two packed documents equals each document's own, in one process
and on two ranks, cut by Ulysses and by ring.
"""

from __future__ import annotations

import argparse
import functools
import logging
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from eagle3_ds.attention import PackedAttention
from eagle3_ds.kernels import select_kernel
from eagle3_ds.layout import SpanPlan
from eagle3_ds.targets import (
    AuxCapture,
    SpanForward,
    Target,
    capture_hidden_states,
    check_config_structure,
    check_parallel,
    check_spans,
    check_supported,
    check_weight_names,
    choose_aux_layers,
    load_embedding_and_head,
    load_full_config,
    load_model,
    teacher_tokens,
)
from eagle3_ds.topology import Topology, maybe_setup_distributed
from judge.family_configs import SMALL, VOCABULARY, families, tiny_config
from judge.ranks import RankPools

Rows = tuple[np.ndarray, Tensor, Tensor]
"""int64 slots, aux and teacher rows of a rank."""

RIGHT, REFUSED, WRONG, UNBUILT = "right", "refused", "WRONG", "not built"
TOLERANCE = 1e-5
"""Largest relative difference (fp32) that is rounding: what is compared was computed by the same code."""
SPAN_TOLERANCE = 1e-4
"""The same for spans of a packed sequence, where another attention kernel sums in another order."""
LENGTHS = (23, 9)
"""Two documents, the first one longer than the windows of the tiny models."""
MESHES = ((1, 2), (2, 1))
"""Ring x Ulysses, of two ranks."""
WORDS = 160
"""Characters of a refusal that are kept."""


@dataclass(frozen=True)
class Verdict:
    """What was found of one family. `single`, `ranks`: RIGHT, REFUSED, WRONG or UNBUILT; the reasons say why
    not RIGHT.
    """

    family: str
    single: str
    single_reason: str = ""
    ranks: str = REFUSED
    ranks_reason: str = ""

    def line(self) -> str:
        reasons = "; ".join(dict.fromkeys(filter(None, (self.single_reason, self.ranks_reason))))
        return f"{self.family:28} {self.single:9} {self.ranks:9} {reasons}"

    def row(self) -> str:
        """Of the table in docs/families.md."""
        reason = (self.single_reason or self.ranks_reason).replace("|", "\\|")
        return f"| `{self.family}` | {self.single} | {self.ranks} | {reason} |"


def judge(family: str, pools: RankPools | None = None) -> Verdict:
    """Build the family tiny and hold each way of capturing it against the model's own outputs.

    pools: where the two ranks run; None leaves them out.
    """
    try:
        config = tiny_config(family)
        # Before it is built: the decoder of an encoder-decoder says of itself that it is none.
        if getattr(config, "is_encoder_decoder", False):
            return Verdict(family, REFUSED, _refusal(config), REFUSED)
        model = random_model(config)
        with torch.no_grad():
            model(input_ids=_tokens(), use_cache=False)
    except Exception as error:  # a family's own code
        return Verdict(family, UNBUILT, f"{type(error).__name__}: {_words(error)}", UNBUILT)
    with tempfile.TemporaryDirectory(prefix="family-") as name:
        folder = Path(name)
        model.save_pretrained(folder)
        stage = ""
        try:
            _check_before(folder)
            stage = "at load: "
            target = _load(folder)
        except ValueError as error:
            return Verdict(family, REFUSED, stage + _words(error), REFUSED)
        problem = _single_problem(target, folder)
        if problem:
            return Verdict(family, WRONG, problem, REFUSED)
        return _judge_ranks(Verdict(family, RIGHT), target, folder, pools)


def _refusal(config: Any) -> str:
    try:
        check_supported(config, "T")
    except ValueError as error:
        return _words(error)
    raise AssertionError(f"{config.model_type} is an encoder-decoder and was not refused")


def random_model(config: Any, seed: int = 0) -> Any:
    """A model whose every weight is random, biases, norms and sinks too: nothing is neutral."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            spread = 0.3 if parameter.dim() < 2 else 1.5 * parameter.shape[-1] ** -0.5
            torch.nn.init.normal_(parameter, 0.5 if parameter.dim() < 2 else 0.0, spread)
        for name, buffer in model.named_buffers():
            if "bias" in name and buffer.is_floating_point():
                torch.nn.init.normal_(buffer, 0.0, 0.3)
    return model.requires_grad_(False).eval()


def _check_before(folder: Path) -> None:
    """What a run does before its first process and before it loads. Raises ValueError on a refusal."""
    config = load_full_config(folder)
    choose_aux_layers(config.get_text_config().num_hidden_layers)
    check_config_structure(config, "T")
    check_weight_names(folder)


def _load(folder: Path) -> Target:
    """What a single capture does at load. Raises ValueError on a refusal."""
    model, factor = load_model(folder, "T", "float32")
    text = model.config.get_text_config()
    return Target(model, None, text, choose_aux_layers(text.num_hidden_layers), factor)


@torch.no_grad()
def _single_problem(target: Target, folder: Path) -> str:
    """How the capture of one document differs from what the model itself gives; "" when it does not."""
    ids = _tokens()
    aux, teacher = capture_hidden_states(target, ids[0])
    with AuxCapture(target.base, (0,)) as first:
        outputs = target.model(input_ids=ids, use_cache=False, output_hidden_states=True)
    # A few old families (Mamba) list the outputs of their layers, all others their inputs.
    shift = 0 if torch.equal(outputs.hidden_states[0][0], first.take()) else 1
    rows = torch.cat([outputs.hidden_states[layer - shift][0] for layer in target.aux_layers], dim=-1)
    embedding, head = load_embedding_and_head(folder)
    logits = outputs.logits[0].float()
    chosen = logits.gather(1, teacher_tokens(teacher, head)[:, None])[:, 0]
    half = ids.shape[1] // 2
    early = capture_hidden_states(target, ids[0, :half])
    compared = {
        "aux rows against output_hidden_states": (aux, rows),
        "last hidden state against output_hidden_states": (teacher, outputs.hidden_states[-1][0]),
        "head x hidden state against the logits": (teacher @ head.T, logits),
        "the token's logit against the highest": (chosen, logits.max(dim=-1).values),
        "the embedding of the file": (embedding, target.model.get_input_embeddings().weight),
        "aux rows of a text without its second half": (early[0], aux[:half]),
        "last hidden states of a text without its second half": (early[1], teacher[:half]),
    }
    return _first_problem(compared, TOLERANCE)


def _first_problem(compared: dict[str, tuple[Tensor, Tensor]], tolerance: float) -> str:
    for what, (found, expected) in compared.items():
        if found.shape != expected.shape:
            return f"{what}: {tuple(found.shape)} and {tuple(expected.shape)}"
        error = float((found.double() - expected.double()).norm() / expected.double().norm())
        if not error <= tolerance:
            return f"{what}: relative difference {error:.1e}"
    return ""


def _judge_ranks(verdict: Verdict, target: Target, folder: Path, pools: RankPools | None) -> Verdict:
    """Whether the target may run cut over ranks, and if so, whether its packed forward is right."""
    config = load_full_config(folder)
    expected = [capture_hidden_states(target, ids) for ids in _tokens()[0].split(list(LENGTHS))]
    whole = [torch.cat(parts) for parts in zip(*expected, strict=True)]
    stage = ""
    try:
        check_parallel(config, "T", ulysses=2, longest=sum(LENGTHS))
        check_spans(config, "T")
        stage = "by the ranks' first forward: "
        found = {"in one process": _assemble([span_forward(target, None)])}
    except ValueError as error:
        return replace(verdict, ranks_reason=stage + _words(error))
    for ring, ulysses in MESHES if pools else ():
        assert pools is not None
        parts = pools(2, rank_of_family, str(folder), target.aux_layers, ring, ulysses)
        found[f"on ring {ring} x ulysses {ulysses}"] = _assemble(parts)
    for where, (_, aux, teacher) in found.items():
        compared = {f"aux rows {where}": (aux, whole[0]), f"last hidden states {where}": (teacher, whole[1])}
        if problem := _first_problem(compared, SPAN_TOLERANCE):
            return replace(verdict, ranks=WRONG, ranks_reason=problem)
    return replace(verdict, ranks=RIGHT)


def rank_of_family(folder: str, aux_layers: tuple[int, ...], ring: int, ulysses: int) -> Rows:
    """What a rank does: the slots of its own, and their aux and teacher rows."""
    config = load_full_config(folder)
    model, factor = load_model(Path(folder), "T", "float32")
    target = Target(model, None, config.get_text_config(), aux_layers, factor)
    return span_forward(target, _mesh(ring, ulysses))


@functools.cache
def _mesh(ring: int, ulysses: int) -> Topology:
    return maybe_setup_distributed(ulysses, ring)


def span_forward(target: Target, topology: Topology | None) -> Rows:
    """Slots, aux and teacher of the documents of `LENGTHS`, packed: whole, or those of this rank."""
    place = None if topology is None else topology.place
    ring, ulysses = (1, 1) if topology is None else (topology.mesh.ring, topology.mesh.ulysses)
    plan = SpanPlan.make(LENGTHS, ring, ulysses, 2)
    ring_rank, ulysses_rank = (0, 0) if place is None else (place.ring_rank, place.ulysses_rank)
    slots = plan.slots(ring_rank, ulysses_rank)
    padded = torch.zeros(plan.padded_length, dtype=torch.int64)
    padded[: plan.length] = _tokens()[0]
    kernel = select_kernel("auto", torch.device("cpu"), torch.float32, SMALL)
    groups = () if topology is None else (topology.ulysses_group, topology.ring_group)
    packed = PackedAttention(plan, ring_rank, kernel, *groups)
    positions = torch.from_numpy(plan.position[slots])
    return slots, *SpanForward(target)(padded[torch.from_numpy(slots)], positions, packed)


def _assemble(parts: Sequence[Rows]) -> Rows:
    """The rows of all ranks in the order of the documents, without padding."""
    slots = np.concatenate([part[0] for part in parts])
    order = np.argsort(slots)[: sum(LENGTHS)]
    aux, teacher = torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])
    return slots[order], aux[order], teacher[order]


def _tokens() -> Tensor:
    """int64 [1, L], without the lowest ids, which are special."""
    return torch.randint(4, VOCABULARY, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(3))


def _words(error: Exception) -> str:
    """The first words of a message, without the name of the target."""
    text = " ".join(str(error).split())
    text = re.sub(r"^target\.path = '[^']*',?( is a model of the family '[^']*',?)?( \(\w+\))? ?", "", text)
    text = text.lstrip(", ")
    return text if len(text) <= WORDS else text[:WORDS].rsplit(" ", 1)[0] + " ..."


def run(names: Sequence[str], pools: RankPools | None) -> list[Verdict]:
    """Judge `names`, printing as it goes."""
    verdicts = []
    for family in names:
        start = time.monotonic()
        try:
            verdicts.append(judge(family, pools))
        except Exception as error:  # a family's own code, past our checks
            verdicts.append(Verdict(family, WRONG, f"{type(error).__name__}: {_words(error)}"))
        print(f"{verdicts[-1].line()} ({time.monotonic() - start:.1f} s)", flush=True)
    return verdicts


def document(verdicts: Sequence[Verdict], seconds: float) -> str:
    """docs/families.md."""
    single, ranks = (Counter(getattr(v, way) for v in verdicts) for way in ("single", "ranks"))
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch"))
    lines = [
        HEAD.format(
            count=len(verdicts),
            single=_counts(single),
            ranks=_counts(ranks),
            versions=versions,
            date=date.today().isoformat(),
            minutes=max(1, round(seconds / 60)),
        ),
        "| family | single | parallel, online | why not |",
        "|---|---|---|---|",
        *(verdict.row() for verdict in verdicts),
    ]
    return "\n".join(lines) + "\n"


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[word]} {word}" for word in (RIGHT, REFUSED, UNBUILT, WRONG))


HEAD = """# Families of targets

Written by `python -m judge.families --write docs/families.md` with {versions},
on {date}, in {minutes} minutes on two CPU cores. Each of the {count} families that this transformers loads as
causal language models is built tiny, from its default config, with random weights, biases and norms, and
saved; then it goes through what a run goes through.

- `single` (`target.capture: single`): {single}. *right*: the checks
  before the first process and those at load let it pass; its aux rows equal `output_hidden_states`, its last
  hidden state times the head that is read from the files equals its logits, the tokens are the argmax, the
  embedding in the files is the model's, and a text without its second half has the same rows; fp32, relative
  difference <= 1e-5.
- `parallel, online` (`target.capture: parallel`, `data.hidden_states: online`; both run the same forward):
  {ranks}. *right*: `check_parallel` and `check_spans` let it pass, and two packed
  documents give the rows of each alone, in one process and on two ranks, by ring and by Ulysses; <= 1e-4.
  ZeRO-3's sharding is not part of it: `tests/ranks/test_target_parallel.py` and `test_target_sharding.py`.
- *refused*: a `ValueError` before the first process, whose first words stand in the last column; those that
  come later say so: at load (of a single capture, still before the first process), or by the ranks' first
  forward. *not built*: transformers' own code did not run with our small sizes, or without a package, so
  nothing is known. *WRONG*: a difference, or another error than a refusal; there must be none.

A family that is right may still be refused for its settings (quantized weights, a soft cap), and the draft
has conditions of its own. What is refused, and why: [targets.md](targets.md).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m judge.families", description=__doc__)
    parser.add_argument("families", nargs="*", help="only these; all of transformers by default")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table there")
    options = parser.parse_args(arguments)
    if options.write and options.families:
        parser.error("--write takes no families: the table has all of them.")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    start, pools = time.monotonic(), RankPools()
    try:
        verdicts = run(options.families or families(), pools)
    finally:
        pools.close()
    if options.write:
        options.write.write_text(document(verdicts, time.monotonic() - start), encoding="utf-8")
    return int(any(WRONG in (verdict.single, verdict.ranks) for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
