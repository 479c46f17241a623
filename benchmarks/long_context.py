"""`python -m benchmarks.long_context`: acceptance against context, of drafts that were trained at short and
at long context with as many tokens and optimizer steps. Hours on two cores; the same command goes on after a
stop.

A target of 6.2 million parameters learns repositories and questions about them (long_corpus.py), at last at
the longest context; it finds what it saw from its first step on (long_start.py). The drafts learn the same
kind of text by the recipe, on four ranks (ring 2 x ulysses 2), and guess in held-out prompts of each length.
The judge is the target's own greedy answer: with any draft a greedy target answers the same, so one answer
judges all drafts, round for round. `--python P`, with vLLM in P, serves some of them at every length too, and
what vLLM accepts must be what was counted here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import long_target
from benchmarks.long_lookup import copied_row, loss_of_copies
from benchmarks.long_picture import draw
from benchmarks.long_target import Stage
from eagle3_ds.algorithms import ALGORITHMS
from eagle3_ds.config import TargetSection
from eagle3_ds.device.found import detect_accelerator
from eagle3_ds.draft import BatchGuesser, OneByOne
from eagle3_ds.eval.batch import batches
from eagle3_ds.eval.intervals import interval
from eagle3_ds.eval.lockstep import Clock, Limits, answer_batch, judged_by_answers, read_prompts
from eagle3_ds.eval.ngram import NgramGuesser
from eagle3_ds.eval.speculative import Round
from eagle3_ds.export import load_export
from eagle3_ds.run.serve_check import Check, run_check
from eagle3_ds.say import progress_bar
from eagle3_ds.targets import Target, load_target
from judge.result_file import FOLDER, PICTURES, print_table, write_result

ROOT = Path(__file__).parents[1]
ANSWERED, COPIES_EVERY = 0.6, 4
"""Share of a conversation that is questions and answers, in a draft's training text; the answers are
supervised. And of its rows, every fourth is of copied random tokens.
"""
PROMPT_ANSWERED = 0.2
"""The share in the prompts that drafts are judged by."""
FIRST_SHORT, FIRST_MIDDLE, FIRST_LONG, FIRST_PROMPT = 20_000_000, 30_000_000, 40_000_000, 50_000_000
"""Numbers of the conversations that drafts learn, by their length, and of those that they are judged by."""
TTT_STEPS = 5
NGRAM = "n-gram"
SERVED_PROMPTS, TOLERANCE = 4, 0.02
COPIED_ROWS = 4
"""At each distance, by which it is told whether the target finds what it saw."""


@dataclass(frozen=True)
class Size:
    """How much is trained.

    Attributes:
        stages: of the target's training.
        short, middle, long: tokens of a conversation; `long` is the packing length of every draft.
        steps: optimizer steps of each draft, `long` tokens each.
        passes: how often a draft reads its text in these steps.
        prompts, new_tokens: at each length of `lengths`.
    """

    stages: tuple[Stage, ...]
    short: int
    middle: int
    long: int
    steps: int
    passes: int
    lengths: tuple[int, ...]
    prompts: int
    new_tokens: int


SIZES = {
    "record": Size(
        (
            Stage(512, 6, 2, 700, 1e-3, reach=16384),
            Stage(2048, 2, 1, 200, 7e-4, reach=16384),
            Stage(16384, 1, 1, 16, 3e-4),
        ),
        1024,
        4096,
        16384,
        100,
        1,
        (1024, 2048, 4096, 8192, 16384),
        16,
        96,
    ),
    "trial": Size(
        (Stage(256, 3, 1, 60, 1e-3, reach=1024), Stage(1024, 1, 1, 10, 5e-4)),
        256,
        512,
        1024,
        3,
        1,
        (256, 1024),
        2,
        16,
    ),
}


@dataclass(frozen=True)
class Variant:
    """One draft: what it learns, what its recipe says beside, and the rotary scaling set at export."""

    what: str
    data: str
    draft: Mapping[str, Any] = field(default_factory=dict)
    exported_of: str | None = None


def variants(size: Size) -> dict[str, Variant]:
    """The drafts that are compared."""
    return {
        "a": Variant(f"trained at {size.short}", "short"),
        "b": Variant(f"trained at {size.short}, YaRN set at export", "short", exported_of="a"),
        "c": Variant(
            f"trained at {size.short}, window of {size.short // 2}",
            "short",
            {"sliding_window": size.short // 2},
        ),
        "d": Variant(f"trained at {size.long}", "long"),
        "e": Variant(
            f"trained at {size.long}, aux_norm and norm_output",
            "long",
            {"aux_norm": True, "norm_output": True},
        ),
        "f": Variant(f"trained at {size.short} to {size.long}", "mix"),
    }


def write_data(folder: Path, tokenizer: Any, size: Size) -> dict[str, Path]:
    """The texts of the drafts, as tokenised rows: as many tokens in each file as a pass takes."""
    folder.mkdir(parents=True, exist_ok=True)
    total = size.steps * size.long // size.passes
    parts = {
        "short": [(size.short, FIRST_SHORT, total)],
        "long": [(size.long, FIRST_LONG, total)],
        "mix": [
            (size.short, FIRST_SHORT, total // 2),
            (size.middle, FIRST_MIDDLE, total // 4),
            (size.long, FIRST_LONG, total // 4),
        ],
        "heldout": [(size.short, FIRST_PROMPT + 500_000, size.long)],
    }
    files = {}
    for name, wanted in parts.items():
        files[name] = folder / f"{name}.jsonl"
        if not files[name].is_file():
            aside = folder / f".{name}.jsonl"
            with aside.open("w") as file:
                for length, first, tokens in wanted:
                    for row in _rows(tokenizer, length, first, tokens):
                        file.write(json.dumps(row) + "\n")
            os.replace(aside, files[name])
    return files


def _rows(tokenizer: Any, length: int, first: int, tokens: int) -> Iterator[dict[str, list[int]]]:
    conversations = long_target.fitting(tokenizer, length, 10**9, first, ANSWERED)
    lowest = long_target.first_token(tokenizer)
    for number in count(first):
        if (number - first) % COPIES_EVERY:
            ids, mask = next(conversations)
        else:
            ids, mask = copied_row(number, length - 1, len(tokenizer), lowest)
        yield {"input_ids": ids, "loss_mask": mask}
        tokens -= len(ids)
        if tokens <= 0:
            return


def train_draft(folder: Path, name: str, variant: Variant, files: Mapping[str, Path], size: Size) -> None:
    """Train and export one draft by its recipe, or go on with it."""
    run = folder / "runs" / name
    if (run / "draft" / "config.json").is_file():
        return
    recipe = {
        "target": {"path": str(folder / "target"), "dtype": "bfloat16"},
        "draft": {"vocab_size": 2048, "ttt_steps": TTT_STEPS, "start": "lookup", **variant.draft},
        "data": {
            "train": [str(files[variant.data])],
            "heldout": [str(files["heldout"])],
            "max_length": size.long,
            "cache_dir": str(folder / "cache"),
        },
        "parallel": {"ulysses": 2, "ring": 2, "draft_dp": 1},
        "train": {
            "steps": size.steps,
            "learning_rate": 1e-3,
            "warmup_steps": max(1, size.steps // 15),
            "save_every": max(1, size.steps // 6),
            "dtype": "float32",
        },
        "eval": {"num_prompts": 0},
        "export": {"dtype": "float32"},
        "deepspeed": str(ROOT / "ds_configs" / "zero2.json"),
        "output_dir": str(run),
    }
    run.mkdir(parents=True, exist_ok=True)
    path = folder / "runs" / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    command = [sys.executable, "-m", "eagle3_ds.cli", "launch", str(path), "--resume", "auto"]
    subprocess.run(command, check=True, cwd=ROOT)


def set_yarn(source: Path, folder: Path, size: Size) -> None:
    """The export at `source` once more, with YaRN from the length it was trained at to the longest."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    path = folder / "config.json"
    keys = json.loads(path.read_text())
    scaling = {
        "rope_type": "yarn",
        "factor": size.long / size.short,
        "original_max_position_embeddings": size.short,
        "rope_theta": long_target.ROPE_THETA,
    }
    for name in ("rope_parameters", "rope_scaling"):
        if name in keys:
            keys[name] = scaling
    path.write_text(json.dumps(keys, indent=2))


def judge_lengths(
    folder: Path, names: Sequence[str], size: Size, progress: bool
) -> dict[str, list[dict[str, Any]]]:
    """Every draft at every length, and the n-gram look-up: {name: a row for each length}."""
    target = load_target(TargetSection(path=str(folder / "target")), "float32", torch.device("cpu"))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (*names, NGRAM)}
    drafts = {name: folder / "runs" / name / "draft" for name in names}
    for length in size.lengths:
        path = folder / "judged" / f"{length}.json"
        rows = json.loads(path.read_text()) if path.is_file() else {}
        if set(rows) < set(found):
            prompts = [list(prompt) for prompt in prompts_of(target.tokenizer, length, size.prompts)]
            rows = _judge(target, drafts, prompts, size, progress)
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(rows, indent=1))
        for name, of_draft in found.items():
            of_draft.append({"context": length, **rows[name]})
    return found


def prompts_of(tokenizer: Any, length: int, number: int) -> Iterator[Sequence[int]]:
    """Held-out conversations of nine tenths of `length` to `length` tokens, up to their last answer."""
    first = FIRST_PROMPT + 10_000 * (length // 256)
    for ids, mask in long_target.fitting(tokenizer, length, number, first, PROMPT_ANSWERED):
        yield ids[: long_target.last_answer(mask)[0]]


def _judge(
    target: Target, drafts: Mapping[str, Path], prompts: list[list[int]], size: Size, progress: bool
) -> dict[str, Any]:
    limits = Limits(size.new_tokens, TTT_STEPS, target.tokenizer.eos_token_id)
    rounds: dict[str, list[list[Round]]] = {name: [] for name in (*drafts, NGRAM)}
    loaded = {name: load_export(path) for name, path in drafts.items()}
    groups = batches(target, list(map(len, prompts)), limits.max_new_tokens + limits.draft_tokens)
    description = f"prompts of {max(map(len, prompts))} tokens"
    for group in progress_bar(groups, desc=description, disable=not progress, unit="batch"):
        texts = [prompts[index] for index in group]
        clock = Clock()
        answers = answer_batch(target, read_prompts(target, texts, clock), limits, clock)
        for name in rounds:
            guesser = _guesser(target, loaded.get(name), texts)
            rounds[name] += judged_by_answers(guesser, texts, answers, limits)
    return {name: _figures(of_draft) for name, of_draft in rounds.items()}


def _guesser(target: Target, export: Any, texts: Sequence[Sequence[int]]) -> BatchGuesser:
    if export is None:
        return OneByOne(lambda text: NgramGuesser(texts[text][0]))
    config, state, vocabulary = export
    algorithm = ALGORITHMS["eagle3"]
    draft = algorithm.build(config)
    draft.load_state_dict(state)
    return algorithm.batch_guesser(draft.float().eval(), target.embedding, vocabulary, len(texts))


def _figures(of_prompts: Sequence[Sequence[Round]]) -> dict[str, Any]:
    rounds = [each for of_prompt in of_prompts for each in of_prompt]
    return {
        "prompts": len(of_prompts),
        "rounds": len(rounds),
        "acceptance_length": sum(each.emitted for each in rounds) / len(rounds),
        "interval": interval(of_prompts),
        "by_position": [
            sum(each.accepted > position for each in rounds) / len(rounds) for position in range(TTT_STEPS)
        ],
    }


def serve(folder: Path, names: Sequence[str], size: Size, python: str) -> list[dict[str, Any]]:
    """What vLLM accepts of drafts, beside what our decoding of the same prompts does."""
    section = TargetSection(path=str(folder / "target"))
    tokenizer = load_target(section, "float32", torch.device("cpu")).tokenizer
    found = []
    for name in names:
        for length in size.lengths:
            prompts = list(prompts_of(tokenizer, length, SERVED_PROMPTS))
            draft = {"vllm": folder / "runs" / name / "draft"}
            check = Check(section, draft, prompts, size.new_tokens, TTT_STEPS, "float32")
            report = run_check(check, python, TOLERANCE, folder / "served" / f"{name}-{length}")
            way = report.ways[-1]
            row = {"draft": name, "context": length, "failures": report.failures}
            if way.acceptance_length is not None:
                row |= dict(zip(("vllm", "ours"), way.acceptance_length, strict=True))
            found.append(row)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="record")
    parser.add_argument("--output", default="output/long-context", help="folder of target, drafts and stages")
    parser.add_argument("--only", nargs="+", metavar="DRAFT", help="train and judge only these, e.g. a d")
    parser.add_argument("--target-only", action="store_true", help="stop when the target is trained")
    parser.add_argument("--python", help="a Python with vLLM, which then serves drafts a and d")
    chosen = parser.parse_args(arguments)
    size, folder = SIZES[chosen.size], Path(chosen.output).resolve()
    device = torch.device(detect_accelerator())
    trained = long_target.train(folder / "target", long_target.sizes(2 * size.long), size.stages, device)
    target = _of_target(folder, trained, size, device)
    if chosen.target_only:
        return 0
    drafts = {name: v for name, v in variants(size).items() if not chosen.only or name in chosen.only}
    tokenizer = load_target(
        TargetSection(path=str(folder / "target")), "float32", torch.device("cpu")
    ).tokenizer
    files = write_data(folder / "data", tokenizer, size)
    for name, variant in drafts.items():
        if variant.exported_of is None:
            train_draft(folder, name, variant, files, size)
        else:
            set_yarn(folder / "runs" / variant.exported_of / "draft", folder / "runs" / name / "draft", size)
    judged = judge_lengths(folder, list(drafts), size, progress=True)
    served = (
        serve(folder, [n for n in ("a", "d") if n in drafts], size, chosen.python) if chosen.python else []
    )
    body = {
        "size": chosen.size,
        "target": target,
        "drafts": {
            name: {"what": variant.what, "steps": size.steps, "passes": size.passes}
            for name, variant in drafts.items()
        },
        "by_context": judged,
        "served": served,
    }
    is_record = chosen.size == "record" and not chosen.only
    write_result("long_context", "python -m benchmarks.long_context", body, FOLDER if is_record else folder)
    _tell(body)
    draw(body, (PICTURES if is_record else folder) / "long-context.png")
    return int(any(row["failures"] for row in served))


def _of_target(folder: Path, trained: Mapping[str, Any], size: Size, device: torch.device) -> dict[str, Any]:
    """What the target is, and that it uses its context: kept in a file, since it takes minutes."""
    path = folder / "target-uses-context.json"
    if not path.is_file():
        target = load_target(TargetSection(path=str(folder / "target")), "float32", device)
        edges = [size.lengths[0] // 4, *size.lengths]
        found = {
            "parameters": trained["parameters"],
            "stages": trained["stages"],
            "loss_by_position": long_target.loss_by_position(
                target.model, target.tokenizer, size.long, edges, size.prompts
            ),
            "loss_of_answers_by_context": long_target.loss_by_context(
                target.model, target.tokenizer, size.long, edges, size.prompts
            ),
            "loss_of_copies": loss_of_copies(
                target.model, long_target.first_token(target.tokenizer), edges, COPIED_ROWS
            ),
        }
        path.write_text(json.dumps(found, indent=1))
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def _tell(body: Mapping[str, Any]) -> None:
    target = body["target"]
    columns = ["loss of the target"] + [str(row["to"]) for row in target["loss_by_position"]]
    rows = [
        ["tokens up to position", *(f"{row['loss']:.3f}" for row in target["loss_by_position"])],
        [
            "last answer, seeing so many tokens",
            *(f"{row['loss']:.3f}" for row in target["loss_of_answers_by_context"]),
        ],
    ]
    copies = target["loss_of_copies"]
    rows.append(
        ["random tokens, copied from so far back", *(f"{row['second']:.3f}" for row in copies)],
    )
    print_table("The target", columns, rows)
    names = {name: row["what"] for name, row in body["drafts"].items()} | {NGRAM: "n-gram look-up"}
    lengths = [row["context"] for row in next(iter(body["by_context"].values()))]
    table = [
        [f"{name} {what}" if name != NGRAM else what, *(_cell(row) for row in body["by_context"][name])]
        for name, what in names.items()
    ]
    print_table("Tokens per forward of the target", ["context", *map(str, lengths)], table)
    for row in body["served"]:
        print(row)


def _cell(row: Mapping[str, Any]) -> str:
    ends = row["interval"]
    return f"{row['acceptance_length']:.2f}" + ("" if ends is None else f" [{ends[0]:.2f}, {ends[1]:.2f}]")


if __name__ == "__main__":
    raise SystemExit(main())
