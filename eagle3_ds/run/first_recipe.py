"""A first recipe for a target, some conversations and a machine, with the reason of every choice in it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eagle3_ds.config import Recipe, TargetSection, load_recipe
from eagle3_ds.config.schema import DataSection
from eagle3_ds.config.sizes import LENGTH, VOCABULARY
from eagle3_ds.data.sample import DataSample, sample_data
from eagle3_ds.device.found import detect_accelerator, device_count, device_name
from eagle3_ds.plan import DEVICES, Candidate, predict_memory
from eagle3_ds.run.checks import check_target_on_ranks, check_target_structure
from eagle3_ds.run.counted_setup import weight_bytes
from eagle3_ds.run.memory_advice import memory_per_rank
from eagle3_ds.run.planning import Machines, plan_recipe
from eagle3_ds.run.recipe_text import TOP, Line, recipe_text, recipe_tree
from eagle3_ds.run.whole_run import duration
from eagle3_ds.store import RowFormat
from eagle3_ds.targets import (
    check_supported,
    choose_aux_layers,
    load_full_config,
    load_text_config,
    load_tokenizer,
    positions,
    resolve_path,
)

GIB = 2**30
EPOCHS, MOST_EPOCHS = 2, 10
"""Passes over the data, and over little data: more would teach the draft the conversations by heart."""
LEARNING_RATE, WIDTH, HIGHEST_RATE = 1e-4, 4096, 2e-3
"""Of a draft of that width, as in the shipped recipes, and of the quickstart's narrow one."""
FEWEST_STEPS = 100
"""Optimizer steps that a run should have, if its data allow: more replicas would leave fewer."""
ENOUGH_STEPS = 1000
"""Of fewer, a draft that begins at random weights learns little."""
CACHE = "output/cache"
DISK_SHARE = 0.8
"""Share of the free disk that hidden states may take."""
WEIGHTS_SHARE = 0.6
"""Share of a device that the whole target may take where it runs on one alone; the rest is for its work."""
MASTERS = 3 * 4
"""Bytes of a checkpoint per trained parameter: fp32 weights and the two moments of Adam."""
DOCUMENT_BYTES = 5
"""Bytes of a token in the tokenised documents: an int32 and a flag."""
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Wishes:
    """What a user says of the run.

    Attributes:
        target: folder of the target, or its hub name.
        data: as in `data.train`.
        output: the recipe that will be written.
        length: tokens of a pack; None takes what the conversations and the memory suggest.
        gpus: ranks; None takes the devices of this machine.
        gpus_per_node: with fast links between them.
        gpu_memory: GiB of a device; None takes that of this machine's, or of `device`.
        device: whose peaks predict the time; None takes this machine's.
    """

    target: str
    data: tuple[str, ...]
    output: Path
    length: int | None = None
    gpus: int | None = None
    gpus_per_node: int = 8
    gpu_memory: float | None = None
    device: str | None = None


@dataclass(frozen=True)
class FirstRecipe:
    """`text`: of the file. `told`: what the run will cost, a line each. `arguments`: of the command that
    starts it.
    """

    text: str
    told: tuple[str, ...]
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class _Target:
    """A target that passed the checks of a config. `weights`: bytes of it, in `dtype`."""

    path: str
    config: Any
    dtype: str
    aux_layers: tuple[int, ...]
    weights: int


@dataclass(frozen=True)
class _Machine:
    """`machines`: as the planner takes them. `on_cpu`: the ranks run on this machine's CPU. `why`: in words.
    `times`: whether a prediction of seconds means anything.
    """

    machines: Machines
    on_cpu: bool
    why: str
    times: bool


def make_first_recipe(wishes: Wishes) -> FirstRecipe:
    """Look at target, data and machine, ask the planner, and write down what it says. Changes nothing.

    Raises:
        ValueError: there is no such target, it has no tokenizer or chat template, no row of the data can be
            used, the length is beyond the target's, or nothing fits the machine. The message says the fix.
    """
    folder, machine = resolve_path(wishes.target), _machine(wishes)
    target = _target(wishes.target, folder, machine)
    known = positions(target.config)
    if wishes.length is not None and wishes.length > known:
        raise ValueError(
            f"--length is {wishes.length}, and the target knows {known} positions (max_position_embeddings): "
            f"what it computes beyond them is not what it was trained for. Use --length {known} or less, or "
            "give its config the rotary scaling that it is served with."
        )
    tokenizer = load_tokenizer(TargetSection(path=wishes.target))
    sample = sample_data(wishes.data, tokenizer, target.config.vocab_size)
    if len(sample.lengths) < 2:
        raise ValueError(
            f"--data: {len(sample.lengths)} of {sample.rows} rows can be used, and a run holds one out of at "
            "least two. Add conversations."
        )
    case = _Case(wishes, target, machine, sample)
    choice = _choose(case, known)
    recipe = case.recipe(choice.lines)
    # Where the weights are still to come, the config alone is judged.
    check_target_structure(recipe, dry_run=not list(folder.glob("*.safetensors")))
    check_target_on_ranks(recipe)
    return FirstRecipe(recipe_text(_opening(case), choice.lines), _costs(case, choice), _arguments(case))


def write_first_recipe(first: FirstRecipe, output: Path) -> Recipe:
    """Write the file, whole or not at all, after the strict loader has accepted it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".init-", dir=output.parent) as aside:
        file = Path(aside) / output.name
        file.write_text(first.text, encoding="utf-8")
        recipe = load_recipe(file)
        os.replace(file, output)
    return recipe


def _target(path: str, folder: Path, machine: _Machine) -> _Target:
    config = load_text_config(folder)
    check_supported(config, path)
    aux_layers = choose_aux_layers(config.num_hidden_layers)
    stored = str(getattr(load_full_config(folder), "dtype", None) or "").removeprefix("torch.")
    dtype = "float32" if machine.on_cpu else stored if stored in DTYPES else "bfloat16"
    return _Target(path, config, dtype, aux_layers, weight_bytes(config, dtype))


def _machine(wishes: Wishes) -> _Machine:
    """The devices to plan for: those that are named, else those of this machine."""
    accelerator = detect_accelerator()
    if accelerator == "cpu" and wishes.gpus is None and wishes.gpu_memory is None:
        memory = memory_per_rank(1) / GIB
        why = (
            f"one rank on this machine's CPU with {memory:.0f} GiB: no accelerator is here, and none was "
            "named by --gpus and --gpu-memory"
        )
        return _Machine(Machines(1, 1, memory, reserve=memory / 4), True, why, times=False)
    here = accelerator != "cpu"
    gpus = wishes.gpus or (device_count(accelerator) if here else 1)
    name = device_name(accelerator) if here else ""
    device = wishes.device or next((known for known in DEVICES if known.lower() in name.lower()), None)
    memory = wishes.gpu_memory or (memory_per_rank(1) / GIB if here else DEVICES[device or "H100"].memory)
    given = wishes.gpus is not None
    why = f"{gpus} {device or name or 'H100'} of {memory:.0f} GiB, " + (
        "as --gpus says" if given else "which are here" if here else "as --gpu-memory says"
    )
    if not here and wishes.device is None:
        why += "; a device of another kind than H100 is named by --device"
    machines = Machines(gpus, wishes.gpus_per_node, memory, device=device or "H100")
    return _Machine(machines, False, why, times=device is not None or not here)


@dataclass(frozen=True)
class _Case:
    """All that a recipe is made from."""

    wishes: Wishes
    target: _Target
    machine: _Machine
    sample: DataSample

    def recipe(self, lines: Sequence[Line]) -> Recipe:
        """The lines as a recipe."""
        return Recipe.model_validate_json(json.dumps(recipe_tree(lines)))

    @property
    def dtype(self) -> str:
        """What the draft is trained in."""
        return "float32" if self.machine.on_cpu else "bfloat16"

    def packs(self, length: int) -> int:
        """Packs of an epoch, about."""
        return max(1, round(self.tokens(length) * (1 - DataSection().heldout_fraction) / length))

    def tokens(self, length: int) -> int:
        """Tokens that are trained on: what is too long is cut where everything is, and left out otherwise."""
        return self.sample.tokens_up_to(length) or self.sample.tokens

    def row_bytes(self, dtype: str) -> int:
        """Bytes of a token's hidden states on disk."""
        hidden = int(self.target.config.hidden_size)
        return RowFormat(len(self.target.aux_layers) * hidden, hidden, dtype).row_bytes


@dataclass(frozen=True)
class _Choice:
    """The lines of the recipe, the planner's setting behind them, and the optimizer steps of the run."""

    lines: tuple[Line, ...]
    candidate: Candidate
    steps: int


def _choose(case: _Case, known: int) -> _Choice:
    """The longest of the lengths that come into question for which the planner finds a setting."""
    wished, longest = case.wishes.length, case.sample.longest
    length = wished or min(known, max(LENGTH, -(-longest // 1024) * 1024))
    why = (
        "as --length says"
        if wished
        else f"the target's positions; the longest conversation of the sample has {longest} tokens"
        if length == known
        else f"holds the longest conversation of the sample, of {longest} tokens"
        if longest > LENGTH
        else f"as many short conversations as fit in {LENGTH} tokens; the longest of the sample has {longest}"
    )
    while True:
        try:
            return _choose_setting(case, length, why)
        except ValueError:
            if wished or length <= 1024:
                raise
            length //= 2
            why = f"what fits the memory; the longest conversation of the sample has {longest} tokens"


def _choose_setting(case: _Case, length: int, why: str) -> _Choice:
    """The planner's fastest setting that leaves the run enough steps.

    Raises:
        ValueError: none fits.
    """
    head = _lines_of_target(case) + _lines_of_data(case, length, why)
    epochs = min(MOST_EPOCHS, max(EPOCHS, -(-ENOUGH_STEPS // max(1, case.packs(length)))))
    asked = case.recipe([*head, Line("train", "epochs", epochs), Line("train", "dtype", case.dtype), *_END])
    planned = plan_recipe(asked, case.machine.machines, case.sample.supervised_share)
    if not planned.candidates:
        raise ValueError(planned.shortage or f"{length} tokens fit no mesh of these ranks.")
    packs = epochs * case.packs(length)
    most = max(packs // one.setup.draft_dp for one in planned.candidates)
    enough = [one for one in planned.candidates if packs // one.setup.draft_dp >= min(FEWEST_STEPS, most)]
    best = enough[0]
    steps = max(1, packs // best.setup.draft_dp)
    lines = [
        *head,
        *_lines_of_mesh(best, planned.candidates[0]),
        *_lines_of_training(case, best, epochs, steps),
    ]
    lines += [*_lines_of_evaluation(case), *_lines_of_end(case, best)]
    return _Choice(tuple(lines), best, steps)


# What a recipe must name, before it is known.
_END = (Line(TOP, "output_dir", "output"),)


def _lines_of_target(case: _Case) -> list[Line]:
    target, machine = case.target, case.machine
    why = "a CPU trains in it, as in the quickstart" if machine.on_cpu else "the dtype that its config names"
    lines = [Line("target", "path", target.path), Line("target", "dtype", target.dtype, why)]
    memory = machine.machines.gpu_memory or 0.0
    if target.weights > WEIGHTS_SHARE * memory * GIB and machine.machines.gpus > 1:
        why = f"its weights are {target.weights / GIB:.1f} GiB, too many for one device of {memory:.0f} GiB"
        lines.append(Line("target", "capture", "parallel", why))
    own = int(target.config.vocab_size)
    why = (
        f"the most frequent of the target's {own} tokens, as many as the authors' draft of Llama 3.1 has"
        if own > VOCABULARY
        else "all of the target's tokens: there are no more than a draft usually has"
    )
    return [*lines, Line("draft", "vocab_size", min(own, VOCABULARY), why)]


def _lines_of_data(case: _Case, length: int, why: str) -> list[Line]:
    sample, longer = case.sample, case.sample.longer_than(length)
    good = len(sample.lengths)
    shapes = ", ".join(sorted({str(shape) for shape in sample.shapes.values() if shape}))
    seen = (
        f"{sample.rows} rows of shape {shapes}; of a sample of {sample.sampled} of them {good} can be used, "
        f"with {sum(sample.lengths) / good:.0f} tokens on average and {sample.supervised_share:.0%} of these "
        f"learnt from; about {sample.tokens} tokens in all"
    )
    everything = "split" if longer == good else "drop"
    lines = [
        Line("data", "train", list(case.wishes.data), seen),
        Line("data", "max_length", length, f"tokens of a pack: {why}"),
        Line(
            "data",
            "on_too_long",
            everything,
            f"{longer} of {good} conversations of the sample are longer; such are "
            + ("cut into pieces" if everything == "split" else "left out and counted"),
        ),
    ]
    if sample.findings.bad_rows:
        why = (
            f"{sample.findings.bad_rows} rows of the sample cannot be used; such are left out and counted. "
            "eagle3-ds data check names all of them; with `error` they stop the run"
        )
        lines.append(Line("data", "on_bad_row", "drop", why))
    return lines + _lines_of_states(case, case.tokens(length))


def _lines_of_states(case: _Case, tokens: int) -> list[Line]:
    """Where hidden states are kept: on disk as the target computes them, in half of that, or nowhere."""
    free = shutil.disk_usage(_existing(Path(CACHE))).free
    own = "bfloat16" if case.target.dtype == "bfloat16" else case.target.dtype
    for dtype in (own, "float8"):
        needed = tokens * case.row_bytes(dtype)
        if needed <= DISK_SHARE * free:
            why = f"about {needed / GIB:.2f} GiB of hidden states in {CACHE}, with {free / GIB:.0f} GiB free"
            why += "" if dtype == own else f"; {own} would take more than {DISK_SHARE:.0%} of them"
            return [Line("data", "hidden_states", "offline", why), Line("data", "hidden_dtype", dtype)]
    why = (
        f"a store of float8 would take {needed / GIB:.0f} GiB, and {free / GIB:.0f} GiB are free in {CACHE}: "
        "the target computes them in each step instead"
    )
    return [Line("data", "hidden_states", "online", why)]


def _existing(path: Path) -> Path:
    """The folder itself, or the next one above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _lines_of_mesh(best: Candidate, fastest: Candidate) -> list[Line]:
    setup = best.setup
    why = (
        f"ulysses x ring = {setup.sp} ranks share a sequence, draft_dp groups of them train side by side: "
        f"the fastest by the planner, with {predict_memory(setup).peak / GIB:.1f} GiB per rank at the peak"
    )
    if setup.draft_dp != fastest.setup.draft_dp:
        why += (
            f"; draft_dp {fastest.setup.draft_dp} would be faster, but its larger steps would be fewer than "
            f"{FEWEST_STEPS}"
        )
    lines = [
        Line("parallel", "ulysses", setup.ulysses, why),
        Line("parallel", "ring", setup.ring),
        Line("parallel", "draft_dp", setup.draft_dp),
        Line("parallel", "zero_group", setup.zero_group),
    ]
    if setup.ring > 1:
        lines.append(Line("parallel", "kv_exchange", setup.kv_exchange))
    return lines


def _lines_of_training(case: _Case, best: Candidate, epochs: int, steps: int) -> list[Line]:
    meanings = {
        "keep": "everything that a backward needs fits the device: nothing is computed twice",
        "recompute": "what a backward needs is computed again, step by step: less memory, more time",
        "offload": "what a backward needs waits in the host's memory: the least memory on the device",
    }
    every = min(500, max(1, steps // 4))
    times = "twice" if epochs == EPOCHS else f"as the data are few, {epochs} times"
    width = best.setup.shape.hidden_size
    rate = min(HIGHEST_RATE, float(f"{LEARNING_RATE * WIDTH / width:.1g}"))
    return [
        Line("train", "epochs", epochs, f"{times} over the data, about {steps} optimizer steps"),
        Line("train", "dtype", case.dtype),
        Line(
            "train",
            "learning_rate",
            rate,
            f"{LEARNING_RATE:g} for a draft {WIDTH} wide, more for a narrower one; this one is {width} wide",
        ),
        Line("train", "warmup_steps", min(100, steps // 10)),
        Line("train", "activation", best.setup.activation, meanings[best.setup.activation]),
        Line("train", "eval_every", every, "four times in the run, or every 500 steps"),
        Line("train", "save_every", every),
    ]


def _lines_of_evaluation(case: _Case) -> list[Line]:
    """After training one device runs the whole target: in fp32, in its own dtype, or not at all."""
    if case.machine.on_cpu:
        return [Line("export", "dtype", "float32", "as it is trained")]
    room = WEIGHTS_SHARE * (case.machine.machines.gpu_memory or 0.0) * GIB
    target = case.target
    in_fp32 = target.weights // getattr(torch, target.dtype).itemsize * 4
    if in_fp32 <= room:
        return []
    if target.weights <= room:
        why = f"in fp32 the target takes {in_fp32 / GIB:.0f} GiB, too many for the one device that decodes"
        return [Line("eval", "dtype", target.dtype, why)]
    why = (
        "the target does not fit the one device that would decode after training: measure the draft on a "
        "server, eagle3-ds evaluate RECIPE --server URL"
    )
    return [Line("eval", "num_prompts", 0, why)]


def _lines_of_end(case: _Case, best: Candidate) -> list[Line]:
    meanings = {
        0: "nothing is sharded: one rank, or so small a draft that sharding costs more than it saves",
        1: "optimizer states are sharded over the ranks",
        2: "optimizer states and gradients are sharded over the ranks",
        3: "optimizer states, gradients and weights are sharded over the ranks",
    }
    why = f"{meanings[best.setup.zero.stage]}; the planner's choice"
    return [
        Line(TOP, "deepspeed", best.deepspeed, why),
        Line(TOP, "output_dir", f"output/{case.wishes.output.stem}"),
    ]


def _opening(case: _Case) -> list[str]:
    return [
        f"A draft of {case.target.path}, planned by `eagle3-ds init` for {case.machine.why}.",
        "Every key: docs/recipe.md. What is not here has its default.",
    ]


def _costs(case: _Case, choice: _Choice) -> tuple[str, ...]:
    """Time, memory and disk of the run, a line each."""
    setup, machines, tokens = (
        choice.candidate.setup,
        case.machine.machines,
        case.tokens(choice.candidate.setup.length),
    )
    memory = predict_memory(setup)
    seconds = choice.candidate.time.seconds
    time = (
        f"time: {choice.steps} optimizer steps of {seconds:.2f} s, {duration(choice.steps * seconds)} by "
        f"the peaks of {machines.device}; the target's own work is not counted"
        if case.machine.times
        else f"time: {choice.steps} optimizer steps; how long one takes is not predicted for this device"
    )
    states = next((line for line in choice.lines if line.key == "hidden_dtype"), None)
    stored = 0 if states is None else tokens * case.row_bytes(states.value)
    checkpoint = setup.shape.num_parameters * MASTERS
    return (
        f"planned for {case.machine.why}",
        f"data: {case.sample.rows} rows, about {tokens} tokens to train on, by {case.sample.sampled} rows "
        "that were tokenised",
        time,
        f"memory: {memory.peak / GIB:.2f} GiB per rank at the peak ({memory.phase}), of "
        f"{(machines.gpu_memory or 0.0):.0f}",
        f"disk: {(stored + tokens * DOCUMENT_BYTES) / GIB:.2f} GiB of hidden states and documents in "
        f"{CACHE}, {checkpoint / GIB:.2f} GiB for each checkpoint (two newest and the best are kept)",
        *(f"note: {line}" for line in case.sample.findings.told_faults()),
        *_few_steps(choice.steps),
    )


def _few_steps(steps: int) -> tuple[str, ...]:
    """What to expect of a short run, and what helps."""
    if steps >= ENOUGH_STEPS:
        return ()
    return (
        f"note: {steps} optimizer steps are few for a draft that begins at random weights: expect few "
        "accepted guesses. More conversations help most (prompts are enough, `data regenerate` lets the "
        "target answer them); train.init_from begins at a draft that was trained before",
    )


def _arguments(case: _Case) -> tuple[str, ...]:
    machines = case.machine.machines
    hosts = ("--hostfile", "HOSTFILE") if machines.gpus > machines.gpus_per_node else ()
    return (str(case.wishes.output), *hosts)
