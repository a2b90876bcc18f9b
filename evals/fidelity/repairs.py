"""Rows repaired beside those that a selection chooses, in the place where a round is decided."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from tokendance.host import leases
from tokendance.host.decide import ROW_KINDS, AgentDecision, RowKind, decide

_REUSED, _REPAIRED = (ROW_KINDS.index(kind) for kind in (RowKind.REUSED, RowKind.REPAIRED))
Choose = Callable[[Sequence[AgentDecision]], Sequence[NDArray[np.int32]]]
"""Of a round's decisions the positions that each repairs, ascending, all of `reused_rows`."""


@contextmanager
def repaired_beside(choose: Choose, block_size: int) -> Iterator[None]:
    """Rows that are chosen so are repaired, too, and only inside."""

    def changed(*arguments: Any, **more: Any) -> list[AgentDecision]:
        decisions = decide(*arguments, **more)
        for decision, rows in zip(decisions, choose(decisions), strict=True):
            if len(rows):
                _repair(decision, rows, block_size)
        return decisions

    with mock.patch.object(leases, "decide", changed):
        yield


def reused_rows(decision: AgentDecision) -> NDArray[np.int32]:
    """Positions whose rows are taken over as another context has them, ascending."""
    return np.flatnonzero(_kinds(decision) == _REUSED).astype(np.int32)


def _kinds(decision: AgentDecision) -> NDArray[np.uint8]:
    """``[length]``"""
    return np.repeat(decision.kinds, np.diff(decision.ends, prepend=0))


def _repair(decision: AgentDecision, rows: NDArray[np.int32], block_size: int) -> None:
    kinds = _kinds(decision)
    kinds[rows] = _REPAIRED
    for use in decision.uses:
        inside = rows[(rows >= use.delta) & (rows < use.delta + use.length)]
        use.override(inside - use.delta, block_size)
    decision.own = np.union1d(decision.own, rows).astype(np.int32)
    last = [*np.flatnonzero(np.diff(kinds)).tolist(), len(kinds) - 1]
    decision.ends = np.array(last, dtype=np.int32) + 1
    decision.kinds = kinds[last]
