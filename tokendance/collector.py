"""`KVCollector`: one collective reuse step for all agents of a round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from tokendance.layout import Source, lay_out
from tokendance.plan import AgentState, Phase, Plan
from tokendance.rounds import IntArray
from tokendance.segments import Segment
from tokendance.selection import Everything, KeyDeviation, LeadingTokens, Nothing, Selection
from tokendance.step import AgentRows, Step, rows_for_prefill
from tokendance.store import DiffStore


class KVCollector:
    """Decides what a round reuses and recomputes, and runs it step by step (docs/guide.md).

    Args:
        store: where Masters and Mirrors are kept.
        source: where the Master of a segment that is not stored comes from. ``"master"``: one agent
            of the round computes it in its own prompt, so that the attention between the shared
            segments is kept. ``"alone"``: it is computed without any context, as
            position-independent caching does (EPIC, CacheBlend); no trace of an agent's private
            context reaches another. ``"producer"``: as ``"master"``, and decoded outputs become
            Masters as their agents computed them.
        selection: which reused rows are recomputed.

    Raises:
        ValueError: an unknown source or selection.
    """

    def __init__(
        self, store: DiffStore, source: str = "master", selection: Selection | None = None
    ) -> None:
        sources = [known.value for known in Source]
        if source not in sources:
            raise ValueError(f"source: expected one of {sources}, got {source!r}")
        selection = LeadingTokens() if selection is None else selection
        if not isinstance(selection, LeadingTokens | KeyDeviation | Everything | Nothing):
            raise ValueError(
                "selection: expected LeadingTokens, KeyDeviation, Everything or Nothing, "
                f"got {selection!r}"
            )
        self.store = store
        self.source = Source(source)
        self.selection = selection

    def plan(self, prompts: Mapping[str, Sequence[Segment]]) -> Plan:
        """Matches the prompts with the store and with each other, and leases the round's pages.

        Args:
            prompts: per agent the segments of its prompt, made by `private` and `shared`. Any
                number of agents; any lengths, orders, subsets and repeats. An agent's own earlier
                KV is taken over as far as the prompt begins with the same tokens.

        Raises:
            TypeError: something else than segments.
            ValueError: a prompt is longer than the rotation tables.
            OutOfPagesError: the store has too few pages; it is as it was, but for evictions.
        """
        for agent, segments in prompts.items():
            for segment in segments:
                if not isinstance(segment, Segment):
                    raise TypeError(
                        f"prompts[{agent!r}]: expected segments (private(ids), shared(ids)), "
                        f"got {type(segment).__name__}"
                    )
            length = sum(segment.length for segment in segments)
            if length > self.store.max_position:
                raise ValueError(
                    f"prompts[{agent!r}]: expected at most {self.store.max_position} tokens (the "
                    f"rotation tables' positions), got {length}"
                )
        layouts = lay_out(
            prompts,
            self.store.find,
            self.store.mirrors,
            self.selection,
            self.source,
            self.store.block_size,
        )
        return Plan(self.store, layouts, prompts, self.selection, self.source)

    def prefill(self, plan: Plan, max_rows: int = 8192) -> Iterator[Step]:
        """The steps that compute the plan's prompts.

        A row's visible keys lie in its own or an earlier step. Enter and finish each step before
        the next is asked for. With `KeyDeviation` all rows of an agent are in one step, however
        many.

        Args:
            max_rows: rows of a step at most.

        Raises:
            ValueError: ``max_rows < 1``, a plan that has been prefilled, or a step left unfinished.
        """
        if max_rows < 1:
            raise ValueError(f"max_rows: expected at least 1, got {max_rows}")
        plan.begin_prefill()
        return self._steps(plan, max_rows)

    def _steps(self, plan: Plan, max_rows: int) -> Iterator[Step]:
        for parts in _chunks(plan, max_rows):
            todo = sum(len(state.pending) for state in plan.states)
            yield Step(plan, partial(rows_for_prefill, parts), decode=False)
            if plan.ended:
                return
            if sum(len(state.pending) for state in plan.states) == todo:
                raise ValueError("step: expected each step to be run before the next, got one left")

    def decode(self, plan: Plan, token_ids: Mapping[str, Sequence[int]]) -> Step:
        """A step that feeds one or more tokens to any subset of the plan's agents.

        Args:
            token_ids: per agent the tokens to feed; several are a draft, see `Plan.truncate`.

        Raises:
            KeyError: an unknown agent.
            ValueError: an agent has ended or is still in prefill, has no tokens to feed, or would
                grow beyond the rotation tables.
            OutOfPagesError: on entering the step; then the plan is as it was.
        """
        fed: list[tuple[AgentState, list[int]]] = []
        for agent, ids in token_ids.items():
            state = plan.state(agent)
            if state.phase is not Phase.DECODE:
                raise ValueError(
                    f"token_ids: expected a finished prefill, got {agent!r} in prefill"
                )
            tokens = [int(token) for token in ids]
            if not tokens:
                raise ValueError(f"token_ids[{agent!r}]: expected at least one token, got none")
            if state.length + len(tokens) > self.store.max_position:
                raise ValueError(
                    f"token_ids[{agent!r}]: expected positions below {self.store.max_position}, "
                    f"got {state.length + len(tokens) - 1}"
                )
            fed.append((state, tokens))

        def make_rows() -> list[AgentRows]:
            rows = []
            grown: list[tuple[AgentState, int]] = []
            try:
                for state, tokens in fed:
                    begin = state.length
                    plan.extend(state, tokens)
                    grown.append((state, begin))
                    positions = np.arange(begin, state.length, dtype=np.int32)
                    rows.append(AgentRows(state, positions, np.array(tokens, np.int64)))
            except BaseException:
                for state, length in grown:
                    assert state.layout.agent is not None
                    plan.truncate(state.layout.agent, length)
                raise
            return rows

        return Step(plan, make_rows, decode=True)


def _chunks(plan: Plan, max_rows: int) -> Iterator[list[tuple[AgentState, IntArray]]]:
    """Rows of the plan in the order of computing, at most ``max_rows`` at a time.

    An agent whose rows are chosen while the round runs is not divided.
    """
    parts: list[tuple[AgentState, IntArray]] = []
    room = max_rows
    for state in plan.states:
        if state.phase is not Phase.PREFILL:
            continue
        state.settle(plan.chosen, plan.store.block_size)
        if state.candidates:
            rows = len(state.pending) + sum(use.length for use in state.candidates)
            if parts and rows > room:
                yield parts  # which may choose this agent's rows too
                parts, room = [], max_rows
                state.settle(plan.chosen, plan.store.block_size)
        if state.candidates:
            parts.append((state, state.pending))
            room -= rows
            continue
        pending = state.pending
        while len(pending):
            if room <= 0:
                yield parts
                parts, room = [], max_rows
            parts.append((state, pending[:room]))
            pending = pending[room:]
            room -= len(parts[-1][1])
    if parts:
        yield parts
