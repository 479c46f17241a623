"""What a run's output folder tells of it while it runs and after: reading apart from drawing.

`reading.py` makes a `RunView` of the files, `words.py` its texts, `curves.py` lines of few points, `page.py`
HTML. The terminal is drawn by the command line.
"""

from eagle3_ds.watch.curves import sparkline
from eagle3_ds.watch.page import page
from eagle3_ds.watch.reading import RankView, RunReader, RunView
from eagle3_ds.watch.words import curve_words, progress_words, rank_words

__all__ = [
    "RankView",
    "RunReader",
    "RunView",
    "curve_words",
    "page",
    "progress_words",
    "rank_words",
    "sparkline",
]
