"""What prompts need, and how they get it: decisions become states with pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, count, pairwise

import numpy as np

from tokendance.host.agent import AgentState
from tokendance.host.books import Books, OutOfPagesError
from tokendance.host.decide import AgentDecision, Find, decide
from tokendance.host.guard import CopyOrder, Guard
from tokendance.host.mirror import Master, Mirror, Pages, no_pages, pages_for, slots_of
from tokendance.host.plan import LivePlan, Policy, Prompts
from tokendance.host.record import Copies, DeviceProfile
from tokendance.host.round import IntArray
from tokendance.host.segments import Segment
from tokendance.host.selection import KeyDeviation


class Leases:
    """Decides prompts over the books of a pool, and leases their pages.

    Args:
        profile: of the devices.
        books: of the pool.
        guard: has copies made; None: the next record has them.
    """

    def __init__(self, profile: DeviceProfile, books: Books, guard: Guard | None) -> None:
        self._profile = profile
        self._books = books
        self._copies: list[Copies] = []  # that the next record has to make, in order
        self._guard = guard
        self._serials = count()

    def find(self, segment: Segment) -> tuple[Master, int] | None:
        """The Master of a segment, stored or being computed, and how many of the segment's first
        rows it has.

        A Master of a decoded output lacks the row of its last token if that was never fed; it is
        found by the segment's stem.
        """
        books = self._books
        master = books.find(segment.digest)
        if master is not None:
            return master, master.length
        master = books.masters.get(segment.stem)
        if master is not None and master.length == segment.length - 1:
            return master, master.length
        return None

    def _find_held(self, segment: Segment) -> tuple[Master, int] | None:
        """As `find`, without Masters that nobody holds."""
        found = self.find(segment)
        return None if found is None or found[0].holders == 0 else found

    def decide(
        self,
        live: LivePlan,
        prompts: Prompts,
        find: Find | None = None,
        mirrors: Mapping[str, Mirror] | None = None,
    ) -> list[AgentDecision]:
        """What prompts reuse and compute that join a plan; no page is taken yet."""
        policy = live.policy
        return decide(
            prompts,
            find or self.find,
            self._books.mirrors if mirrors is None else mirrors,
            policy.selection,
            policy.source,
            self._profile.block_size,
            self._profile.max_position,
            policy.opted_out,
            live.company_of(prompts),
        )

    def check_possible(self, live: LivePlan, prompts: Prompts) -> None:
        """Raises ``OutOfPagesError`` for prompts that would not fit into a pool without anything
        else in it, neither beside what they reuse now nor with nothing to reuse."""
        decisions = self.decide(live, prompts)
        block = self._profile.block_size
        reused = [master.pages for decision in decisions for master in decision.uses.masters]
        for decision in decisions:
            if decision.earlier is not None:
                reused.append(decision.earlier.own_pages[: len(_carried(decision)) // block])
        beside = len(np.unique(np.concatenate([no_pages(), *reused])))
        needed = self._pages_of(decisions, live.policy) + beside
        if needed > self._books.limit:
            alone = self.decide(live, prompts, lambda _: None, {})
            needed = min(needed, self._pages_of(alone, live.policy))
        if needed > self._books.limit:
            raise OutOfPagesError(
                f"prompts: expected at most {self._books.limit} pages, got {needed}; they "
                "would wait for ever"
            )

    def pages_to_lease(self, live: LivePlan, prompts: Prompts, more: int = 0) -> int:
        """What `lease_prompts` needs, with so many more pages; see `Scheduler.pages_needed`."""
        decisions = self.decide(live, prompts)
        held = [master for decision in decisions for master in decision.uses.masters]
        idle = self._books.idle_pages_of(held)
        needed = self._pages_of(decisions, live.policy) + idle + more
        if idle and needed > self._books.free_pages + self._books.evictable_pages:
            without = self.decide(live, prompts, self._find_held)
            needed = min(needed, self._pages_of(without, live.policy) + more)
        return needed

    def lease_prompts(
        self, live: LivePlan, prompts: Prompts, more: int = 0
    ) -> tuple[list[AgentState], Pages]:
        """Decides and leases, with so many more pages.

        Prompts that do not fit beside the idle Masters that they would reuse do without them.

        Returns:
            The states, in the order of computing, and the further pages.

        Raises:
            OutOfPagesError: nothing was leased.
        """
        decisions = self.decide(live, prompts)
        try:
            return self.lease(decisions, live.policy, more)
        except OutOfPagesError:
            held = [master for decision in decisions for master in decision.uses.masters]
            # Where others make room, they have these leave too when nothing else is left.
            if not self._books.evicts or not self._books.idle_pages_of(held):
                raise
        return self.lease(self.decide(live, prompts, self._find_held), live.policy, more)

    def _pages_of(self, decisions: Sequence[AgentDecision], policy: Policy) -> int:
        """Fresh pages of decisions."""
        return sum(self._needs(decisions, policy))

    def _needs(self, decisions: Sequence[AgentDecision], policy: Policy) -> list[int]:
        """Fresh pages of each Master that is made, then of each decision's own rows."""
        block = self._profile.block_size
        needs = [pages_for(use.length, block) for decision in decisions for use in decision.made]
        for decision in decisions:
            mine = len(_carried(decision))
            more = 0
            if isinstance(policy.selection, KeyDeviation):
                more = sum(policy.selection.rows_of(use.length) for use in decision.candidates)
            needs.append(pages_for(mine + len(decision.own) + more, block) - mine // block)
        return needs

    def lease(
        self, decisions: Sequence[AgentDecision], policy: Policy, more: int = 0
    ) -> tuple[list[AgentState], Pages]:
        """Takes all pages of prompts, and so many more, or none; makes the agents' states.

        What they carry over from an earlier round is to be copied: see `copy_carried_rows`.
        """
        block = self._profile.block_size
        held = [master for decision in decisions for master in decision.uses.masters]
        self._books.hold(held)
        needs = self._needs(decisions, policy)
        try:
            pages = self._books.take_pages(sum(needs) + more)
        except BaseException:
            self._books.let_go(held)
            raise
        pages, rest = pages[: len(pages) - more], pages[len(pages) - more :]
        parts = [pages[begin:end].copy() for begin, end in pairwise(accumulate(needs, initial=0))]
        made = [use.master for decision in decisions for use in decision.made]
        for master, mine in zip(made, parts, strict=False):
            master.pages = mine
        states = []
        for decision, fresh in zip(decisions, parts[len(made) :], strict=True):
            carried = _carried(decision)
            full = len(carried) // block
            kept = decision.earlier.own_pages[:full] if decision.earlier else no_pages()
            self._books.share_pages(kept)
            own_pages = np.concatenate([kept, fresh])
            state = AgentState(decision, own_pages, carried, block, self._serials)
            states.append(state)
        return states, rest

    def copy_carried_rows(
        self,
        states: Sequence[AgentState],
        done: Callable[[Sequence[AgentState]], None],
        undo: Callable[[], None],
    ) -> None:
        """Own rows of an earlier round that share a page with new ones get a page of their own.

        Args:
            states: that have just been leased.
            done: called when the copies are made, with the states that had some.
            undo: called when they could not be made.
        """
        block = self._profile.block_size
        moves, waiting, sources = [], [], []
        for state in states:
            earlier, rows = state.decision.earlier, len(_carried(state.decision))
            if earlier is None or rows % block == 0:
                continue
            begin = rows - rows % block
            from_ = slots_of(earlier.own_pages, rows, block)[begin:]
            to = slots_of(state.own_pages, rows, block)[begin:]
            moves.append(np.stack([from_, to], axis=1))
            sources.append(earlier.own_pages[begin // block : begin // block + 1])
            waiting.append(state)
        if not moves:
            return
        read = np.concatenate(sources)  # whoever has them may let go of them meanwhile
        self._books.share_pages(read)

        def end(then: Callable[[], None]) -> None:
            self._books.drop_pages(read)
            then()

        copies = [Copies(rows=np.concatenate(moves))]
        self.order(
            CopyOrder(copies, waiting, lambda: end(lambda: done(waiting)), lambda: end(undo))
        )

    def order(self, order: CopyOrder) -> None:
        """Has copies made before anything else is computed."""
        if self._guard is not None:
            self._guard.order(order)
        else:
            self._copies += order.copies
            order.end(well=True)

    def take_copies(self) -> list[Copies]:
        """The copies of the next record, in order."""
        copies, self._copies = self._copies, []
        return copies

    def put_back(self, copies: list[Copies]) -> None:
        """Copies of a record that is not run are the next one's."""
        self._copies = copies + self._copies


def _carried(decision: AgentDecision) -> IntArray:
    """Positions of the own rows that are taken over from the agent's earlier KV."""
    if decision.earlier is None:
        return np.empty(0, dtype=np.int32)
    position = decision.earlier.own_position
    return position[: int(np.searchsorted(position, decision.prefix))]
