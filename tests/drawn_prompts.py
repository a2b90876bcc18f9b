"""Prompts that hypothesis draws: segments that many prompts share, and private ones."""

from __future__ import annotations

from typing import Any

from driving import tokens
from hypothesis import strategies as st

import tokendance as td
from tokendance.host.decide import Source

SELECTIONS = [td.LeadingTokens(4, unseen=96), td.KeyDeviation(0.3), td.Everything(), td.Nothing()]
SOURCES = list(Source)
_SHARED = [tokens(100 + i, n) for i, n in enumerate((3, 9, 16, 21, 40, 64))]

prompts_of = st.lists(
    st.one_of(
        st.tuples(st.just("shared"), st.integers(0, len(_SHARED) - 1)),
        st.tuples(st.just("private"), st.integers(1, 40)),
    ),
    min_size=0,
    max_size=5,
)


def segments_of(agent: int, drawn: list[tuple[str, int]], makers: Any = td) -> list[td.Segment]:
    """The segments of a prompt, as the library or a tenant (``makers``) makes them."""
    return [
        makers.shared(_SHARED[number])
        if kind == "shared"
        else makers.private(tokens(1000 * agent + i, number))
        for i, (kind, number) in enumerate(drawn)
    ]
