"""The most agents whose rounds end within a limit."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

from evals.capacity.collective import Collective
from evals.capacity.cost import ASSUMED, CostModel, Shares
from evals.capacity.machines import Machine, ModelShape, kv_bytes
from evals.capacity.rounds import Shape, arrivals
from evals.capacity.serve import Served, serve
from evals.capacity.systems import BLOCK, Dense, PerRequestBlend, System
from tokendance.host.selection import DEFAULT, LeadingTokens, Selection

SYSTEMS = ("plain", "prefix", "reuse", "blend", "tokendance", "tokendance-1")
"""vLLM without and with prefix caching, dense reuse without repair, CacheBlend, ours, and ours
repairing one row of every run."""


LEAD = 3600.0  # seconds
_AT_ONCE = 1e9  # rounds a second


@dataclass(frozen=True)
class Setting:
    """What is asked.

    Attributes:
        machine, model, shape: see there.
        rate: rounds a second, of all societies.
        societies: how many take turns.
        rounds: measured ones of each society.
        max_rows: rows of a forward pass.
        shares: of the machine's figures.
        selection: which reused rows tokendance computes again.
    """

    machine: Machine
    model: ModelShape
    shape: Shape
    rate: float = 0.2
    societies: int = 1
    rounds: int = 4
    max_rows: int = 8192
    shares: Shares = ASSUMED
    selection: Selection = DEFAULT

    def run(self, name: str, agents: int, give_up: float = float("inf")) -> tuple[Served, System]:
        """One system with so many agents a society. The first round of each is not measured, and
        has ended before the others come."""
        system = make(name, self)
        rounds = (self.rounds + 1) * self.societies
        traffic = arrivals(agents, self.shape, self.rate, rounds, self.societies, lead=LEAD)
        cost = CostModel(self.machine, self.model, self.shares)
        return serve(system, cost, traffic, warm_up=1, give_up=give_up), system


def make(name: str, setting: Setting) -> System:
    """A system with all the memory that the machine has for KV.

    Raises:
        ValueError: an unknown name, or a model that does not fit.
    """
    model = setting.model
    rows = kv_bytes(setting.machine, model) // model.row_bytes
    if name in ("plain", "prefix"):
        return Dense(rows, model.num_layers, setting.max_rows, caches=name == "prefix")
    if name in ("blend", "reuse"):
        ratio = 0.15 if name == "blend" else 0.0
        return PerRequestBlend(rows, model.num_layers, setting.max_rows, ratio)
    if name == "tokendance":
        return Collective(rows, model, setting.max_rows, selection=setting.selection)
    if name == "tokendance-1":
        return Collective(rows, model, setting.max_rows, selection=LeadingTokens(1))
    raise ValueError(f"system: expected one of {SYSTEMS}, got {name!r}")


def together(setting: Setting, agents: int, societies: int) -> tuple[Served, Collective]:
    """Our system with societies of so many agents, whose rounds come all at once, in a pool that
    has room for all of them."""
    rounds = (setting.rounds + 1) * societies
    traffic = [*arrivals(agents, setting.shape, _AT_ONCE, rounds, societies, lead=LEAD)]
    longest = max(request.length + request.output for request in traffic[0].requests)
    pool = 2 * agents * societies * (longest + BLOCK * 4)
    system = Collective(pool, setting.model, setting.max_rows)
    cost = CostModel(setting.machine, setting.model, setting.shares)
    return serve(system, cost, traffic, warm_up=1), system


def searching(most: int) -> Generator[int, bool, int]:
    """The largest number up to ``most`` that holds, by doubling and halving.

    Yields a number, is sent whether it holds, and returns what it has found. It is taken that all
    numbers below hold, and none above.
    """
    below, above = 0, 1
    while above <= most and (yield above):
        below, above = above, 2 * above
    above = min(above, most + 1)
    while above - below > 1:
        middle = (below + above) // 2
        if (yield middle):
            below = middle
        else:
            above = middle
    return below


def agents_within(holds: Callable[[int], bool], most: int) -> int:
    """The largest number up to ``most`` for which ``holds`` is true, as `searching` finds it."""
    search, answer = searching(most), None
    while True:
        try:
            asked = search.send(answer)  # type: ignore[arg-type]
        except StopIteration as found:
            return int(found.value)
        answer = holds(asked)


def agents_under(setting: Setting, name: str, limit: float, most: int = 256) -> int:
    """Agents of a round of which nine in ten rounds end within ``limit`` seconds."""

    def holds(agents: int) -> bool:
        served, _ = setting.run(name, agents, give_up=limit * 1.001)
        return served.percentile(0.9) <= limit

    return agents_within(holds, most)
