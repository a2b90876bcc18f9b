"""Uses as arrays, and the numbers in which a round is laid out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from driving import make_store, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

import tokendance as td
from tokendance._planner import RoundDecision
from tokendance.host.decide import RowKind
from tokendance.host.mirror import Master, Mirror, Use, Uses, round_arrays
from tokendance.host.segments import told_apart

BLOCK = 8


def make_uses(*lengths: int, gap: int = 3) -> Uses:
    """Uses of Masters of their own, a gap before each, every third row replaced."""
    uses, begin = [], 0
    for i, length in enumerate(lengths):
        begin += gap
        master = Master(bytes([i]), length, 2 * i, b"", False, pages=np.arange(-(-length // BLOCK)))
        use = Use(master, begin, length, np.zeros(-(-length // BLOCK), dtype=np.uint32))
        use.override(np.arange(0, length, 3, dtype=np.int32), BLOCK)
        uses.append(use)
        begin += length
    return Uses.of(uses, BLOCK)


def contents(uses: Uses) -> list[tuple[int, int, int, list[int]]]:
    return [
        (use.master.serial, use.delta, use.length, use.overridden(BLOCK).tolist()) for use in uses
    ]


def test_items_are_views() -> None:
    uses = make_uses(20, 8, 1)
    assert [use.length for use in uses] == [20, 8, 1]
    assert uses[-1].delta == uses[2].delta == 37
    assert [use.delta for use in uses[:2]] == [3, 26]
    with pytest.raises(IndexError):
        uses[3]
    uses[1].override(np.array([7], dtype=np.int32), BLOCK)
    assert uses[1].overridden(BLOCK).tolist() == [0, 3, 6, 7]
    assert uses[0].overridden(BLOCK).tolist() == [0, 3, 6, 9, 12, 15, 18]


@pytest.mark.parametrize("rows", [0, 3, 4, 11, 12, 22, 23, 26, 27, 37, 100])
def test_cut_keeps_the_first_rows(rows: int) -> None:
    uses = make_uses(20, 8, 1)
    before = contents(uses)
    cut = uses.cut(rows)
    expected = [
        (serial, delta, min(length, rows - delta), [row for row in hidden if row < rows - delta])
        for serial, delta, length, hidden in before
        if delta < rows
    ]
    assert contents(cut) == expected
    cut.masks[:] = 0
    assert contents(uses) == before


def test_followed_by_puts_uses_behind_each_other() -> None:
    first, second = make_uses(20, 8), make_uses(17, gap=50)
    assert contents(first.followed_by(second)) == contents(first) + contents(second)


def test_a_master_that_one_prompt_uses_twice_is_listed_twice() -> None:
    twice, other = make_uses(9), make_uses(12)
    again = Use(twice.masters[0], 20, 9, np.zeros(2, dtype=np.uint32))
    uses = [other, twice.followed_by(Uses.of([again], BLOCK)), twice]
    none = np.empty(0, dtype=np.int32)
    arrays, extents = round_arrays([Mirror((), 40, one, none, none, 0) for one in uses], BLOCK)
    assert extents.masters == 3
    assert arrays["use_master"].tolist() == [0, 1, 2, 1]
    assert arrays["use_agent"].tolist() == [0, 1, 1, 2]
    assert arrays["agent_use"].tolist() == [[0, 0], [1, 1], [2, 2], [1, 3]]
    assert arrays["use_shift"].tolist() == [3, 3, 20, 3]
    assert arrays["master_page_indptr"].tolist() == [0, 2, 4, 6]


@st.composite
def rounds(draw: st.DrawFn) -> dict[str, list[td.Segment]]:
    pieces = [tokens(i, length) for i, length in enumerate((1, 3, 4, 9, 16, 21))]
    kinds = st.sampled_from([td.shared, td.shared, td.private])
    segment = st.builds(lambda kind, ids: kind(ids), kinds, st.sampled_from(pieces))
    prompts = draw(st.lists(st.lists(segment, max_size=6), min_size=1, max_size=5))
    return {f"agent {a}": segments for a, segments in enumerate(prompts)}


SELECTIONS = [td.LeadingTokens(2, unseen=3), td.Everything(), td.Nothing(), td.KeyDeviation(0.3)]


@settings(max_examples=150, deadline=None)
@given(
    prompts=rounds(),
    selection=st.sampled_from(SELECTIONS),
    source=st.sampled_from(["master", "alone"]),
)
def test_every_row_is_computed_or_stands_in_a_master_of_its_tokens(
    prompts: dict[str, list[td.Segment]], selection: Any, source: str
) -> None:
    collector = td.KVCollector(make_store(), selection=selection, source=source)
    plan = collector.plan(prompts)
    everywhere = [*prompts.values(), *map(told_apart, prompts.values())]
    texts = {one.digest: one.token_ids for segments in everywhere for one in segments}
    made: set[int] = set()
    for state in plan._live.states:
        layout = state.decision
        ids = np.concatenate([np.empty(0, np.int32), *[one.token_ids for one in layout.segments]])
        computed = np.zeros(layout.length, dtype=bool)
        computed[layout.own] = True
        reused = np.zeros(layout.length, dtype=int)
        for use in layout.uses:
            rows = slice(use.delta, use.delta + use.length)
            assert ids[rows].tolist() == texts[use.master.digest][: use.length].tolist()
            hidden = np.zeros(use.length, dtype=bool)
            hidden[use.overridden(collector.store.block_size)] = True
            assert (computed[rows] == hidden).all()
            reused[rows] += ~hidden
            made_here = any(one.master is use.master for one in layout.made)
            assert made_here or use.master.serial in made  # computed before it is reused
            made.add(use.master.serial)
        assert (reused + computed == 1).all()
        origins = np.concatenate(
            [np.empty(0, object), *[np.full(s.end - s.begin, s.kind) for s in layout.spans]]
        )
        assert ((origins == RowKind.OWN) | (origins == RowKind.REPAIRED) == computed).all()
        inexact = np.flatnonzero(origins == RowKind.REUSED)
        if len(inexact):
            assert layout.exact_length <= inexact[0]
        if isinstance(selection, td.Everything):
            assert not len(inexact)
    plan.abort()


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def flags(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint8)


def test_wrong_numbers_are_named() -> None:
    places: dict[str, Any] = {
        "place_indptr": ints(0, 1),
        "segment": ints(0),
        "is_shared": flags(1),
        "segment_length": ints(5),
        "prefix": ints(0),
    }
    with pytest.raises(ValueError, match=r"segment: expected 0 to 0, got 1 at 0"):
        RoundDecision(**{**places, "segment": ints(1)})
    with pytest.raises(ValueError, match=r"prefix: expected \[1\], got \[2\]"):
        RoundDecision(**{**places, "prefix": ints(0, 0)})
    with pytest.raises(ValueError, match=r"is_shared: expected 1 flags, got 0"):
        RoundDecision(**{**places, "is_shared": flags()})
    with pytest.raises(ValueError, match=r"place_indptr: expected ascending values"):
        RoundDecision(**{**places, "place_indptr": ints(1, 0)})
    found: dict[str, Any] = {
        "exact_prefix": ints(0),
        "earlier_context": ints(-1),
        "agent_computes": flags(0),
        "segment_computes": flags(0),
        "stored": ints(-1),
        "stored_rows": ints(0),
        "master_context": ints(),
        "master_is_exact": flags(),
        "master_has_seen": flags(),
        "known": flags(0),
        "replaceable": flags(0),
        "shortest": 1,
        "alone": False,
        "informed": False,
        "lone": False,
        "chain": lambda context, segment: 1,
    }
    layout = RoundDecision(**places)
    with pytest.raises(ValueError, match=r"stored: expected less than 0, got 0"):
        layout.match(**{**found, "stored": ints(0)})
    with pytest.raises(ValueError, match=r"agent_computes: expected 1 flags, got 2"):
        layout.match(**{**found, "agent_computes": flags(0, 0)})
    layout.match(**found)
    with pytest.raises(ValueError, match=r"repaired: expected \[1\], got \[0\]"):
        layout.tile(ints(), BLOCK)
    tiling = layout.tile(ints(0), BLOCK)
    assert (tiling["span_end"].tolist(), tiling["use_length"].tolist()) == ([5], [5])
