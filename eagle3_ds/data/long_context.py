"""Prompts of a wanted length: look-ups and variables hidden in long filler text, after the tasks of RULER
(arXiv 2404.06654), made here from a seed; and the questions of LongBench v2 (arXiv 2412.15204).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets

Tokenize = Callable[[str], list[int]]
"""What a user says -> the whole prompt's token ids, with what the chat template puts around it."""

LONGBENCH = "THUDM/LongBench-v2"
COLUMNS = ("context", "question", "choice_A", "choice_B", "choice_C", "choice_D")
PAIRS, ASKED, CHAINS, HOPS = 8, 4, 2, 4
"""Keys in a text and how many are asked for; chains of variables and how many there are in one."""
FIRST_GUESS = 64
"""Sentences by which a filler's tokens per sentence are first judged."""
WHO = [
    "baker",
    "captain",
    "gardener",
    "clerk",
    "miller",
    "teacher",
    "sailor",
    "weaver",
    "doctor",
    "printer",
    "shepherd",
    "mason",
]
DOES = [
    "carries",
    "sells",
    "paints",
    "repairs",
    "forgets",
    "counts",
    "borrows",
    "hides",
    "washes",
    "measures",
    "finds",
    "describes",
]
WHAT = [
    "lamps",
    "maps",
    "ropes",
    "apples",
    "letters",
    "clocks",
    "baskets",
    "boats",
    "bricks",
    "books",
    "keys",
    "candles",
]
WHERE = [
    "harbour",
    "market",
    "mill",
    "bridge",
    "library",
    "orchard",
    "station",
    "tower",
    "garden",
    "cellar",
    "school",
    "square",
]
WHEN = [
    "in spring",
    "at noon",
    "every week",
    "before dawn",
    "on Sundays",
    "after the rain",
    "at night",
    "in winter",
]
KIND = [
    "amber",
    "silver",
    "quiet",
    "northern",
    "hollow",
    "crimson",
    "early",
    "narrow",
    "golden",
    "distant",
    "broken",
    "velvet",
]


class Task(NamedTuple):
    """What is hidden in the filler, in this order, the question that stands before and after it, and the
    words of the right answer.
    """

    needles: Sequence[str]
    question: str
    answer: Sequence[str]


def ruler_prompts(tokenize: Tokenize, length: int, number: int, seed: int) -> list[list[int]]:
    """`number` prompts of as many tokens as whole sentences allow, at most `length`: by turns a look-up of
    keys and a tracking of variables. The same seed and tokenizer give the same prompts.

    Raises:
        ValueError: a task without any filler is longer than `length`.
    """
    prompts = []
    for index in range(number):
        draw = random.Random(f"{seed} {length} {index}")
        task = _look_up(draw) if index % 2 == 0 else _variables(draw)
        prompts.append(_filled(task, draw, tokenize, length))
    return prompts


def _look_up(draw: random.Random) -> Task:
    names = draw.sample([f"{kind}-{place}" for kind in KIND for place in WHERE], PAIRS)
    codes = [str(draw.randrange(10**6, 10**7)) for _ in names]
    asked = draw.sample(range(PAIRS), ASKED)
    return Task(
        [f"The code of {name} is {code}." for name, code in zip(names, codes, strict=True)],
        "The text holds codes of places. Write, one a line, the codes of: "
        + ", ".join(names[place] for place in asked),
        [codes[place] for place in asked],
    )


def _variables(draw: random.Random) -> Task:
    letters = "ABCDEFGHJKLMNPQRSTUVWXYZ"
    names = draw.sample([one + other for one in letters for other in letters], CHAINS * (HOPS + 1))
    values = draw.sample(range(10000, 100000), CHAINS)
    chains = [names[chain::CHAINS] for chain in range(CHAINS)]
    needles = [f"VAR {chain[0]} = {value}." for chain, value in zip(chains, values, strict=True)]
    for hop in range(HOPS):
        needles += [f"VAR {chain[hop + 1]} = VAR {chain[hop]}." for chain in chains]
    question = f"The text assigns values to variables. Write, one a line, all variables that are {values[0]}."
    return Task(needles, question, chains[0])


def _filled(task: Task, draw: random.Random, tokenize: Tokenize, length: int) -> list[int]:
    """The longest prompt of the task that has at most `length` tokens."""
    depths = sorted(draw.random() for _ in task.needles)
    filler = _sentences(draw)
    drawn: list[str] = []

    def tokens(count: int) -> list[int]:
        while len(drawn) < count:
            drawn.append(next(filler))
        return tokenize(_text(task, drawn[:count], depths))

    best = tokens(0)
    if len(best) > length:
        raise ValueError(
            f"--prompts ruler:{length}: the shortest task has {len(best)} tokens of this tokenizer before "
            f"any filler. Give a length of {2 * len(best)} or more."
        )
    each = max(1.0, (len(tokens(FIRST_GUESS)) - len(best)) / FIRST_GUESS)
    fits, too_many = 0, None
    while too_many is None or too_many - fits > 1:
        guess = fits + max(1, int((length - len(best)) / each))
        # Never beyond what is known to be too long, and halving where the guess does not move.
        guess = guess if too_many is None or guess < too_many else (fits + too_many) // 2
        found = tokens(guess)
        if len(found) <= length:
            fits, best = guess, found
        else:
            too_many = guess
    return best


def _text(task: Task, sentences: Sequence[str], depths: Sequence[float]) -> str:
    parts, start = [], 0
    for needle, depth in zip(task.needles, depths, strict=True):
        end = int(depth * len(sentences))
        parts += [*sentences[start:end], needle]
        start = end
    told = " ".join([*parts, *sentences[start:]])
    return f"{task.question}\n\n{told}\n\n{task.question}"


def _sentences(draw: random.Random) -> Iterator[str]:
    while True:
        who, does, what, where, when = map(draw.choice, (WHO, DOES, WHAT, WHERE, WHEN))
        yield f"The {who} {does} {draw.randrange(2, 99)} {what} near the {where} {when}."


def longbench_prompts(
    tokenize: Tokenize, number: int, seed: int, longest: int | None = None, place: str = LONGBENCH
) -> tuple[list[list[int]], int]:
    """Up to `number` questions of LongBench v2, drawn by the seed, in its own words for an answer without
    reasoning.

    Args:
        longest: prompts of more tokens are passed over.
        place: a hub name, or a folder of files with the same columns.

    Returns:
        The prompts, and how many were passed over.

    Raises:
        ValueError: the data set cannot be loaded or has other columns.
    """
    rows = _load(place)
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    prompts: list[list[int]] = []
    passed_over = 0
    for index in order:
        if len(prompts) == number:
            break
        tokens = tokenize(_question(rows[index]))
        if longest is not None and len(tokens) > longest:
            passed_over += 1
        else:
            prompts.append(tokens)
    return prompts, passed_over


def _load(place: str) -> datasets.Dataset:
    is_folder = Path(place).expanduser().is_dir()
    try:
        rows = datasets.load_dataset(str(Path(place).expanduser()) if is_folder else place, split="train")
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"--prompts longbench-v2: {place!r} cannot be loaded ({error}). On a host without the hub, "
            f"download {LONGBENCH} elsewhere and give its folder: --prompts longbench-v2:FOLDER."
        ) from error
    missing = sorted(set(COLUMNS) - set(rows.column_names))
    if missing or not len(rows):
        raise ValueError(
            f"--prompts longbench-v2: {place!r} has {len(rows)} rows with the columns {rows.column_names}, "
            f"and {missing or 'rows'} are missing. Name a copy of {LONGBENCH}."
        )
    return rows


def _question(row: Any) -> str:
    choices = "\n".join(f"({letter}) {str(row[f'choice_{letter}']).strip()}" for letter in "ABCD")
    return (
        "Please read the following text and answer the question below.\n\n"
        f"<text>\n{str(row['context']).strip()}\n</text>\n\n"
        f"What is the correct answer to this question: {str(row['question']).strip()}\n"
        f"Choices:\n{choices}\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )
