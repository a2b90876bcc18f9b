"""One device that serves rounds in simulated time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from evals.capacity.cost import CostModel
from evals.capacity.rounds import Round
from evals.capacity.systems import System


@dataclass
class Served:
    """What a run has done so far.

    Attributes:
        ended: seconds from each ended round's arrival to its last token, in the order of ends.
        first: the same until all its agents had their first tokens.
        late: how many rounds were given up.
        now: simulated seconds.
        busy: of them, in forward passes.
        steps: forward passes.
        row_layers: rows that went through the linear layers, summed over layers.
        peak_rows: the most rows of keys and values that were in the pool.
    """

    ended: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    late: int = 0
    now: float = 0.0
    busy: float = 0.0
    steps: int = 0
    row_layers: float = 0.0
    peak_rows: int = 0

    def percentile(self, share: float) -> float:
        """Of the rounds' latencies; infinite where rounds that were given up belong to the share
        that is asked for."""
        values = [*self.ended, *[float("inf")] * self.late]
        if not values:
            return float("inf")
        return float(np.percentile(values, 100 * share, method="higher"))


def serve(
    system: System,
    cost: CostModel,
    rounds: Iterable[Round],
    warm_up: int = 0,
    give_up: float = float("inf"),
) -> Served:
    """Runs rounds to their ends.

    A society's round begins when it has come and the one before has ended.

    Args:
        warm_up: how many rounds of each society are served and not measured.
        give_up: seconds. A run ends as soon as a measured round has taken longer; what has come by
            then and has not ended was given up.
    """
    served = Served()
    arriving, held = deque(rounds), list[Round]()
    active: dict[int, Round] = {}
    while arriving or held or active:
        while arriving and arriving[0].arrival <= served.now:
            held.append(arriving.popleft())
        for one in list(held):
            if one.society not in active:
                held.remove(one)
                active[one.society] = one
                system.submit(one.requests)
        made = system.forward()
        if made is not None:
            seconds = cost.seconds(made.work)
            served.now += seconds
            served.busy += seconds
            served.steps += 1
            served.row_layers += made.work.row_layers
            for request in made.sampled:
                request.sampled(served.now)
        elif arriving:
            served.now = max(served.now, arriving[0].arrival)
        else:
            break  # what is left will never fit
        for one in [one for one in active.values() if one.ended]:
            del active[one.society]
            if one.number >= warm_up:
                served.ended.append(one.latency)
                served.first.append(one.first_latency)
        open_rounds = [*active.values(), *held]
        measured = [one for one in open_rounds if one.number >= warm_up]
        if any(served.now - one.arrival > give_up for one in measured):
            break
    left = [*active.values(), *held]
    served.late = sum(one.number >= warm_up for one in left)
    served.peak_rows = system.peak_rows
    return served
