"""Random span plans: documents, meshes, and which slots are live."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from eagle3_ds.layout import SpanPlan


@st.composite
def span_plans(
    draw: st.DrawFn, longest: int = 60, documents: int = 12, ring: int = 5, ulysses: int = 4, chunks: int = 8
) -> SpanPlan:
    """All slots live, none, or stretches of them as chats have."""
    lengths = draw(st.lists(st.integers(1, longest), min_size=1, max_size=documents))
    turns = draw(st.none() | st.lists(st.integers(1, 30), max_size=12))
    live = None
    if turns is not None:
        # Turns alternate; what they do not reach is not live.
        live = np.zeros(sum(lengths), dtype=np.bool_)
        edges = np.cumsum([0, *turns])
        for start, stop in zip(edges[1::2], edges[2::2], strict=False):
            live[start:stop] = True
    ring, ulysses, chunks = (draw(st.integers(1, most)) for most in (ring, ulysses, chunks))
    return SpanPlan.make(lengths, ring, ulysses, chunks, live)
