"""A device that computes nothing: it remembers which token stands in which row of a pool.

It runs the records of a `Scheduler` as a device would, from the packed round alone, and checks that
every row sees its whole prompt, each position once, and only rows that have been computed. Beside
it, `check_books` counts a scheduler's pages and Masters anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from tokendance.host.agent import AgentState
from tokendance.host.books import Books, PageAllocator
from tokendance.host.mirror import Master
from tokendance.host.planned_step import PlannedStep
from tokendance.host.record import Copies, DeviceProfile, PackedRound, StepRecord, WorkShape
from tokendance.host.scheduler import Scheduler

_NOTHING = -1
_WORK = WorkShape(max_tile_rows=32, read_bound_rows=8, target_items=4)


def profile(num_pages: int, host_pages: int = 0, block_size: int = 8) -> DeviceProfile:
    return DeviceProfile(
        num_layers=2,
        num_pages=num_pages,
        block_size=block_size,
        page_bytes=64,
        max_position=4096,
        work=_WORK,
        host_pages=host_pages,
    )


class SymbolicDevice:
    """Rows of a pool and of host memory, each the token and the position that it was written for.

    Args:
        profile: its own.
        copies_at_once: whether copies are made when they are ordered; else by the next record.
    """

    def __init__(self, profile: DeviceProfile, copies_at_once: bool = True) -> None:
        self.profile = profile
        self.rows = np.full((profile.num_pages, profile.block_size, 2), _NOTHING)
        self.host = np.full((profile.host_pages, profile.block_size, 2), _NOTHING)
        self.free = list(range(profile.num_pages))
        self._poisons = copies_at_once
        allocator = PageAllocator(
            profile.num_pages, self._allocate, self.free.extend, self.free.__len__
        )
        copy = self.copy if copies_at_once else None
        self.scheduler = Scheduler(profile, allocator, copy=copy)
        self.ran = -1

    def _allocate(self, count: int) -> list[int] | None:
        if count > len(self.free):
            return None
        pages = [self.free.pop() for _ in range(count)]
        if self._poisons:
            self.rows[pages] = _NOTHING
        return pages

    def copy(self, copies: Sequence[Copies]) -> None:
        for one in copies:
            rows = self.rows.reshape(-1, 2)
            to_host = self.rows[one.to_host[:, 0]].copy()
            to_device = self.host[one.to_device[:, 0]].copy()
            moved = rows[one.rows[:, 0]].copy()
            self.host[one.to_host[:, 1]] = to_host
            self.rows[one.to_device[:, 1]] = to_device
            rows[one.rows[:, 1]] = moved

    def run(self, step: PlannedStep, finish: bool = True) -> PlannedStep:
        """Runs a step; what `KeyDeviation` chooses from are the first rows."""
        self.execute(step.record)
        if step.record.choices:
            chosen = [np.arange(one.count, dtype=np.int32) for one in step.record.choices]
            self.execute(step.choose(chosen))
        for packed in step.record.rounds.values():
            self._check(step, packed)
        if finish:
            step.finish()
        return step

    def execute(self, record: StepRecord) -> None:
        """Makes the copies and writes the rows."""
        assert record.number > self.ran or record.kept is not None
        self.ran = record.number
        self.copy(record.copies)
        kept = record.slots >= 0
        rows = self.rows.reshape(-1, 2)
        assert len(set(record.slots[kept].tolist())) == kept.sum()
        rows[record.slots[kept], 0] = record.token_ids[kept]
        rows[record.slots[kept], 1] = record.positions[kept]

    def _check(self, step: PlannedStep, packed: PackedRound) -> None:
        """What the last row of each agent sees; its earlier rows see no more."""
        ranges, _ = packed.extents.offsets()
        field = {
            name: packed.buffer[at : at + length].reshape(packed.extents.shapes()[name])
            for name, (at, length) in ranges.items()
        }
        block = self.profile.block_size
        rows = self.rows.reshape(-1, 2)
        offsets = np.arange(block)
        for agent in np.unique(field["row_agent"]).tolist():
            state = step._parts[agent].state
            last = int(field["row_position"][field["row_agent"] == agent].max())
            wanted = state.token_ids(np.arange(last + 1, dtype=np.int32))
            seen = np.zeros(last + 1, dtype=int)
            for use in np.flatnonzero(field["use_agent"] == agent).tolist():
                master = int(field["use_master"][use])
                begin, end = field["master_page_indptr"][master : master + 2]
                pages = field["master_pages"][begin:end]
                masks = field["use_masks"][
                    field["use_page_indptr"][use] : field["use_page_indptr"][use + 1]
                ]
                length, delta = int(field["use_length"][use]), int(field["use_delta"][use])
                shift = int(field["use_shift"][use])
                bits = ((masks.view(np.uint32)[:, None] >> offsets) & 1).ravel()[:length]
                visible = np.flatnonzero((bits == 0) & (delta + np.arange(length) <= last))
                found = rows[pages[visible // block] * block + visible % block]
                np.testing.assert_array_equal(found[:, 0], wanted[delta + visible])
                np.testing.assert_array_equal(found[:, 1], delta + visible - shift)
                seen[delta + visible] += 1
            length = int(field["own_length"][agent])
            begin = int(field["own_page_indptr"][agent])
            position = field["own_position"][begin * block : begin * block + length]
            pages = field["own_pages"][begin : int(field["own_page_indptr"][agent + 1])]
            visible = np.flatnonzero(position <= last)
            found = rows[pages[visible // block] * block + visible % block]
            np.testing.assert_array_equal(found[:, 0], wanted[position[visible]])
            np.testing.assert_array_equal(found[:, 1], position[visible])
            np.add.at(seen, position[visible], 1)
            assert (seen == 1).all(), (state.agent, np.flatnonzero(seen != 1))


def check_books(scheduler: Scheduler, free: Iterable[int] | None = None) -> None:
    """Counts users of pages and holders of Masters anew, and compares.

    Args:
        free: page ids that the allocator has, where that is known.
    """
    books, block = scheduler.books, scheduler.profile.block_size
    states = list({id(s): s for s in _states(scheduler)}.values())
    _check_users(books, states, block)
    _check_users(scheduler.host_books, [], block)
    if free is not None:
        left = list(free)
        assert sorted(left) == np.flatnonzero(books._page_users == 0).tolist()
        assert books.free_pages == len(left)
    pending = {s.serial: s.pending for s in states}
    for digest, master in books.making.items():
        assert master.digest == digest
        assert not master.stored
        assert not master.is_computed
        maker = scheduler.roster.makers[master.serial]
        use = next(use for use in maker.decision.made if use.master is master)
        left = np.arange(use.delta + master.computed, use.delta + use.length)
        assert np.isin(left, pending[maker.serial]).all()
    for state in states:
        for use in state.awaited:
            # Whatever is waited for is computed by somebody.
            assert use.master.is_computed or use.master.serial in scheduler.roster.makers
    host = [page for state in states if state.host_pages is not None for page in state.host_pages]
    assert len(set(host)) == len(host)
    resting = np.flatnonzero(scheduler.host_books._page_users)
    assert not set(host) & set(resting.tolist())
    used = len(host) + len(resting)
    assert scheduler.host_pages.num_free == scheduler.host_pages.limit - used
    assert {s.serial for s in states if s.ended} == set(scheduler.roster.leaving)
    names = {name for live in _plans(scheduler) for name in live.names(None)}
    assert names == set(scheduler.roster.agents)


def _check_users(books: Books, states: Sequence[AgentState], block: int) -> None:
    """The pages of one tier."""
    mirrors = list(books.mirrors.values())
    holders: Counter[int] = Counter()
    masters: dict[int, Master] = {}
    for mirror in [*mirrors, *states]:
        for master in mirror.uses.masters:
            holders[master.serial] += 1
            masters[master.serial] = master
    for master in [*books.masters.values(), *books.making.values()]:
        masters[master.serial] = master
    users = np.zeros(books.num_pages, dtype=int)
    for mirror in mirrors:
        users[mirror.own_pages] += 1
        assert len(mirror.own_pages) * block >= len(mirror.own_position)
    for state in states:
        if state.host_pages is None:
            users[state.own_pages] += 1
    swapped = {id(s.output) for s in states if s.host_pages is not None and s.output is not None}
    for master in masters.values():
        if id(master) not in swapped:
            users[master.pages] += 1
            assert len(master.pages) * block >= master.length
        assert master.holders == holders[master.serial], master
    np.testing.assert_array_equal(books._page_users, users)
    assert books.used_pages == np.count_nonzero(users)
    assert books._used_at.keys() == books.mirrors.keys()
    idle = {s for s, one in masters.items() if one.stored and not one.holders}
    assert set(books._idle) == idle
    assert books.evictable_pages == sum(len(masters[s].pages) for s in idle)
    for digest, master in books.masters.items():
        assert master.digest == digest
        assert master.stored
        assert master.is_computed


def _plans(scheduler: Scheduler) -> list:
    plans = {id(live): live for live in scheduler.roster.agents.values()}
    return list(plans.values())


def _states(scheduler: Scheduler) -> list:
    lives = {id(live): live for live in [*scheduler.roster.plans.values(), *_plans(scheduler)]}
    states = [state for live in lives.values() for state in live.states if not state.ended]
    assert all(state.ended and state.keeps_pages for state in scheduler.roster.leaving.values())
    return states + list(scheduler.roster.leaving.values())
