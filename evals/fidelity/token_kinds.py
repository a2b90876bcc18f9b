"""Rows repaired by what their tokens are, beside those that a selection chooses.

Attention gathers at tokens that end something: line breaks, full stops, closing brackets. Their
rows hold what stood before them, so they may lose most where that was another context.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from tokendance.host import leases
from tokendance.host.decide import ROW_KINDS, AgentDecision, RowKind, decide

_REUSED, _REPAIRED = (ROW_KINDS.index(kind) for kind in (RowKind.REUSED, RowKind.REPAIRED))
ENDS = (".", "!", "?", ")", "]", "}", "\n")
"""What a collecting token ends with, spaces aside."""


def collecting_tokens(tokenizer: Any) -> NDArray[np.int64]:
    """Ids of the tokens that end with one of `ENDS`."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    found = [token for token, text in enumerate(texts) if text.rstrip(" \t").endswith(ENDS)]
    return np.array(found, dtype=np.int64)


@contextmanager
def repaired_beside(tokens: NDArray[np.int64], block_size: int) -> Iterator[None]:
    """Every reused row of one of these tokens is repaired, and only inside."""

    def changed(*arguments: Any, **more: Any) -> list[AgentDecision]:
        decisions = decide(*arguments, **more)
        for decision in decisions:
            _repair(decision, tokens, block_size)
        return decisions

    with mock.patch.object(leases, "decide", changed):
        yield


def _repair(decision: AgentDecision, tokens: NDArray[np.int64], block_size: int) -> None:
    lengths = np.diff(decision.ends, prepend=0)
    kinds = np.repeat(decision.kinds, lengths)
    ids = np.concatenate([segment.token_ids for segment in decision.segments])
    rows = np.flatnonzero((kinds == _REUSED) & np.isin(ids, tokens)).astype(np.int32)
    if not len(rows):
        return
    kinds[rows] = _REPAIRED
    for use in decision.uses:
        inside = rows[(rows >= use.delta) & (rows < use.delta + use.length)]
        use.override(inside - use.delta, block_size)
    decision.own = np.union1d(decision.own, rows).astype(np.int32)
    last = [*np.flatnonzero(np.diff(kinds)).tolist(), len(kinds) - 1]
    decision.ends = np.array(last, dtype=np.int32) + 1
    decision.kinds = kinds[last]
