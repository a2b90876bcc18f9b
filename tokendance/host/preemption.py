"""Agents that give their pages to others for a while, and how they get some again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from tokendance.host.agent import AgentState, Phase
from tokendance.host.books import Books, OutOfPagesError, PageAllocator
from tokendance.host.guard import CopyOrder, Guard
from tokendance.host.leases import Leases
from tokendance.host.mirror import pages_for
from tokendance.host.plan import LivePlan, Suspended
from tokendance.host.record import Copies, DeviceProfile
from tokendance.host.roster import Roster


class Preemption:
    """Suspends and resumes agents of plans.

    Args:
        roster: the agents.
        leases: takes pages for prompts that are planned again, and has rows copied.
        books: of the pages.
        host_pages: of host memory.
        profile: of the devices.
        guard: is told.
    """

    def __init__(
        self,
        roster: Roster,
        leases: Leases,
        books: Books,
        host_pages: PageAllocator,
        profile: DeviceProfile,
        guard: Guard,
    ) -> None:
        self._roster = roster
        self._leases = leases
        self._books = books
        self._host_pages = host_pages
        self._profile = profile
        self._guard = guard

    def suspend(self, live: LivePlan, agents: list[str], to: str) -> None:
        """Gives own rows up, or moves them to host memory; see `Plan.suspend`."""
        states = []
        for name in live.names(agents):
            state = self._roster.idle(live, name, on_host=True)
            if to == "host" and state.phase is not Phase.DECODE:
                raise ValueError(
                    f"agents: expected agents in decode, got {name!r} ({state.phase.value})"
                )
            states.append(state)
        if to == "host":
            self._move_to_host(states)
            return
        for state in states:
            assert state.agent is not None
            name = state.agent
            live.suspended[name] = Suspended(state.segments, list(state.output_ids))
            self._roster.forget_host_pages(state)
            if state.output is not None:
                self._roster.shorten(state, state.decision.length)
            self._roster.give_up(live, state)
            if state.ended:
                live.states.remove(state)
            self._roster.agents[name] = live
        self._roster.end_unneeded()

    def _move_to_host(self, states: Sequence[AgentState]) -> None:
        private = [state.private_pages for state in states]
        ends = np.cumsum([0, *[len(pages) for pages in private]])
        given = self._host_pages.allocate(int(ends[-1]))
        if given is None:
            self._guard.tell("refused %d pages of host memory", int(ends[-1]))
            raise OutOfPagesError(
                f"to: expected {ends[-1]} free host pages, got {self._host_pages.num_free} of "
                f"{self._host_pages.limit}",
                int(ends[-1]) - (self._host_pages.num_free or 0),
                on_host=True,
            )
        pages = np.concatenate(private)
        rows = np.concatenate([state.rows_of_private_pages for state in states])
        for state, (begin, end) in zip(states, pairwise(ends), strict=True):
            state.leave(given[begin:end])

        def done() -> None:
            self._books.drop_pages(pages)
            self._roster.settle(states)

        def undo() -> None:
            for state, mine in zip(states, private, strict=True):
                state.come_back(mine)
            self._host_pages.free(given)
            self._roster.settle(states)

        copies = [Copies(to_host=np.stack([pages, given, rows], axis=1))]
        self._leases.order(CopyOrder(copies, states, done, undo))

    def resume(self, live: LivePlan, agents: list[str]) -> None:
        """Takes pages again, for all of the agents or for none; see `Plan.resume`."""
        names = live.names(agents)
        for name in names:
            if live.phase(name) is not Phase.SUSPENDED:
                raise ValueError(
                    f"agents: expected suspended agents, got {name!r} ({live.phase(name).value})"
                )
        on_host = [live.by_name[name] for name in names if name in live.by_name]
        done: list[str] = []
        try:
            for name in names:
                if name in live.suspended:
                    self._plan_again(live, name)
                    done.append(name)
            self._move_to_device(on_host)
        except BaseException:
            self.suspend(live, done, "nowhere")
            raise

    def _plan_again(self, live: LivePlan, agent: str) -> None:
        """Decides and leases as `plan` does, and makes room for the output's rows."""
        given = live.suspended[agent]
        more = self._pages_of_output(given)
        prompts = {agent: given.segments}
        states, pages = self._leases.lease_prompts(live, prompts, more)
        self._roster.enter(live, states)
        state = live.by_name[agent]
        if given.output_ids:
            needed = state.pages_to_extend(len(given.output_ids))
            made = state.extend(given.output_ids, pages[:needed])
            pages = pages[needed:]
            assert made is not None
            self._books.hold([made])
            state.recompute_output()
        self._books.drop_pages(pages)  # of the next row: it was enough to know that there is one
        del live.suspended[agent]
        self._leases.copy_carried_rows(
            states, self._roster.settle, lambda: self.suspend(live, [agent], "nowhere")
        )

    def _pages_of_output(self, suspended: Suspended) -> int:
        """Pages of the decoded rows and of one more, without which an agent is suspended again."""
        return pages_for(len(suspended.output_ids) + 1, self._profile.block_size)

    def _move_to_device(self, states: Sequence[AgentState]) -> None:
        held = [state.host_pages for state in states if state.host_pages is not None]
        if not held:
            return
        more = sum(state.pages_to_go_on for state in states)
        pages = self._books.take_pages(sum(map(len, held)) + more)
        pages, rest = pages[: len(pages) - more], pages[len(pages) - more :]
        self._books.drop_pages(rest)
        at = 0
        for state, host_pages in zip(states, held, strict=True):
            state.come_back(pages[at : at + len(host_pages)])
            at += len(host_pages)

        def done() -> None:
            self._host_pages.free(np.concatenate(held))
            self._roster.settle(states)

        def undo() -> None:
            for state, host_pages in zip(states, held, strict=True):
                state.leave(host_pages)
            self._books.drop_pages(pages)
            self._roster.settle(states)

        copies = [Copies(to_device=np.stack([np.concatenate(held), pages], axis=1))]
        self._leases.order(CopyOrder(copies, states, done, undo))

    def pages_to_resume(self, live: LivePlan, agent: str) -> int:
        """See `Plan.pages_to_resume`."""
        if live.phase(agent) is not Phase.SUSPENDED:
            raise ValueError(
                f"agent: expected a suspended agent, got {agent!r} ({live.phase(agent).value})"
            )
        if agent in live.by_name:
            state = live.by_name[agent]
            assert state.host_pages is not None
            return len(state.host_pages) + state.pages_to_go_on
        given = live.suspended[agent]
        more = self._pages_of_output(given)
        return self._leases.pages_to_lease(live, {agent: given.segments}, more)
