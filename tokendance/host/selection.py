"""Which reused rows of a round are recomputed.

A row that is selected becomes an own row of its agent: computed in that agent's context, it
replaces the Master's row. The last row of every prompt is always computed, whatever the selection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokendance.host.round import IntArray


def _check_integer(name: str, value: object, least: int) -> None:
    if not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


@dataclass(frozen=True)
class LeadingTokens:
    """The first rows of every run of reused segments (the rule of EPIC, arXiv 2410.15332).

    A run is a sequence of segments that stood next to each other, in this order, where their
    Masters were computed. Inside a run the context does not break.

    ``count`` rows of each run are computed. With ``unseen`` there are more, up to ``most``, in
    proportion to what the Master has not seen: the tokens of shared segments that stand left of the
    run and never stood left of its Master, over all tokens of the prompt. ``unseen=96`` means one
    more row for every 96th of the prompt. In a long prompt a row looks at many others, so that the
    same missing tokens matter less.

    A segment that no other agent of the round has, such as an agent's own history, is computed as a
    whole, unless it is exact. Reusing it would save its rows once, and leave traces of another
    context in the agent's KV from then on. In a round that grows, agents that came before count as
    others. The first agent has none, and reuses all that is stored.
    """

    count: int = 8
    unseen: int | None = None
    most: int = 24

    def __post_init__(self) -> None:
        _check_integer("count", self.count, least=0)
        if self.unseen is not None:
            _check_integer("unseen", self.unseen, least=1)
        _check_integer("most", self.most, least=0)

    def rows_of(
        self, unseen_tokens: IntArray, prompt_tokens: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Rows that are recomputed of runs behind so many tokens that their Master never saw."""
        if self.unseen is None:
            return np.full(len(unseen_tokens), self.count)
        more: NDArray[np.int64] = self.unseen * unseen_tokens.astype(np.int64) // prompt_tokens
        return np.minimum(self.count + more, max(self.count, self.most))


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
        _check_integer("layer", self.layer, least=0)

    def rows_of(self, length: int) -> int:
        """Rows that stay of a segment of ``length`` rows."""
        return min(length, math.ceil(self.ratio * length))


@dataclass(frozen=True)
class Everything:
    """Every row that is not exact: what is reused is what prefix caching would reuse."""


@dataclass(frozen=True)
class Nothing:
    """No reused row but the last of each prompt."""


Selection = LeadingTokens | KeyDeviation | Everything | Nothing

DEFAULT = LeadingTokens(12)
"""What a collector recomputes unless told otherwise; docs/fidelity.md says why."""

DEFAULT_NAME = f"leading:{DEFAULT.count}"
"""Its name on a command line."""


def parse_selection(text: str) -> Selection:
    """A selection by its name.

    ``leading:4``, ``leading:4:96:24`` (count, unseen and most), ``deviation:0.15``,
    ``deviation:0.15:1`` (ratio and layer), ``everything`` or ``nothing``.

    Raises:
        ValueError: ``text`` is none of them, or a number is out of range.
    """
    kind, *numbers = text.split(":")
    try:
        if kind == "leading" and 1 <= len(numbers) <= 3:
            return LeadingTokens(*map(int, numbers))
        if kind == "deviation" and len(numbers) == 1:
            return KeyDeviation(float(numbers[0]))
        if kind == "deviation" and len(numbers) == 2:
            return KeyDeviation(float(numbers[0]), int(numbers[1]))
        if kind in ("everything", "nothing") and not numbers:
            return Everything() if kind == "everything" else Nothing()
    except ValueError as error:
        raise ValueError(f"selection: {error}, in {text!r}") from error
    raise ValueError(
        "selection: expected leading:COUNT, leading:COUNT:UNSEEN:MOST, deviation:RATIO, "
        f"deviation:RATIO:LAYER, everything or nothing, got {text!r}"
    )
