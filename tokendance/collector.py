"""`KVCollector`: one collective reuse step for all agents of a round."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import numpy as np

from tokendance.audit import (
    Audit,
    AuditReport,
    CollectorStats,
    Gate,
    Record,
    draw_rows,
    is_drawn,
    judge,
    tell,
)
from tokendance.layout import OptedOut, Source, Sources, lay_out
from tokendance.plan import AgentState, Phase, Plan
from tokendance.rounds import IntArray
from tokendance.segments import Segment, TokenIds, as_token_ids
from tokendance.selection import (
    DEFAULT,
    Everything,
    KeyDeviation,
    LeadingTokens,
    Nothing,
    Selection,
)
from tokendance.step import AgentRows, Step, is_to_compute, rows_for_prefill
from tokendance.store import DiffStore
from tokendance.uncopied import Uncopied


class KVCollector(
    Uncopied, instead="make another KVCollector over a store that DiffStore.load has read"
):
    """Decides what a round reuses and recomputes, and runs it step by step (docs/guide.md).

    Args:
        store: where Masters and Mirrors are kept.
        source: where the Master of a segment that is not stored comes from. ``"master"``: one agent
            of the round computes it in its own prompt, so that the attention between the shared
            segments is kept. ``"alone"``: it is computed without any context, as
            position-independent caching does (EPIC, CacheBlend); no trace of an agent's private
            context reaches another. ``"producer"``: as ``"master"``, and decoded outputs become
            Masters as their agents computed them. Or a function that says so of each segment: of
            the shared ones of a round that is planned, and of decoded outputs when they are
            committed. One that answers ``"producer"`` for outputs and ``"alone"`` for the rest has
            what agents wrote as they wrote it, and what they were given without a context.
        selection: which reused rows are recomputed; default ``LeadingTokens(4, unseen=96)``.
        gate: what `audit` may find before it warns, or makes agents and segments fall back.

    Raises:
        ValueError: an unknown source, selection or gate.
    """

    def __init__(
        self,
        store: DiffStore,
        source: str | Callable[[Segment], str] = "master",
        selection: Selection | None = None,
        gate: Gate | None = None,
    ) -> None:
        known = [one.value for one in Source]
        if not callable(source) and source not in known:
            raise ValueError(f"source: expected one of {known}, got {source!r}")
        selection = DEFAULT if selection is None else selection
        if not isinstance(selection, LeadingTokens | KeyDeviation | Everything | Nothing):
            raise ValueError(
                "selection: expected LeadingTokens, KeyDeviation, Everything or Nothing, "
                f"got {selection!r}"
            )
        if gate is not None and not isinstance(gate, Gate):
            raise ValueError(f"gate: expected a Gate, got {gate!r}")
        self.store = store
        self.source: Sources = source if callable(source) else Source(source)
        self.selection = selection
        self.gate = gate
        self._opted_out = OptedOut()
        self._record = Record()
        self._audits = 0

    def plan(self, prompts: Mapping[str, Iterable[Segment]]) -> Plan:
        """Matches the prompts with the store and with each other, and leases the round's pages.

        Args:
            prompts: per agent the segments of its prompt, made by `private` and `shared`. Any
                number of agents; any lengths, orders, subsets and repeats. An agent's own earlier
                KV is taken over as far as the prompt begins with the same tokens.

        Raises:
            TypeError: something else than segments.
            ValueError: an agent's name is no str, a prompt is longer than the rotation tables, or
                an unknown source of a segment.
            OutOfPagesError: the store has too few pages; it is as it was, but for evictions.
        """
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
        layouts = lay_out(
            tuples,
            self.store.find,
            self.store.mirrors,
            self.selection,
            self.source,
            self.store.block_size,
            self.store.max_position,
            self._opted_out,
        )
        return Plan(self.store, layouts, tuples, self.selection, self.source)

    def prefill(self, plan: Plan, max_rows: int = 8192) -> Iterator[Step]:
        """The steps that compute the plan's prompts.

        A row's visible keys lie in its own or an earlier step. Enter and finish each step before
        the next is asked for, unless an agent in it was aborted: then it can no longer be entered,
        and the next step has its other rows. With `KeyDeviation` all rows of an agent are in one
        step, however many.

        Args:
            max_rows: rows of a step at most.

        Raises:
            ValueError: ``max_rows < 1``, a plan that has been prefilled or is of another store, or
                a step left unfinished.
        """
        self._check_plan(plan)
        if max_rows < 1:
            raise ValueError(f"max_rows: expected at least 1, got {max_rows}")
        plan.begin_prefill()
        return self._steps(plan, max_rows)

    def _steps(self, plan: Plan, max_rows: int) -> Iterator[Step]:
        while parts := _next_rows(plan, max_rows):
            states = [state for state, _ in parts]
            yield Step(plan, states, partial(rows_for_prefill, parts), decode=False)
            if all(is_to_compute(state, positions) for state, positions in parts):
                raise ValueError("step: expected each step to be run before the next, got one left")

    def decode(self, plan: Plan, token_ids: Mapping[str, TokenIds | Iterator[int]]) -> Step:
        """A step that feeds one or more tokens to any subset of the plan's agents.

        Args:
            token_ids: per agent the tokens to feed; several are a draft, see `Plan.truncate`.

        Raises:
            KeyError: an unknown agent.
            TypeError: token ids that are no integers.
            ValueError: a plan of another store; an agent has ended or is still in prefill, has no
                tokens to feed, or would grow beyond the rotation tables; a token id out of range.
            OutOfPagesError: on entering the step; then the plan is as it was.
        """
        self._check_plan(plan)
        fed: list[tuple[AgentState, list[int]]] = []
        for agent, ids in token_ids.items():
            state = plan.state(agent)
            if state.phase is not Phase.DECODE:
                raise ValueError(
                    f"token_ids: expected a finished prefill, got {agent!r} in prefill"
                )
            given = list(ids) if isinstance(ids, Iterator) else ids
            tokens = as_token_ids(given, f"token_ids[{agent!r}]").tolist()
            if not tokens:
                raise ValueError(f"token_ids[{agent!r}]: expected at least one token, got none")
            self._check_room(state, len(tokens))
            fed.append((state, tokens))

        def make_rows() -> list[AgentRows]:
            rows = []
            for state, tokens in fed:
                begin = state.length
                self._check_room(state, len(tokens))
                plan.extend(state, tokens)
                positions = np.arange(begin, state.length, dtype=np.int32)
                rows.append(AgentRows(state, positions, np.array(tokens, np.int64)))
            return rows

        return Step(plan, [state for state, _ in fed], make_rows, decode=True)

    def _check_plan(self, plan: Plan) -> None:
        if plan.store is not self.store:
            raise ValueError("plan: expected one of this collector's store, got another's")

    def _check_room(self, state: AgentState, count: int) -> None:
        if state.length + count > self.store.max_position:
            raise ValueError(
                f"token_ids[{state.layout.agent!r}]: expected positions below "
                f"{self.store.max_position}, got {state.length + count - 1}"
            )

    # The gate ------------------------------------------------------------------------------------

    def opt_out(
        self, agents: str | Iterable[str] = (), segments: Iterable[Segment | bytes] = ()
    ) -> None:
        """From the next plan on, computes agents or segments as `Everything` does.

        An agent that has opted out takes over only exact rows, its own earlier ones too; a segment
        is computed in every prompt in which it would not be reused exactly. What such an agent
        computes may still become a Master that others reuse: an agent that must not give either
        has its segments made by `private`.

        Args:
            agents: names, known or not yet.
            segments: or their digests.
        """
        names, digests = _names_and_digests(agents, segments)
        opted = self._opted_out
        self._opted_out = OptedOut(opted.agents | names, opted.segments | digests)

    def opt_in(
        self, agents: str | Iterable[str] = (), segments: Iterable[Segment | bytes] = ()
    ) -> None:
        """Ends `opt_out`, also where the gate has called it; who has not opted out stays in."""
        names, digests = _names_and_digests(agents, segments)
        opted = self._opted_out
        self._opted_out = OptedOut(opted.agents - names, opted.segments - digests)

    @property
    def opted_out(self) -> OptedOut:
        """The agents and the segments' digests that are computed."""
        return self._opted_out

    def audit(
        self,
        plan: Plan,
        agents: str | Iterable[str] | None = None,
        fraction: float = 1.0,
        seed: int = 0,
        tokens: int = 16,
        rows: float = 1.0,
    ) -> Audit:
        """Full recompute of a sample of a plan's agents, to be run like a prefill.

        It computes all rows of a sampled prompt, so that audits cost ``fraction`` of full prefill
        on average, and leases the pages of one prompt at a time. Neither the plan nor the store
        changes, but for evictions.

        With ``rows < 1`` it computes a sample of each prompt's rows, for that share of the cost,
        and its last row and decoded tokens. They attend to the round's rows wherever no row is
        sampled: what is found is how far the sampled rows are from their own repair, and how much
        the distributions would move by it; both are less than what full recompute shows.

        Args:
            plan: prefilled before the audit is run, and not committed or aborted.
            agents: whom to draw from; None: those whose prompts hold inexact rows.
            fraction: the chance of each to be drawn. 1 draws all.
            seed: the same draws for the same seed, collector history and names.
            tokens: decoded tokens of each agent that are compared as well, at most.
            rows: the chance of each row of a drawn agent's prompt to be recomputed.

        Raises:
            KeyError: an unknown agent.
            ValueError: an agent that has ended, or a number that is out of range.
        """
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction: expected 0 < fraction <= 1, got {fraction}")
        if not 0 < rows <= 1:
            raise ValueError(f"rows: expected 0 < rows <= 1, got {rows}")
        if seed < 0:
            raise ValueError(f"seed: expected at least 0, got {seed}")
        if tokens < 0:
            raise ValueError(f"tokens: expected at least 0, got {tokens}")
        self._check_plan(plan)
        if agents is None:
            active = [name for name in plan.agents if plan.is_active(name)]
            states = {name: plan.state(name) for name in active}
            names = [n for n, state in states.items() if state.exact_length < state.length]
        else:
            wanted = [agents] if isinstance(agents, str) else list(agents)
            states = {name: plan.state(name) for name in wanted}
            names = [name for name in plan.agents if name in states]
        drawn = [name for name in names if is_drawn(name, fraction, seed, self._audits)]
        draw = partial(draw_rows, fraction=rows, seed=seed, number=self._audits)
        self._audits += 1
        return Audit(self, plan, drawn, tokens, draw if rows < 1 else None, self._finish_audit)

    def _finish_audit(self, report: AuditReport) -> AuditReport:
        if self.gate is not None:
            report = judge(self.gate, report.agents)
        self.opt_out(report.fallen_agents, report.fallen_segments)
        self._record.add(report)
        tell(report)
        return report

    def stats(self) -> CollectorStats:
        """What audits have cost and found, and who is computed because of it."""
        return self._record.stats(len(self._opted_out.agents), len(self._opted_out.segments))


def _names_and_digests(
    agents: str | Iterable[str], segments: Iterable[Segment | bytes]
) -> tuple[frozenset[str], frozenset[bytes]]:
    names = [agents] if isinstance(agents, str) else list(agents)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"agents: expected names, got {type(name).__name__}")
    if isinstance(segments, Segment | bytes):
        segments = [segments]
    digests = []
    for segment in segments:
        if not isinstance(segment, Segment | bytes):
            raise TypeError(
                f"segments: expected segments or their digests, got {type(segment).__name__}"
            )
        digests.append(segment.digest if isinstance(segment, Segment) else segment)
    return frozenset(names), frozenset(digests)


def _next_rows(plan: Plan, max_rows: int) -> list[tuple[AgentState, IntArray]]:
    """The next rows of the plan in the order of computing, at most ``max_rows``.

    An agent whose rows are chosen while the round runs is not divided.
    """
    parts: list[tuple[AgentState, IntArray]] = []
    room = max_rows
    for state in plan.states:
        if state.phase is not Phase.PREFILL:
            continue
        if room <= 0:
            break
        state.settle(plan.chosen, plan.store.block_size)
        positions = state.pending
        rows = len(positions)
        if state.candidates:
            rows += sum(use.length for use in state.candidates)
            if parts and rows > room:
                break  # the rows so far may choose this agent's rows too
        else:
            positions = positions[:room]
            rows = len(positions)
        if rows:
            parts.append((state, positions))
        room -= rows
    return parts
