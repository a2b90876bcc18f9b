"""Which reused rows of a round are recomputed.

A row that is selected becomes an own row of its agent: computed in that agent's context, it
replaces the Master's row. The last row of every prompt is always computed, whatever the selection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LeadingTokens:
    """The first ``count`` rows of every run of reused segments (the rule of EPIC, arXiv
    2410.15332).

    A run is a sequence of segments that stood next to each other, in this order, where their
    Masters were computed: inside it the context does not break. A segment that no other agent of
    the round has (an agent's own history) is computed as a whole, unless it is exact: whoever
    shares it with nobody would save its rows once and carry another context's traces from then on.
    A round of one agent cannot tell, and reuses all that is stored.
    """

    count: int = 8

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count: expected at least 0, got {self.count}")


@dataclass(frozen=True)
class KeyDeviation:
    """The rows whose keys deviate most (the rule of CacheBlend, arXiv 2405.16444).

    All reused rows are computed up to ``layer``; there the squared distance between fresh and
    reused keys, summed over the agents that share a Master, ranks the Master's rows, and the top
    ``ratio`` of them stay. One choice per Master and round serves all its users.
    """

    ratio: float = 0.15
    layer: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio: expected 0 < ratio <= 1, got {self.ratio}")
        if self.layer < 0:
            raise ValueError(f"layer: expected at least 0, got {self.layer}")

    def rows_of(self, length: int) -> int:
        """Rows that stay of a segment of ``length`` rows."""
        return min(length, math.ceil(self.ratio * length))


@dataclass(frozen=True)
class Everything:
    """Every row that is not exact: what is reused is what prefix caching would reuse."""


@dataclass(frozen=True)
class Nothing:
    """No row."""


Selection = LeadingTokens | KeyDeviation | Everything | Nothing


def parse_selection(text: str) -> Selection:
    """``leading:4``, ``deviation:0.15``, ``deviation:0.15:1`` (ratio and layer), ``everything`` or
    ``nothing`` as a selection.

    Raises:
        ValueError: ``text`` is none of them, or a number is out of range.
    """
    kind, *numbers = text.split(":")
    try:
        if kind == "leading" and len(numbers) == 1:
            return LeadingTokens(int(numbers[0]))
        if kind == "deviation" and len(numbers) == 1:
            return KeyDeviation(float(numbers[0]))
        if kind == "deviation" and len(numbers) == 2:
            return KeyDeviation(float(numbers[0]), int(numbers[1]))
        if kind in ("everything", "nothing") and not numbers:
            return Everything() if kind == "everything" else Nothing()
    except ValueError as error:
        raise ValueError(f"selection: {error}, in {text!r}") from error
    raise ValueError(
        "selection: expected leading:COUNT, deviation:RATIO, deviation:RATIO:LAYER, everything or "
        f"nothing, got {text!r}"
    )
