"""Selections by their names on a command line."""

from __future__ import annotations

import pytest

from tokendance import Everything, KeyDeviation, LeadingTokens, Nothing
from tokendance.host.selection import DEFAULT, DEFAULT_NAME, parse_selection


@pytest.mark.parametrize(
    ("text", "selection"),
    [
        ("leading:4", LeadingTokens(4)),
        (DEFAULT_NAME, DEFAULT),
        ("leading:0", LeadingTokens(0)),
        ("leading:4:96", LeadingTokens(4, unseen=96)),
        ("deviation:0.15", KeyDeviation(0.15, 1)),
        ("deviation:0.3:2", KeyDeviation(0.3, 2)),
        ("everything", Everything()),
        ("nothing", Nothing()),
    ],
)
def test_names(text: str, selection: object) -> None:
    assert parse_selection(text) == selection


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("first", "selection: expected leading:COUNT, .* got 'first'"),
        ("leading", "expected leading:COUNT, .* got 'leading'"),
        ("everything:1", "expected leading:COUNT, .* got 'everything:1'"),
        ("leading:-1", "selection: count: expected at least 0, got -1, in 'leading:-1'"),
        ("leading:4:0", "selection: unseen: expected at least 1, got 0, in 'leading:4:0'"),
        ("leading:x", "selection: invalid literal .*'x', in 'leading:x'"),
        ("deviation:1.5", "selection: ratio: expected 0 < ratio <= 1, got 1.5"),
        ("deviation:0.5:-1", "selection: layer: expected at least 0, got -1"),
        ("", "expected leading:COUNT, .* got ''"),
    ],
)
def test_other_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_selection(text)
