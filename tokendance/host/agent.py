"""One agent while its round runs: a Mirror that grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from itertools import count

import numpy as np
from numpy.typing import NDArray

from tokendance.host.decide import AgentDecision
from tokendance.host.mirror import (
    Master,
    Mirror,
    Pages,
    Use,
    Uses,
    empty_masks,
    no_pages,
    no_positions,
    pages_for,
    rows_of_pages,
    slots_at,
)
from tokendance.host.round import IntArray
from tokendance.host.segments import told_apart


class Phase(Enum):
    """How far an agent of a plan is."""

    WAITING = "waiting"  # its prompt has no pages yet
    PREFILL = "prefill"  # some of its rows are not computed yet
    DECODE = "decode"
    SUSPENDED = "suspended"  # its own rows have no pages on the device
    ENDED = "ended"  # committed or aborted


class Copying(Enum):
    """Whether copies of an agent's rows are outstanding."""

    NONE = "none"
    ORDERED = "ordered"  # by the call that runs: it makes them before it returns
    RUNNING = "running"


class AgentState(Mirror):
    """One agent's KV while its round runs.

    Attributes:
        agent: its name; None for what is computed for no agent: a segment without context, or the
            Masters of an agent that was aborted.
        decision: what was decided for the agent.
        serial: a number that grows with every state: rows never see rows of a later one.
        pending: int32, positions that are still to be computed, ascending.
        made: uses of Masters that this state computes or has computed.
        candidates: uses whose rows `KeyDeviation` has not chosen yet.
        awaited: uses of Masters that another state is still computing.
        output: the Master that holds the decoded rows, or None before the first.
        output_ids: the decoded tokens that were fed.
        busy: whether an open step has rows of it.
        copying: whether its rows are being copied.
        host_pages: where its own pages lie in host memory while it is suspended, or None.
    """

    def __init__(
        self,
        decision: AgentDecision,
        own_pages: Pages,
        carried: IntArray,
        block_size: int,
        serials: count[int],
    ) -> None:
        super().__init__(
            decision.segments,
            decision.length,
            decision.uses,
            own_pages,
            np.concatenate([carried, decision.own]),
            decision.exact_length,
        )
        self.agent = decision.agent
        self.decision = decision
        self.serial = next(serials)
        self.pending: IntArray = decision.own
        self.made = list(decision.made)
        if decision.made:
            computed = np.zeros(decision.length, dtype=bool)
            computed[decision.own] = True
            for use in decision.made:
                computed[use.delta : use.delta + use.length] = True
            self.pending = np.flatnonzero(computed).astype(np.int32)
        made = {use.master.serial for use in decision.made}
        self.awaited = [
            decision.uses[i]
            for i, master in enumerate(decision.uses.masters)
            if not master.is_computed and master.serial not in made
        ]
        self.candidates = list(decision.candidates)
        self.output: Master | None = None
        self.output_ids: list[int] = []
        self.busy = False
        self.copying = Copying.NONE
        self.ended = False
        self.host_pages: Pages | None = None
        self._own_pages_left = 0
        self._block_size = block_size

    @property
    def phase(self) -> Phase:
        if self.ended:
            return Phase.ENDED
        if self.host_pages is not None:
            return Phase.SUSPENDED
        return Phase.PREFILL if len(self.pending) else Phase.DECODE

    @property
    def is_taken(self) -> bool:
        """Whether it can take part in nothing else: an open step has it, or a copy."""
        return self.busy or self.copying is Copying.RUNNING

    @property
    def keeps_pages(self) -> bool:
        """Whether something reads or writes its pages, or is going to."""
        return self.busy or self.copying is not Copying.NONE

    # Rows -----------------------------------------------------------------------------------------

    def slots(self, positions: IntArray) -> NDArray[np.int64]:
        """Pool rows where the KV of computed rows is kept; -1 for rows that are not kept."""
        behind = positions - self.decision.length
        if self.output is not None and len(behind) and behind[0] >= 0:  # as in every decode step
            return slots_at(self.output.pages, behind, self._block_size)
        slots = np.full(len(positions), -1, dtype=np.int64)
        if len(self.own_position):
            index = np.searchsorted(self.own_position, positions)
            index = np.minimum(index, len(self.own_position) - 1)
            own = self.own_position[index] == positions
            slots[own] = slots_at(self.own_pages, index[own], self._block_size)
        prompt = positions < self.decision.length
        written = list(self.made) if prompt.any() else []
        if self.output is not None and not prompt.all():
            written.append(self.uses[-1])
        for use in written:
            inside = (positions >= use.delta) & (positions < use.delta + use.length)
            rows = positions[inside] - use.delta
            slots[inside] = slots_at(use.master.pages, rows, self._block_size)
        return slots

    def decoded_row(self, position: int) -> tuple[int, int]:
        """The token at a position of the output, and the pool row where its KV is kept."""
        assert self.output is not None
        row = position - self.decision.length
        page, offset = divmod(row, self._block_size)
        return self.output_ids[row], int(self.output.pages[page]) * self._block_size + offset

    def token_ids(self, positions: IntArray) -> NDArray[np.int64]:
        """Tokens at positions of the prompt and of the output so far."""
        behind = positions - self.decision.length
        if len(behind) and behind[0] >= 0:  # the prompt is left alone: it may be long
            return np.array([self.output_ids[row] for row in behind], dtype=np.int64)
        parts = [segment.token_ids for segment in self.segments]
        output = np.array(self.output_ids, dtype=np.int64)
        return np.concatenate([no_positions(), *parts, output])[positions].astype(np.int64)

    def rows_to_choose(self) -> IntArray:
        """Positions of the rows that `KeyDeviation` chooses from."""
        parts = [
            np.arange(use.delta, use.delta + use.length, dtype=np.int32) for use in self.candidates
        ]
        return np.concatenate([no_positions(), *parts])

    def settle(self, chosen: Mapping[int, IntArray]) -> None:
        """Makes the rows that have been chosen, by serial of their Master, own rows to be computed.

        Their pages were taken with the plan.
        """
        for use in self.candidates:
            if use.master.serial not in chosen:
                continue
            rows = chosen[use.master.serial]
            rows = rows[rows < use.length]
            use.override(rows, self._block_size)
            positions = (use.delta + rows).astype(np.int32)
            self.own_position = np.union1d(self.own_position, positions).astype(np.int32)
            self.pending = np.union1d(self.pending, positions).astype(np.int32)
        self.candidates = [use for use in self.candidates if use.master.serial not in chosen]
        if self.output is not None:
            self._use_output()  # the masks that have changed are the prompt's

    def first_unseeable(self, available: Mapping[int, int]) -> int:
        """The first position that sees a Master's row that nobody has computed yet.

        Args:
            available: by serial, rows of Masters that are computed by the end of a step, of those
                that are not just what `Master.computed` says.
        """
        self.awaited = [use for use in self.awaited if not use.master.is_computed]
        first = int(np.iinfo(np.int32).max)
        for use in self.awaited:
            rows = available.get(use.master.serial, use.master.computed)
            if rows < use.length:
                first = min(first, use.delta + rows)
        return first

    def computed_of(self, use: Use, pending: IntArray) -> int:
        """Rows of a Master that this agent makes, when only ``pending`` is left to be computed."""
        inside = pending[(pending >= use.delta) & (pending < use.delta + use.length)]
        return int(inside[0]) - use.delta if len(inside) else use.length

    def advance(self, last: int) -> list[Master]:
        """Counts rows up to position ``last`` as computed; returns the Masters that are finished
        by it."""
        self.pending = self.pending[self.pending > last]
        finished: list[Master] = []
        for use in self.made:
            if not use.master.is_computed:
                use.master.computed = self.computed_of(use, self.pending)
                if use.master.is_computed:
                    finished.append(use.master)
        return finished

    def give_up_from(self, end: int) -> list[Master]:
        """Nothing from position ``end`` on is computed any more; returns the Masters that will
        never be."""
        self.pending = self.pending[self.pending < end]
        self.candidates = [use for use in self.candidates if use.delta < end]
        lost = [one for one in self.made if one.delta >= end and not one.master.is_computed]
        self.made = [one for one in self.made if one.delta < end or one.master.is_computed]
        return [use.master for use in lost]

    # Output ---------------------------------------------------------------------------------------

    def pages_to_extend(self, tokens: int) -> int:
        """Pages that so many more decoded rows need."""
        pages = len(self.output.pages) if self.output else 0
        return pages_for(len(self.output_ids) + tokens, self._block_size) - pages

    @property
    def pages_to_go_on(self) -> int:
        """Pages that one more decoded row needs, of an agent in host memory too."""
        rows = len(self.output_ids)
        return pages_for(rows + 1, self._block_size) - pages_for(rows, self._block_size)

    def extend(self, token_ids: Sequence[int], pages: Pages) -> Master | None:
        """Appends decoded tokens, whose rows go to the last pages and ``pages``.

        Returns:
            The Master of the output if this call made it: it is to be held.
        """
        made = None
        if self.output is None:
            exact = self.exact_length == self.length
            seen = frozenset(one.digest for one in told_apart(self.segments) if one.is_shared)
            origin, context = self.length, self.decision.context
            made = self.output = Master(b"", 0, origin, context, exact, seen)
        self.output.pages = np.concatenate([self.output.pages, pages])
        self.output_ids += token_ids
        self._set_output_length()
        return made

    def shorten(self, length: int) -> tuple[Pages, Master | None]:
        """Undoes `extend` down to a length between that of the prompt and the present one.

        Returns:
            Pages to be given back, and the output's Master if there is none any more.
        """
        if self.output is None:
            return no_pages(), None
        kept = length - self.decision.length
        needed = pages_for(kept, self._block_size)
        pages = self.output.pages[needed:]
        self.output.pages = self.output.pages[:needed]
        del self.output_ids[kept:]
        self._set_output_length()
        if kept:
            return pages, None
        self.uses = self.decision.uses
        gone, self.output = self.output, None
        return pages, gone

    def _set_output_length(self) -> None:
        assert self.output is not None
        before, length = self.output.length, len(self.output_ids)
        self.output.length = self.output.computed = length
        self.length = self.decision.length + length
        if before and pages_for(before, self._block_size) == pages_for(length, self._block_size):
            self.uses.length[-1] = length  # nobody else has these uses before the agent ends
        else:
            self._use_output()
        if self.output.exact:
            self.exact_length = self.length

    def _use_output(self) -> None:
        assert self.output is not None
        length = self.output.length
        use = Use(self.output, self.decision.length, length, empty_masks(length, self._block_size))
        self.uses = self.decision.uses.followed_by(Uses.of([use], self._block_size))

    def recompute_output(self) -> None:
        """The output's rows are computed again, behind the prompt's."""
        rows = np.arange(self.decision.length, self.length, dtype=np.int32)
        self.pending = np.union1d(self.pending, rows).astype(np.int32)

    # Pages ----------------------------------------------------------------------------------------

    @property
    def private_pages(self) -> Pages:
        """Pages that hold what only this agent has: own rows and the output's."""
        return np.concatenate([self.own_pages, self._output_pages])

    @property
    def _output_pages(self) -> Pages:
        return self.output.pages if self.output else no_pages()

    @property
    def rows_of_private_pages(self) -> IntArray:
        """How many rows each of them has."""
        output = self.output.length if self.output else 0
        parts = ((self.own_pages, len(self.own_position)), (self._output_pages, output))
        return np.concatenate(
            [rows_of_pages(len(pages), rows, self._block_size) for pages, rows in parts]
        )

    def leave(self, host_pages: Pages) -> None:
        """What the private pages hold is in these pages of host memory from now on."""
        self.host_pages = host_pages
        self._own_pages_left = len(self.own_pages)
        self.own_pages = no_pages()
        if self.output is not None:
            self.output.pages = no_pages()

    def come_back(self, pages: Pages) -> None:
        """The private pages are these from now on."""
        self.host_pages = None
        self.own_pages = pages[: self._own_pages_left]
        if self.output is not None:
            self.output.pages = pages[self._own_pages_left :]

    def mirror(self, segments: tuple[object, ...]) -> Mirror:
        """What stays of the agent when it is committed."""
        return Mirror(
            segments,  # type: ignore[arg-type]
            self.length,
            self.uses,
            self.own_pages,
            self.own_position,
            self.exact_length,
        )
