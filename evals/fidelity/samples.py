"""What samples of siblings say, and how far a ratio of two means may be from the truth.

One sibling that is far from full recompute makes the mean of a round, so that means alone claim
nothing. A claim is made of the upper end of an interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 2000
LEVEL = 0.95
SEED = 0


@dataclass(frozen=True)
class Spread:
    """Of some values: how many, their mean, their median, and the 90th percentile."""

    count: int
    mean: float
    median: float
    p90: float


def spread(values: ArrayLike) -> Spread:
    """Percentiles are interpolated linearly between values."""
    found = np.asarray(values, dtype=np.float64)
    return Spread(
        len(found), float(found.mean()), float(np.median(found)), float(np.percentile(found, 90))
    )


@dataclass(frozen=True)
class Ratio:
    """Of two means: itself, and the ends of its interval."""

    value: float
    low: float
    high: float


def ratio_of_means(
    rounds: Sequence[tuple[ArrayLike, ArrayLike]],
    draws: int = DRAWS,
    level: float = LEVEL,
    seed: int = SEED,
) -> Ratio:
    """Mean of the first over mean of the second, with a paired bootstrap interval of percentiles.

    Agents of a round have the same messages before them and are no independent samples. So a draw
    takes as many rounds as there are, with replacement, and of each of them as many agents as it
    has, with replacement; both values of an agent stay together. With a single round only agents
    are drawn, and the interval says nothing about other rounds.

    Args:
        rounds: per round both values of the same agents, in the same order.
        draws: of the bootstrap.
        level: share of the draws inside the interval; as many are left out below as above.
        seed: of the draws; the same seed gives the same interval.

    Raises:
        ValueError: a round without agents, or whose two lists differ in length; no rounds.
    """
    pairs = [_paired(first, second) for first, second in rounds]
    if not pairs:
        raise ValueError("rounds: expected at least one round, got none")
    generator = np.random.default_rng(seed)
    found = np.empty(draws)
    for draw in range(draws):
        chosen = generator.integers(len(pairs), size=len(pairs))
        sums = np.zeros(2)
        for number in chosen:
            own = pairs[number]
            sums += own[:, generator.integers(own.shape[1], size=own.shape[1])].sum(axis=1)
        found[draw] = sums[0] / sums[1]
    outside = 50 * (1 - level)
    low, high = np.percentile(found, [outside, 100 - outside])
    whole = np.concatenate(pairs, axis=1).sum(axis=1)
    return Ratio(float(whole[0] / whole[1]), float(low), float(high))


def ratio_text(rounds: Sequence[tuple[ArrayLike, ArrayLike]]) -> str:
    """`ratio_of_means` for a table; "-" where the second mean is not above 0."""
    if np.concatenate([np.asarray(second, dtype=np.float64) for _, second in rounds]).sum() <= 0:
        return "-"
    with np.errstate(divide="ignore", invalid="ignore"):  # a draw whose second mean is 0
        found = ratio_of_means(rounds)
    if not np.isfinite([found.low, found.high]).all():
        return f"{found.value:.3f} (no interval)"
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def _paired(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """``[2, agents]``"""
    found = [np.asarray(values, dtype=np.float64) for values in (first, second)]
    if len(found[0]) != len(found[1]) or not len(found[0]):
        lengths = f"{len(found[0])} and {len(found[1])}"
        raise ValueError(f"rounds: expected two values of each of some agents, got {lengths}")
    return np.stack(found)
