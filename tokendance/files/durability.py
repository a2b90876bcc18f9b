"""Between a store in memory and its directory: what is new is written, what is there is loaded."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import TypeAlias

from tokendance.device.layer_ropes import LayerRope
from tokendance.device.pool import PagePool
from tokendance.files import directory as directories
from tokendance.files.catalogue import Changes
from tokendance.files.directory import Directory, FreshRows, Progress
from tokendance.files.errors import DamagedError
from tokendance.files.identity import RopeTables
from tokendance.files.loading import Listing, list_directory, load
from tokendance.files.records import master_row, mirror_row
from tokendance.files.rows import read_rows
from tokendance.host.books import Books
from tokendance.host.mirror import Master, Mirror, Pages

Guard: TypeAlias = AbstractContextManager[object]
Chosen: TypeAlias = tuple[Mapping[str, Mirror], Sequence[Master]]

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Kept:
    """A Mirror on disk.

    Attributes:
        mirror: the same in memory; None where it is damaged on disk.
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
        self._positions = directory.ropes.positions
        self._next = 1
        self.damage: dict[str, str] = {}

    @property
    def path(self) -> os.PathLike[str]:
        """Of the directory."""
        return self._directory.path

    def close(self) -> None:
        self._directory.close()

    # Loading --------------------------------------------------------------------------------------

    def load(self, books: Books, progress: Progress | None = None) -> None:
        """Brings all that is whole into the pool: every agent, and Masters that nobody uses as far
        as there is room.

        Raises:
            OutOfPagesError: there are too few pages for the agents.
        """
        listing = list_directory(self._directory, self._max_position)
        loaded = load(
            self._directory, listing, None, books, self._pool, self._guard, True, progress
        )
        self.damage = dict(listing.damage)
        self._take_in(listing, {one.key for one in loaded})
        self._directory.contents.rows.clear()

    def _take_in(self, listing: Listing, loaded: set[int]) -> None:
        for key, one in listing.masters.items():
            self._masters[key] = one.group
            if one.recency is not None:
                self._recency[key] = one.recency
            if one.master is not None:
                self._ids[one.master.serial] = key
        for key, found in listing.mirrors.items():
            mirror = found.mirror if key in loaded else None
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
            self._directory.compact(directories.SLACK)
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
        """Has the next flush drop an agent that is damaged; whether there is one."""
        return self.damage.pop(agent, None) is not None

    def _collect(self, mirrors: Mapping[str, Mirror], found: Sequence[Master]) -> _Delta:
        delta = _Delta()
        recency = {one.serial: 0 if one.holders else one.last_used for one in found}
        by_serial = {one.serial: one for one in found}
        old = {
            agent: kept
            for agent, kept in self._mirrors.items()
            if (agent not in mirrors and agent not in self.damage)
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
        self._masters |= delta.masters
        self._ids |= delta.ids
        for key in delta.gone:
            self._masters.pop(key, None)
            del self._users[key]
        self._ids = {serial: key for serial, key in self._ids.items() if key in self._masters}
        self._recency = delta.recency

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
            return self._directory.compact(None, progress)
