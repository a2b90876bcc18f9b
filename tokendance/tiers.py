"""Device, host memory, disk: what is longest unused moves down when pages are short, and up again.

A Mirror and its Masters are copied to the tier below, and let go of above. The Masters stay above
as long as another Mirror there uses them, and leave after the last one: so a Mirror never lacks
a Master, in whatever tier it is. A copy has its number (`Master.serial`, `Mirror.content`), by
which a later move finds it and copies nothing. Only what the last tier has no room for is evicted,
and only Masters that nobody uses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import accumulate, pairwise
from threading import RLock

import numpy as np

from tokendance.device.executor import Executor
from tokendance.files.durability import Durability
from tokendance.files.memory import DeviceMemory, Held, Memory
from tokendance.host.books import OutOfPagesError
from tokendance.host.folding import folding_of
from tokendance.host.mirror import Master, Mirror, Pages, Uses, no_pages, rows_of_pages
from tokendance.host.plan import Prompts
from tokendance.host.reading import Reading
from tokendance.host.scheduler import Scheduler
from tokendance.host.segments import Segment, told_apart

_LOGGER = logging.getLogger(__name__)
_PART = 32
"""At least one such part of a memory comes free at once: a flush for every page would be slow."""


class Tiers:
    """The tiers of a store or of a tenant.

    The books' guard is held while they are read or changed, and not while rows are copied or files
    are written. One thread moves rows at a time; nobody else waits for it.

    Args:
        scheduler: of the store; it gets what brings up and what makes room.
        executor: copies pages.
        spare: pages of the device that a thread keeps free, as long as there is a lower tier.

    Attributes:
        device: the tier that is computed in.
        host: the one below; None where there is no host memory.
        disk: the last one; None where nothing outlives the process.
        demoted: Mirrors and Masters that have left a tier for a lower one, by its name.
    """

    def __init__(self, scheduler: Scheduler, executor: Executor, spare: int = 0) -> None:
        self._scheduler = scheduler
        self._spare = spare
        self._thread: ThreadPoolExecutor | None = None
        self._freeing: Future[None] | None = None
        self._stuck: tuple[int, ...] | None = None  # books from which nothing could move
        self._guard = scheduler.guard
        self._executor = executor
        self._moving = RLock()
        self.device = DeviceMemory(scheduler.books, executor.pool)
        self.host: Memory | None = None
        if executor.host is not None and scheduler.host_pages.limit:
            self.host = Memory(scheduler.host_books, executor.host)
        self.disk: Durability | None = None
        self.demoted = {"device": 0, "host": 0}
        scheduler.books.on_put = self._forget_below
        scheduler.host_books.evicts = False
        self.keep_on(None)

    def keep_on(self, disk: Durability | None) -> None:
        """What the last tier is; None: none that outlives the process."""
        self.disk = disk
        has_lower = self.host is not None or disk is not None
        self.device.books.evicts = not has_lower
        self._scheduler.flush = None if disk is None else self.flush
        self._scheduler.fetch = self._fetch if has_lower else None
        self._scheduler.make_room = self.make_room if has_lower else None

    # By a thread of its own -----------------------------------------------------------------------

    def later(self, work: Callable[[], None]) -> Future[None]:
        """Has something done by the thread that moves rows, after what it has been given before."""
        with self._guard:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "tokendance tiers")
            return self._thread.submit(work)

    def keep_spare(self) -> None:
        """Has pages moved down ahead, if there are too few free ones; the guard is held."""
        books = self.device.books
        if self._spare <= books.free_pages or books.evicts:
            return
        if (self._freeing is None or self._freeing.done()) and books.state() != self._stuck:
            self._freeing = self.later(self._free_spare)

    def _free_spare(self) -> None:
        with self._guard:
            missing = self._spare - self.device.books.free_pages
        if missing <= 0:
            return
        with self._moving:
            given, problem = self._free(self.device, missing)
        with self._guard:
            self._stuck = None if given >= missing else self.device.books.state()
        if isinstance(problem, OSError):
            _LOGGER.warning("nothing moves down ahead: %s", problem)

    # What is where --------------------------------------------------------------------------------

    @property
    def on_host(self) -> list[str]:
        """Agents in host memory."""
        return [] if self.host is None else list(self.host.books.mirrors)

    def mirror_on_host(self, agent: str) -> Mirror | None:
        """The agent's Mirror in host memory, if it is there."""
        return None if self.host is None else self.host.books.mirrors.get(agent)

    @property
    def on_disk(self) -> list[str]:
        """Agents that are on disk alone."""
        return [] if self.disk is None else list(self.disk.resting)

    def has_master(self, serial: int) -> bool:
        """Whether a memory has the Master."""
        memories = [self.device] if self.host is None else [self.device, self.host]
        return any(one.books.known(serial) is not None for one in memories)

    def is_below(self, agent: str) -> bool:
        """Whether an agent is in one of the lower tiers."""
        return (self.host is not None and agent in self.host.books.mirrors) or (
            self.disk is not None and agent in self.disk.resting
        )

    def forget(self, agent: str) -> bool:
        """Drops an agent from the lower tiers; whether it was there."""
        known = self.is_below(agent)
        self._forget_below(agent)
        return known

    def _forget_below(self, agent: str) -> None:
        if self.host is not None and agent in self.host.books.mirrors:
            self.host.books.drop(agent)
        if self.disk is not None:
            self.disk.forget(agent)

    # Down -----------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Makes the directory hold what the memories hold now.

        Raises:
            OSError: it cannot be written; everything is as it was.
        """
        assert self.disk is not None
        self.disk.write(self._held)

    def _held(self) -> Sequence[Held]:
        books = self.device.books
        held = [Held(self.device, books.mirrors, list(books.masters.values()))]
        if self.host is not None:
            mine = self.host.books
            masters = [one for one in mine.masters.values() if one.digest not in books.masters]
            held.insert(0, Held(self.host, mine.mirrors, masters))
        return held

    def make_room(
        self, error: OutOfPagesError, spared: Collection[str] = ()
    ) -> tuple[int, Exception | None]:
        """Moves what is longest unused down, for who got no pages.

        Returns:
            Pages that came free, and what has kept others from moving.
        """
        memory = self.host if error.on_host else self.device
        if not error.missing or memory is None:
            return 0, None
        with self._moving:
            return self._free(memory, error.missing, spared)

    def _free(
        self, memory: Memory, pages: int, spared: Collection[str] = ()
    ) -> tuple[int, Exception | None]:
        given = 0
        problem: Exception | None = None
        while given < pages and problem is None:
            with self._guard:
                wanted = max(pages - given, memory.books.limit // _PART)
                agents, masters = memory.books.coldest(
                    wanted, lambda agent: agent in spared or self._scheduler.is_live(agent)
                )
                before = memory.books.free_pages
            if not agents and not masters:
                break
            try:
                self._demote(memory, agents, masters)
            except (OutOfPagesError, OSError) as error:
                problem = error.with_traceback(None)  # which would keep the callers' objects
            with self._guard:
                given += max(memory.books.free_pages - before, 0)
        if given < pages:
            with self._guard:
                given += memory.books.evict(pages - given)
        if given < pages and memory is self.device:
            with self._guard:
                before = memory.books.free_pages
            self.fold(pages - given, spared)
            with self._guard:
                memory.books.evict(pages - given)
                given += max(memory.books.free_pages - before, 0)
        return given, problem

    def fold(self, pages: int | None = None, spared: Collection[str] = ()) -> int:
        """Masters on the device that one agent alone uses become own rows of it, the longest unused
        agents first, where that saves pages.

        Args:
            pages: that are wanted; None: all that can be saved.
            spared: agents that stay as they are, besides those of plans.

        Returns:
            Pages that have come free or can be evicted.
        """
        saved = 0
        with self._moving:
            with self._guard:
                agents = self.device.books.by_last_use()
            for agent in agents:
                if pages is not None and saved >= pages:
                    break
                if agent not in spared:
                    saved += self._fold(agent)
        return saved

    def _fold(self, agent: str) -> int:
        books, pool = self.device.books, self.device.pool
        with ExitStack() as stack:
            with self._guard:
                mirror = books.mirrors.get(agent)
                if mirror is None or self._scheduler.is_live(agent):
                    return 0
                # A quantized key that is moved is rounded once more than restore would round it.
                folding = folding_of(mirror, pool.block_size, turns=pool.quantization is None)
                if folding is None:
                    return 0
                try:
                    fresh = books.take_pages(folding.pages_needed)
                except OutOfPagesError:
                    return 0
                stack.callback(self._drop, fresh)
                stack.enter_context(Reading(self._scheduler, [mirror]))
            self._executor.move_rows(folding.moved(fresh))
            with self._guard:
                taken = self._scheduler.is_live(agent) or not folding.is_current
                if taken or books.mirrors.get(agent) is not mirror:
                    return 0
                books.share_pages(fresh)
                books.fold(agent, folding, fresh)
        return folding.pages_saved

    def _drop(self, pages: Pages) -> None:
        with self._guard:
            self.device.books.drop_pages(pages)

    def _demote(self, memory: Memory, agents: list[str], masters: list[Master]) -> None:
        """Moves agents and idle Masters to the next tier that has room.

        Raises:
            OutOfPagesError: there is none below host memory, and that is full.
            OSError: the disk is full, or cannot be written.
        """
        if memory is self.device and self.host is not None:
            try:
                self.to_host(agents, masters)
                return
            except OutOfPagesError:
                if self.disk is None:
                    raise
        if self.disk is None:
            raise OutOfPagesError("host_capacity: expected a tier below for agents, got none")
        if not self._rest(memory, agents, masters):  # as far as they are on disk already
            self.flush()
            self._rest(memory, agents, masters)

    def rest(self, agents: Sequence[str]) -> None:
        """Leaves agents on disk alone, after a flush.

        Raises:
            OSError: it cannot be written; nothing has changed.
        """
        with self._moving:
            self.flush()
            self._rest(self.device, agents, ())
            if self.host is not None:
                self._rest(self.host, agents, ())

    def _rest(self, memory: Memory, agents: Sequence[str], masters: Sequence[Master]) -> int:
        assert self.disk is not None
        moved = self.disk.rest(memory, agents, masters)
        self.demoted["host" if memory is self.host else "device"] += moved
        return moved

    def _to_host(self, agents: Sequence[str], masters: Sequence[Master]) -> None:
        """Moves from the device.

        Raises:
            OutOfPagesError: host memory is full, and so is what is below it; nothing was moved.
        """
        assert self.host is not None
        with self._moving:
            while True:
                try:
                    self.demoted["device"] += self._move(self.device, self.host, agents, masters)
                    return
                except OutOfPagesError as error:
                    refused = error.with_traceback(None)  # see Scheduler.with_room
                given = self._free(self.host, refused.missing)[0] if refused.missing else 0
                if not given:
                    raise OutOfPagesError(str(refused), on_host=True)

    def to_host(self, agents: Sequence[str], masters: Sequence[Master] = ()) -> None:
        """Moves from the device to host memory: by one copy, if there is room for all.

        Raises:
            OutOfPagesError: host memory is full; some may have been moved.
        """
        assert self.host is not None
        with self._moving:
            with suppress(OutOfPagesError):
                moved = self._move(self.device, self.host, agents, masters)
                self.demoted["device"] += moved
                return
            for agent in agents:
                self._to_host([agent], [])
            for master in masters:
                self._to_host([], [master])

    # Up -------------------------------------------------------------------------------------------

    def _fetch(self, prompts: Prompts) -> None:
        segments = [one for given in prompts.values() for one in told_apart(given) if one.is_shared]
        with suppress(OutOfPagesError):  # what does not fit is computed again
            self.bring_up(prompts, segments)

    def bring_up(self, agents: Collection[str], segments: Iterable[Segment] = ()) -> None:
        """Brings agents, and Masters of segments, to the device.

        Raises:
            OutOfPagesError: there are too few pages; some may have come up.
            DamagedError, OSError: as `DiffStore.prefetch`.
        """
        segments = list(segments)
        with self._guard:
            on_host = self._wanted_of_host(agents, segments)
            on_disk = self.disk is not None and self.disk.has(agents, segments)
        if any(on_host):
            self._scheduler.with_room(lambda: self._up_from_host(agents, segments), agents)
        if on_disk:
            self._scheduler.with_room(lambda: self._up_from_disk(agents, segments), agents)

    def _wanted_of_host(
        self, agents: Iterable[str], segments: Iterable[Segment]
    ) -> tuple[list[str], list[Master]]:
        if self.host is None:
            return [], []
        above, mine = self.device.books.masters, self.host.books
        names = [agent for agent in agents if agent in mine.mirrors]
        digests = dict.fromkeys(d for one in segments for d in (one.digest, one.stem))
        found = [mine.masters[one] for one in digests if one in mine.masters and one not in above]
        return names, found

    def _up_from_host(self, agents: Iterable[str], segments: Iterable[Segment]) -> None:
        with self._moving:
            with self._guard:
                names, masters = self._wanted_of_host(agents, segments)
            if self.host is not None and (names or masters):
                self._move(self.host, self.device, names, masters)

    def _up_from_disk(self, agents: Iterable[str], segments: Iterable[Segment]) -> None:
        disk = self.disk  # another thread may close the store
        if disk is not None:
            with self._moving:
                disk.prefetch(agents, segments)

    # Between memories -----------------------------------------------------------------------------

    def _move(
        self, source: Memory, target: Memory, agents: Sequence[str], masters: Sequence[Master]
    ) -> int:
        """Copies agents with the Masters that they use, and Masters that are found by their
        digests; the agents, and Masters that nobody uses, leave the source.

        Returns:
            How many have left.

        Raises:
            OutOfPagesError: the target is full; nothing has changed.
        """
        from_, to = source.books, target.books
        with self._guard:
            mirrors = {name: from_.mirrors[name] for name in agents if name in from_.mirrors}
            found = {one.serial: one for one in masters if one.stored}
            every = {m.serial: m for mirror in mirrors.values() for m in mirror.uses.masters}
            every |= found
            there = {key: one for key in every if (one := to.known(key)) is not None}
            fresh = [one for key, one in every.items() if key not in there]
            to.hold(list(there.values()))
            parts = [one.pages for one in fresh] + [one.own_pages for one in mirrors.values()]
            lengths = [one.length for one in fresh]
            lengths += [len(one.own_position) for one in mirrors.values()]
            read = np.concatenate([no_pages(), *parts])
            try:
                written = to.take_pages(len(read))
            except BaseException as error:
                to.let_go(list(there.values()))
                if isinstance(error, OutOfPagesError) and target is self.host:
                    error.on_host = True
                raise
            from_.share_pages(read)
        try:
            moved = [read, written]
            if target is self.host:
                rows = zip(parts, lengths, strict=True)
                block = source.pool.block_size
                counts = [rows_of_pages(len(pages), many, block) for pages, many in rows]
                moved.append(np.concatenate([no_pages(), *counts]))
            self._executor.move(np.stack(moved, axis=1), to_host=target is self.host)
        except BaseException:
            with self._guard:
                from_.drop_pages(read)
                to.drop_pages(written)
                to.let_go(list(there.values()))
            raise
        ends = accumulate(map(len, parts), initial=0)
        places = [written[begin:end].copy() for begin, end in pairwise(ends)]
        with self._guard:
            from_.drop_pages(read)
            copies = [
                replace(one, pages=place, holders=0, stored=False, replaces=False)
                for one, place in zip(fresh, places, strict=False)
            ]
            to.hold(copies)
            by_serial = there | {one.serial: one for one in copies}
            for key, one in every.items():
                if (
                    one.stored
                    and target is self.host
                    and to.masters.get(one.digest) is not by_serial[key]
                ):
                    to.forget(one.digest)  # an older one
                if one.stored and one.digest not in to.masters:
                    to.publish(by_serial[key])
            left = 0
            for (name, mirror), place in zip(mirrors.items(), places[len(fresh) :], strict=True):
                stays = name in from_.pinned or self._scheduler.is_live(name)
                if from_.mirrors.get(name) is not mirror or (target is self.host and stays):
                    to.drop_pages(place)  # committed, released, pinned or planned meanwhile
                    continue
                to.put(name, _over(mirror, by_serial, place, source.pool.block_size))
                if name in from_.mirrors:
                    from_.drop(name, to_lower_tier=target is self.host)
                left += 1
            to.let_go(list(by_serial.values()))
            for one in found.values():
                if target is self.host and from_.is_idle(one):
                    from_.forget(one.digest)
                    left += 1
        return left


def _over(mirror: Mirror, masters: dict[int, Master], pages: np.ndarray, block: int) -> Mirror:
    """The same Mirror in other pages, over copies of its Masters."""
    uses = mirror.uses
    mine = [masters[one.serial] for one in uses.masters]
    moved = Uses(mine, uses.delta, uses.length, uses.masks, block, uses.serial)
    return replace(mirror, uses=moved, own_pages=pages)
