"""What came of a run, in figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from evals.serving.rounds import RoundServed, Served

SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}

Row = dict[str, Any]


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that is not exceeded by so many; infinite where there are none."""
    if not values:
        return float("inf")
    return float(np.percentile(values, 100 * share, method="higher"))


TABLE = {
    "round p50, s": "round p50, s",
    "round p90, s": "p90, s",
    "round p99, s": "p99, s",
    "first token p50, s": "first token p50, s",
    "first token p90, s": "p90 of it, s",
    "time per token p50, s": "per token, s",
    "prompt rows": "rows",
    "rows computed": "computed",
    "peak KV, MB": "KV, MB",
    "KV between rounds, MB": "between, MB",
    "rounds as plain": "rounds as plain",
    "outputs as plain": "outputs",
    "failures": "failures",
}
"""Which figures a table has, and what they are called there."""


def row_of(figures: Row) -> Row:
    """A run's line in a table: what says which run it is, and some of its figures."""
    head = ("rounds/s", "agents", "system")
    found = {name: figures[name] for name in head if name in figures}
    return found | {short: figures.get(name) for name, short in TABLE.items()}


def figures_of(served: Served, plain: Served | None = None) -> Row:
    """A run's figures, in seconds, bytes and rows.

    Args:
        plain: the same rounds by plain vLLM, which outputs are compared with.
    """
    rounds = served.rounds
    latency = [one.latency if not one.failures else float("inf") for one in rounds]
    first = [value for one in rounds for value in one.first.values()]
    between = [value for one in rounds for value in one.between.values()]
    found: Row = {"rounds": len(rounds)}
    for name, share in SHARES.items():
        found[f"round {name}, s"] = percentile(latency, share)
    for name, share in SHARES.items():
        found[f"first token {name}, s"] = percentile(first, share)
    found |= {
        "all first tokens p50, s": percentile(
            [max(one.first.values(), default=float("inf")) for one in rounds], 0.5
        ),
        "time per token p50, s": percentile(between, 0.5) if between else None,
        "prompt rows": sum(one.prompt_rows for one in rounds),
        "rows computed": served.rows_computed,
        "peak KV, MB": served.peak_bytes / 1e6,
        "KV between rounds, MB": served.between_bytes / 1e6,
        "failures": sum(len(one.failures) for one in rounds),
        "latencies, s": [one.latency for one in rounds],
        "outputs alike": alike([*served.firsts, *rounds]),
    }
    if plain is not None:
        found |= agreement(rounds, plain.rounds)
    return found


def alike(rounds: Iterable[RoundServed]) -> list[str]:
    """Which outputs are the same: by round, a number for each agent's, by order of appearance.

    Rounds of one society, in order. What two agents have written alike is reused where it would
    else be computed, so that rows depend on it.
    """
    numbers: dict[tuple[int, ...], int] = {}
    return [
        " ".join(str(numbers.setdefault(tuple(ids), len(numbers))) for ids in one.said.values())
        for one in rounds
    ]


def agreement(rounds: Iterable[RoundServed], plain: Iterable[RoundServed]) -> Row:
    """How far what was written is what plain vLLM wrote, of the rounds that both have.

    What was written is handed out, so that a round whose outputs differ changes the prompts of all
    that follow.
    """
    expected = {(one.society, one.number): one for one in plain}
    pairs = [(one, expected.get((one.society, one.number))) for one in rounds]
    whole, same, outputs = 0, 0, 0
    for one, other in pairs:
        if other is None:
            continue
        equal = [one.said[agent] == ids for agent, ids in other.said.items()]
        whole += all(equal)
        same += sum(equal)
        outputs += len(equal)
    count = sum(other is not None for _, other in pairs)
    return {"rounds as plain": f"{whole}/{count}", "outputs as plain": f"{same}/{outputs}"}
