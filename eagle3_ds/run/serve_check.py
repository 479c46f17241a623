"""Whether an exported draft serves as it was trained: a real vLLM loads it, answers with it and without it,
and what it accepts is compared with what our own decoding accepts of the same export.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eagle3_ds import serving
from eagle3_ds.algorithms import ALGORITHMS
from eagle3_ds.config import Recipe, TargetSection
from eagle3_ds.data.prompts import prompt_tokens, read_prompts_file
from eagle3_ds.data.stdlib_corpus import stdlib_conversations
from eagle3_ds.device.found import detect_accelerator
from eagle3_ds.draft import has_own_embedding
from eagle3_ds.draft.geometry import aux_size
from eagle3_ds.eval import Round, decode_alone, in_process, speculative_decode
from eagle3_ds.export import load_embedding, load_export
from eagle3_ds.export.card import sglang_words
from eagle3_ds.export.folder import algorithm_of_folder, read_folder
from eagle3_ds.export.vllm import AUX_LAYERS
from eagle3_ds.run.eval_file import read_eval
from eagle3_ds.run.finish import FOLDERS, prompts_of_run
from eagle3_ds.targets import Target, load_target, load_text_config, load_tokenizer, resolve_path

ALONE, WITHOUT, RECORDED = "speculators layout alone", "the target alone", "eval.json"
NEVER_ASKED = "has no acceptance: every text ended before the draft was asked"
NAMES = {"vllm": "vLLM layout", "speculators": "speculators layout"}
STDLIB_PROMPTS = 8
# A server's line that tells of a trouble, behind the time and place that it begins with. Lines of a traceback
# are left to the log, all but the error that ends it.
WARNING = re.compile(r"\b(?:WARNING|ERROR) [\d-]+ [\d:]+ \[[^\]]*\] (?!Traceback)(\S.*)")


@dataclass(frozen=True)
class Check:
    """What is to be served.

    Attributes:
        target: section of the target; a draft's own layers are read from its export.
        drafts: {layout: folder of an export}.
        prompts: token ids. The rest as in the recipe's section `eval`.
        recorded: the evaluation of these weights in the run's eval.json; None without one.
        algorithm: of the drafts, as the recipe names it.
    """

    target: TargetSection
    drafts: Mapping[str, Path]
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    draft_tokens: int
    dtype: str
    recorded: Mapping[str, Any] | None = None
    algorithm: str = "eagle3"


@dataclass(frozen=True)
class Served:
    """One way of serving, and what went wrong with it.

    Attributes:
        acceptance_length: tokens per forward of the target, of the server and of our decoding; `accepted`: by
            position, the share of rounds in which that guess was accepted. None where it was not loaded.
        tokens_per_second: one prompt at a time.
        note: why there is nothing to compare.
    """

    way: str
    failures: tuple[str, ...]
    tokens_per_second: float | None = None
    acceptance_length: tuple[float, float] | None = None
    accepted: tuple[tuple[float, float], ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Report:
    """All ways, the server's warnings, and where its whole log is: None of one that was not started here."""

    ways: tuple[Served, ...]
    warnings: tuple[str, ...] = ()
    log: Path | None = None

    @property
    def failures(self) -> list[str]:
        return [f"{served.way}: {failure}" for served in self.ways for failure in served.failures]


def check_of_run(recipe: Recipe) -> Check:
    """The exports of a finished run with its held-out prompts.

    Raises:
        ValueError: no export is there, or `eval.num_prompts` is 0.
    """
    folder = Path(recipe.output_dir)
    drafts = {layout: folder / FOLDERS[layout] for layout in FOLDERS if (folder / FOLDERS[layout]).is_dir()}
    if not drafts:
        raise ValueError(
            f"output_dir: {folder} has neither {' nor '.join(FOLDERS.values())}: nothing was exported. Run "
            "`launch` or `export` first."
        )
    config = load_text_config(resolve_path(recipe.target.path))
    prompts = prompts_of_run(recipe, config.max_position_embeddings)
    evaluation = in_process(read_eval(folder))
    settings = recipe.eval
    sizes = (settings.max_new_tokens, settings.draft_tokens, settings.dtype)
    return Check(recipe.target, drafts, _some(prompts), *sizes, evaluation, recipe.draft.algorithm)


def check_of_folders(
    target: str, draft: str, prompts: str | None, max_new_tokens: int, draft_tokens: int, dtype: str
) -> Check:
    """An export with its target.

    Args:
        prompts: a JSONL file with `messages`, `prompt` or `input_ids` in each row; None takes questions about
            Python's standard library.

    Raises:
        ValueError: the export, the target or a row cannot be read.
    """
    keys, _ = read_folder(draft)
    layout = "speculators" if "speculators_model_type" in keys else "vllm"
    # Some drafts name their layers always, and by a key of their own; it is then in the draft's config.
    layers = getattr(load_export(draft)[0], "aux_layers", None) or keys.get(AUX_LAYERS)
    section = TargetSection(path=target, aux_layers=None if layers is None else tuple(layers))
    tokenizer = load_tokenizer(section)
    if prompts is None:
        conversations = itertools.islice(stdlib_conversations(), STDLIB_PROMPTS)
        rows = [{"messages": row["messages"][:1]} for row in conversations]
        tokens = [prompt_tokens(tokenizer, row, "stdlib") for row in rows]
    else:
        tokens = read_prompts_file(prompts, tokenizer)
    found = algorithm_of_folder(draft)
    # A folder that is no draft is refused when it is loaded.
    algorithm = Check.algorithm if found is None else found.name
    sizes = (max_new_tokens, draft_tokens, dtype)
    return Check(section, {layout: Path(draft)}, _some(tokens), *sizes, algorithm=algorithm)


def _some(prompts: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    if not prompts or not all(prompts):
        raise ValueError(
            f"there are {len(prompts)} prompts, or one is empty: nothing can be decoded. Raise "
            "eval.num_prompts, hold out more data, or name other prompts."
        )
    return prompts


def server_python(named: str | None) -> str:
    """A Python that has vLLM: the one named, or this one.

    Raises:
        ValueError: it has none.
    """
    if named is None:
        if importlib.util.find_spec("vllm") is not None:
            return sys.executable
        raise ValueError(
            "--python: the Python that runs this has no vLLM. Name one that has; on a machine without a GPU, "
            "tests/served/make_environment.sh makes one."
        )
    command = [named, "-c", "import importlib.util as u; raise SystemExit(u.find_spec('vllm') is None)"]
    if shutil.which(named) is None or subprocess.run(command, check=False, env=_environment()).returncode:
        raise ValueError(f"--python: {named} is no Python that has vLLM. Name one that has.")
    return named


def run_check(check: Check, python: str, tolerance: float, folder: Path) -> Report:
    """Serve all ways, and compare.

    Args:
        tolerance: how far the server's acceptance length may be from ours, relative.
        folder: where the server's log goes; made when it is not there.
    """
    expected, rounds = decode_here(check, ended=True)
    answers, log = _decode_there(check, python, folder)
    texts = log.read_text(encoding="utf-8", errors="replace")
    warnings = dict.fromkeys(match[1] for match in WARNING.finditer(texts))
    missing = {"error": f"the server ended before it came so far; the end of its log: {texts[-600:]}"}
    ways = [judge(WITHOUT, answers.get(WITHOUT, missing), expected, None, tolerance)]
    for layout in check.drafts:
        for way in _ways(layout):
            found = answers.get(way, missing)
            if rounds[way]:
                ours = by_position(rounds[way], check.draft_tokens)
                ways.append(judge(way, found, expected, ours, tolerance))
            else:
                ways.append(replace(judge(way, found, expected, None, tolerance), note=NEVER_ASKED))
    if check.recorded is not None:
        ways.append(judge_recorded(check, rounds.get(RECORDED), tolerance))
    return Report(tuple(ways), tuple(warnings), log)


def _ways(layout: str) -> tuple[str, ...]:
    return (NAMES[layout], ALONE) if layout == "speculators" else (NAMES[layout],)


def decode_here(check: Check, ended: bool = False) -> tuple[list[list[int]], dict[str, list[Round]]]:
    """The target's own answers and the rounds of each way; of `RECORDED` those of texts that end at the end
    token, as an evaluation's do.

    Args:
        ended: the answers and rounds of all ways stop with the end token too, but as a server counts: a last
            round is whole, with what is accepted behind that token. Without it they go to the full length.
    """
    target: Target = load_target(check.target, check.dtype, detect_accelerator())
    expected = [decode_alone(target, prompt, check.max_new_tokens, None) for prompt in check.prompts]
    end = target.tokenizer.eos_token_id
    short = [answer[: answer.index(end) + 1] if end in answer else answer for answer in expected]
    stops = [len(answer) for answer in (short if ended else expected)]
    rounds: dict[str, list[Round]] = {}

    def of_way(folder: Path, draft_tokens: int) -> list[Round]:
        found = _rounds(check, target, folder, expected, draft_tokens)
        return [
            each
            for prompt, stop, of_prompt in zip(check.prompts, stops, found, strict=True)
            for each in of_prompt
            if each.context < len(prompt) + stop
        ]

    for layout, folder in check.drafts.items():
        rounds[NAMES[layout]] = of_way(folder, check.draft_tokens)
        if layout == "speculators":
            own = own_draft_tokens(folder)
            same = own == check.draft_tokens
            rounds[ALONE] = rounds[NAMES[layout]] if same else of_way(folder, own)
    if check.recorded is not None and not other_settings(check):
        folder = next(iter(check.drafts.values()))
        found = _rounds(check, target, folder, short, check.draft_tokens, end)
        rounds[RECORDED] = [each for of_prompt in found for each in of_prompt]
    return short if ended else expected, rounds


def _rounds(
    check: Check,
    target: Target,
    folder: Path,
    expected: Sequence[Sequence[int]],
    draft_tokens: int,
    end: int | None = None,
) -> list[list[Round]]:
    """Of each prompt, with an export, which is read as others read it: from its folder.

    Args:
        end: the token that ends a text.
    """
    config, state, vocabulary = load_export(folder)
    algorithm = ALGORITHMS[check.algorithm]
    if aux_size(config) != len(target.aux_layers) * target.config.hidden_size:
        raise ValueError(
            f"the draft in {folder} reads {aux_size(config)} hidden states of a slot, layers "
            f"{list(target.aux_layers)} of the target have {len(target.aux_layers)} x "
            f"{target.config.hidden_size}. Set target.aux_layers as in the run that trained it."
        )
    draft = algorithm.build(config)
    draft.load_state_dict(state)
    draft.to(target.device, target.head.dtype).eval().requires_grad_(False)
    shared = target.embedding
    if has_own_embedding(config):
        shared = load_embedding(folder).to(shared.device, shared.dtype)
    rounds = []
    for prompt, answer in zip(check.prompts, expected, strict=True):
        guesser = algorithm.guesser(draft, shared, vocabulary)
        sizes = (check.max_new_tokens, draft_tokens, end, answer)
        rounds.append(speculative_decode(target, guesser, prompt, *sizes)[1])
    return rounds


def own_draft_tokens(folder: str | Path) -> int:
    """How many tokens a server guesses at a time that is given an export of the speculators layout alone."""
    keys, _ = read_folder(folder)
    return int(keys["speculators_config"]["proposal_methods"][0]["speculative_tokens"])


def _decode_there(check: Check, python: str, folder: Path) -> tuple[dict[str, Any], Path]:
    """The answers of serving/decode.py, run by the server's Python, and the log of the server."""
    target = str(resolve_path(check.target.path).resolve())
    engines: list[dict[str, Any]] = [{"name": WITHOUT, "model": target, "draft": None}]
    for layout, draft in check.drafts.items():
        way = dict(ALGORITHMS[check.algorithm].served_by_vllm)
        engines.append(
            {"name": NAMES[layout], "model": target, "draft": str(draft.resolve()), "speculative": way}
        )
        if layout == "speculators":
            engines.append({"name": ALONE, "model": str(draft.resolve()), "draft": None})
    guesses = [check.draft_tokens, *map(own_draft_tokens, _speculators(check))]
    # vLLM drafts only where a round's guesses and as many places behind them fit its length; with less room
    # the last round would have no guesses there, and some here.
    longest = max(map(len, check.prompts)) + check.max_new_tokens + 2 * max(guesses) + 1
    jobs = {
        "prompts": [list(prompt) for prompt in check.prompts],
        "max_new_tokens": check.max_new_tokens,
        "draft_tokens": check.draft_tokens,
        "dtype": check.dtype,
        "max_model_len": longest,
        "end": load_tokenizer(check.target).eos_token_id,
        "engines": engines,
    }
    folder.mkdir(parents=True, exist_ok=True)
    script, log = Path(serving.__file__).with_name("decode.py"), folder / "serve-check.log"
    with tempfile.TemporaryDirectory() as work, log.open("w", encoding="utf-8") as lines:
        jobs_file, answers_file = Path(work) / "jobs.json", Path(work) / "answers.json"
        jobs_file.write_text(json.dumps(jobs))
        command = [python, str(script), str(jobs_file), str(answers_file)]
        subprocess.run(command, check=False, env=_environment(), stdout=lines, stderr=subprocess.STDOUT)
        return (json.loads(answers_file.read_text()) if answers_file.is_file() else {}), log


def _speculators(check: Check) -> list[Path]:
    return [folder for layout, folder in check.drafts.items() if layout == "speculators"]


def _environment() -> dict[str, str]:
    """This process's, without what points Python at our packages."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def judge(
    way: str,
    found: Mapping[str, Any],
    expected: Sequence[Sequence[int]],
    ours: Sequence[float] | None,
    tolerance: float,
    meaning: str = "the server runs another draft than was trained",
) -> Served:
    """Hold what a server gave against the target's own answers and, by position, the shares of rounds in
    which a guess should be accepted; None where there is no draft.
    """
    if "error" in found:
        return Served(way, (f"does not load: {found['error']}",))
    failures = _differences(found["answers"], expected)
    speed = sum(map(len, found["answers"])) / sum(found["seconds"])
    if ours is None:
        return Served(way, tuple(failures), speed)
    counts = [count for count in found["counts"] if count is not None and count["rounds"]]
    total = sum(count["rounds"] for count in counts)
    if not total:
        return Served(way, (*failures, "the server never asked the draft"), speed)
    places = zip(*(count["accepted_by_position"] for count in counts), strict=True)
    theirs = [sum(place) / total for place in places]
    # A server may guess another number of tokens, as an export served alone may say: it is held to that.
    ours = [*ours, *(0.0 for _ in theirs)][: len(theirs)]
    lengths, pairs = (1 + sum(theirs), 1 + sum(ours)), tuple(zip(theirs, ours, strict=True))
    failures += _too_far(meaning, lengths, pairs, tolerance)
    return Served(way, tuple(failures), speed, lengths, pairs)


def by_position(rounds: Sequence[Round], draft_tokens: int) -> list[float]:
    """For each guess, the share of rounds in which it was accepted; 0 without rounds."""
    return [sum(each.accepted > k for each in rounds) / max(1, len(rounds)) for k in range(draft_tokens)]


def other_settings(check: Check) -> list[str]:
    """In what the run's evaluation differs from this check, so that their figures cannot be compared."""
    assert check.recorded is not None
    here: dict[str, Any] = {"prompts": len(check.prompts), "draft_tokens": check.draft_tokens}
    here |= {"max_new_tokens": check.max_new_tokens, "dtype": check.dtype}
    recorded = check.recorded
    return [
        f"{name} is {recorded[name]}, here {value}" for name, value in here.items() if recorded[name] != value
    ]


def judge_recorded(check: Check, rounds: Sequence[Round] | None, tolerance: float) -> Served:
    """Hold the run's eval.json against our decoding of its export."""
    assert check.recorded is not None
    if rounds is None:
        other = ", ".join(other_settings(check))
        return Served(RECORDED, (), note=f"is of other settings and not compared: {other}")
    recorded = check.recorded["acceptance_length"]
    if not rounds or recorded is None:
        return Served(RECORDED, (), note=NEVER_ASKED)
    theirs = [row["accepted"] for row in check.recorded["acceptance_by_position"]]
    pairs = tuple(zip(theirs, by_position(rounds, len(theirs)), strict=True))
    lengths = (recorded, sum(each.emitted for each in rounds) / len(rounds))
    failures = _too_far("what was exported is not what was evaluated", lengths, pairs, tolerance)
    return Served(RECORDED, tuple(failures), None, lengths, pairs)


def _too_far(
    meaning: str, lengths: tuple[float, float], accepted: Sequence[tuple[float, float]], tolerance: float
) -> list[str]:
    """What differs by more than the tolerance: the acceptance length relatively, a share as it is."""
    theirs, ours = lengths
    if not abs(theirs - ours) <= tolerance * ours:
        return [
            f"acceptance length {theirs:.3f}, our decoding of the same export has {ours:.3f} "
            f"(more than {tolerance:.1%} away): {meaning}"
        ]
    places = [k for k, (one, other) in enumerate(accepted, 1) if not abs(one - other) <= tolerance]
    if not places:
        return []
    one, other = accepted[places[0] - 1]
    return [
        f"guess {places[0]} is accepted in {one:.3f} of all rounds, in our decoding of the same export in "
        f"{other:.3f} (more than {tolerance:.3f} away): {meaning}"
    ]


def _differences(answers: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> list[str]:
    """Where the first answer that is not the target's own leaves it."""
    wrong = [
        n for n, (one, other) in enumerate(zip(answers, expected, strict=True)) if list(one) != list(other)
    ]
    if not wrong:
        return []
    one, other = answers[wrong[0]], expected[wrong[0]]
    pairs = zip(one, other, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
    return [
        f"{len(wrong)} of {len(expected)} answers are not the target's own; prompt {wrong[0] + 1} differs "
        f"from new token {place + 1} on. In a 16-bit dtype rounding alone may do that: try eval.dtype float32"
    ]


def sglang_command(check: Check) -> str | None:
    """How SGLang serves the vLLM layout; None when there is none of it, or SGLang has no such drafts."""
    if "vllm" not in check.drafts or not ALGORITHMS[check.algorithm].served_by_sglang:
        return None
    draft = str(check.drafts["vllm"])
    return shlex.join(sglang_words(check.target.path, draft, check.dtype, check.draft_tokens))
