"""Between a store in memory and its directory: what is new is written, what is there is loaded."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Lock
from typing import TypeAlias

from tokendance.device.layer_ropes import LayerRope
from tokendance.device.pool import PagePool
from tokendance.files import compaction
from tokendance.files.catalogue import Changes
from tokendance.files.compaction import compact
from tokendance.files.directory import Directory, FreshRows, Progress
from tokendance.files.errors import DamagedError
from tokendance.files.identity import RopeTables
from tokendance.files.loading import Listing, list_directory, load, use_instead
from tokendance.files.records import master_row, mirror_row
from tokendance.files.rows import read_rows
from tokendance.host.books import Books
from tokendance.host.mirror import Master, Mirror, Pages
from tokendance.host.segments import Segment

Guard: TypeAlias = AbstractContextManager[object]
Chosen: TypeAlias = tuple[Mapping[str, Mirror], Sequence[Master]]

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Kept:
    """A Mirror on disk.

    Attributes:
        mirror: the same in memory; None where the agent is at rest, or damaged.
        key: its id in the catalogue.
        group: of its own rows.
        masters: ids of those that it uses.
    """

    mirror: Mirror | None
    key: int
    group: int | None
    masters: list[int]


@dataclass
class _Delta:
    """What a flush writes, and what is on disk when it has been written."""

    changes: Changes = field(default_factory=Changes)
    fresh: dict[int, FreshRows] = field(default_factory=dict)
    pages: list[Pages] = field(default_factory=list)
    mirrors: dict[str, _Kept | None] = field(default_factory=dict)
    ids: dict[int, int] = field(default_factory=dict)
    masters: dict[int, int | None] = field(default_factory=dict)
    live: dict[int, Master] = field(default_factory=dict)
    digests: dict[bytes, int] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)
    recency: dict[int, int] = field(default_factory=dict)
    positions: int = 0


class Durability:
    """Keeps a directory as a store is.

    What is committed never changes, so a Mirror or a Master is written once: a Mirror is known by
    the object that the books have, a Master by its serial number.

    Args:
        directory: open for writing.
        pool: the store's pages.
        ropes: the store's tables.
        max_position: how many positions they have.
        guard: is held while books are read or changed, and not while files are.

    Attributes:
        damage: what is wrong with agents that could not be loaded, by name. They stay on disk until
            an agent of the name is committed or released.
        resting: agents that are whole and on disk alone, as a dict's keys.
    """

    def __init__(
        self,
        directory: Directory,
        pool: PagePool,
        ropes: Sequence[LayerRope],
        max_position: int,
        guard: Guard | None = None,
    ) -> None:
        self._directory = directory
        self._guard = guard or nullcontext()
        self._pool = pool
        self._ropes = ropes
        self._max_position = max_position
        self._writing = Lock()
        self._mirrors: dict[str, _Kept] = {}
        self._masters: dict[int, int | None] = {}  # the group of each on disk
        self._ids: dict[int, int] = {}  # of Masters on disk, by serial
        self._users: Counter[int] = Counter()  # Mirrors on disk, of each Master
        self._recency: dict[int, int] = {}  # of Masters that are found by their digests
        self._live: dict[int, Master] = {}  # of Masters on disk, the object that has been in memory
        self._digests: dict[bytes, int] = {}  # Masters on disk that are found by them
        self._positions = directory.ropes.positions
        self._next = 1
        self.damage: dict[str, str] = {}
        self.resting: dict[str, None] = {}

    @property
    def path(self) -> os.PathLike[str]:
        """Of the directory."""
        return self._directory.path

    def close(self) -> None:
        self._directory.close()

    # Loading --------------------------------------------------------------------------------------

    def load(
        self,
        books: Books,
        agents: Iterable[str] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Brings agents into the pool, and Masters that nobody uses as far as there is room.

        Args:
            agents: their names; None: all. The others are at rest.

        Raises:
            KeyError: an agent that is not there.
            OutOfPagesError: there are too few pages for the agents.
        """
        listing = list_directory(self._directory, self._max_position)
        names = {one.agent for one in listing.mirrors.values()}
        wanted = names if agents is None else set(agents)
        if wanted - names:
            raise KeyError(
                f"agents: expected some of {sorted(names)}, got {sorted(wanted - names)}"
            )
        loaded = load(
            self._directory, listing, wanted, books, self._pool, self._guard, True, progress
        )
        self.damage = dict(listing.damage)
        _tell(listing.damage)
        self._take_in(listing, {one.key for one in loaded})
        self._directory.contents.rows.clear()

    def prefetch(
        self, books: Books, agents: Iterable[str], segments: Iterable[Segment] = ()
    ) -> None:
        """Brings agents at rest into the pool, and Masters of segments that they alone have used.

        It reads files: whoever holds the guard must not call it.

        Raises:
            OutOfPagesError: there are too few pages; they are at rest as before.
        """
        with self._writing:
            digests = {digest for one in segments for digest in (one.digest, one.stem)}
            found = {self._digests[digest] for digest in digests & self._digests.keys()}
            with self._guard:
                kept = {
                    agent: self._mirrors[agent]
                    for agent in agents
                    if agent in self.resting and agent not in books.mirrors
                }
                asleep = {key for key in found if not self._is_in_pool(key)}
                if not kept and not asleep:
                    return
                masters = asleep | {key for one in kept.values() for key in one.masters}
                there = {key: self._live[key] for key in masters if self._is_in_pool(key)}
                books.hold(list(there.values()))
            try:
                self._bring_up(books, kept, masters, there)
            finally:
                with self._guard:
                    books.let_go(list(there.values()))

    def _bring_up(
        self,
        books: Books,
        kept: Mapping[str, _Kept],
        masters: set[int],
        there: Mapping[int, Master],
    ) -> None:
        contents = self._directory.records(masters, (one.key for one in kept.values()))
        listing = list_directory(self._directory, self._max_position, contents)
        use_instead(listing, there, self._pool.block_size)
        loaded = load(self._directory, listing, None, books, self._pool, self._guard, True)
        self.damage |= listing.damage
        _tell(listing.damage)
        for one in loaded:
            self._mirrors[one.agent] = replace(self._mirrors[one.agent], mirror=one.mirror)
        for agent in kept:
            self.resting.pop(agent, None)
        for key, found in listing.masters.items():
            if found.master is not None and not found.is_there and len(found.master.pages):
                self._know(key, found.master)

    def _know(self, key: int, master: Master) -> None:
        """This is the object of a Master on disk from now on."""
        if key in self._live:
            self._ids.pop(self._live[key].serial, None)
        self._live[key] = master
        self._ids[master.serial] = key

    def _is_in_pool(self, key: int) -> bool:
        return key in self._live and (self._live[key].stored or self._live[key].holders > 0)

    def rest(self, books: Books, agents: Iterable[str]) -> None:
        """Takes agents out of the pool that are on disk as they are there."""
        with self._writing, self._guard:
            for agent in agents:
                kept = self._mirrors.get(agent)
                if kept is not None and kept.mirror is books.mirrors.get(agent):
                    books.drop(agent)
                    self._mirrors[agent] = replace(kept, mirror=None)
                    self.resting[agent] = None

    def _take_in(self, listing: Listing, loaded: set[int]) -> None:
        for key, one in listing.masters.items():
            self._masters[key] = one.group
            if one.recency is not None:
                self._recency[key] = one.recency
            if one.master is not None:
                self._know(key, one.master)
                if one.recency is not None:
                    self._digests.setdefault(one.master.digest, key)
        for key, found in listing.mirrors.items():
            mirror = found.mirror if key in loaded else None
            if mirror is None and found.agent not in self.damage:
                self.resting[found.agent] = None
            self._mirrors[found.agent] = _Kept(mirror, key, found.group, found.masters)
            self._users.update(set(found.masters))
        self._next = 1 + max([0, *listing.masters, *listing.mirrors, *self._directory.groups])

    # Writing --------------------------------------------------------------------------------------

    def flush(self, books: Books) -> None:
        """Makes the directory hold what the books hold now: agents, the Masters that they use, and
        those that later rounds find.

        Raises:
            OSError: it cannot be written; directory and books are as they were, and it may be tried
                again.
        """
        self.write(books, lambda: (books.mirrors, list(books.masters.values())))

    def _tidy(self) -> None:
        """Compacts where much is not valid any more. What was written stays so if that fails."""
        try:
            compact(self._directory, compaction.SLACK)
        except (OSError, DamagedError) as error:
            _LOGGER.warning("%s is not compacted: %s", self._directory.path, error)

    def write(self, books: Books, chosen: Callable[[], Chosen]) -> None:
        """The same of chosen agents, and Masters that later rounds find; nothing else is kept."""
        with self._writing:
            with self._guard:
                delta = self._collect(*chosen())
                for pages in delta.pages:  # others may let go of them meanwhile
                    books.share_pages(pages)
            try:
                self._write(delta)
            finally:
                with self._guard:
                    for pages in delta.pages:
                        books.drop_pages(pages)
            if delta.changes:
                self._tidy()

    def _write(self, delta: _Delta) -> None:
        ropes = None
        if delta.positions > self._positions:
            ropes = RopeTables.of(self._ropes, delta.positions, self._max_position)
        self._directory.write(delta.changes, delta.fresh, ropes)
        self._settle(delta)
        if ropes is not None:
            self._positions = ropes.positions

    def forget(self, agent: str) -> bool:
        """Has the next flush drop an agent that is damaged or at rest; whether there is one."""
        known = agent in self.damage or agent in self.resting
        self.damage.pop(agent, None)
        self.resting.pop(agent, None)
        return known

    def _collect(self, mirrors: Mapping[str, Mirror], found: Sequence[Master]) -> _Delta:
        delta = _Delta()
        recency = {one.serial: 0 if one.holders else one.last_used for one in found}
        by_serial = {one.serial: one for one in found}
        old = {
            agent: kept
            for agent, kept in self._mirrors.items()
            if (agent not in mirrors and agent not in self.damage and agent not in self.resting)
            or (agent in mirrors and kept.mirror is not mirrors[agent])
        }
        new = {
            agent: mirror
            for agent, mirror in mirrors.items()
            if agent not in self._mirrors or agent in old
        }
        for mirror in new.values():
            by_serial |= {one.serial: one for one in mirror.uses.masters}
        for serial, master in by_serial.items():
            if serial not in self._ids:
                delta.ids[serial] = self._new_master(delta, master)
                delta.live[delta.ids[serial]] = master
        ids = {**self._ids, **delta.ids}
        users = self._users.copy()
        for kept in old.values():
            users.subtract(set(kept.masters))
        for agent, mirror in new.items():
            kept = self._new_mirror(delta, agent, mirror, ids)
            delta.mirrors[agent] = kept
            users.update(set(kept.masters))
        self._drop(delta, old)
        wanted = {ids[serial]: when for serial, when in recency.items()}
        delta.digests = {one.digest: ids[one.serial] for one in found}
        # Masters that were evicted, and that agents at rest use, are brought up when a prompt has
        # their segment.
        for digest, key in self._digests.items():
            if digest not in delta.digests and users[key] > 0:
                wanted[key], delta.digests[digest] = 0, key
        delta.recency = wanted
        delta.gone = {
            key for key in (*self._masters, *delta.masters) if not users[key] and key not in wanted
        }
        self._drop_masters(delta)
        changed = {k: (when,) for k, when in wanted.items() if self._recency.get(k) != when}
        delta.changes.put["findable"] = dict(changed)
        delta.changes.drop["findable"] = self._recency.keys() - wanted.keys()
        return delta

    def _number(self) -> int:
        self._next += 1
        return self._next - 1

    def _rows(self, delta: _Delta, pages: Pages, rows: int) -> int | None:
        """The number of a new group; None for no rows."""
        if not rows:
            return None
        key = self._number()
        delta.fresh[key] = FreshRows(rows, partial(read_rows, self._pool, pages, rows))
        delta.pages.append(pages)
        return key

    def _new_master(self, delta: _Delta, master: Master) -> int:
        group = self._rows(delta, master.pages, master.length)
        key = self._number()
        delta.changes.put.setdefault("masters", {})[key] = master_row(master, group)
        delta.masters[key] = group
        delta.positions = max(delta.positions, master.origin + master.length)
        return key

    def _new_mirror(
        self, delta: _Delta, agent: str, mirror: Mirror, ids: Mapping[int, int]
    ) -> _Kept:
        group = self._rows(delta, mirror.own_pages, len(mirror.own_position))
        masters = [ids[one.serial] for one in mirror.uses.masters]
        key = self._number()
        row = mirror_row(agent, mirror, masters, group)
        delta.changes.put.setdefault("mirrors", {})[key] = row
        delta.positions = max(delta.positions, mirror.length)
        return _Kept(mirror, key, group, masters)

    def _drop(self, delta: _Delta, old: Mapping[str, _Kept]) -> None:
        for agent, kept in old.items():
            delta.changes.drop.setdefault("mirrors", set()).add(kept.key)
            if kept.group is not None:
                delta.changes.drop.setdefault("groups", set()).add(kept.group)
            delta.mirrors.setdefault(agent, None)

    def _drop_masters(self, delta: _Delta) -> None:
        delta.changes.drop["masters"] = delta.gone & self._masters.keys()
        groups = {self._masters[key] for key in delta.changes.drop["masters"]} - {None}
        delta.changes.drop.setdefault("groups", set()).update(groups)  # type: ignore[arg-type]

    def _settle(self, delta: _Delta) -> None:
        """What has been written is known from now on."""
        for agent, kept in delta.mirrors.items():
            old = self._mirrors.pop(agent, None)
            if old is not None:
                self._users.subtract(set(old.masters))
            if kept is not None:
                self._mirrors[agent] = kept
                self._users.update(set(kept.masters))
                self.damage.pop(agent, None)
                self.resting.pop(agent, None)
        self._masters |= delta.masters
        for key, master in delta.live.items():
            self._know(key, master)
        for key in delta.gone:
            self._masters.pop(key, None)
            del self._users[key]
            if key in self._live:
                self._ids.pop(self._live.pop(key).serial, None)
        self._recency, self._digests = delta.recency, delta.digests

    # What is on disk ------------------------------------------------------------------------------

    def verify(self, progress: Progress | None = None) -> dict[str, str]:
        """Reads everything; see `DiffStore.verify`."""
        with self._writing:
            found = self._directory.check_catalogue()
            wrong = {"catalogue": found} if found else {}
            groups = self._directory.verify(progress)
            agents: dict[int, list[str]] = {}
            for agent, kept in self._mirrors.items():
                for group in (kept.group, *(self._masters.get(key) for key in kept.masters)):
                    if group in groups:
                        agents.setdefault(group, []).append(agent)  # type: ignore[arg-type]
            for group, why in groups.items():
                names = agents.get(group, [f"group {group}"])
                wrong |= dict.fromkeys(names, why)
            return {**self.damage, **wrong}

    def compact(self, progress: Progress | None = None) -> int:
        """Removes what is not valid any more from the files; returns how many bytes."""
        with self._writing:
            return compact(self._directory, None, progress)


def _tell(damage: Mapping[str, str]) -> None:
    for agent, why in damage.items():
        _LOGGER.warning("agent %r is left out: %s", agent, why)
