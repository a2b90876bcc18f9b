"""Rows repaired by what their tokens are.

Attention gathers at tokens that end something: line breaks, full stops, closing brackets. Their
rows hold what stood before them, so they may lose most where that was another context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evals.fidelity.repairs import Choose, reused_rows
from tokendance.host.decide import AgentDecision

ENDS = (".", "!", "?", ")", "]", "}", "\n")
"""What a collecting token ends with, spaces aside."""


def collecting_tokens(tokenizer: Any) -> NDArray[np.int64]:
    """Ids of the tokens that end with one of `ENDS`."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    found = [token for token, text in enumerate(texts) if text.rstrip(" \t").endswith(ENDS)]
    return np.array(found, dtype=np.int64)


def every(tokens: NDArray[np.int64]) -> Choose:
    """For `repaired_beside`: every reused row of one of these tokens."""

    def choose(decisions: Sequence[AgentDecision]) -> list[NDArray[np.int32]]:
        return [_among(one, tokens) for one in decisions]

    return choose


def _among(one: AgentDecision, tokens: NDArray[np.int64]) -> NDArray[np.int32]:
    rows = reused_rows(one)
    ids = np.concatenate([segment.token_ids for segment in one.segments])
    return rows[np.isin(ids[rows], tokens)]
