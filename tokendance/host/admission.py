"""How prompts get their pages: at once, or when it is their turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

from tokendance.host.books import Books, OutOfPagesError
from tokendance.host.guard import Guard
from tokendance.host.leases import Leases
from tokendance.host.plan import LivePlan, Prompts
from tokendance.host.roster import Roster
from tokendance.host.segments import Segment


class Admission:
    """Leases pages for prompts, and keeps those that wait in the order in which they came.

    Args:
        roster: that agents enter.
        leases: takes the pages.
        books: of the pages.
        guard: is told.
    """

    def __init__(self, roster: Roster, leases: Leases, books: Books, guard: Guard) -> None:
        self._roster = roster
        self._leases = leases
        self._books = books
        self._guard = guard
        self._waiting: deque[tuple[LivePlan, dict[str, tuple[Segment, ...]]]] = deque()
        self._did_not_fit: tuple[int, ...] | None = None  # books in which their first did not

    @property
    def has_waiting(self) -> bool:
        """Whether prompts wait for pages."""
        return bool(self._waiting)

    def add(self, live: LivePlan, prompts: dict[str, tuple[Segment, ...]], wait: bool) -> None:
        """Agents join a plan. With ``wait`` nobody is served before those that wait already.

        Raises:
            ValueError: an agent of a live plan.
            OutOfPagesError: too few pages.
        """
        self._check_new(live, prompts)
        if wait and self._waiting:
            self._enqueue(live, prompts)
        else:
            self._admit(live, prompts)

    def wait(self, live: LivePlan, prompts: dict[str, tuple[Segment, ...]]) -> None:
        """Agents join a plan, and get pages later; raises as `add` does, for what can never fit."""
        self._check_new(live, prompts)
        self._enqueue(live, prompts)

    def _check_new(self, live: LivePlan, prompts: Prompts) -> None:
        for agent in prompts:
            if agent in self._roster.agents or agent in live.agents:
                raise ValueError(
                    f"prompts: expected agents of no live plan, got {agent!r} a second time"
                )

    def _admit(self, live: LivePlan, prompts: Prompts) -> None:
        states = self._leases.lease_prompts(live, prompts)[0]
        self._roster.enter(live, states)
        for agent in prompts:
            live.agents[agent] = None
            self._roster.agents[agent] = live
            self._books.touch(agent)
        names = list(prompts)
        self._guard.tell(
            "planned %d agents: %d rows, %d of them to be computed",
            *(len(names), sum(live.decisions[name].length for name in names)),
            sum(len(state.pending) for state in states),
        )
        self._leases.copy_carried_rows(
            states, self._roster.settle, lambda: self.withdraw(live, names)
        )

    def _enqueue(self, live: LivePlan, prompts: dict[str, tuple[Segment, ...]]) -> None:
        self._leases.check_possible(live, prompts)
        live.waiting.append(prompts)
        for agent in prompts:
            live.agents[agent] = None
            self._roster.agents[agent] = live
        self._waiting.append((live, prompts))

    def admit(self, told: bool = False) -> None:
        """Leases pages for prompts that wait, as far as they are there, in order.

        Args:
            told: for which there are not raises ``OutOfPagesError``.
        """
        while self._waiting:
            live, prompts = self._waiting[0]
            seen = self._books.state()
            if not told and prompts and seen is not None and seen == self._did_not_fit:
                return
            try:
                if prompts:
                    self._admit(live, prompts)
            except OutOfPagesError:
                self._did_not_fit = self._books.state()
                if told:
                    raise
                return
            self._did_not_fit = None
            self._waiting.popleft()
            live.waiting.remove(prompts)

    def withdraw(self, live: LivePlan, names: Iterable[str]) -> None:
        """Agents leave their plan, whether they wait, have pages or are suspended."""
        for name in names:
            if name in live.by_name:
                self._roster.give_up(live, live.by_name[name])
            live.suspended.pop(name, None)
            self._stop_waiting(live, name)
            if not live.is_probe:
                self._roster.agents.pop(name, None)
        self._roster.end_unneeded()

    def _stop_waiting(self, live: LivePlan, agent: str) -> None:
        for prompts in live.waiting:
            if prompts.pop(agent, None) is not None:
                self._did_not_fit = None


def checked_prompts(prompts: Mapping[str, Iterable[Segment]]) -> dict[str, tuple[Segment, ...]]:
    """Prompts that have been read once. Raises ``TypeError`` or ``ValueError``."""
    for agent, given in prompts.items():
        if not isinstance(agent, str):
            raise ValueError(f"prompts: expected agents' names (str), got {agent!r}")
        if not isinstance(given, Iterable):
            raise TypeError(
                f"prompts[{agent!r}]: expected a list of segments, got {type(given).__name__}"
            )
    tuples = {agent: tuple(segments) for agent, segments in prompts.items()}
    for agent, segments in tuples.items():
        odd = [kind for kind in set(map(type, segments)) if not issubclass(kind, Segment)]
        if odd:
            raise TypeError(
                f"prompts[{agent!r}]: expected segments (private(ids), shared(ids)), "
                f"got {odd[0].__name__}"
            )
    return tuples
