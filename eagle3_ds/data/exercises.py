"""Conversations whose answers this program computes: days after a date, numbers in words, tables and sums,
records as JSON, classes of Python, lists, letters and short stories.

A model of a few million parameters that is trained for minutes answers them in whole sentences, where on the
sources of a library it would repeat itself. So a draft that is judged by its answers is judged by text. Every
conversation depends on its number alone.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

NUM_CONVERSATIONS = 20_000
MAX_TURNS = 3


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words("Anna Ben Clara David Emma Felix Grace Henry Iris Karin Leo Maria Oscar Paula Victor")
SURNAMES = _words(
    "Adams Berger Dubois Fischer Garcia Hansen Ivanov Jansen Keller Lopez Novak Olsen Peters Rossi Young"
)
CITIES = _words(
    "Athens Bergen Cairo Dublin Essen Florence Geneva Hamburg Kyoto Lisbon Madrid Oslo Riga Vienna Zurich"
)
TRADES = _words("baker carpenter doctor driver engineer farmer gardener nurse painter pilot sailor teacher")
GOODS = _words("basket blanket chair clock kettle ladder lamp mirror radio suitcase table umbrella")
ANIMALS = _words("badger crow fox frog goat hare hedgehog mouse otter owl squirrel wolf")
PLACES = _words("barn bridge cave forest garden harbour hill island lake meadow mill river")
MOODS = _words("brave clever curious gentle hungry lonely patient proud quiet shy tired young")
CLASSES = _words("Account Book Order Parcel Player Recipe Room Sensor Ship Ticket Track Worker")
FIELDS = _words(
    "address amount author colour height length name owner price rating size speed state title weight width"
)
WORDS = tuple(dict.fromkeys((*TRADES, *GOODS, *ANIMALS, *PLACES, *MOODS, *FIELDS)))
ONES = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")

Turn = tuple[str, str]
"""A question and its answer."""


def exercise_conversations() -> Iterator[dict]:
    """Rows `{"messages": [...]}` of one to three exercises each."""
    for number in range(NUM_CONVERSATIONS):
        rng = random.Random(f"exercises {number}")
        turns = [rng.choice(EXERCISES)(rng) for _ in range(rng.randint(1, MAX_TURNS))]
        yield {
            "messages": [
                {"role": role, "content": text}
                for turn in turns
                for role, text in zip(("user", "assistant"), turn, strict=True)
            ]
        }


def exercises_fingerprint() -> str:
    """sha256 of this file, on which alone the conversations depend."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def in_words(number: int) -> str:
    """A number from 0 to 999,999 in English words."""
    if number < 20:
        return ONES[number]
    if number < 100:
        rest = number % 10
        return TENS[number // 10 - 2] + (f"-{ONES[rest]}" if rest else "")
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    words = f"{in_words(number // size)} {name}"
    return f"{words} {'and ' if size == 100 else ''}{in_words(number % size)}" if number % size else words


def _listed(items: Sequence[str]) -> str:
    return f"{', '.join(items[:-1])} and {items[-1]}" if len(items) > 1 else items[0]


def _person(rng: random.Random) -> tuple[str, str]:
    return rng.choice(NAMES), rng.choice(SURNAMES)


def _date(rng: random.Random) -> datetime.date:
    return datetime.date(2020, 1, 1) + datetime.timedelta(days=rng.randrange(3650))


def _long_date(date: datetime.date) -> str:
    return f"{date:%A}, {date.day} {date:%B} {date.year}"


def _days(rng: random.Random) -> Turn:
    start, count = _date(rng), rng.randint(4, 9)
    lines = [f"- {_long_date(start + datetime.timedelta(days=n))}" for n in range(1, count + 1)]
    question = rng.choice(("Which {n} days follow {day}?", "List the {n} days after {day}."))
    first = f"These are the {in_words(count)} days after {_long_date(start)}:"
    return question.format(n=in_words(count), day=_long_date(start)), "\n".join([first, "", *lines])


def _counting(rng: random.Random) -> Turn:
    count = rng.randint(4, 8)
    start = rng.randrange(100 - count)
    words = [in_words(number) for number in range(start, start + count)]
    question = rng.choice(("Count from {} to {} in words.", "Write the numbers from {} to {} as words."))
    answer = "\n".join(f"{n}. {word}" for n, word in enumerate(words, 1))
    return question.format(start, start + count - 1), answer


def _table(rng: random.Random) -> Turn:
    factor, start, count = rng.randint(2, 12), rng.randint(1, 5), rng.randint(4, 7)
    lines = [f"{n} x {factor} = {n * factor}" for n in range(start, start + count)]
    question = f"Write the multiplication table of {factor} from {start} to {start + count - 1}."
    return question, "\n".join(["Here is the table:", "", *lines])


def _addition(rng: random.Random) -> Turn:
    one, other = rng.randrange(10, 100), rng.randrange(10, 100)
    ones, tens = one % 10 + other % 10, one // 10 * 10 + other // 10 * 10
    lines = (
        f"{one} is {one // 10 * 10} and {one % 10}, and {other} is {other // 10 * 10} and {other % 10}.",
        f"The tens: {one // 10 * 10} plus {other // 10 * 10} is {tens}.",
        f"The ones: {one % 10} plus {other % 10} is {ones}.",
        f"Together: {tens} plus {ones} is {one + other}.",
    )
    question = rng.choice(("Add {} and {} step by step.", "How much is {} plus {}? Show each step."))
    return question.format(one, other), "\n".join(lines)


def _record(rng: random.Random) -> Turn:
    first, last = _person(rng)
    record = {
        "first_name": first,
        "last_name": last,
        "age": rng.randint(18, 79),
        "trade": rng.choice(TRADES),
        "city": rng.choice(CITIES),
        "room": rng.randint(10, 99),
    }
    question = (
        f"Write as JSON: {first} {last}, {record['age']}, a {record['trade']} from {record['city']}, "
        f"room {record['room']}."
    )
    return question, f"```json\n{json.dumps(record, indent=2)}\n```"


def _class(rng: random.Random) -> Turn:
    name, fields = rng.choice(CLASSES), rng.sample(FIELDS, rng.randint(2, 4))
    lines = [
        f"class {name}:",
        f'    """A {name.lower()} with its {_listed(fields)}."""',
        "",
        f"    def __init__(self, {', '.join(fields)}):",
        *(f"        self.{field} = {field}" for field in fields),
        "",
        "    def __repr__(self):",
        f'        return f"{name}({", ".join(f"{{self.{field}!r}}" for field in fields)})"',
    ]
    question = rng.choice(("Write a Python class {} with {}.", "How would you write a class {} that has {}?"))
    return question.format(name, _listed(fields)), "\n".join(["```python", *lines, "```"])


def _list(rng: random.Random) -> Turn:
    # Nothing but the question says what the answer is: a young model learns here to look back.
    words = rng.sample(WORDS, rng.randint(5, 10))
    if rng.random() < 0.5:
        return f"Number these words: {_listed(words)}.", "\n".join(
            f"{n}. {word}" for n, word in enumerate(words, 1)
        )
    return f"Make a list of {_listed(words)}.", "\n".join(f"- {word}" for word in words)


def _letter(rng: random.Random) -> Turn:
    (first, last), (clerk, _) = _person(rng), _person(rng)
    good, date, city = rng.choice(GOODS), _date(rng), rng.choice(CITIES)
    order, days = f"{in_words(rng.randint(2, 12))} {good}s", rng.randint(2, 9)
    question = (
        f"Write to {first} {last} in {city}: the {order} ordered on {date.day} {date:%B} arrive in {days} "
        f"days. Sign as {clerk}."
    )
    thanks = f"thank you for your order of {date.day} {date:%B}."
    news = f"Your {order} have left our house today and will reach you in {city} in {in_words(days)} days."
    offer = (
        f"If one of them should be damaged, please write to us, and we will send you another {good} at once."
    )
    return question, f"Dear {first} {last},\n\n{thanks} {news} {offer}\n\nWith kind regards,\n{clerk}"


def _story(rng: random.Random) -> Turn:
    (animal, friend), (mood, other) = rng.sample(ANIMALS, 2), rng.sample(MOODS, 2)
    place, good, name = rng.choice(PLACES), rng.choice(GOODS), rng.choice(NAMES)
    sentences = (
        f"Once upon a time a {mood} {animal} called {name} lived by the {place}.",
        f"One morning {name} found an old {good} in the grass and did not know what it was for.",
        f"So the {animal} carried it to the {friend}, who was {other} but knew many things.",
        f'"This is a {good}," said the {friend}. "People forget them by the {place}."',
        f"From that day on the {animal} and the {friend} met at the {good} every evening,",
        f"and {name} was never {mood} again.",
    )
    question = f"Tell me a story about a {mood} {animal}, a {other} {friend} and a {good} by the {place}."
    return question, " ".join(sentences)


EXERCISES: tuple[Callable[[random.Random], Turn], ...] = (
    _days,
    _counting,
    _table,
    _addition,
    _record,
    _class,
    _list,
    _letter,
    _story,
)
