"""The pictures of docs/how-it-works.md. `python docs/pictures/draw.py` writes the SVG files beside this one;
tests/unit/test_pictures.py fails when they are not what this program draws.

Text stays text, colours are those of Okabe and Ito, which people with any colour vision tell apart, and the
ground is opaque, so that a picture reads the same on a light page and on a dark one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np

from eagle3_ds.layout import SpanPlan
from eagle3_ds.topology.mesh import Mesh

INK, GREY, LINE, PALE, GROUND = "#1a1a1a", "#595959", "#8c8c8c", "#f2f2f2", "#ffffff"
BLUE, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#B35900", "#00795A", "#C44601", "#9A4F7A"
SOFT_BLUE, SOFT_ORANGE, SOFT_GREEN, SOFT_PURPLE = "#d6e9f5", "#fbe8c8", "#d3eee5", "#f4dfea"
ANSWERS = ((10, 20), (26, 32), (37, 47))
LENGTHS, GUESSES = (20, 12, 15), 3


class Sheet:
    """One SVG picture."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.items: list[str] = []

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str = PALE,
        stroke: str = LINE,
        dash: str = "",
        radius: int = 5,
    ) -> None:
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.items.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" fill="{fill}" '
            f'stroke="{stroke}"{dashed}/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: int = 13,
        at: str = "start",
        fill: str = INK,
        bold: bool = False,
    ) -> None:
        weight = ' font-weight="bold"' if bold else ""
        self.items.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{at}" fill="{fill}"{weight}>'
            f"{escape(words)}</text>"
        )

    def labelled(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        lines: Sequence[str],
        fill: str = PALE,
        size: int = 12,
    ) -> None:
        """A box with centred lines of text."""
        self.box(x, y, width, height, fill)
        first = y + height / 2 - (len(lines) - 1) * (size + 3) / 2 + size * 0.36
        for number, line in enumerate(lines):
            self.text(x + width / 2, first + number * (size + 3), line, size, "middle")

    def arrow(self, path: str, colour: str = INK, dash: str = "") -> None:
        """An arrow along an SVG path; the marker of its colour is made in `svg`."""
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.items.append(
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.5"{dashed} '
            f'marker-end="url(#{colour[1:]})"/>'
        )

    def svg(self) -> str:
        body = "\n".join(self.items)
        colours = [
            colour
            for colour in (INK, BLUE, ORANGE, GREEN, RED, PURPLE, GREY)
            if f"url(#{colour[1:]})" in body
        ]
        markers = "\n".join(
            f'<marker id="{colour[1:]}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0L10 5L0 10z" fill="{colour}"/></marker>'
            for colour in colours
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'font-family="Helvetica, Arial, sans-serif">\n<title>{escape(self.title)}</title>\n'
            f"<defs>\n{markers}\n</defs>\n"
            f'<rect width="{self.width}" height="{self.height}" rx="8" fill="{GROUND}"/>\n{body}\n</svg>\n'
        )


def a_round() -> Sheet:
    """(a) What a draft is, and one round of speculative decoding."""
    sheet = Sheet(860, 480, "A draft beside its target, and one round of speculative decoding")
    sheet.text(24, 32, "What the draft is", 15, bold=True)
    sheet.box(24, 48, 240, 128, SOFT_BLUE)
    sheet.text(144, 68, "target: frozen, n layers", 13, "middle", bold=True)
    for place, layer in enumerate(("input of layer 2", "input of layer n // 2", "input of layer n - 3")):
        sheet.labelled(44, 78 + place * 31, 200, 24, [layer], GROUND)
        sheet.arrow(f"M244 {90 + place * 31}H310", BLUE)
    sheet.box(312, 48, 250, 128, SOFT_ORANGE)
    sheet.text(437, 68, "draft: trained, one layer", 13, "middle", bold=True)
    for place, part in enumerate(
        ("fc: three states become one", "one decoder layer", "lm_head: draft vocabulary")
    ):
        sheet.labelled(332, 78 + place * 31, 210, 24, [part], GROUND)
    sheet.arrow("M542 152H620", ORANGE)
    sheet.text(628, 159, "a guess: the token", 13)
    sheet.text(628, 176, "after the newest one", 13)
    sheet.text(628, 111, "it also reads the newest", 13, fill=GREY)
    sheet.text(628, 128, "token's embedding", 13, fill=GREY)
    sheet.arrow("M620 121H542", GREY, "5 3")
    _the_round(sheet)
    return sheet


def _the_round(sheet: Sheet) -> None:
    sheet.text(24, 218, "One round: four guesses, one forward of the target", 15, bold=True)
    columns = [(",", "Tuesday"), ("Tuesday", ","), (",", "Wednesday"), ("Friday", "..."), ("and", "...")]
    left, step, width = 220, 126, 112
    sheet.text(24, 262, "The draft guesses, one", 13)
    sheet.text(24, 279, "token after the other", 13)
    sheet.text(24, 332, "The target reads all", 13)
    sheet.text(24, 349, "five in one forward ...", 13)
    sheet.text(24, 402, "... and says what it", 13)
    sheet.text(24, 419, "would put behind each", 13)
    for place, (read, said) in enumerate(columns):
        x = left + place * step
        if place:
            sheet.labelled(x, 246, width, 34, [read], SOFT_ORANGE, 14)
            sheet.arrow(f"M{x + width / 2} 280V316", ORANGE)
        else:
            sheet.text(x + width / 2, 267, "newest token", 12, "middle", GREY)
            sheet.arrow(f"M{x + width / 2} 274V316", GREY)
        sheet.labelled(x, 316, width, 34, [read], SOFT_BLUE, 14)
        sheet.arrow(f"M{x + width / 2} 350V386", BLUE)
        sheet.labelled(x, 386, width, 34, [said], GROUND if place > 2 else SOFT_GREEN, 14)
    words = ("right: accepted", "right: accepted", "wrong: replaced", "not looked at", "not looked at")
    for place, said in enumerate(words):
        colour = GREEN if place < 2 else RED if place == 2 else GREY
        sheet.text(left + place * step + width / 2, 437, said, 12, "middle", colour)
    sheet.text(
        24,
        468,
        "Three new tokens for one forward: Tuesday , Wednesday. The text is the target's own.",
        13,
        bold=True,
    )


def ttt_steps() -> Sheet:
    """(b) What EAGLE-3 trains: one slot over the TTT steps."""
    sheet = Sheet(880, 466, "One slot over the steps of training-time test")
    sheet.text(
        24, 32, "Slot i of a document, over the K steps that imitate K guesses of a server", 15, bold=True
    )
    rows = ("reads the token", "hidden state", "attends to", "MLP, residual", "guesses the token")
    tops = (70, 124, 188, 262, 316)
    for top, row in zip((*tops, 358, 392), (*rows, "its teacher is row", "weight in the loss"), strict=True):
        sheet.text(24, top + 25, row, 13, fill=GREY)
    left, step, width = 184, 224, 190
    hidden = (
        ["fc of g_i, the target's", "captured states"],
        ["own output of step 0"],
        ["own output of step 1"],
    )
    attends = (
        ["step-0 keys of slots", "j <= i of the document"],
        ["the same step-0 keys,", "and its own key of step 1"],
        ["the same step-0 keys, and", "its own keys of steps 1, 2"],
    )
    for k in range(3):
        x = left + k * step
        sheet.text(x + width / 2, 62, f"step {k}", 13, "middle", bold=True)
        sheet.labelled(x, tops[0] + 4, width, 34, [f"true token i + {k + 1}"], PALE)
        sheet.labelled(x, tops[1] + 2, width, 42, hidden[k], SOFT_ORANGE if k else SOFT_BLUE)
        sheet.labelled(x, tops[2] - 2, width, 54, attends[k], SOFT_ORANGE)
        sheet.labelled(x, tops[3] - 2, width, 34, [f"output of step {k}"], SOFT_ORANGE)
        sheet.labelled(x, tops[4] + 2, width, 34, [f"i + {k + 2}"], SOFT_GREEN)
        sheet.text(x + width / 2, 383, f"i + {k + 1} of the target", 13, "middle")
        sheet.text(x + width / 2, 417, ("1", "0.8", "0.64")[k], 13, "middle")
        for above, below in ((108, 126), (168, 186), (240, 260), (294, 318)):
            sheet.arrow(f"M{x + width / 2} {above}V{below}", INK)
        if k < 2:
            sheet.arrow(f"M{x + width} 277H{x + width + 17}V147H{x + step}", ORANGE)
    sheet.arrow(f"M{left + 2 * step + width} 277H868", ORANGE)
    sheet.text(
        24, 450, "A wrong guess is never fed back: every step reads the true token. Step-0 keys never change."
    )
    return sheet


def the_plan() -> tuple[SpanPlan, np.ndarray]:
    """The cut that is drawn, by the product's own planner, and where the answers are, bool [L]."""
    answer = np.zeros(sum(LENGTHS), dtype=np.bool_)
    for first, stop in ANSWERS:
        answer[first:stop] = True
    live = np.zeros_like(answer)
    starts = np.cumsum((0, *LENGTHS))
    for start, stop in zip(starts, starts[1:], strict=False):
        for slot in range(start, stop):
            live[slot] = answer[slot + 1 : min(stop, slot + 1 + GUESSES)].any()
    return SpanPlan.make(LENGTHS, ring=2, ulysses=2, chunks_per_rank=2, live=live), answer


def mesh_and_spans() -> Sheet:
    """(c) The mesh, and how one packed sequence is cut over four of its ranks."""
    sheet = Sheet(860, 610, "The mesh draft_dp x ring x ulysses, and the spans of one packed sequence")
    sheet.text(24, 32, "Eight ranks: draft_dp 2 x ring 2 x ulysses 2", 15, bold=True)
    mesh = Mesh(2, 2, 2)
    for group in range(2):
        x = 24 + group * 412
        sheet.box(x, 46, 400, 136, GROUND)
        sheet.text(x + 12, 66, f"draft_dp {group}: trains on a pack of its own", 12, fill=GREY)
        for rank in range(4):
            place = mesh.place(group * 4 + rank)
            left, top = x + 110 + place.ulysses_rank * 140, 76 + place.ring_rank * 50
            fill = SOFT_BLUE if place.ring_rank == 0 else SOFT_ORANGE
            sheet.labelled(left, top, 126, 40, [f"rank {place.rank}"], fill, 13)
        for ring in range(2):
            sheet.text(x + 12, 101 + ring * 50, f"ring {ring}", 12)
    sheet.text(
        24, 204, "Side by side: Ulysses peers, which share heads, neighbours within a host.", 12, fill=GREY
    )
    sheet.text(
        24,
        221,
        "One above the other: ring, which may cross hosts. Four ranks share one sequence: sp = 4.",
        12,
        fill=GREY,
    )
    _the_pack(sheet)
    return sheet


def _the_pack(sheet: Sheet) -> None:
    plan, answer = the_plan()
    cell, left = 17.0, 24.0
    sheet.text(24, 260, "One pack of three documents: which rank holds which slot", 15, bold=True)
    holder = {
        int(s): (r, u) for r in range(2) for u in range(2) for s in (*plan.live[r, u], *plan.rest[r, u])
    }
    live = {int(slot) for slot in plan.live.ravel()}
    start = 0
    for number, length in enumerate(LENGTHS):
        sheet.text(left + (start + length / 2) * cell, 285, f"document {number}", 12, "middle")
        sheet.box(left + start * cell, 291, length * cell, 26, GROUND, INK)
        start += length
    sheet.text(left + (start + 1) * cell, 285, "padding", 12, "end", GREY)
    for slot in range(plan.padded_length):
        x = left + slot * cell
        if slot < len(answer) and answer[slot]:
            sheet.box(x + 1.5, 293, cell - 3, 22, GREEN, GREEN, radius=2)
        ring, ulysses = holder[slot]
        fill = (SOFT_BLUE if ring == 0 else SOFT_ORANGE) if slot in live else GROUND
        sheet.box(x, 325, cell, 26, fill, BLUE if ring == 0 else ORANGE, radius=0)
        sheet.text(x + cell / 2, 343, str(ring * 2 + ulysses), 12, "middle")
    sheet.box(24, 364, 14, 14, GREEN, GREEN, radius=2)
    sheet.text(44, 376, "token of an answer", 12)
    sheet.box(184, 364, 14, 14, SOFT_BLUE, BLUE, radius=0)
    sheet.box(202, 364, 14, 14, SOFT_ORANGE, ORANGE, radius=0)
    sheet.text(222, 376, "live slot: a loss reads it, it is unrolled", 12)
    sheet.box(478, 364, 14, 14, GROUND, BLUE, radius=0)
    sheet.box(496, 364, 14, 14, GROUND, ORANGE, radius=0)
    sheet.text(516, 376, "other slot: one key and one value, no more", 12)
    sheet.text(
        24,
        398,
        "The number is the rank. A prompt's last slots are live too: their guesses reach into the answer.",
        12,
        fill=GREY,
    )
    _the_ranks(sheet, plan)


def _the_ranks(sheet: Sheet, plan: SpanPlan) -> None:
    sheet.text(
        24,
        438,
        "What each of the four ranks holds: its live slots first, equally many on every rank",
        15,
        bold=True,
    )
    cell = 30.0
    for ring in range(2):
        for ulysses in range(2):
            rank = ring * 2 + ulysses
            top = 452 + rank * 30
            sheet.text(24, top + 18, f"rank {rank}", 12)
            fill, stroke = (SOFT_BLUE, BLUE) if ring == 0 else (SOFT_ORANGE, ORANGE)
            x = 84.0
            for part, ground in ((plan.live, fill), (plan.rest, GROUND)):
                for slot in part[ring, ulysses]:
                    sheet.box(x, top, cell, 24, ground, stroke, radius=0)
                    words = str(slot) if slot < plan.length else "-"
                    sheet.text(x + cell / 2, top + 17, words, 12, "middle", INK if words != "-" else GREY)
                    x += cell
                x += 12
    notes = (
        "Numbers are those of slots, - is padding.",
        "",
        "Halo: of the K slots behind each of its own a",
        "rank also reads token, mask and teacher. No",
        "gradient goes there.",
    )
    for number, line in enumerate(notes):
        sheet.text(530, 478 + number * 19, line, 12, fill=GREY)
    sheet.text(
        24,
        596,
        "Small numbers for the picture: chunks_per_rank 2, K 3. The cut is that of eagle3_ds/layout/plan.py.",
        12,
        fill=GREY,
    )


STEP_ZERO = (
    (["norms, projections:", "q, k, v of own slots"], SOFT_GREEN),
    (["ulysses all-to-all:", "q, k, v in one call"], SOFT_BLUE),
    (["ring: k and v of all,", "gathered once"], SOFT_ORANGE),
    (["attention to step-0", "keys, own heads"], SOFT_GREEN),
    (["ulysses all-to-all:", "out, lse come home"], SOFT_BLUE),
    (["o_proj, MLP; the", "tap for the loss"], SOFT_GREEN),
)
STEP_LATER = (
    (["norms, projections:", "q, k, v of live slots"], SOFT_GREEN),
    (["ulysses all-to-all:", "q only; k, v stay"], SOFT_BLUE),
    (["ring: nothing, step-0", "keys are here"], GROUND),
    (["attention to step-0", "keys, own heads"], SOFT_GREEN),
    (["ulysses all-to-all:", "out, lse come home"], SOFT_BLUE),
    (["merge own diagonals;", "o_proj, MLP; tap"], SOFT_GREEN),
)
BACK_LATER = (
    (["o_proj, MLP again,", "their gradients"], SOFT_GREEN),
    (["ulysses all-to-all:", "dout, q, lse, delta"], SOFT_BLUE),
    (["attention backward;", "diagonals at home"], SOFT_GREEN),
    (["ring: nothing, dk and", "dv are summed here"], GROUND),
    (["ulysses all-to-all:", "dq comes home"], SOFT_BLUE),
    (["norms, projections,", "their gradients"], SOFT_GREEN),
)
BACK_ZERO = (
    (["o_proj, MLP again,", "their gradients"], SOFT_GREEN),
    (["ulysses all-to-all:", "dout, q, lse, delta"], SOFT_BLUE),
    (["attention backward"], SOFT_GREEN),
    (["ring: dk and dv of", "all, scattered once"], SOFT_ORANGE),
    (["ulysses all-to-all:", "dq, dk, dv in one"], SOFT_BLUE),
    (["norms, projections,", "their gradients; fc"], SOFT_GREEN),
)


def one_step() -> Sheet:
    """(d) One TTT step: who sends what, when."""
    sheet = Sheet(1040, 470, "What the ranks of one sequence send each other in a TTT step")
    sheet.text(24, 32, "Each of the sp ranks does this, for one layer; time runs to the right", 15, bold=True)
    rows = (
        ("forward,", "step 0", STEP_ZERO),
        ("forward, steps", "1 to K - 1", STEP_LATER),
        ("backward, steps", "K - 1 to 1", BACK_LATER),
        ("backward,", "step 0", BACK_ZERO),
    )
    for number, (first, second, parts) in enumerate(rows):
        top = 56 + number * 84
        sheet.text(24, top + 26, first, 12, bold=True)
        sheet.text(24, top + 43, second, 12, bold=True)
        for place, (lines, fill) in enumerate(parts):
            x = 146 + place * 147
            sheet.labelled(x, top, 136, 58, lines, fill, 11)
            if place:
                sheet.arrow(f"M{x - 11} {top + 29}H{x}", INK)
    for x, fill, words in (
        (24, SOFT_GREEN, "computed on the rank"),
        (222, SOFT_BLUE, "sent among Ulysses peers (fast links)"),
        (520, SOFT_ORANGE, "sent over the ring (may cross hosts)"),
    ):
        sheet.box(x, 396, 16, 16, fill)
        sheet.text(x + 24, 409, words, 12)
    sheet.text(
        24,
        434,
        "For K = 7: 28 all-to-alls, one gather and one reduce-scatter, however long the sequence is.",
        12,
    )
    sheet.text(
        24,
        453,
        "Drawn for kv_exchange: gather. With ring, keys and values go round from rank to rank instead.",
        12,
        fill=GREY,
    )
    return sheet


def waiting_gradients() -> Sheet:
    """(e) The backward: where gradients wait."""
    sheet = Sheet(900, 440, "Where gradients wait in the backward of three steps")
    sheet.text(24, 32, "The backward of K = 3 steps, from the left to the right", 15, bold=True)
    phases = ("forward", "loss", "step 2", "step 1", "step 0", "fc", "ZeRO")
    left, step = 264.0, 88.0
    for place, phase in enumerate(phases):
        x = left + place * step
        fill = PALE if place == 0 else SOFT_PURPLE if phase in ("loss", "ZeRO") else SOFT_ORANGE
        sheet.labelled(x + 4, 48, step - 8, 32, [phase], fill, 13)
        if place:
            sheet.arrow(f"M{x - 4} 64H{x + 4}", INK)
    lanes = (
        ("loss of guess 2, at its tap", 0.5, 2.2, BLUE),
        ("loss of guess 1, at its tap", 0.5, 3.2, BLUE),
        ("loss of guess 0, at its tap", 0.5, 4.2, BLUE),
        ("own keys, values of step 2", 2.4, 2.9, ORANGE),
        ("own keys, values of step 1", 2.4, 3.9, ORANGE),
        ("step-0 keys, values, in fp32", 2.4, 4.6, GREEN),
        ("weights of the layer, in fp32", 2.1, 4.95, PURPLE),
        ("whole draft, under ZeRO-3", 4.95, 5.95, INK),
    )
    for number, (words, begin, end, colour) in enumerate(lanes):
        y = 106 + number * 30
        sheet.text(24, y + 5, words, 13)
        x0, x1 = left + begin * step, left + end * step
        sheet.box(x0, y - 7, x1 - x0, 14, colour, colour, radius=7)
        sheet.arrow(f"M{x1} {y}H{x1 + 16}", colour)
    notes = (
        (
            BLUE,
            "Made in the forward pass, at supervised slots only; scaled once the loss's backward has run.",
        ),
        (ORANGE, "Every later step reads a diagonal key: its gradient is whole when its own step runs."),
        (GREEN, "Read by all K steps: summed here, sent over the ring and home once, in step 0."),
        (
            PURPLE,
            "The same weights K times: one sum, which step 0 hands to autograd (not with activation: keep).",
        ),
        (INK, "ZeRO-3 reduces when fc's gradient, the last, is there: that is what the anchor is for."),
    )
    for number, (colour, words) in enumerate(notes):
        y = 354 + number * 18
        sheet.box(24, y - 9, 10, 10, colour, colour, radius=2)
        sheet.text(42, y, words, 12)
    return sheet


PICTURES = {
    "round.svg": a_round,
    "ttt-steps.svg": ttt_steps,
    "mesh.svg": mesh_and_spans,
    "one-step.svg": one_step,
    "gradients.svg": waiting_gradients,
}


def main() -> None:
    for name, draw in PICTURES.items():
        Path(__file__).with_name(name).write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
