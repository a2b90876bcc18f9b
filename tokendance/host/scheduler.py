"""Which rows are computed when, and who has which pages meanwhile."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count, pairwise
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from tokendance.host.agent import AgentState, Phase
from tokendance.host.books import Books, OutOfPagesError, PageAllocator
from tokendance.host.decide import AgentDecision, Source, source_of
from tokendance.host.guard import CopyOrder, Guard, guarded
from tokendance.host.leases import Leases
from tokendance.host.mirror import Master, Mirror, pages_for
from tokendance.host.plan import LivePlan, Plan, Policy, Prompts, Suspended
from tokendance.host.planned_step import PlannedStep, StepPart
from tokendance.host.reading import Reading
from tokendance.host.record import (
    AppendRecord,
    Copies,
    DeviceProfile,
    RestoreRecord,
    pack_mirrors,
)
from tokendance.host.round import RoundExtents
from tokendance.host.segments import Segment, TokenIds, on_host, shared, token_list
from tokendance.host.tenant_segments import TenantSegments
from tokendance.host.uncopied import Uncopied

SlotMapping: TypeAlias = Sequence[int] | Sequence[Sequence[int]] | NDArray[np.int64]
"""Rows of a cache, by agent and position."""

MakeRoom: TypeAlias = Callable[[OutOfPagesError, Collection[str]], tuple[int, Exception | None]]
"""Takes what somebody got instead of pages, and agents that are to stay. Returns how many pages
have come free, and what has kept others from doing so."""

_NO_END = int(np.iinfo(np.int32).max)  # beyond all positions
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
        self._agents: dict[str, LivePlan] = {}  # of all plans, those that have not ended
        self._states: dict[int, AgentState] = {}  # by serial, those that have not ended
        self._plans: dict[int, LivePlan] = {}  # of each state, by serial
        self._orphans: dict[int, AgentState] = {}  # of them, what is computed for no agent
        self._makers: dict[int, AgentState] = {}  # of Masters that are not computed, by serial
        self._leaving: dict[int, AgentState] = {}  # ended, by serial; their pages are still used
        self._open: dict[int, PlannedStep] = {}  # steps that have not ended, by number
        self._waiting: deque[tuple[LivePlan, dict[str, tuple[Segment, ...]]]] = deque()
        self._did_not_fit: tuple[int, ...] | None = None  # books in which their first did not
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
        self._register(live, self._leases.lease(decisions, policy)[0])
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
        return agent in self._agents

    def _bring_up(self, prompts: Prompts) -> None:
        """Reads files, and so nobody who is let in by the guard does it."""
        fetch = self.fetch  # another thread may close the store
        if fetch is not None:
            fetch(prompts)

    def checked(self, prompts: Mapping[str, Iterable[Segment]]) -> dict[str, tuple[Segment, ...]]:
        """Prompts that have been read once; raises what `plan` does for others."""
        checked = _checked_prompts(prompts)
        if self.segments is not None:
            for agent, segments in checked.items():
                self.segments.check(f"prompts[{agent!r}]", segments)
        return checked

    @guarded
    def _add(self, live: LivePlan, checked: dict[str, tuple[Segment, ...]], wait: bool) -> None:
        self._check_new(live, checked)
        if wait and self._waiting:
            self._enqueue(live, checked)
        else:
            self._admit(live, checked)

    @guarded
    def _wait(self, live: LivePlan, checked: dict[str, tuple[Segment, ...]]) -> None:
        self._check_new(live, checked)
        self._enqueue(live, checked)

    def _check_new(self, live: LivePlan, prompts: Prompts) -> None:
        self.collect()
        for agent in prompts:
            if agent in self._agents or agent in live.agents:
                raise ValueError(
                    f"prompts: expected agents of no live plan, got {agent!r} a second time"
                )

    def _admit(self, live: LivePlan, prompts: Prompts) -> None:
        states = self._leases.lease_prompts(live, prompts)[0]
        self._register(live, states)
        for agent in prompts:
            live.agents[agent] = None
            self._agents[agent] = live
            self.books.touch(agent)
        names = list(prompts)
        self.guard.tell(
            "planned %d agents: %d rows, %d of them to be computed",
            *(len(names), sum(live.decisions[name].length for name in names)),
            sum(len(state.pending) for state in states),
        )
        self._leases.copy_carried_rows(states, self.settle, lambda: self._abort(live, names))

    def _enqueue(self, live: LivePlan, prompts: dict[str, tuple[Segment, ...]]) -> None:
        self._leases.check_possible(live, prompts)
        live.waiting.append(prompts)
        for agent in prompts:
            live.agents[agent] = None
            self._agents[agent] = live
        self._waiting.append((live, prompts))

    @guarded
    def _admit_next(self) -> None:
        """Leases pages for the prompts that wait first.

        Raises:
            OutOfPagesError: there are too few; they wait on.
        """
        self.collect()
        self._admit_waiting(told=True)

    def _admit_waiting(self, told: bool = False) -> None:
        """Leases pages for prompts that wait, as far as they are there, in order.

        Args:
            told: for which there are not raises ``OutOfPagesError``.
        """
        while self._waiting:
            live, prompts = self._waiting[0]
            seen = self.books.state()
            if not told and prompts and seen is not None and seen == self._did_not_fit:
                return
            try:
                if prompts:
                    self._admit(live, prompts)
            except OutOfPagesError:
                self._did_not_fit = self.books.state()
                if told:
                    raise
                return
            self._did_not_fit = None
            self._waiting.popleft()
            live.waiting.remove(prompts)

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

    def _register(self, live: LivePlan, states: Sequence[AgentState]) -> None:
        """The states are the plan's from now on, and the Masters that they make can be found."""
        for state in states:
            live.states.append(state)
            self._plans[state.serial] = live
            if state.agent is not None:
                live.by_name[state.agent] = state
                live.take(state.decision)
            for use in state.made:
                self._makers[use.master.serial] = state
            if not live.is_probe:
                self._states[state.serial] = state
                if state.agent is None:
                    self._orphans[state.serial] = state
                for use in state.made:
                    self.books.announce(use.master)

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
        given = _given(decode or {})
        wanted = None if prefill is None else _listed(prefill)
        if self.make_room is not None and self._waiting:
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
        names = None if prefill is None else self._named(prefill)
        fed = self._fed(decode)
        seen = self._with_rows(again)
        decoded = self._extend(fed)  # before others are admitted, who would take their pages
        decoded = _with_last_rows(decoded, seen)
        with self._undone_by_errors(decoded):
            self._admit_waiting()
            room = max_rows - sum(len(part.positions) for part in decoded)
            wanted = None if names is None else self._wanted(names)
            prefilled = self._prefill_parts(self._states.values(), room, wanted)
            return self._planned([*decoded, *prefilled])

    @contextmanager
    def _undone_by_errors(self, decoded: Sequence[StepPart]) -> Iterator[None]:
        """Gives decoded rows' pages back if their step cannot be planned."""
        try:
            yield
        except BaseException:
            for part in decoded:
                self.shorten(part.state, part.begin)
            raise

    @guarded
    def holds_up(self, prefill: Iterable[str] | None) -> bool:
        """Whether rows that `step` would compute wait for the end of an open step."""
        wanted = None if prefill is None else self._wanted(self._named(prefill))
        return any(
            state.is_taken and state.phase is Phase.PREFILL
            for state in self._states.values()
            if wanted is None or state.serial in wanted
        )

    @guarded
    def step_of(self, plan: Plan, max_rows: int) -> PlannedStep | None:
        """The next step of one plan's prompts alone."""
        live = plan._live
        return self._planned(self._prefill_parts(live.states, max_rows, None))

    def decode_step(
        self, decode: Mapping[str, TokenIds | Iterator[int]], capacity: RoundExtents
    ) -> PlannedStep | None:
        """A step of decode rows alone, padded to the rows and extents of ``capacity``.

        Raises:
            ValueError: the step needs more than that, naming what; nothing has changed. Otherwise
                as `step`.
        """
        given = _given(decode)
        return self.with_room(lambda: self._decode_step(given, capacity))

    def _decode_step(
        self, decode: Mapping[str, TokenIds], capacity: RoundExtents
    ) -> PlannedStep | None:
        with self.guard:
            for name, needed in self.exceeded(decode, capacity).items():
                most = getattr(capacity, name)
                raise ValueError(f"capacity: expected at least {needed} {name}, got {most}")
            decoded = self._extend(self._fed(decode))
            with self._undone_by_errors(decoded):
                return self._planned(decoded, capacity)

    def exceeded(
        self, decode: Mapping[str, TokenIds | Iterator[int]], capacity: RoundExtents
    ) -> dict[str, int]:
        """The extents of which a decode step needs more than ``capacity`` has, and how many."""
        decode = _given(decode)
        with self.guard:
            self.collect()
            needed = self._extents_of(self._fed(decode))
        return {name: count for name, count in needed.items() if count > getattr(capacity, name)}

    def _extents_of(self, fed: Sequence[tuple[LivePlan, AgentState, list[int]]]) -> dict[str, int]:
        """What a decode step needs of the extents of a round, but for its work list."""
        pages: dict[int, int] = {}  # of each Master, by serial
        listed: dict[int, int] = {}  # and how often it stands in the round
        needed = dict.fromkeys(("uses", "use_pages", "masters", "master_pages", "own_pages"), 0)
        for _, state, tokens in fed:
            more, new = state.pages_to_extend(len(tokens)), state.output is None
            needed["uses"] += len(state.uses) + new
            needed["use_pages"] += int(state.uses.page_indptr[-1]) + more
            needed["masters"] += new
            needed["master_pages"] += more
            needed["own_pages"] += len(state.own_pages)
            # A Master that one prompt uses twice is listed twice.
            for serial, times in Counter(one.serial for one in state.uses.masters).items():
                listed[serial] = max(listed.get(serial, 0), times)
            pages |= {one.serial: len(one.pages) for one in state.uses.masters}
        needed["masters"] += sum(listed.values())
        needed["master_pages"] += sum(times * pages[serial] for serial, times in listed.items())
        rows = sum(len(tokens) for _, _, tokens in fed)
        return {"agents": len(fed), "rows": rows, **needed}

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

    def _named(self, agents: Iterable[str]) -> list[str]:
        names = _listed(agents)
        for name in names:
            if name not in self._agents:
                raise KeyError(f"agent: expected one of {sorted(self._agents)}, got {name!r}")
        return names

    def _fed(
        self, decode: Mapping[str, TokenIds], argument: str = "decode"
    ) -> list[tuple[LivePlan, AgentState, list[int]]]:
        fed = []
        for agent, ids in decode.items():
            self._named([agent])
            live = self._agents[agent]
            state = live.state(agent)
            if state.is_taken:
                raise ValueError(f"{argument}: expected agents in no open step, got {agent!r}")
            if state.phase is not Phase.DECODE:
                raise ValueError(
                    f"{argument}: expected agents in decode, got {agent!r} ({state.phase.value})"
                )
            tokens = token_list(ids, f"{argument}[{agent!r}]")
            if not tokens:
                raise ValueError(f"{argument}[{agent!r}]: expected at least one token, got none")
            if state.length + len(tokens) > self.profile.max_position:
                raise ValueError(
                    f"{argument}[{agent!r}]: expected positions below {self.profile.max_position}, "
                    f"got {state.length + len(tokens) - 1}"
                )
            fed.append((live, state, tokens))
        return fed

    def _with_rows(self, agents: Iterable[str]) -> list[tuple[LivePlan, AgentState]]:
        """Agents in decode that have a row."""
        found = []
        for agent in agents:
            self._named([agent])
            live = self._agents[agent]
            state = self._idle(live, agent)
            if state.phase is not Phase.DECODE or not state.length:
                raise ValueError(
                    f"again: expected agents in decode with a row, got {agent!r} "
                    f"({state.phase.value}, {state.length} rows)"
                )
            found.append((live, state))
        return found

    def _extend(self, fed: Sequence[tuple[LivePlan, AgentState, list[int]]]) -> list[StepPart]:
        """Makes room for decoded rows, of all agents or of none."""
        needs = [state.pages_to_extend(len(tokens)) for _, state, tokens in fed]
        pages = self.books.take_pages(sum(needs))
        parts, at = [], 0
        for (live, state, tokens), need in zip(fed, needs, strict=True):
            begin = state.length
            made = state.extend(tokens, pages[at : at + need])
            at += need
            if made is not None:
                self.books.hold([made])
            positions = np.arange(begin, state.length, dtype=np.int32)
            parts.append(StepPart(live, state, positions, begin))
        return parts

    def _wanted(self, names: Sequence[str]) -> dict[int, int]:
        """By serial, the states of agents and of all that they wait for, each with the position
        up to which its rows are wanted."""
        wanted = {
            self._agents[name].by_name[name].serial: _NO_END
            for name in names
            if name in self._agents[name].by_name
        }
        for serial in sorted(self._states, reverse=True):  # who waits has the larger serial
            for use in self._states[serial].awaited if serial in wanted else ():
                maker = self._makers.get(use.master.serial)
                if maker is None or use.delta >= wanted[serial]:
                    continue
                made = next(one for one in maker.made if one.master is use.master)
                # Rows that are to be chosen are in one step, with all that they see; the agent is
                # not asked for, all the same.
                end = _NO_END - 1 if maker.candidates else made.delta + use.length
                wanted[maker.serial] = max(end, wanted.get(maker.serial, 0))
        return wanted

    def _prefill_parts(
        self, states: Iterable[AgentState], room: int, wanted: Mapping[int, int] | None
    ) -> list[StepPart]:
        parts: list[StepPart] = []
        available: dict[int, int] = {}
        for state in states:
            if room <= 0:
                break
            if state.ended or state.is_taken or state.phase is not Phase.PREFILL:
                continue
            end = _NO_END if wanted is None else wanted.get(state.serial, 0)
            if not end:
                continue
            plan = self._plans[state.serial]
            state.settle(plan.chosen)
            limit = state.first_unseeable(available)
            positions = state.pending
            if state.candidates:
                positions = np.union1d(positions, state.rows_to_choose()).astype(np.int32)
                if limit <= positions[-1]:
                    continue
                if parts and len(positions) > room:
                    break  # the rows so far may choose this agent's rows too
            else:
                positions = positions[: int(np.searchsorted(positions, min(limit, end)))][:room]
            if not len(positions):
                continue
            left = state.pending[state.pending > positions[-1]]
            for use in state.made:
                if not use.master.is_computed:
                    available[use.master.serial] = state.computed_of(use, left)
            parts.append(StepPart(plan, state, positions, -1, end == _NO_END))
            room -= len(positions)
        return parts

    def shorten(self, state: AgentState, length: int) -> None:
        """Gives the pages of decoded rows from position ``length`` on back."""
        pages, gone = state.shorten(length)
        self.books.drop_pages(pages)
        if gone is not None:
            self.books.let_go([gone])

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
        state = self._idle(live, agent)
        if state.phase is not Phase.DECODE:
            raise ValueError(
                f"agents: expected a finished prefill, got {agent!r} in {state.phase.value}"
            )
        return state

    def append(self, live: LivePlan, rows: Mapping[str, TokenIds | Iterator[int]]) -> AppendRecord:
        """Takes tokens for decoded whose rows an engine computed; see `Plan.append`."""
        given = _given(rows)
        return self.with_room(lambda: self._append(live, given))

    @guarded
    def _append(self, live: LivePlan, rows: Mapping[str, TokenIds]) -> AppendRecord:
        self.collect()
        for agent in rows:
            live.state(agent)
        parts = self._extend(self._fed(rows, "rows"))
        positions = [np.empty(0, np.int32), *[part.positions for part in parts]]
        slots = [np.empty(0, np.int64), *[part.state.slots(part.positions) for part in parts]]
        copies = self._leases.take_copies()
        number = next(self._numbers)
        return AppendRecord(number, np.concatenate(positions), np.concatenate(slots), copies)

    # Ends -----------------------------------------------------------------------------------------

    @guarded
    def truncate(self, live: LivePlan, agent: str, length: int) -> None:
        self.collect()
        state = self._idle(live, agent)
        if not state.decision.length <= length <= state.length:
            raise ValueError(
                f"length: expected {state.decision.length}..{state.length}, got {length}"
            )
        self.shorten(state, length)
        state.pending = state.pending[state.pending < length]

    def _idle(self, live: LivePlan, agent: str, on_host: bool = False) -> AgentState:
        state = live.state(agent)
        if state.is_taken:
            raise ValueError(f"agent: expected one that is in no open step, got {agent!r}")
        if state.phase is Phase.SUSPENDED and not on_host:
            raise ValueError(f"agent: expected one that has pages, got {agent!r} (suspended)")
        return state

    @guarded
    def commit(
        self,
        live: LivePlan,
        agents: str | Iterable[str] | None,
        namespace: bytes | str = b"",
    ) -> None:
        self.collect()
        states = [(name, self._idle(live, name)) for name in live.names(agents)]
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
            self._end(live, state)
            self.books.let_go(state.uses.masters)
        if states:
            rows = sum(state.length for _, state in states)
            self.guard.tell("committed %d agents of %d rows", len(states), rows)
        self.end_unneeded()

    @guarded
    def abort(self, live: LivePlan, agents: str | Iterable[str] | None) -> None:
        self.collect()
        names = live.names(agents)
        for name in names:
            if live.phase(name) is Phase.ENDED:
                live.state(name)  # raises
        self._abort(live, names)

    def _abort(self, live: LivePlan, names: Iterable[str]) -> None:
        for name in names:
            if name in live.by_name:
                self._give_up(live, live.by_name[name])
            live.suspended.pop(name, None)
            self._stop_waiting(live, name)
            if not live.is_probe:
                self._agents.pop(name, None)
        self.end_unneeded()

    def _stop_waiting(self, live: LivePlan, agent: str) -> None:
        for prompts in live.waiting:
            if prompts.pop(agent, None) is not None:
                self._did_not_fit = None

    def _give_up(self, live: LivePlan, state: AgentState) -> None:
        """Ends an agent; the Masters that it was making are computed for no agent from now on."""
        unfinished = any(not use.master.is_computed for use in state.made)
        if state.phase is Phase.PREFILL and unfinished and not live.is_probe:
            assert state.agent is not None
            del live.by_name[state.agent]
            state.agent = None
            self._orphans[state.serial] = state
        else:
            self._give_back(live, state)

    def _give_back(self, live: LivePlan, state: AgentState) -> None:
        self._end(live, state)
        self._leaving[state.serial] = state
        self.settle([state])

    def settle(self, states: Iterable[AgentState]) -> None:
        """Those among the states that have ended give their pages back, unless an open step or a
        copy still has them."""
        for state in states:
            if state.serial in self._leaving and not state.keeps_pages:
                del self._leaving[state.serial]
                self._forget_host_pages(state)
                self.books.drop_pages(state.own_pages)
                self.books.let_go(state.uses.masters)

    def _forget_host_pages(self, state: AgentState) -> None:
        if state.host_pages is not None:
            self.host_pages.free(state.host_pages)
            state.host_pages = None

    def _end(self, live: LivePlan, state: AgentState) -> None:
        state.ended = True
        state.pending = state.pending[:0]
        for use in state.made:
            self._makers.pop(use.master.serial, None)
        del self._plans[state.serial]
        self._states.pop(state.serial, None)
        self._orphans.pop(state.serial, None)
        if state.agent is None:
            live.states.remove(state)
        else:
            del live.by_name[state.agent]
            if not live.is_probe:
                self._agents.pop(state.agent, None)

    def end_unneeded(self) -> None:
        """Ends what is computed for no agent where no agent waits for it.

        What is in an open step ends with the step.
        """
        for serial in sorted(self._orphans, reverse=True):
            state = self._orphans[serial]
            if state.is_taken:
                continue
            mine = [master.serial for master in state.uses.masters]
            ends = [
                use.delta + use.length
                for use in state.made
                if use.master.holders > mine.count(use.master.serial) and not use.master.is_computed
            ]
            for master in state.give_up_from(max(ends, default=0)):
                self.books.withdraw(master)
                del self._makers[master.serial]
            if not len(state.pending):
                self._give_back(self._plans[state.serial], state)

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
                self._abort(one, one.names(None))
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
        if self._leaving:
            raise ValueError(f"store: expected no open steps, got {len(self._open)}")
        if self._agents or self._plans:
            computed = {state.agent for live in self._plans.values() for state in live.states}
            raise ValueError(
                "store: expected no agents of plans that have not ended, got "
                f"{sorted(one for one in {*self._agents, *computed} if one is not None)}"
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
        states = []
        for name in live.names(agents):
            state = self._idle(live, name, on_host=True)
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
            self._forget_host_pages(state)
            if state.output is not None:
                self.shorten(state, state.decision.length)
            self._give_up(live, state)
            if state.ended:
                live.states.remove(state)
            self._agents[name] = live
        self.end_unneeded()

    def _move_to_host(self, states: Sequence[AgentState]) -> None:
        private = [state.private_pages for state in states]
        ends = np.cumsum([0, *[len(pages) for pages in private]])
        given = self.host_pages.allocate(int(ends[-1]))
        if given is None:
            self.guard.tell("refused %d pages of host memory", int(ends[-1]))
            raise OutOfPagesError(
                f"to: expected {ends[-1]} free host pages, got {self.host_pages.num_free} of "
                f"{self.host_pages.limit}",
                int(ends[-1]) - (self.host_pages.num_free or 0),
                on_host=True,
            )
        pages = np.concatenate(private)
        for state, (begin, end) in zip(states, pairwise(ends), strict=True):
            state.leave(given[begin:end])

        def done() -> None:
            self.books.drop_pages(pages)
            self.settle(states)

        def undo() -> None:
            for state, mine in zip(states, private, strict=True):
                state.come_back(mine)
            self.host_pages.free(given)
            self.settle(states)

        copies = [Copies(to_host=np.stack([pages, given], axis=1))]
        self._leases.order(CopyOrder(copies, states, done, undo))

    def resume(self, live: LivePlan, agents: str | Iterable[str]) -> None:
        names = _listed(agents)
        self.with_room(lambda: self._resume(live, names))

    @guarded
    def _resume(self, live: LivePlan, agents: list[str]) -> None:
        self.collect()
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
            self._suspend(live, done, "nowhere")
            raise

    def _plan_again(self, live: LivePlan, agent: str) -> None:
        """Decides and leases as `plan` does, and makes room for the output's rows."""
        given = live.suspended[agent]
        more = self._pages_of_output(given)
        prompts = {agent: given.segments}
        states, pages = self._leases.lease_prompts(live, prompts, more)
        self._register(live, states)
        state = live.by_name[agent]
        if given.output_ids:
            needed = state.pages_to_extend(len(given.output_ids))
            made = state.extend(given.output_ids, pages[:needed])
            pages = pages[needed:]
            assert made is not None
            self.books.hold([made])
            state.recompute_output()
        self.books.drop_pages(pages)  # that of the next row: it was enough to know that it is there
        del live.suspended[agent]
        self._leases.copy_carried_rows(
            states, self.settle, lambda: self._suspend(live, [agent], "nowhere")
        )

    def _pages_of_output(self, suspended: Suspended) -> int:
        """Pages of the decoded rows and of one more, without which an agent is suspended again."""
        return pages_for(len(suspended.output_ids) + 1, self.profile.block_size)

    def _move_to_device(self, states: Sequence[AgentState]) -> None:
        held = [state.host_pages for state in states if state.host_pages is not None]
        if not held:
            return
        more = sum(state.pages_to_go_on for state in states)
        pages = self.books.take_pages(sum(map(len, held)) + more)
        pages, rest = pages[: len(pages) - more], pages[len(pages) - more :]
        self.books.drop_pages(rest)
        at = 0
        for state, host_pages in zip(states, held, strict=True):
            state.come_back(pages[at : at + len(host_pages)])
            at += len(host_pages)

        def done() -> None:
            self.host_pages.free(np.concatenate(held))
            self.settle(states)

        def undo() -> None:
            for state, host_pages in zip(states, held, strict=True):
                state.leave(host_pages)
            self.books.drop_pages(pages)
            self.settle(states)

        copies = [Copies(to_device=np.stack([np.concatenate(held), pages], axis=1))]
        self._leases.order(CopyOrder(copies, states, done, undo))

    @guarded
    def pages_to_resume(self, live: LivePlan, agent: str) -> int:
        self.collect()
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


def _no_copies(copies: Sequence[Copies]) -> None:
    raise AssertionError("copies that the next record has")


def _given(decode: Mapping[str, TokenIds | Iterator[int]]) -> dict[str, TokenIds]:
    """Token ids as they are read: nobody waits for a device, or an iterator, at the books."""
    return {
        agent: list(ids) if isinstance(ids, Iterator) else on_host(ids)
        for agent, ids in decode.items()
    }


def _listed(agents: Iterable[str]) -> list[str]:
    return [agents] if isinstance(agents, str) else list(agents)


def _with_last_rows(
    decoded: Sequence[StepPart], seen: Sequence[tuple[LivePlan, AgentState]]
) -> list[StepPart]:
    """Puts the rows before decoded ones, or the last rows where nothing is decoded, in front."""
    parts = {part.state.serial: part for part in decoded}
    for live, state in seen:
        part = parts.get(state.serial)
        begin = state.length if part is None else part.begin
        positions = np.arange(begin - 1, state.length, dtype=np.int32)
        parts[state.serial] = StepPart(live, state, positions, begin)
    return list(parts.values())


def _checked_prompts(prompts: Mapping[str, Iterable[Segment]]) -> dict[str, tuple[Segment, ...]]:
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
