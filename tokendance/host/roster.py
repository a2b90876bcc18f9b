"""Which agents live, what is computed for them, and how those that end give their pages back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokendance.host.agent import AgentState, Phase
from tokendance.host.books import Books, PageAllocator
from tokendance.host.plan import LivePlan


class Roster:
    """The agents of all plans, and the states of what is or was computed for them.

    Args:
        books: of the pages.
        host_pages: of host memory.

    Attributes:
        agents: with their plans, those that have not ended.
        states: by serial, those that have not ended.
        plans: of each state, by serial.
        orphans: of the states, what is computed for no agent.
        makers: of Masters that are not computed, by serial.
        leaving: states that have ended, by serial; their pages are still used.
    """

    def __init__(self, books: Books, host_pages: PageAllocator) -> None:
        self._books = books
        self._host_pages = host_pages
        self.agents: dict[str, LivePlan] = {}
        self.states: dict[int, AgentState] = {}
        self.plans: dict[int, LivePlan] = {}
        self.orphans: dict[int, AgentState] = {}
        self.makers: dict[int, AgentState] = {}
        self.leaving: dict[int, AgentState] = {}

    def enter(self, live: LivePlan, states: Sequence[AgentState]) -> None:
        """The states are the plan's from now on, and the Masters that they make can be found."""
        for state in states:
            live.states.append(state)
            self.plans[state.serial] = live
            if state.agent is not None:
                live.by_name[state.agent] = state
                live.take(state.decision)
            for use in state.made:
                self.makers[use.master.serial] = state
            if not live.is_probe:
                self.states[state.serial] = state
                if state.agent is None:
                    self.orphans[state.serial] = state
                for use in state.made:
                    self._books.announce(use.master)

    def check(self, agents: Iterable[str]) -> None:
        """Raises ``KeyError`` for an agent of no plan."""
        for name in agents:
            if name not in self.agents:
                raise KeyError(f"agent: expected one of {sorted(self.agents)}, got {name!r}")

    def idle(self, live: LivePlan, agent: str, on_host: bool = False) -> AgentState:
        """An agent in no open step. Raises ``KeyError`` or ``ValueError``."""
        state = live.state(agent)
        if state.is_taken:
            raise ValueError(f"agent: expected one that is in no open step, got {agent!r}")
        if state.phase is Phase.SUSPENDED and not on_host:
            raise ValueError(f"agent: expected one that has pages, got {agent!r} (suspended)")
        return state

    def shorten(self, state: AgentState, length: int) -> None:
        """Gives the pages of decoded rows from position ``length`` on back."""
        pages, gone = state.shorten(length)
        self._books.drop_pages(pages)
        if gone is not None:
            self._books.let_go([gone])

    def give_up(self, live: LivePlan, state: AgentState) -> None:
        """Ends an agent; the Masters that it was making are computed for no agent from now on."""
        unfinished = any(not use.master.is_computed for use in state.made)
        if state.phase is Phase.PREFILL and unfinished and not live.is_probe:
            assert state.agent is not None
            del live.by_name[state.agent]
            state.agent = None
            self.orphans[state.serial] = state
        else:
            self._give_back(live, state)

    def _give_back(self, live: LivePlan, state: AgentState) -> None:
        self.end(live, state)
        self.leaving[state.serial] = state
        self.settle([state])

    def settle(self, states: Iterable[AgentState]) -> None:
        """Those among the states that have ended give their pages back, unless an open step or a
        copy still has them."""
        for state in states:
            if state.serial in self.leaving and not state.keeps_pages:
                del self.leaving[state.serial]
                self.forget_host_pages(state)
                self._books.drop_pages(state.own_pages)
                self._books.let_go(state.uses.masters)

    def forget_host_pages(self, state: AgentState) -> None:
        """What a state has in host memory is free."""
        if state.host_pages is not None:
            self._host_pages.free(state.host_pages)
            state.host_pages = None

    def end(self, live: LivePlan, state: AgentState) -> None:
        """Nothing more is computed of a state; its pages stay where they are."""
        state.ended = True
        state.pending = state.pending[:0]
        for use in state.made:
            self.makers.pop(use.master.serial, None)
        del self.plans[state.serial]
        self.states.pop(state.serial, None)
        self.orphans.pop(state.serial, None)
        if state.agent is None:
            live.states.remove(state)
        else:
            del live.by_name[state.agent]
            if not live.is_probe:
                self.agents.pop(state.agent, None)

    def end_unneeded(self) -> None:
        """Ends what is computed for no agent where no agent waits for it.

        What is in an open step ends with the step.
        """
        for serial in sorted(self.orphans, reverse=True):
            state = self.orphans[serial]
            if state.is_taken:
                continue
            mine = [master.serial for master in state.uses.masters]
            ends = [
                use.delta + use.length
                for use in state.made
                if use.master.holders > mine.count(use.master.serial) and not use.master.is_computed
            ]
            for master in state.give_up_from(max(ends, default=0)):
                self._books.withdraw(master)
                del self.makers[master.serial]
            if not len(state.pending):
                self._give_back(self.plans[state.serial], state)
