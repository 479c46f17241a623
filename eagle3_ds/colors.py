"""The colours and markers of every picture: Okabe and Ito's palette, which people with any kind of colour
blindness tell apart (jfly.uni-koeln.de/color, 2008); markers and hatches tell things apart in grey too.
"""

from __future__ import annotations

BLUE, VERMILION, GREEN, PINK = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
ORANGE, SKY, BLACK, GREY = "#e69f00", "#56b4e9", "#000000", "#999999"
COLORS = (BLUE, VERMILION, GREEN, PINK, ORANGE, SKY, BLACK)
"""Of lines, in the order in which they are taken."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""Of those lines."""
