"""One step on the host: which rows it has, and what follows when it is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tokendance.host.agent import AgentState
from tokendance.host.guard import Guard, guarded
from tokendance.host.mirror import Use, slots_of
from tokendance.host.plan import LivePlan
from tokendance.host.record import Choice, PackedRound, StepRecord, pack_round
from tokendance.host.round import IntArray, RoundExtents
from tokendance.host.selection import KeyDeviation

if TYPE_CHECKING:
    from tokendance.host.scheduler import Scheduler


@dataclass(eq=False)
class StepPart:
    """Rows of one agent in a step.

    Attributes:
        plan, state: whose rows they are.
        positions: int32, ascending.
        begin: length of the agent before a decode step; -1 for rows of a prefill. Rows before it
            are there already.
        is_asked: whether the agent was asked for; otherwise one that was waits for its rows.
    """

    plan: LivePlan
    state: AgentState
    positions: IntArray
    begin: int
    is_asked: bool = True

    @property
    def is_decode(self) -> bool:
        return self.begin >= 0

    @property
    def slots(self) -> NDArray[np.int64]:
        """Pool rows that keep the rows; -1 for those that nothing keeps, or that are kept."""
        slots = self.state.slots(self.positions)
        slots[self.positions < self.begin] = -1
        return slots


class PlannedStep:
    """A step that was planned, and is to be finished, failed or cancelled; made by a `Scheduler`.

    Attributes:
        record: for the device half.
        number: of the record.
        is_open: whether it has not ended.
        agents: name of every row's agent; None for what is computed for no agent.
        logit_agents: the agents of ``record.logit_rows``.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        parts: list[StepPart],
        number: int,
        capacity: RoundExtents | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._parts = parts
        self.number = number
        self._capacity = capacity
        self._before: list[tuple[int, int]] | None = None  # rows and pairs before a choice
        self.is_open = True
        self.record = self._make_record()

    @property
    def agents(self) -> list[str | None]:
        return [part.state.agent for part in self._parts for _ in part.positions]

    @property
    def logit_agents(self) -> list[str]:
        agents = self.agents
        found = [agents[row] for row in self.record.logit_rows]
        return [name for name in found if name is not None]

    @property
    def guard(self) -> Guard:
        return self._scheduler.guard

    def _make_record(self) -> StepRecord:
        block = self._scheduler.profile.block_size
        states = [part.state for part in self._parts]
        counts = [len(part.positions) for part in self._parts]
        positions = np.concatenate([part.positions for part in self._parts]).astype(np.int32)
        row_agent = np.repeat(np.arange(len(states), dtype=np.int32), counts)
        self._row_agent = row_agent
        tokens = np.empty(len(positions), dtype=np.int64)
        slots = np.empty(len(positions), dtype=np.int64)
        at = 0
        for part, count in zip(self._parts, counts, strict=True):
            if count == 1 and part.is_decode and part.positions[0] >= part.begin:
                tokens[at], slots[at] = part.state.decoded_row(part.begin)
            else:
                tokens[at : at + count] = part.state.token_ids(part.positions)
                slots[at : at + count] = part.slots
            at += count
        first = np.array([_first_wanted(part) for part in self._parts], dtype=np.int64)
        logit_rows = np.flatnonzero(positions >= first[row_agent]).astype(np.int64)
        choices = _choices(self._parts, block)
        record = StepRecord(
            number=self.number,
            token_ids=tokens,
            positions=positions,
            slots=slots,
            logit_rows=logit_rows,
            rounds={},
            choices=[choice for _, _, choice in choices],
        )
        self._chooses = [(plan, serial) for plan, serial, _ in choices]
        if choices:
            layers = [
                part.plan.policy.selection.layer
                for part in self._parts
                if part.state.candidates and isinstance(part.plan.policy.selection, KeyDeviation)
            ]
            record.choice_layer = min(max(layers), self._scheduler.profile.num_layers - 1)
        for window in self._scheduler.windows:
            record.rounds[window] = self._pack(record, window)
        return record if self._capacity is None else record.padded(self._capacity.rows)

    def _pack(self, record: StepRecord, window: int) -> PackedRound:
        states = [part.state for part in self._parts]
        profile = self._scheduler.profile
        positions = record.positions[: len(self._row_agent)]
        return pack_round(states, self._row_agent, positions, profile, window, self._capacity)

    @guarded
    def round_of(self, window: int) -> PackedRound:
        """The round with the work list of a sliding window; later steps have it from the start."""
        if window not in self.record.rounds:
            if window not in self._scheduler.windows:
                self._scheduler.windows.append(window)
            self.record.rounds[window] = self._pack(self.record, window)
        return self.record.rounds[window]

    @guarded
    def choose(self, chosen: Sequence[IntArray]) -> StepRecord:
        """Goes on with the rows that were chosen.

        Args:
            chosen: of each of ``record.choices``, the rows of the Master, int32, ascending.

        Returns:
            The record of the layers behind ``record.choice_layer``; `record` from now on.
        """
        if len(chosen) != len(self._chooses):
            raise ValueError(f"chosen: expected {len(self._chooses)} arrays, got {len(chosen)}")
        for (plan, serial), rows in zip(self._chooses, chosen, strict=True):
            plan.chosen[serial] = np.asarray(rows, dtype=np.int32)
        self._before = [_counted(part.positions) for part in self._parts]
        kept, start = [], 0
        for part in self._parts:
            reused = np.isin(part.positions, part.state.rows_to_choose())
            part.state.settle(part.plan.chosen)
            stays = ~reused | np.isin(part.positions, part.state.own_position)
            kept.append(start + np.flatnonzero(stays))
            start += len(part.positions)
            part.positions = part.positions[stays]
        layer = self.record.choice_layer
        self.record = self._make_record()
        self.record.kept = np.concatenate(kept)
        self._choice_layers = layer + 1
        return self.record

    @guarded
    def finish(self) -> None:
        """Counts the step's rows as computed, and lets later plans find the Masters that it
        finished."""
        self._end()
        layers = self._scheduler.profile.num_layers
        for i, part in enumerate(self._parts):
            part.state.busy = False
            if part.is_decode or part.state.ended:
                continue
            rows, pairs = _counted(part.positions)
            before = self._choice_layers if self._before else 0
            part.plan.row_layers += rows * (layers - before)
            part.plan.pair_layers += pairs * (layers - before)
            if self._before:
                part.plan.row_layers += self._before[i][0] * before
                part.plan.pair_layers += self._before[i][1] * before
            finished = part.state.advance(int(part.positions[-1]))
            if not part.plan.is_probe:
                for master in finished:
                    self._scheduler.books.publish(master)
        self._settle()

    @guarded
    def cancel(self) -> None:
        """The step is not run: everything is as before it was planned.

        Its copies are made by the next record: no later one may have been run.
        """
        self._end()
        for part in self._parts:
            part.state.busy = False
            if part.is_decode and not part.state.ended:
                self._scheduler.roster.shorten(part.state, part.begin)
        self._scheduler.take_back(self)
        self._settle()

    def abandon(self) -> None:
        """Has the step cancelled by the scheduler's next call; garbage may be collected in the
        middle of one."""
        self._scheduler.dropped.append(self)

    @guarded
    def fail(self) -> None:
        """Aborts the plans whose agents were asked for: what they wrote is not to be trusted.

        What others only waited for is computed again, by a later step. The record's copies count as
        made.
        """
        self._end()
        for part in self._parts:
            part.state.busy = False
        self._settle()
        for plan in {id(part.plan): part.plan for part in self._parts if part.is_asked}.values():
            self._scheduler.abort(plan, None)

    def _settle(self) -> None:
        """Agents that were aborted meanwhile give their pages back."""
        self._scheduler.roster.settle(part.state for part in self._parts)
        self._scheduler.roster.end_unneeded()

    def _end(self) -> None:
        if not self.is_open:
            raise ValueError("step: expected one that is open, got one that has ended")
        self.is_open = False
        self._scheduler.end_step(self)


def _counted(positions: IntArray) -> tuple[int, int]:
    """Rows, and (row, visible key) pairs."""
    return len(positions), int(positions.sum(dtype=np.int64)) + len(positions)


def _first_wanted(part: StepPart) -> int:
    """First position whose logits are wanted."""
    if part.is_decode:
        return int(part.positions[0])
    if part.state.agent is None:
        return int(np.iinfo(np.int32).max)
    if part.state.output is not None:  # computed again; only the last row's are of any use
        return part.state.length - 1
    return part.state.decision.length - part.state.decision.logit_rows


def _choices(parts: Sequence[StepPart], block_size: int) -> list[tuple[LivePlan, int, Choice]]:
    """What `KeyDeviation` chooses from: one choice for each Master of each plan."""
    groups: dict[tuple[int, int], list[tuple[int, Use]]] = {}
    starts = np.cumsum([0, *[len(part.positions) for part in parts]])
    for i, part in enumerate(parts):
        for use in part.state.candidates:
            groups.setdefault((id(part.plan), use.master.serial), []).append((i, use))
    found = []
    for group in groups.values():
        length = max(use.length for _, use in group)
        fresh = np.full((len(group), length), -1, dtype=np.int64)
        for line, (i, use) in zip(fresh, group, strict=True):
            wanted = np.arange(use.delta, use.delta + use.length, dtype=np.int32)
            line[: use.length] = starts[i] + np.searchsorted(parts[i].positions, wanted)
        plan, master = parts[group[0][0]].plan, group[0][1].master
        selection = plan.policy.selection
        assert isinstance(selection, KeyDeviation)
        slots = slots_of(master.pages, length, block_size)
        at = np.arange(master.origin, master.origin + length, dtype=np.int32)
        choice = Choice(fresh, slots, at, selection.rows_of(length))
        found.append((plan, master.serial, choice))
    return found
