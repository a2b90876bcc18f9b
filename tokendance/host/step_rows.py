"""Which rows a forward pass has: tokens that are fed, and rows of prompts that see only what is
computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np

from tokendance.host.agent import AgentState, Phase
from tokendance.host.books import Books
from tokendance.host.plan import LivePlan
from tokendance.host.planned_step import StepPart
from tokendance.host.record import DeviceProfile
from tokendance.host.roster import Roster
from tokendance.host.segments import TokenIds, on_host, token_list

Fed: TypeAlias = tuple[LivePlan, AgentState, list[int]]
"""An agent and the tokens that it decodes."""

_NO_END = int(np.iinfo(np.int32).max)  # beyond all positions


class StepRows:
    """Chooses the rows of steps, and makes room for decoded ones.

    Args:
        roster: whose rows are computed.
        books: of the pages.
        profile: of the devices.
    """

    def __init__(self, roster: Roster, books: Books, profile: DeviceProfile) -> None:
        self._roster = roster
        self._books = books
        self._profile = profile

    def fed(self, decode: Mapping[str, TokenIds], argument: str = "decode") -> list[Fed]:
        """Agents in decode, with their tokens. Raises as `Scheduler.step` does."""
        fed = []
        for agent, ids in decode.items():
            self._roster.check([agent])
            live = self._roster.agents[agent]
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
            if state.length + len(tokens) > self._profile.max_position:
                most = self._profile.max_position
                raise ValueError(
                    f"{argument}[{agent!r}]: expected positions below {most}, "
                    f"got {state.length + len(tokens) - 1}"
                )
            fed.append((live, state, tokens))
        return fed

    def with_rows(self, agents: Iterable[str]) -> list[tuple[LivePlan, AgentState]]:
        """Agents in decode that have a row."""
        found = []
        for agent in agents:
            self._roster.check([agent])
            live = self._roster.agents[agent]
            state = self._roster.idle(live, agent)
            if state.phase is not Phase.DECODE or not state.length:
                raise ValueError(
                    f"again: expected agents in decode with a row, got {agent!r} "
                    f"({state.phase.value}, {state.length} rows)"
                )
            found.append((live, state))
        return found

    def extend(self, fed: Sequence[Fed]) -> list[StepPart]:
        """Makes room for decoded rows, of all agents or of none."""
        needs = [state.pages_to_extend(len(tokens)) for _, state, tokens in fed]
        pages = self._books.take_pages(sum(needs))
        parts, at = [], 0
        for (live, state, tokens), need in zip(fed, needs, strict=True):
            begin = state.length
            made = state.extend(tokens, pages[at : at + need])
            at += need
            if made is not None:
                self._books.hold([made])
            positions = np.arange(begin, state.length, dtype=np.int32)
            parts.append(StepPart(live, state, positions, begin))
        return parts

    @contextmanager
    def undone_by_errors(self, decoded: Sequence[StepPart]) -> Iterator[None]:
        """Gives decoded rows' pages back if their step cannot be planned."""
        try:
            yield
        except BaseException:
            for part in decoded:
                self._roster.shorten(part.state, part.begin)
            raise

    def wanted(self, names: Sequence[str]) -> dict[int, int]:
        """By serial, the states of agents and of all that they wait for, each with the position
        up to which its rows are wanted."""
        wanted = {
            self._roster.agents[name].by_name[name].serial: _NO_END
            for name in names
            if name in self._roster.agents[name].by_name
        }
        for serial in sorted(self._roster.states, reverse=True):  # who waits has the larger serial
            for use in self._roster.states[serial].awaited if serial in wanted else ():
                maker = self._roster.makers.get(use.master.serial)
                if maker is None or use.delta >= wanted[serial]:
                    continue
                made = next(one for one in maker.made if one.master is use.master)
                # Rows that are to be chosen are in one step, with all that they see; the agent is
                # not asked for, all the same.
                end = _NO_END - 1 if maker.candidates else made.delta + use.length
                wanted[maker.serial] = max(end, wanted.get(maker.serial, 0))
        return wanted

    def of_prompts(
        self, states: Iterable[AgentState], room: int, wanted: Mapping[int, int] | None
    ) -> list[StepPart]:
        """Rows of prompts, as far as all that they see is computed in this step or before it.

        Args:
            states: in the order of computing.
            room: how many at most; rows of which some will be chosen are one whole.
            wanted: see `wanted`; None: all.
        """
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
            plan = self._roster.plans[state.serial]
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


def extents_of(fed: Sequence[Fed]) -> dict[str, int]:
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


def ids_on_host(decode: Mapping[str, TokenIds | Iterator[int]]) -> dict[str, TokenIds]:
    """Token ids as they are read: nobody waits for a device, or an iterator, at the books."""
    return {
        agent: list(ids) if isinstance(ids, Iterator) else on_host(ids)
        for agent, ids in decode.items()
    }


def with_last_rows(
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
