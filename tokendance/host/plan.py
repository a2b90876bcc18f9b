"""A round in the making, as whoever asked for it sees it."""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tokendance.host.agent import AgentState, Phase
from tokendance.host.decide import AgentDecision, Company, OptedOut, Source, Sources, Span
from tokendance.host.guard import Guard, guarded
from tokendance.host.mirror import no_pages
from tokendance.host.record import AppendRecord, RestoreRecord
from tokendance.host.round import IntArray
from tokendance.host.segments import Segment, TokenIds, told_apart
from tokendance.host.selection import DEFAULT, Selection
from tokendance.host.uncopied import Uncopied

if TYPE_CHECKING:
    from tokendance.host.scheduler import Scheduler, SlotMapping

Prompts = Mapping[str, tuple[Segment, ...]]


@dataclass(frozen=True)
class Policy:
    """What a plan reuses and recomputes.

    Attributes:
        selection: which reused rows are recomputed.
        source: where Masters that are not stored come from.
        opted_out: who and what is computed whatever the selection.
    """

    selection: Selection = DEFAULT
    source: Sources = Source.MASTER
    opted_out: OptedOut = field(default_factory=OptedOut)


@dataclass(frozen=True)
class Suspended:
    """An agent whose rows were given back: what is needed to compute them again.

    Attributes:
        segments: of its prompt.
        output_ids: the decoded tokens that were fed.
    """

    segments: tuple[Segment, ...]
    output_ids: list[int]

    @property
    def length(self) -> int:
        """Rows of prompt and output."""
        return sum(segment.length for segment in self.segments) + len(self.output_ids)


@dataclass(eq=False)
class LivePlan:
    """What a scheduler keeps of a plan.

    Attributes:
        policy: of its agents.
        is_probe: it changes nothing that others see: no Master of it is ever found.
        agents: all names, in the order in which they were given, as a dict's keys.
        decisions: by name, what was decided.
        users: how many agents' prompts hold a segment, by digest.
        replaceable: see `Company`.
        states: what is or was computed, in the order of computing.
        by_name: the states of agents that have not ended.
        waiting: prompts that have no pages yet, in the order in which they came.
        suspended: agents whose rows were given back.
        chosen: rows that `KeyDeviation` chose, by serial of the Master.
        row_layers, pair_layers: computed prompt rows, and (row, visible key) pairs, times layers.
    """

    policy: Policy
    is_probe: bool = False
    agents: dict[str, None] = field(default_factory=dict)
    decisions: dict[str, AgentDecision] = field(default_factory=dict)
    users: Counter[bytes] = field(default_factory=Counter)
    replaceable: set[bytes] = field(default_factory=set)
    states: list[AgentState] = field(default_factory=list)
    by_name: dict[str, AgentState] = field(default_factory=dict)
    waiting: list[dict[str, tuple[Segment, ...]]] = field(default_factory=list)
    suspended: dict[str, Suspended] = field(default_factory=dict)
    chosen: dict[int, IntArray] = field(default_factory=dict)
    row_layers: int = 0
    pair_layers: int = 0

    def company_of(self, prompts: Prompts) -> Company | None:
        """The agents that came before these; None where nobody did."""
        again = [self.decisions[agent] for agent in prompts if agent in self.decisions]
        if len(self.decisions) == len(again):
            return None
        mine = Counter(digest for one in again for digest in _digests_of(one.segments))
        digests = {digest for segments in prompts.values() for digest in _digests_of(segments)}
        known = {digest for digest in digests if self.users[digest] > mine[digest]}
        # Who is resumed has had its rows once, and makes no Master again.
        return Company(known, frozenset() if again else self.replaceable & known)

    def take(self, decision: AgentDecision) -> None:
        """Keeps what was decided of an agent."""
        assert decision.agent is not None
        if decision.agent not in self.decisions:
            self.users.update(_digests_of(decision.segments))
        self.decisions[decision.agent] = decision
        made = {use.master.serial for use in decision.made}
        for use in decision.made:
            if use.master.replaces:
                self.replaceable.discard(use.master.digest)
            else:
                self.replaceable.add(use.master.digest)
        uses = decision.uses
        exact = np.flatnonzero(uses.delta + uses.length <= decision.exact_length)
        for master in [uses.masters[i] for i in exact.tolist()]:
            if master.serial not in made:
                self.replaceable.discard(master.digest)

    def phase(self, agent: str) -> Phase:
        """Raises ``KeyError`` for an unknown agent."""
        if agent not in self.agents:
            raise KeyError(f"agent: expected one of {list(self.agents)}, got {agent!r}")
        state = self.by_name.get(agent)
        if state is not None:
            return state.phase
        if agent in self.suspended:
            return Phase.SUSPENDED
        if any(agent in prompts for prompts in self.waiting):
            return Phase.WAITING
        return Phase.ENDED

    def state(self, agent: str) -> AgentState:
        """An agent that has pages. Raises ``KeyError`` or ``ValueError``."""
        phase = self.phase(agent)
        if phase is Phase.ENDED:
            raise ValueError(f"agent: expected one that has not ended, got {agent!r}")
        if agent not in self.by_name:
            raise ValueError(f"agent: expected one that has pages, got {agent!r} ({phase.value})")
        return self.by_name[agent]

    def names(self, agents: str | Iterable[str] | None) -> list[str]:
        """The agents that are meant: one, several, or (None) all that have not ended."""
        if agents is None:
            return [name for name in self.agents if self.phase(name) is not Phase.ENDED]
        return [agents] if isinstance(agents, str) else list(dict.fromkeys(agents))


def _digests_of(prompt: Sequence[Segment]) -> set[bytes]:
    """What the segments of a prompt are matched by."""
    return {one.digest for one in told_apart(prompt)}


class Plan(Uncopied, instead="make another by KVCollector.plan, with the same prompts"):
    """A round of requests: made by `KVCollector.plan`, ended agent by agent.

    It holds the Masters that it uses and leases the pages that it fills. A Master serves others
    from the moment its last row is computed; an agent's own rows are visible to nobody before it is
    committed. After `abort` the store is as it was, except for finished Masters. As a context
    manager, a plan aborts the agents that have not ended when the block is left. A plan that is
    dropped before all its agents have ended aborts the others, with a ``ResourceWarning``.
    """

    def __init__(self, scheduler: Scheduler, live: LivePlan) -> None:
        self._scheduler = scheduler
        self._live = live
        self._finalizer = weakref.finalize(self, _abandon, scheduler, live)
        self._finalizer.atexit = False

    def __enter__(self) -> Plan:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: object
    ) -> None:
        self.abort()

    @property
    def guard(self) -> Guard:
        return self._scheduler.guard

    @guarded
    def __repr__(self) -> str:
        phases = [self._live.phase(agent) for agent in self.agents]
        counts = [f"{phases.count(one)} {one.value}" for one in Phase if one in phases]
        return (
            f"Plan({len(phases)} agents: {', '.join(counts) or 'none'}; "
            f"{self.rows_computed:g} of {self.rows} prompt rows computed)"
        )

    # Agents ---------------------------------------------------------------------------------------

    @property
    @guarded
    def agents(self) -> list[str]:
        """The agents' names, in the order in which they came."""
        return list(self._live.agents)

    @guarded
    def phase(self, agent: str) -> Phase:
        """How far an agent is. Raises ``KeyError`` for an unknown one."""
        return self._live.phase(agent)

    @property
    @guarded
    def prefilling(self) -> list[str]:
        """The agents that have rows to be computed."""
        return [name for name in self._live.agents if self.phase(name) is Phase.PREFILL]

    def is_active(self, agent: str) -> bool:
        """Whether an agent of the plan has not ended."""
        return self.phase(agent) is not Phase.ENDED

    @property
    @guarded
    def ended(self) -> bool:
        """Whether all agents have been committed or aborted."""
        return all(not self.is_active(name) for name in self._live.agents)

    def add(self, prompts: Mapping[str, Iterable[Segment]], *, wait: bool = False) -> None:
        """More agents join the round; see `KVCollector.plan`.

        They reuse what is computed, and wait for what is being computed.
        """
        self._scheduler.add(self._live, prompts, wait)

    def pages_needed(self, prompts: Mapping[str, Iterable[Segment]]) -> int:
        """Pages that `add` of these prompts now needs; see `KVCollector.pages_needed`.

        The number may differ from that of a separate plan, because `LeadingTokens` computes a
        segment that no other agent of the round has.
        """
        return self._scheduler.pages_to_add(self._live, prompts)

    @guarded
    def length(self, agent: str) -> int:
        """Rows of the agent's prompt and output so far."""
        self._scheduler.collect()
        if agent in self._live.suspended:
            return self._live.suspended[agent].length
        return self._live.state(agent).length

    @guarded
    def output(self, agent: str) -> list[int]:
        """The agent's decoded tokens that were fed."""
        self._scheduler.collect()
        if agent in self._live.suspended:
            return list(self._live.suspended[agent].output_ids)
        return list(self._live.state(agent).output_ids)

    def truncate(self, agent: str, length: int) -> None:
        """Forgets the agent's rows from position ``length`` on: rejected drafts.

        Raises:
            KeyError: an unknown agent.
            ValueError: the agent has ended, is in an open step or has no pages, or ``length`` is
                not between prompt and present length.
        """
        self._scheduler.truncate(self._live, agent, length)

    def restore(self, agents: str | Sequence[str], slots: SlotMapping) -> RestoreRecord:
        """Agents' rows for an engine that attends over a cache of its own.

        Args:
            agents: one or several, whose prompts are computed.
            slots: int64 ``[T]`` for one agent, ``[N, T]`` for N: the row of the cache that position
                p goes to, -1 = leave out. Positions from T on are left out.

        Returns:
            The record that `tokendance.device.Executor.restore` runs, before any later one.

        Raises:
            KeyError: an unknown agent.
            ValueError: an agent that has ended, is in an open step, is suspended or has rows that
                are not computed yet; or slots of another shape.
        """
        return self._scheduler.restore(agents, slots, self._live)

    def append(self, rows: Mapping[str, TokenIds | Iterator[int]]) -> AppendRecord:
        """Decoded tokens whose rows an engine has computed with attention of its own.

        They count as fed from now on, as if a step had computed them, and `commit` keeps them. A
        row is exact if all rows that it saw are.

        Args:
            rows: per agent the tokens; their rows follow those that the agent has.

        Returns:
            The record that `tokendance.device.Executor.append` runs, before any later one, with the
            rows' keys and values in this order.

        Raises:
            KeyError, TypeError, OutOfPagesError: as of decoded tokens in `KVCollector.step`;
                nothing has changed, but for evictions.
            ValueError: likewise.
        """
        return self._scheduler.append(self._live, rows)

    def suspend(self, agents: str | Iterable[str], *, to: str = "nowhere") -> None:
        """Gives the pages of agents' own rows back: preemption.

        Args:
            agents: one or several.
            to: ``"nowhere"``: the rows are given up, and `resume` plans and computes the agent's
                prompt and output again. Finished Masters stay in the store as long as there is
                room. ``"host"``: own rows are copied to host memory, and the Masters stay held.
                An agent whose rows lie in host memory may be suspended again to ``"nowhere"``.

        Raises:
            KeyError: an unknown agent.
            ValueError: an agent that has ended, is in an open step or has no pages; one that is
                not in decode, for host memory.
            OutOfPagesError: host memory is full; nothing has changed.
        """
        self._scheduler.suspend(self._live, agents, to)

    def resume(self, agents: str | Iterable[str]) -> None:
        """Takes pages for suspended agents again.

        The next steps compute again the rows that were given up; the last of them gives logits
        again. There must also be room for one more decoded row. Without it the agent would be
        suspended again before it gets on.

        Raises:
            KeyError: an unknown agent.
            ValueError: an agent that is not suspended.
            OutOfPagesError: too few pages for all of them; nothing has changed, but for evictions.
        """
        self._scheduler.resume(self._live, agents)

    def pages_to_resume(self, agent: str) -> int:
        """Pages that `resume` of the agent needs, counted as `KVCollector.pages_needed` does."""
        return self._scheduler.pages_to_resume(self._live, agent)

    def commit(
        self,
        agents: str | Iterable[str] | None = None,
        namespace: bytes | str = b"",
        *,
        durable: bool = False,
    ) -> None:
        """Makes what was computed the agents' KV in the store.

        With the source ``"producer"``, or where the output's segment has it, an agent's output
        becomes a Master too: its pages are handed over.

        Args:
            agents: one, several, or (None) all that have not ended.
            namespace: of the segments that outputs become (see `shared`).
            durable: returns when all that the store has committed is on disk, as `DiffStore.flush`.

        Raises:
            KeyError, ValueError: an unknown agent, one that has ended, one whose prefill has not
                finished, one in an open step or without pages, an unknown source of an output, or
                ``durable`` for a store that has no directory; then nothing is committed.
            OSError: the directory cannot be written. The agents are committed all the same; a later
                `DiffStore.flush` makes them durable.
        """
        flush = self._scheduler.flush
        if durable and flush is None:
            raise ValueError("durable: expected a store of DiffStore.open, got one in memory alone")
        self._scheduler.commit(self._live, agents, namespace)
        if durable and flush is not None:
            flush()

    def abort(self, agents: str | Iterable[str] | None = None) -> None:
        """Gives back what the agents (default: all that have not ended) leased.

        If an aborted agent was computing a Master that others need, that Master is still completed,
        and its pages are kept until then. Pages of an agent in an open step are kept until the step
        has ended; it goes on for its other agents.

        Raises:
            KeyError, ValueError: an unknown agent, or one that has ended; then nothing is given
                back.
        """
        self._scheduler.abort(self._live, agents)

    def abandon(self) -> None:
        """Has the plan aborted by the scheduler's next call, whatever goes on at present."""
        self._finalizer.detach()
        self._scheduler.dropped.append(self._live)

    # What was decided and done --------------------------------------------------------------------

    @guarded
    def spans(self, agent: str) -> list[Span]:
        """Where the rows of the agent's prompt come from; the spans tile it.

        Rows that `KeyDeviation` will choose count as reused.

        Raises:
            KeyError: an unknown agent.
            ValueError: an agent that waits for pages, or ended without ever having them.
        """
        phase = self._live.phase(agent)
        if agent not in self._live.decisions:
            raise ValueError(
                f"agent: expected one that has had pages, got {agent!r} ({phase.value})"
            )
        return list(self._live.decisions[agent].spans)

    @property
    @guarded
    def rows(self) -> int:
        """Rows of all prompts that have been decided."""
        return sum(decision.length for decision in self._live.decisions.values())

    @property
    @guarded
    def rows_computed(self) -> float:
        """Prompt rows computed so far, in whole-model rows: row-layers / layers."""
        return self._live.row_layers / self._scheduler.profile.num_layers

    @property
    @guarded
    def pairs_computed(self) -> float:
        """(Query row, visible key) pairs of the prompts attended so far: pair-layers / layers.

        What a sliding window hides is counted too.
        """
        return self._live.pair_layers / self._scheduler.profile.num_layers

    @property
    @guarded
    def stored_bytes(self) -> int:
        """Bytes of the pages that hold the KV of the agents that have not ended.

        What lies in host memory does not count.
        """
        parts = [no_pages()]
        for state in self._live.states:
            if not state.ended:
                parts += [state.own_pages, *[master.pages for master in state.uses.masters]]
        return len(np.unique(np.concatenate(parts))) * self._scheduler.profile.page_bytes

    @property
    @guarded
    def rows_overridden(self) -> int:
        """Rows of Masters that agents' own rows replace."""
        block = self._scheduler.profile.block_size
        states = [state for state in self._live.states if state.agent is not None]
        return sum(len(use.overridden(block)) for state in states for use in state.uses)

    @property
    @guarded
    def master_agents(self) -> list[str]:
        """Agents that compute a Master which another agent reuses."""
        decisions: Sequence[AgentDecision] = list(self._live.decisions.values())
        made = {use.master.serial: one.agent for one in decisions for use in one.made}
        reused = {
            made[master.serial]
            for one in decisions
            for master in one.uses.masters
            if master.serial in made and made[master.serial] != one.agent
        }
        return [agent for agent in self._live.agents if agent in reused]


def _abandon(scheduler: Scheduler, live: LivePlan) -> None:
    scheduler.dropped.append(live)  # garbage may be collected in the middle of anything
    left = [name for name in list(live.agents) if live.phase(name) is not Phase.ENDED]
    if left:
        warnings.warn(
            f"plan: expected commit or abort of every agent before the plan is dropped, got "
            f"{left} left; they are aborted",
            ResourceWarning,
            stacklevel=2,
        )
