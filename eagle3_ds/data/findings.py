"""What rows turned out to be: bad ones by their fault, and what a user should know of the others."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

PLACES = 3
"""Places that are named for a fault."""
FAULTS = 20
"""Faults that are told, the most frequent ones."""
ENOUGH = 1000
"""Bad rows after which reading stops: what is wrong is known by then."""


@dataclass
class Findings:
    """Collected over rows in their order.

    Attributes:
        notes: count and first place of what a user should know, by the sentence that tells it.
        faults: by a fault without its numbers, how it was told first, and the places of its rows.
    """

    notes: dict[str, tuple[int, str]] = field(default_factory=dict)
    faults: dict[str, tuple[str, list[str]]] = field(default_factory=dict)

    def add_note(self, place: str, note: str, count: int = 1) -> None:
        before, first = self.notes.get(note, (0, place))
        self.notes[note] = (before + count, first)

    def add_bad(self, place: str, message: str) -> None:
        """A bad row; `message` opens with its place."""
        told = message.removeprefix(f"{place}: ")
        self.faults.setdefault(re.sub(r"\d+", "n", told), (told, []))[1].append(place)

    def update(self, later: Findings) -> None:
        """Take in what was found in rows after these."""
        for note, (count, place) in later.notes.items():
            self.add_note(place, note, count)
        for fault, (told, places) in later.faults.items():
            self.faults.setdefault(fault, (told, []))[1].extend(places)

    @property
    def bad_rows(self) -> int:
        return sum(len(places) for _, places in self.faults.values())

    def told_faults(self) -> list[str]:
        """A line for each fault, the most frequent first."""
        faults = sorted(self.faults.values(), key=lambda fault: -len(fault[1]))
        lines = [_told(told, places) for told, places in faults[:FAULTS]]
        return [*lines, f"and {len(faults) - FAULTS} further faults"] if len(faults) > FAULTS else lines

    def all_faults(self) -> list[str]:
        """For each fault, the most frequent first: how it is told, and every row that has it."""
        faults = sorted(self.faults.values(), key=lambda fault: -len(fault[1]))
        return [
            f"{len(places):,} {'row' if len(places) == 1 else 'rows'}: {told}\n{_listed(places)}"
            for told, places in faults
        ]

    def error(self, read: int) -> ValueError:
        """All bad rows of the `read` ones at once, and what is rare among the others."""
        lines = self.told_faults()
        if self.bad_rows > 1:
            lines = [f"{self.bad_rows:,} of {read:,} rows are bad:", *lines]
        if self.bad_rows >= ENOUGH:
            lines.append("reading stopped there; more may follow")
        if 1 < self.bad_rows == read and len(self.faults) == 1:
            lines.append(
                "every row has this fault: the recipe (data.shape, data.chat_template, data.max_length) "
                "may be to blame rather than the rows"
            )
        elif self.bad_rows > 1:
            lines.append(
                "correct these rows, or set data.on_bad_row: drop, which leaves them out and counts them "
                "(those that are too long are left to data.on_too_long)"
            )
        rare = sorted(self.notes.items(), key=lambda note: note[1][0])[:PLACES]
        lines += [f"not bad, but unusual: {count:,} {note} ({place})" for note, (count, place) in rare]
        return ValueError("\n  ".join(lines))


def _told(told: str, places: Sequence[str]) -> str:
    """The fault at its first place, and where else it is."""
    if len(places) == 1:
        return f"{places[0]}: {told}"
    more = ", ..." if len(places) > PLACES else ""
    return f"{places[0]}: {told} [{len(places):,} rows, further {', '.join(places[1:PLACES])}{more}]"


def _listed(places: Sequence[str]) -> str:
    """Places ("file, line 3") by what stands before their number, with runs of numbers in one: "3-5"."""
    groups: dict[str, list[int]] = {}
    others = []
    for place in places:
        found = re.fullmatch(r"(.*?)(\d+)", place, flags=re.DOTALL)
        if found is None:
            others.append(place)
        else:
            groups.setdefault(found[1], []).append(int(found[2]))
    lines = [f"    {before}{_runs(numbers)}" for before, numbers in groups.items()]
    return "\n".join([*lines, *(f"    {place}" for place in others)])


def _runs(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def note_lines(notes: Mapping[str, int]) -> list[str]:
    """Counted sentences, the most frequent ones."""
    ordered = sorted(notes.items(), key=lambda note: -note[1])
    lines = [f"{count:,} {note}" for note, count in ordered[:FAULTS]]
    return [*lines, f"{len(ordered) - FAULTS:,} further notes on rows"] if len(ordered) > FAULTS else lines
