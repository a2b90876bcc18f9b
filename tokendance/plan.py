"""A round in the making: the pages that it leases and the KV that it fills, agent by agent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from enum import Enum
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from typing_extensions import Self

from tokendance.layout import AgentLayout, Origin, Source, Sources, Span, source_of
from tokendance.mirror import (
    Master,
    Mirror,
    Use,
    Uses,
    empty_masks,
    no_pages,
    pages_for,
    slots_at,
    slots_of,
)
from tokendance.rounds import IntArray
from tokendance.segments import Segment, shared
from tokendance.selection import KeyDeviation, Selection
from tokendance.store import DiffStore
from tokendance.uncopied import Uncopied


class Phase(Enum):
    """How far an agent of a plan is."""

    PREFILL = "prefill"  # some of its rows are not computed yet
    DECODE = "decode"
    ENDED = "ended"  # committed or aborted


class AgentState(Mirror):
    """One agent's KV while its round runs: a Mirror that grows.

    Attributes:
        layout: what was decided for the agent.
        phase: how far it is.
        pending: int32, prompt positions that are still to be computed, ascending.
        candidates: uses whose rows `KeyDeviation` has not chosen yet.
        output: the Master that holds the decoded rows, or None before the first.
        output_ids: the decoded tokens that were fed.
        busy: whether an open step has rows of it.
    """

    def __init__(
        self, layout: AgentLayout, own_pages: NDArray[np.int32], carried: IntArray
    ) -> None:
        super().__init__(
            layout.segments,
            layout.length,
            layout.uses,
            own_pages,
            np.concatenate([carried, layout.own]),
            layout.exact_length,
        )
        self.layout = layout
        self.pending: IntArray = layout.own
        if layout.made:
            computed = np.zeros(layout.length, dtype=bool)
            computed[layout.own] = True
            for use in layout.made:
                computed[use.delta : use.delta + use.length] = True
            self.pending = np.flatnonzero(computed).astype(np.int32)
        self.candidates = list(layout.candidates)
        self.phase = Phase.PREFILL if layout.length else Phase.DECODE
        self.output: Master | None = None
        self.output_ids: list[int] = []
        self.busy = False

    def slots(self, positions: IntArray, block_size: int) -> NDArray[np.int64]:
        """Pool rows where the KV of computed rows is kept; -1 for rows that are not kept."""
        slots = np.full(len(positions), -1, dtype=np.int64)
        if len(self.own_position):
            index = np.searchsorted(self.own_position, positions)
            index = np.minimum(index, len(self.own_position) - 1)
            own = self.own_position[index] == positions
            slots[own] = slots_at(self.own_pages, index[own], block_size)
        prompt = positions < self.layout.length
        written = list(self.layout.made) if prompt.any() else []
        if self.output is not None and not prompt.all():
            written.append(self.uses[-1])
        for use in written:
            inside = (positions >= use.delta) & (positions < use.delta + use.length)
            slots[inside] = slots_at(use.master.pages, positions[inside] - use.delta, block_size)
        return slots

    def settle(self, chosen: Mapping[int, IntArray], block_size: int) -> None:
        """Makes the rows that have been chosen, by id of their Master, own rows to be computed.

        Their pages were taken with the plan.
        """
        for use in self.candidates:
            if id(use.master) not in chosen:
                continue
            rows = chosen[id(use.master)]
            rows = rows[rows < use.length]
            use.override(rows, block_size)
            positions = (use.delta + rows).astype(np.int32)
            self.own_position = np.union1d(self.own_position, positions).astype(np.int32)
            self.pending = np.union1d(self.pending, positions).astype(np.int32)
        self.candidates = [use for use in self.candidates if id(use.master) not in chosen]

    def token_ids(self, positions: IntArray) -> NDArray[np.int64]:
        """Tokens at positions of the prompt."""
        return np.concatenate([segment.token_ids for segment in self.segments])[positions].astype(
            np.int64
        )


class Plan(Uncopied, instead="make another by KVCollector.plan, with the same prompts"):
    """A round of requests: made by `KVCollector.plan`, ended agent by agent.

    It holds the Masters that it uses and leases the pages that it fills. Until an agent is
    committed, the store shows nothing of it; after `abort` the store is as it was. As a context
    manager it aborts the agents that have not ended when the block is left.

    Attributes:
        agents: the agents' names, in the order of the prompts.
    """

    def __init__(
        self,
        store: DiffStore,
        layouts: Sequence[AgentLayout],
        agents: Iterable[str],
        selection: Selection,
        source: Sources,
    ) -> None:
        self.store = store
        self.selection = selection
        self.source = source
        self.agents = list(agents)
        self.chosen: dict[int, IntArray] = {}  # rows that KeyDeviation chose, by id of the Master
        self._row_layers = self._pair_layers = 0
        self._prefilling = False
        self.aborted = False  # by an exception in a step
        held = [master for layout in layouts for master in layout.uses.masters]
        store.ledger.hold(held)
        try:
            self._states = self._lease(layouts)
            try:
                self._copy_carried_rows()
            except BaseException:
                for state in self._states:
                    store.ledger.drop_pages(state.own_pages)
                raise
        except BaseException:
            store.ledger.let_go(held)
            raise
        self._by_name = {
            state.layout.agent: state for state in self._states if state.layout.agent is not None
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: object
    ) -> None:
        if kind is None:
            self.abort()
        else:
            self.abort_open()

    # Pages ----------------------------------------------------------------------------------------

    def _lease(self, layouts: Sequence[AgentLayout]) -> list[AgentState]:
        """Takes all pages of the round's prompts at once, or none."""
        block = self.store.block_size
        made = [use.master for layout in layouts for use in layout.made]
        carried = [_carried(layout) for layout in layouts]
        chosen = [self._rows_to_choose(layout) for layout in layouts]
        needs = [pages_for(master.length, block) for master in made]
        needs += [
            pages_for(len(mine) + len(layout.own) + more, block) - len(mine) // block
            for layout, mine, more in zip(layouts, carried, chosen, strict=True)
        ]
        pages, ends = self.store.ledger.take_pages(sum(needs)), list(accumulate(needs, initial=0))
        parts = [pages[begin:end].copy() for begin, end in pairwise(ends)]
        for master, mine in zip(made, parts, strict=False):
            master.pages = mine
        states = []
        for layout, mine, fresh in zip(layouts, carried, parts[len(made) :], strict=True):
            full = len(mine) // block
            kept = layout.earlier.own_pages[:full] if layout.earlier else no_pages()
            self.store.ledger.share_pages(kept)
            states.append(AgentState(layout, np.concatenate([kept, fresh]), mine))
        return states

    def _rows_to_choose(self, layout: AgentLayout) -> int:
        if not isinstance(self.selection, KeyDeviation):
            return 0
        return sum(self.selection.rows_of(use.length) for use in layout.candidates)

    def _copy_carried_rows(self) -> None:
        """Own rows of an earlier round that share a page with new ones get a page of their own."""
        block = self.store.block_size
        sources, targets = [], []
        for state in self._states:
            earlier, rows = state.layout.earlier, len(_carried(state.layout))
            if earlier is None or rows % block == 0:
                continue
            begin = rows - rows % block
            sources.append(slots_of(earlier.own_pages, rows, block)[begin:])
            targets.append(slots_of(state.own_pages, rows, block)[begin:])
        if not sources:
            return
        device = self.store.device
        rows_in = torch.from_numpy(np.concatenate(sources)).to(device)
        rows_out = torch.from_numpy(np.concatenate(targets)).to(device)
        pool = self.store.pool
        for layer in range(pool.num_layers):
            self.store.pool.write_rows(
                layer, pool.k_pools[layer], pool.v_pools[layer], rows_out, rows_in
            )

    # What the collector and its steps need
    # ----------------------------------------------------------

    @property
    def states(self) -> Sequence[AgentState]:
        """All agents in the order of computing, segments that are computed alone among them."""
        return self._states

    def state(self, agent: str) -> AgentState:
        """An agent that has not ended. Raises ``KeyError`` or ``ValueError``."""
        if agent not in self._by_name:
            raise KeyError(f"agent: expected one of {self.agents}, got {agent!r}")
        state = self._by_name[agent]
        if state.phase is Phase.ENDED:
            raise ValueError(f"agent: expected one that has not ended, got {agent!r}")
        return state

    def _idle(self, agent: str) -> AgentState:
        state = self.state(agent)
        if state.busy:
            raise ValueError(f"agent: expected one that is in no open step, got {agent!r}")
        return state

    def is_active(self, agent: str) -> bool:
        """Whether an agent of the plan has not ended."""
        return self._by_name[agent].phase is not Phase.ENDED

    def begin_prefill(self) -> None:
        if self._prefilling:
            raise ValueError("plan: expected one that has not been prefilled, got one that has")
        self._prefilling = True

    def count_prefill(self, rows: int, pairs: int) -> None:
        """Adds what a step has computed in one layer."""
        self._row_layers += rows
        self._pair_layers += pairs

    def extend(self, state: AgentState, token_ids: Sequence[int]) -> None:
        """Makes room for decoded rows. Raises OutOfPagesError, then nothing has changed."""
        block = self.store.block_size
        length = len(state.output_ids) + len(token_ids)
        pages = state.output.pages if state.output else no_pages()
        fresh = self.store.ledger.take_pages(pages_for(length, block) - len(pages))
        if state.output is None:
            exact = state.exact_length == state.length
            seen = frozenset(one.digest for one in state.segments if one.is_shared)
            state.output = Master(b"", 0, state.length, state.layout.context, exact, seen)
            self.store.ledger.hold([state.output])
        state.output.pages = np.concatenate([pages, fresh])
        state.output_ids += token_ids
        self._set_output_length(state, length)

    def _set_output_length(self, state: AgentState, length: int) -> None:
        assert state.output is not None
        state.output.length = length
        state.length = state.layout.length + length
        block = self.store.block_size
        use = Use(state.output, state.layout.length, length, empty_masks(length, block))
        state.uses = state.layout.uses.followed_by(Uses.of([use], block))
        if state.output.exact:
            state.exact_length = state.length

    # The engine's view ----------------------------------------------------------------------------

    def length(self, agent: str) -> int:
        """Rows of the agent's prompt and output so far."""
        return self.state(agent).length

    def output(self, agent: str) -> list[int]:
        """The agent's decoded tokens that were fed."""
        return list(self.state(agent).output_ids)

    def spans(self, agent: str) -> list[Span]:
        """Where the rows of the agent's prompt come from; the spans tile it.

        Rows that `KeyDeviation` will choose count as reused.
        """
        return list(self._by_name[agent].layout.spans)

    @property
    def rows(self) -> int:
        """Rows of all prompts."""
        return sum(self._by_name[agent].layout.length for agent in self.agents)

    @property
    def rows_computed(self) -> float:
        """Prompt rows computed so far, in whole-model rows: row-layers / layers."""
        return self._row_layers / self.store.geometry.num_layers

    @property
    def pairs_computed(self) -> float:
        """(Query row, visible key) pairs of the prompts attended so far: pair-layers / layers.

        What a sliding window hides is counted too.
        """
        return self._pair_layers / self.store.geometry.num_layers

    @property
    def stored_bytes(self) -> int:
        """Bytes of the pages that hold the KV of the agents that have not ended."""
        parts = [no_pages()]
        for state in self._states:
            if state.phase is not Phase.ENDED:
                parts += [state.own_pages, *[master.pages for master in state.uses.masters]]
        return len(np.unique(np.concatenate(parts))) * self.store.pool.page_bytes

    @property
    def rows_overridden(self) -> int:
        """Rows of Masters that agents' own rows replace."""
        block = self.store.block_size
        return sum(len(use.overridden(block)) for state in self._states for use in state.uses)

    @property
    def master_agents(self) -> list[str]:
        """Agents that compute a Master which another agent reuses."""
        made = {
            id(use.master): state.layout.agent
            for state in self._states
            for use in state.layout.made
        }
        reused = [
            made[id(master)]
            for state in self._states
            for master in state.layout.uses.masters
            if id(master) in made and made[id(master)] != state.layout.agent
        ]
        return [agent for agent in self.agents if agent in set(reused)]

    def truncate(self, agent: str, length: int) -> None:
        """Forgets the agent's rows from position ``length`` on: rejected drafts.

        Raises:
            KeyError: an unknown agent.
            ValueError: the agent has ended or is in an open step, or ``length`` is not between
                prompt and present length.
        """
        state = self._idle(agent)
        if not state.layout.length <= length <= state.length:
            raise ValueError(
                f"length: expected {state.layout.length}..{state.length}, got {length}"
            )
        self.shorten(state, length)

    def shorten(self, state: AgentState, length: int) -> None:
        """Undoes `extend` down to a length between that of the prompt and the present one."""
        if state.output is None:
            return
        kept = length - state.layout.length
        pages = state.output.pages
        needed = pages_for(kept, self.store.block_size)
        state.output.pages = pages[:needed]
        self.store.ledger.drop_pages(pages[needed:])
        del state.output_ids[kept:]
        self._set_output_length(state, kept)
        if kept == 0:
            state.uses = state.layout.uses
            self.store.ledger.let_go([state.output])
            state.output = None

    def commit(
        self, agents: str | Iterable[str] | None = None, namespace: bytes | str = b""
    ) -> None:
        """Makes what was computed the agents' KV in the store, and its Masters visible to others.

        With the source ``"producer"``, or where the output's segment has it, an agent's output
        becomes a Master too: its pages are handed over.

        Args:
            agents: one, several, or (None) all that have not ended.
            namespace: of the segments that outputs become (see `shared`).

        Raises:
            KeyError, ValueError: an unknown agent, one that has ended, one whose prefill has not
                finished, one in an open step, or an unknown source of an output; then nothing is
                committed.
        """
        states = [(name, self._idle(name)) for name in self._names(agents)]
        for name, state in states:
            if state.phase is Phase.PREFILL:
                raise ValueError(f"agents: expected a finished prefill, got {name!r} in prefill")
        outputs = {
            name: shared(state.output_ids, namespace=namespace)
            for name, state in states
            if state.output is not None
        }
        sources = {name: source_of(self.source, output) for name, output in outputs.items()}
        for name, state in states:
            segments: tuple[Segment, ...] = state.segments
            if state.output is not None:
                segments = (*segments, outputs[name])
                if sources[name] is Source.PRODUCER:
                    state.output.digest = outputs[name].digest
            for master in state.uses.masters:
                if master.digest:
                    self.store.ledger.publish(master)
            mirror = Mirror(
                segments,
                state.length,
                state.uses,
                state.own_pages,
                state.own_position,
                state.exact_length,
            )
            self.store.ledger.put(name, mirror)
            self._let_go(state)
        self.end_unneeded()

    def abort(self, agents: str | Iterable[str] | None = None) -> None:
        """Gives back what the agents (default: all that have not ended) leased.

        Masters that an agent made outlive it. In prefill, its rows up to the last Master that
        another agent waits for are still computed, for no agent, and its pages are kept until then.

        Raises:
            KeyError, ValueError: an unknown agent, one that has ended, or one in an open step
                (which an exception aborts); then nothing is given back.
        """
        states = [(name, self._idle(name)) for name in self._names(agents)]
        if any(state.busy for state in self._states if state.layout.agent is None):
            raise ValueError("agents: expected no open step with rows of no agent, got one")
        self._give_up(states)

    def abort_open(self) -> None:
        """Aborts all agents that have not ended, those in open steps too."""
        for state in self._states:
            state.busy = False
        self._give_up([(name, self.state(name)) for name in self._names(None)])
        self.aborted = True

    def _give_up(self, states: Iterable[tuple[str, AgentState]]) -> None:
        for name, state in states:
            if state.phase is Phase.PREFILL and state.layout.made:
                self._by_name[name] = copy(state)
                self._by_name[name].phase = Phase.ENDED
                state.layout = replace(state.layout, agent=None)
            else:
                self._give_back(state)
        self.end_unneeded()

    def end_unneeded(self) -> None:
        """Ends what is computed for no agent where no agent waits for it."""
        if not any(s.layout.agent is None and s.phase is not Phase.ENDED for s in self._states):
            return
        awaited: set[int] = set()  # Masters that states further back in the order of computing use
        for state in reversed(self._states):
            if state.phase is Phase.ENDED:
                continue
            if state.layout.agent is None and not state.busy:
                ends = [u.delta + u.length for u in state.layout.made if u.master.serial in awaited]
                end = max(ends, default=0)
                state.pending = state.pending[state.pending < end]
                state.candidates = [use for use in state.candidates if use.delta < end]
                if state.phase is not Phase.PREFILL or not len(state.pending):
                    self._give_back(state)
                    continue
            awaited.update(state.uses.serial.tolist())

    def _names(self, agents: str | Iterable[str] | None) -> list[str]:
        if agents is None:
            return [name for name in self.agents if self._by_name[name].phase is not Phase.ENDED]
        return [agents] if isinstance(agents, str) else list(dict.fromkeys(agents))

    def _give_back(self, state: AgentState) -> None:
        self.store.ledger.drop_pages(state.own_pages)
        self._let_go(state)

    def _let_go(self, state: AgentState) -> None:
        state.phase = Phase.ENDED
        state.pending = state.pending[:0]
        self.store.ledger.let_go(state.uses.masters)

    @property
    def ended(self) -> bool:
        """Whether all agents have been committed or aborted."""
        return all(self._by_name[name].phase is Phase.ENDED for name in self.agents)


def _carried(layout: AgentLayout) -> IntArray:
    """Positions of the own rows that are taken over from the agent's earlier KV."""
    if layout.earlier is None:
        return np.empty(0, dtype=np.int32)
    position = layout.earlier.own_position
    return position[: int(np.searchsorted(position, layout.prefix))]


__all__ = ["AgentState", "Origin", "Phase", "Plan", "Span"]
