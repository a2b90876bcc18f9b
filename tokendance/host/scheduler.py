"""The front of the host half: plans, steps, and the ends of agents."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from tokendance.host.admission import Admission, checked_prompts
from tokendance.host.agent import Phase
from tokendance.host.books import Books, OutOfPagesError, PageAllocator
from tokendance.host.decide import AgentDecision, Source, source_of
from tokendance.host.guard import CopyOrder, Guard, guarded
from tokendance.host.leases import Leases
from tokendance.host.mirror import Master, Mirror
from tokendance.host.plan import LivePlan, Plan, Policy, Prompts
from tokendance.host.planned_step import PlannedStep, StepPart
from tokendance.host.preemption import Preemption
from tokendance.host.reading import Reading
from tokendance.host.record import (
    AppendRecord,
    Copies,
    DeviceProfile,
    RestoreRecord,
    pack_mirrors,
)
from tokendance.host.roster import Roster
from tokendance.host.round import RoundExtents
from tokendance.host.segments import Segment, TokenIds, shared
from tokendance.host.step_rows import StepRows, extents_of, ids_on_host, with_last_rows
from tokendance.host.tenant_segments import TenantSegments
from tokendance.host.uncopied import Uncopied

SlotMapping: TypeAlias = Sequence[int] | Sequence[Sequence[int]] | NDArray[np.int64]
"""Rows of a cache, by agent and position."""

MakeRoom: TypeAlias = Callable[[OutOfPagesError, Collection[str]], tuple[int, Exception | None]]
"""Takes what somebody got instead of pages, and agents that are to stay. Returns how many pages
have come free, and what has kept others from doing so."""

Result = TypeVar("Result")


class Scheduler(Uncopied, instead="make another with the same profile"):
    """Plans rounds and their steps, and keeps the books of one pool of pages.

    The host half of the library: it knows prompts, names and pages, and no device. What is to be
    computed it says in `StepRecord`s; whoever runs them says when one is done. One scheduler may
    serve any number of workers that run the same records.

    Args:
        profile: of the devices.
        allocator: an engine's pages; None for a list of its own.
        windows: sliding windows of the model's layers, 0 for none; each record has a work list for
            each.
        copy: makes copies at once, where the device half is in this process. None: the next record
            has them. An engine whose allocator the books use must not write to pages that it got
            back before that record has been run.
        guard: lets threads in one at a time, and makes the copies; None: there are no threads, and
            ``copy`` makes them.
        host_allocator: of the pages of host memory; None for a list of its own.
        segments: makes and knows the segments of a tenant; None: any are taken.
        clears: pages are overwritten with zeros before the allocator has them again; ``guard`` does
            so after `order_clearing`.

    Attributes:
        books: pages, Masters and Mirrors.
        host_books: of what rests in host memory.
        roster: which agents live, and what is computed for them.
        flush: makes what the books hold durable; None where nothing outlives the process.
        fetch: brings up what prompts may reuse from where it rests, as far as there is room.
        make_room: moves what is longest unused to a lower tier; None where there is none.
        guard: entered by every method.
    """

    def __init__(
        self,
        profile: DeviceProfile,
        allocator: PageAllocator | None = None,
        windows: Sequence[int] = (0,),
        copy: Callable[[Sequence[Copies]], None] | None = None,
        guard: Guard | None = None,
        host_allocator: PageAllocator | None = None,
        segments: TenantSegments | None = None,
        clears: bool = False,
    ) -> None:
        if guard is None and copy is not None:
            guard = Guard(copy)
        self.guard = guard or Guard(_no_copies)
        self.profile = profile
        self.books = Books(allocator or PageAllocator(profile.num_pages), self.guard.tell, clears)
        self.host_pages = host_allocator or PageAllocator(profile.host_pages)
        if host_allocator is None:
            self.host_pages.shortage = ("host_capacity", "give the store more host memory")
        self.host_books = Books(self.host_pages, self.guard.tell)
        self.flush: Callable[[], None] | None = None
        self.fetch: Callable[[Prompts], None] | None = None
        self.make_room: MakeRoom | None = None
        self.segments = segments
        self.windows = list(windows)
        self._leases = Leases(profile, self.books, guard)
        self.dropped: deque[LivePlan | PlannedStep | Reading] = deque()
        self.roster = Roster(self.books, self.host_pages)
        self._admission = Admission(self.roster, self._leases, self.books, self.guard)
        self._rows = StepRows(self.roster, self.books, profile)
        self._preemption = Preemption(
            *(self.roster, self._leases, self.books, self.host_pages, profile, self.guard)
        )
        self._open: dict[int, PlannedStep] = {}  # steps that have not ended, by number
        self._numbers = count()

    # Plans ----------------------------------------------------------------------------------------

    def plan(
        self,
        prompts: Mapping[str, Iterable[Segment]],
        policy: Policy | None = None,
        *,
        wait: bool = False,
    ) -> Plan:
        """Matches prompts with what is stored or being computed, and leases their pages.

        Args:
            prompts: per agent the segments of its prompt.
            policy: what is reused and recomputed; default `Policy`.
            wait: prompts for which there are too few pages get them later, in the order in which
                they came, when a step is planned.

        Raises:
            TypeError: something else than segments.
            ValueError: an agent's name is no str or is that of a live agent, a prompt is longer
                than the rotation tables, or an unknown source of a segment.
            OutOfPagesError: too few pages, now or, with ``wait``, ever; the books are as they were,
                but for evictions.
        """
        live = LivePlan(policy or Policy())
        self.add(live, prompts, wait)
        return Plan(self, live)

    def probe(
        self, decisions: Sequence[AgentDecision], agents: Sequence[str], policy: Policy
    ) -> Plan:
        """A plan of given decisions, of no earlier rows, that changes nothing that others see."""
        return self.with_room(lambda: self._probe(decisions, agents, policy))

    @guarded
    def _probe(
        self, decisions: Sequence[AgentDecision], agents: Sequence[str], policy: Policy
    ) -> Plan:
        self.collect()
        live = LivePlan(policy, is_probe=True, agents=dict.fromkeys(agents))
        self.roster.enter(live, self._leases.lease(decisions, policy)[0])
        return Plan(self, live)

    def add(
        self, live: LivePlan, prompts: Mapping[str, Iterable[Segment]], wait: bool = False
    ) -> None:
        """Adds agents to a plan; see `plan`."""
        checked = self.checked(prompts)
        self._bring_up(checked)
        try:
            self.with_room(lambda: self._add(live, checked, wait), checked)
        except OutOfPagesError:
            if not wait:
                raise
            self._wait(live, checked)

    def with_room(self, work: Callable[[], Result], spared: Collection[str] = ()) -> Result:
        """What ``work`` returns. Where it has too few pages, what is longest unused moves to a
        lower tier, and it is called again.

        Whoever is let in by the guard does not call it.

        Args:
            spared: agents that do not move, besides those of plans.

        Raises:
            OutOfPagesError: nothing is left that can move.
        """
        while True:
            try:
                return work()
            except OutOfPagesError as error:
                if self.make_room is None:
                    raise
                # A traceback would keep the callers' objects: this frame has the error.
                refused = error.with_traceback(None)
            given, problem = self.make_room(refused, spared)
            if not given:
                why = "" if problem is None else f"; nothing moves down: {problem}"
                raise OutOfPagesError(f"{refused}{why}") from (problem or refused.__cause__)

    def is_live(self, agent: str) -> bool:
        """Whether a plan has the agent."""
        return agent in self.roster.agents

    def _bring_up(self, prompts: Prompts) -> None:
        """Reads files, and so nobody who is let in by the guard does it."""
        fetch = self.fetch  # another thread may close the store
        if fetch is not None:
            fetch(prompts)

    def checked(self, prompts: Mapping[str, Iterable[Segment]]) -> dict[str, tuple[Segment, ...]]:
        """Prompts that have been read once; raises what `plan` does for others."""
        checked = checked_prompts(prompts)
        if self.segments is not None:
            for agent, segments in checked.items():
                self.segments.check(f"prompts[{agent!r}]", segments)
        return checked

    @guarded
    def _add(self, live: LivePlan, checked: dict[str, tuple[Segment, ...]], wait: bool) -> None:
        self.collect()
        self._admission.add(live, checked, wait)

    @guarded
    def _wait(self, live: LivePlan, checked: dict[str, tuple[Segment, ...]]) -> None:
        self.collect()
        self._admission.wait(live, checked)

    @guarded
    def _admit_next(self) -> None:
        """Leases pages for the prompts that wait first.

        Raises:
            OutOfPagesError: there are too few; they wait on.
        """
        self.collect()
        self._admission.admit(told=True)

    def pages_needed(
        self, prompts: Mapping[str, Iterable[Segment]], policy: Policy | None = None
    ) -> int:
        """Pages that planning these prompts now needs of the free and the evictable ones.

        Planning takes fresh pages, and holds idle Masters that could have been evicted otherwise;
        both count. It succeeds exactly if the sum is at most ``books.free_pages +
        books.evictable_pages``. Prompts that do not fit beside the idle Masters that they would
        reuse, whose repaired rows take pages too, are planned without them, if that fits.

        Raises:
            TypeError, ValueError: as `plan`.
        """
        return self.pages_to_add(LivePlan(policy or Policy()), prompts)

    def pages_to_add(self, live: LivePlan, prompts: Mapping[str, Iterable[Segment]]) -> int:
        """The same for `add`."""
        checked = self.checked(prompts)
        self._bring_up(checked)
        with self.guard:
            self.collect()
            return self._leases.pages_to_lease(live, checked)

    @guarded
    def find(self, segment: Segment) -> tuple[Master, int] | None:
        """The Master of a segment, stored or being computed, and how many of the segment's first
        rows it has."""
        return self._leases.find(segment)

    # Steps ----------------------------------------------------------------------------------------

    def step(
        self,
        decode: Mapping[str, TokenIds | Iterator[int]] | None = None,
        prefill: Iterable[str] | None = None,
        max_rows: int = 2048,
        again: Iterable[str] = (),
    ) -> PlannedStep | None:
        """The rows of the next forward pass, of any plans: decode rows first, then prompts' rows.

        Rows of prompts come in the order in which their agents were planned, as far as all rows
        that they see are computed in this step or before it.

        Args:
            decode: per agent the tokens to feed; several are a draft, see `Plan.truncate`.
            prefill: agents whose prompts may be computed, with what they wait for; None: all.
            max_rows: rows of a step at most. Decode rows are always in it; with `KeyDeviation` all
                rows of an agent are in one step, however many.
            again: agents whose last row so far is computed once more, before what they decode,
                for an engine that has not seen its logits. It sees what is stored, itself too, and
                nothing is written.

        Returns:
            The step, or None where there is nothing to compute.

        Raises:
            KeyError: an unknown agent.
            TypeError: token ids that are no integers.
            ValueError: ``max_rows < 1``; an agent to decode, or of ``again``, that is in an open
                step or not in decode, has no tokens, no row, or would grow beyond the rotation
                tables; a token id out of range.
            OutOfPagesError: too few pages for the decode rows; nothing has changed, but for
                evictions.
        """
        if max_rows < 1:
            raise ValueError(f"max_rows: expected at least 1, got {max_rows}")
        given = ids_on_host(decode or {})
        wanted = None if prefill is None else _listed(prefill)
        if self.make_room is not None and self._admission.has_waiting:
            with suppress(OutOfPagesError):
                self.with_room(self._admit_next)
        seen = list(again)
        return self.with_room(lambda: self._try_step(given, wanted, max_rows, seen))

    def _try_step(
        self,
        decode: Mapping[str, TokenIds],
        prefill: list[str] | None,
        max_rows: int,
        again: list[str],
    ) -> PlannedStep | None:
        planned = None
        try:
            with self.guard:
                planned = self._step(decode, prefill, max_rows, again)
        except BaseException:
            if planned is not None:  # copies of who was admitted could not be made
                planned.cancel()
            raise
        return planned

    def _step(
        self,
        decode: Mapping[str, TokenIds],
        prefill: list[str] | None,
        max_rows: int,
        again: list[str],
    ) -> PlannedStep | None:
        self.collect()
        if prefill is not None:
            self.roster.check(prefill)
        fed = self._rows.fed(decode)
        seen = self._rows.with_rows(again)
        decoded = self._rows.extend(fed)  # before others are admitted, who would take their pages
        decoded = with_last_rows(decoded, seen)
        with self._rows.undone_by_errors(decoded):
            self._admission.admit()
            room = max_rows - sum(len(part.positions) for part in decoded)
            wanted = None if prefill is None else self._rows.wanted(prefill)
            prefilled = self._rows.of_prompts(self.roster.states.values(), room, wanted)
            return self._planned([*decoded, *prefilled])

    @guarded
    def holds_up(self, prefill: Iterable[str] | None) -> bool:
        """Whether rows that `step` would compute wait for the end of an open step."""
        names = None if prefill is None else _listed(prefill)
        self.roster.check(names or ())
        wanted = None if names is None else self._rows.wanted(names)
        return any(
            state.is_taken and state.phase is Phase.PREFILL
            for state in self.roster.states.values()
            if wanted is None or state.serial in wanted
        )

    @guarded
    def step_of(self, plan: Plan, max_rows: int) -> PlannedStep | None:
        """The next step of one plan's prompts alone."""
        live = plan._live
        return self._planned(self._rows.of_prompts(live.states, max_rows, None))

    def decode_step(
        self, decode: Mapping[str, TokenIds | Iterator[int]], capacity: RoundExtents
    ) -> PlannedStep | None:
        """A step of decode rows alone, padded to the rows and extents of ``capacity``.

        Raises:
            ValueError: the step needs more than that, naming what; nothing has changed. Otherwise
                as `step`.
        """
        given = ids_on_host(decode)
        return self.with_room(lambda: self._decode_step(given, capacity))

    def _decode_step(
        self, decode: Mapping[str, TokenIds], capacity: RoundExtents
    ) -> PlannedStep | None:
        with self.guard:
            for name, needed in self.exceeded(decode, capacity).items():
                most = getattr(capacity, name)
                raise ValueError(f"capacity: expected at least {needed} {name}, got {most}")
            decoded = self._rows.extend(self._rows.fed(decode))
            with self._rows.undone_by_errors(decoded):
                return self._planned(decoded, capacity)

    def exceeded(
        self, decode: Mapping[str, TokenIds | Iterator[int]], capacity: RoundExtents
    ) -> dict[str, int]:
        """The extents of which a decode step needs more than ``capacity`` has, and how many."""
        decode = ids_on_host(decode)
        with self.guard:
            self.collect()
            needed = extents_of(self._rows.fed(decode))
        return {name: count for name, count in needed.items() if count > getattr(capacity, name)}

    def _planned(
        self, parts: list[StepPart], capacity: RoundExtents | None = None
    ) -> PlannedStep | None:
        if not parts:
            return None
        step = PlannedStep(self, parts, next(self._numbers), capacity)
        self._open[step.number] = step
        step.record.copies = self._leases.take_copies()
        for part in parts:
            part.state.busy = True
        return step

    # Rows of an engine's own cache ----------------------------------------------------------------

    @guarded
    def restore(
        self, agents: str | Sequence[str], slots: SlotMapping, live: LivePlan | None = None
    ) -> RestoreRecord:
        """The record that writes agents' rows into an engine's own cache.

        Args:
            agents: one or several.
            slots: int64 ``[T]`` for one agent, ``[N, T]`` for several; see `RestoreRecord`.
            live: the plan in which the agents are; None: their stored rows are meant.

        Raises:
            KeyError: an unknown agent.
            ValueError: an agent of the plan that has ended, is in an open step or has rows that are
                not computed yet; or slots of another shape.
        """
        names = _listed(agents)
        mirrors = self.restorable(names, live)
        rows = np.asarray(slots)
        if rows.ndim == 1 and len(names) == 1:
            rows = rows[None]
        if rows.dtype != np.int64 or rows.ndim != 2 or len(rows) != len(names):
            raise ValueError(
                f"slots: expected int64 [{len(names)}, T], got {rows.dtype} {list(rows.shape)}"
            )
        packed = pack_mirrors(mirrors, self.profile.block_size)
        copies = self._leases.take_copies()
        return RestoreRecord(next(self._numbers), packed, rows, copies)

    @guarded
    def restorable(self, agents: Sequence[str], live: LivePlan | None = None) -> list[Mirror]:
        """Agents' rows as `restore` means them, and with its errors."""
        return [self._restorable(agent, live) for agent in agents]

    def _restorable(self, agent: str, live: LivePlan | None) -> Mirror:
        if live is None:
            if agent not in self.books.mirrors:
                known = sorted(self.books.mirrors)
                raise KeyError(f"agent: expected one of {known}, got {agent!r}")
            self.books.touch(agent)
            return self.books.mirrors[agent]
        state = self.roster.idle(live, agent)
        if state.phase is not Phase.DECODE:
            raise ValueError(
                f"agents: expected a finished prefill, got {agent!r} in {state.phase.value}"
            )
        return state

    def append(self, live: LivePlan, rows: Mapping[str, TokenIds | Iterator[int]]) -> AppendRecord:
        """Takes tokens for decoded whose rows an engine computed; see `Plan.append`."""
        given = ids_on_host(rows)
        return self.with_room(lambda: self._append(live, given))

    @guarded
    def _append(self, live: LivePlan, rows: Mapping[str, TokenIds]) -> AppendRecord:
        self.collect()
        for agent in rows:
            live.state(agent)
        parts = self._rows.extend(self._rows.fed(rows, "rows"))
        positions = [np.empty(0, np.int32), *[part.positions for part in parts]]
        slots = [np.empty(0, np.int64), *[part.state.slots(part.positions) for part in parts]]
        copies = self._leases.take_copies()
        number = next(self._numbers)
        return AppendRecord(number, np.concatenate(positions), np.concatenate(slots), copies)

    # Ends -----------------------------------------------------------------------------------------

    @guarded
    def truncate(self, live: LivePlan, agent: str, length: int) -> None:
        self.collect()
        state = self.roster.idle(live, agent)
        if not state.decision.length <= length <= state.length:
            raise ValueError(
                f"length: expected {state.decision.length}..{state.length}, got {length}"
            )
        self.roster.shorten(state, length)
        state.pending = state.pending[state.pending < length]

    @guarded
    def commit(
        self,
        live: LivePlan,
        agents: str | Iterable[str] | None,
        namespace: bytes | str = b"",
    ) -> None:
        self.collect()
        states = [(name, self.roster.idle(live, name)) for name in live.names(agents)]
        for name, state in states:
            if state.phase is not Phase.DECODE:
                raise ValueError(
                    f"agents: expected a finished prefill, got {name!r} in {state.phase.value}"
                )
        made = shared if self.segments is None else self.segments.shared
        outputs = {
            name: made(state.output_ids, namespace=namespace)
            for name, state in states
            if state.output is not None
        }
        sources = {name: source_of(live.policy.source, output) for name, output in outputs.items()}
        for name, state in states:
            segments: tuple[Segment, ...] = state.segments
            if state.output is not None:
                segments = (*segments, outputs[name])
                if sources[name] is Source.PRODUCER:
                    state.output.digest = outputs[name].digest
                    self.books.publish(state.output)
            self.books.put(name, state.mirror(segments))
            self.roster.end(live, state)
            self.books.let_go(state.uses.masters)
        if states:
            rows = sum(state.length for _, state in states)
            self.guard.tell("committed %d agents of %d rows", len(states), rows)
        self.roster.end_unneeded()

    @guarded
    def abort(self, live: LivePlan, agents: str | Iterable[str] | None) -> None:
        self.collect()
        names = live.names(agents)
        for name in names:
            if live.phase(name) is Phase.ENDED:
                live.state(name)  # raises
        self._admission.withdraw(live, names)

    def end_step(self, step: PlannedStep) -> None:
        del self._open[step.number]
        self.guard.rows_are_free()

    def take_back(self, step: PlannedStep) -> None:
        """Has the copies of a step that is not run made by the next one."""
        copies, step.record.copies = step.record.copies, []
        later = min((number for number in self._open if number > step.number), default=None)
        if later is None:
            self._leases.put_back(copies)
        else:
            record = self._open[later].record
            record.copies = copies + record.copies

    @guarded
    def collect(self) -> None:
        """Ends what was dropped: plans are aborted, steps cancelled.

        Garbage may be collected by any thread in the middle of anything, so that it is only put
        down what is to be ended.
        """
        while self.dropped:
            one = self.dropped.popleft()
            if isinstance(one, LivePlan):
                self._admission.withdraw(one, one.names(None))
            elif isinstance(one, Reading):
                one.end()
            elif one.is_open:
                one.cancel()

    def order_clearing(self) -> None:
        """Has pages that nobody uses any more overwritten, and given back."""
        if self.books.has_uncleared:
            pages = self.books.to_be_cleared()

            def done() -> None:
                self.books.cleared(pages)

            self.guard.order(CopyOrder([], [], done, done, pages))

    @guarded
    def clear(self) -> None:
        """Forgets all Mirrors and Masters; see `DiffStore.clear`."""
        self.collect()
        if self.roster.leaving:
            raise ValueError(f"store: expected no open steps, got {len(self._open)}")
        if self.roster.agents or self.roster.plans:
            computed = {state.agent for live in self.roster.plans.values() for state in live.states}
            raise ValueError(
                "store: expected no agents of plans that have not ended, got "
                f"{sorted(one for one in {*self.roster.agents, *computed} if one is not None)}"
            )
        for books in (self.books, self.host_books):
            for agent in list(books.mirrors):
                books.drop(agent)
            books.evict(books.num_pages)

    # Preemption -----------------------------------------------------------------------------------

    def suspend(self, live: LivePlan, agents: str | Iterable[str], to: str) -> None:
        if to not in ("nowhere", "host"):
            raise ValueError(f"to: expected 'nowhere' or 'host', got {to!r}")
        names = _listed(agents)
        self.with_room(lambda: self._suspend(live, names, to))

    @guarded
    def _suspend(self, live: LivePlan, agents: list[str], to: str) -> None:
        self.collect()
        self._preemption.suspend(live, agents, to)

    def resume(self, live: LivePlan, agents: str | Iterable[str]) -> None:
        names = _listed(agents)
        self.with_room(lambda: self._resume(live, names))

    @guarded
    def _resume(self, live: LivePlan, agents: list[str]) -> None:
        self.collect()
        self._preemption.resume(live, agents)

    @guarded
    def pages_to_resume(self, live: LivePlan, agent: str) -> int:
        self.collect()
        return self._preemption.pages_to_resume(live, agent)


def _no_copies(copies: Sequence[Copies]) -> None:
    raise AssertionError("copies that the next record has")


def _listed(agents: Iterable[str]) -> list[str]:
    return [agents] if isinstance(agents, str) else list(agents)
