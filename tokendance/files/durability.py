"""Between a store in memory and its directory: what is new is written, what is there is loaded."""

from __future__ import annotations

import errno
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import TypeAlias

from tokendance.device.layer_ropes import LayerRope
from tokendance.files import compaction
from tokendance.files.catalogue import Changes
from tokendance.files.compaction import compact
from tokendance.files.directory import Directory, FreshRows, Progress
from tokendance.files.errors import DamagedError
from tokendance.files.identity import RopeTables
from tokendance.files.loading import Listing, list_directory, load, use_instead
from tokendance.files.memory import DeviceMemory, Held, Memory
from tokendance.files.records import master_row, mirror_row
from tokendance.host.mirror import Master, Mirror, Pages
from tokendance.host.segments import Segment

Guard: TypeAlias = AbstractContextManager[object]
Chosen: TypeAlias = Callable[[], Sequence[Held]]
"""What is to be on disk, called by who holds the guard. What a memory has stands for the same in
those before it."""

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Kept:
    """A Mirror on disk.

    Attributes:
        content: of the same in memory; None where the agent has been on disk alone since the
            directory was opened, or is damaged.
        key: its id in the catalogue.
        group: of its own rows.
        masters: ids of those that it uses.
    """

    content: int | None
    key: int
    group: int | None
    masters: list[int]


@dataclass
class _Delta:
    """What a flush writes, and what is on disk when it has been written."""

    changes: Changes = field(default_factory=Changes)
    fresh: dict[int, FreshRows] = field(default_factory=dict)
    pages: list[tuple[Memory, Pages]] = field(default_factory=list)
    mirrors: dict[str, _Kept | None] = field(default_factory=dict)
    ids: dict[int, int] = field(default_factory=dict)
    masters: dict[int, int | None] = field(default_factory=dict)
    digests: dict[bytes, int] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)
    recency: dict[int, int] = field(default_factory=dict)
    positions: int = 0


class Durability:
    """Keeps a directory as a store is.

    What is committed never changes, so a Mirror or a Master is written once: a Mirror is known by
    the number of its content, a Master by its serial number.

    Args:
        directory: open for writing.
        memory: the pages that agents are brought up to.
        ropes: the store's tables.
        max_position: how many positions they have.
        guard: is held while books are read or changed, and not while files are.
        capacity: bytes of rows that the files may have; None: any.
        limit: what has set that, for errors.

    Attributes:
        damage: what is wrong with agents that could not be loaded, by name. They stay on disk until
            an agent of the name is committed or released.
        resting: agents that are whole and on disk alone, as a dict's keys.
        asleep: ids of Masters on disk that no agent uses and that no memory has, as a dict's keys,
            the longest unused first. Prompts find them.
        evictions: Masters that were dropped from the disk to make room.
    """

    def __init__(
        self,
        directory: Directory,
        memory: DeviceMemory,
        ropes: Sequence[LayerRope],
        max_position: int,
        guard: Guard | None = None,
        capacity: int | None = None,
        limit: str = "disk_capacity",
    ) -> None:
        self._directory = directory
        self._guard = guard or nullcontext()
        self._memory = memory
        self._capacity = capacity
        self._limit = limit
        self._ropes = ropes
        self._max_position = max_position
        self._writing = Lock()
        self._mirrors: dict[str, _Kept] = {}
        self._masters: dict[int, int | None] = {}  # the group of each on disk
        self._ids: dict[int, int] = {}  # of Masters on disk, by serial
        self._users: Counter[int] = Counter()  # Mirrors on disk, of each Master
        self._recency: dict[int, int] = {}  # of Masters that are found by their digests
        self._serials: dict[int, int] = {}  # of Masters on disk
        self._digests: dict[bytes, int] = {}  # Masters on disk that are found by them
        self._positions = directory.ropes.positions
        self._next = 1
        self.damage: dict[str, str] = {}
        self.resting: dict[str, None] = {}
        self.asleep: dict[int, None] = {}
        self.evictions = 0

    @property
    def path(self) -> os.PathLike[str]:
        """Of the directory."""
        return self._directory.path

    @property
    def file_bytes(self) -> int:
        """Bytes of all rows in the files, valid or not."""
        return self._directory.file_bytes

    @property
    def capacity(self) -> int | None:
        """Bytes that they may have; None: any."""
        return self._capacity

    def masters_below(self, is_above: Callable[[int], bool]) -> int:
        """How many Masters are on disk alone, by what says of a serial number that one is not."""
        serials = self._serials
        return sum(key not in serials or not is_above(serials[key]) for key in self._masters)

    def close(self) -> None:
        self._directory.close()

    # Loading --------------------------------------------------------------------------------------

    def load(
        self,
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
            *(self._directory, listing, wanted, self._memory.books, self._memory.pool),
            *(self._guard, True, progress),
        )
        self.damage = dict(listing.damage)
        _tell(listing.damage)
        self._take_in(listing, {one.key for one in loaded})
        self._directory.contents.rows.clear()

    def forget_masters(self) -> None:
        """Has the next flush drop Masters that no memory has and no agent uses."""
        self.asleep.clear()

    def has(self, agents: Iterable[str], segments: Iterable[Segment] = ()) -> bool:
        """Whether `prefetch` would read anything; the guard is held."""
        return any(one in self.resting for one in agents) or bool(self._asleep_of(segments))

    def _asleep_of(self, segments: Iterable[Segment]) -> set[int]:
        """Ids of Masters of segments that are on disk and not in the pool."""
        digests = {digest for one in segments for digest in (one.digest, one.stem)}
        books = self._memory.books
        found = {
            self._digests[digest]
            for digest in digests & self._digests.keys()
            if digest not in books.masters
        }
        return {key for key in found if not self._is_in_pool(key)}

    def prefetch(self, agents: Iterable[str], segments: Iterable[Segment] = ()) -> None:
        """Brings agents at rest into the pool, and Masters of segments that lie on disk alone.

        It reads files: whoever holds the guard must not call it.

        Raises:
            OutOfPagesError: there are too few pages; they are at rest as before.
        """
        books = self._memory.books
        with self._writing:
            with self._guard:
                kept = {
                    agent: self._mirrors[agent]
                    for agent in agents
                    if agent in self.resting and agent not in books.mirrors
                }
                asleep = self._asleep_of(segments)
                if not kept and not asleep:
                    return
                masters = asleep | {key for one in kept.values() for key in one.masters}
                there = {key: one for key in masters if (one := self._in_pool(key)) is not None}
                books.hold(list(there.values()))
            try:
                self._bring_up(kept, masters, there)
            finally:
                with self._guard:
                    books.let_go(list(there.values()))

    def _bring_up(
        self, kept: Mapping[str, _Kept], masters: set[int], there: Mapping[int, Master]
    ) -> None:
        contents = self._directory.records(masters, (one.key for one in kept.values()))
        listing = list_directory(self._directory, self._max_position, contents, self._serials)
        pool = self._memory.pool
        use_instead(listing, there, pool.block_size)
        loaded = load(self._directory, listing, None, self._memory.books, pool, self._guard, True)
        self.damage |= listing.damage
        _tell(listing.damage)
        for one in loaded:
            assert one.mirror is not None
            self._mirrors[one.agent] = replace(self._mirrors[one.agent], content=one.mirror.content)
        for agent in kept:
            self.resting.pop(agent, None)
        for key, found in listing.masters.items():
            if found.master is not None and not found.is_there and len(found.master.pages):
                self._know(key, found.master.serial)
                self.asleep.pop(key, None)

    def _know(self, key: int, serial: int) -> None:
        """This Master is the one on disk."""
        self._serials[key] = serial
        self._ids[serial] = key

    def _in_pool(self, key: int) -> Master | None:
        """The Master in the pool that is on disk as this one."""
        return self._memory.books.known(self._serials[key]) if key in self._serials else None

    def _is_in_pool(self, key: int) -> bool:
        return self._in_pool(key) is not None

    def rest(self, memory: Memory, agents: Iterable[str], masters: Iterable[Master] = ()) -> int:
        """Takes agents, and Masters that nobody uses, out of a memory, if they are on disk as they
        are there; returns how many."""
        books, moved = memory.books, 0
        with self._writing, self._guard:
            for agent in agents:
                kept, mirror = self._mirrors.get(agent), books.mirrors.get(agent)
                if kept is None or mirror is None or agent in books.pinned:
                    continue
                if kept.content == mirror.content:
                    books.drop(agent, to_lower_tier=True)
                    self.resting[agent] = None
                    moved += 1
            for master in masters:
                key = self._ids.get(master.serial)
                if key is not None and books.is_idle(master):
                    books.forget(master.digest)
                    moved += 1
                    if self._digests.get(master.digest) == key:
                        self.asleep.pop(key, None)
                        self.asleep[key] = None
        return moved

    def _take_in(self, listing: Listing, loaded: set[int]) -> None:
        for key, one in listing.masters.items():
            self._masters[key] = one.group
            if one.recency is not None:
                self._recency[key] = one.recency
            if one.master is not None:
                self._know(key, one.master.serial)
                if one.recency is not None:
                    self._digests.setdefault(one.master.digest, key)
        for key, found in listing.mirrors.items():
            content = found.mirror.content if found.mirror and key in loaded else None
            if content is None and found.agent not in self.damage:
                self.resting[found.agent] = None
            self._mirrors[found.agent] = _Kept(content, key, found.group, found.masters)
            self._users.update(set(found.masters))
        for key in sorted(self._recency, key=lambda key: self._recency[key]):
            if not self._users[key] and not self._is_in_pool(key):
                self.asleep[key] = None
        self._next = 1 + max([0, *listing.masters, *listing.mirrors, *self._directory.groups])

    # Writing --------------------------------------------------------------------------------------

    def _tidy(self) -> None:
        """Compacts where much is not valid any more. What was written stays so if that fails."""
        try:
            compact(self._directory, compaction.SLACK)
        except (OSError, DamagedError) as error:
            _LOGGER.warning("%s is not compacted: %s", self._directory.path, error)

    def write(self, chosen: Chosen) -> None:
        """Makes the directory hold chosen agents, the Masters that they use, those that later
        rounds find, and what rests; nothing else is kept.

        Raises:
            OSError: it cannot be written; directory and books are as they were, and it may be tried
                again.
        """
        with self._writing:
            while True:
                with self._guard:
                    delta = self._collect(chosen())
                    for memory, pages in delta.pages:  # others may let go of them meanwhile
                        memory.books.share_pages(pages)
                try:
                    missing = self._missing_bytes(delta)
                    if missing <= 0:
                        self._write(delta)
                        break
                finally:
                    with self._guard:
                        for memory, pages in delta.pages:
                            memory.books.drop_pages(pages)
                if not self._drop_unneeded(delta):
                    self._shrink(missing)
            if delta.changes:
                self._tidy()

    def _missing_bytes(self, delta: _Delta) -> int:
        """Bytes that the disk has too few of for what is new."""
        if self._capacity is None or not delta.fresh:
            return 0
        needed = sum(map(self._directory.bytes_of_fresh, delta.fresh.values()))
        return self._directory.file_bytes + needed - self._capacity

    def _drop_unneeded(self, delta: _Delta) -> bool:
        """Drops what nobody needs any more, before what is new is written; whether there is any."""
        released = {
            agent: self._mirrors[agent] for agent, kept in delta.mirrors.items() if kept is None
        }
        left = self._users.copy()
        for kept in released.values():
            left.subtract(set(kept.masters))
        masters = {key for key in delta.gone & self._masters.keys() if not left[key]}
        if not released and not masters:
            return False
        dropped = _Delta()
        self._drop(dropped, released)
        changes = dropped.changes
        changes.drop["findable"] = masters & self._recency.keys()
        self._drop_masters(changes, masters)
        self._directory.write(changes, {})
        with self._guard:
            self._users = left
            for agent in released:
                del self._mirrors[agent]
            self._no_longer(masters)
        return True

    def _no_longer(self, masters: set[int]) -> None:
        """Masters are not on disk any more."""
        self._digests = {one: key for one, key in self._digests.items() if key not in masters}
        self._recency = {key: at for key, at in self._recency.items() if key not in masters}
        self._forget_masters(masters)

    def _shrink(self, size: int) -> None:
        """Makes the files smaller: they are written anew, or Masters are evicted that nobody uses
        and no memory has, those first that have been asleep longest.

        Raises:
            OSError: neither helps; that cannot be written.
        """
        directory = self._directory
        if compact(directory):
            return
        gone: set[int] = set()
        missing = size
        for key in self.asleep:
            group = self._masters[key]
            if missing > 0 and not self._users[key]:
                missing -= 0 if group is None else directory.bytes_of([group])
                gone.add(key)
        if not gone:
            raise OSError(
                errno.ENOSPC,
                f"{self._limit}: expected at most {self._capacity} bytes of rows, got {size} more; "
                "release agents, or give the store more",
                str(directory.path),
            )
        changes = Changes(drop={"findable": gone & self._recency.keys()})
        self._drop_masters(changes, gone)
        directory.write(changes, {})
        with self._guard:
            self._no_longer(gone)
            self.evictions += len(gone)

    def _write(self, delta: _Delta) -> None:
        ropes = None
        if delta.positions > self._positions:
            ropes = RopeTables.of(self._ropes, delta.positions, self._max_position)
        self._directory.write(delta.changes, delta.fresh, ropes)
        self._settle(delta)
        if ropes is not None:
            self._positions = ropes.positions

    def forget(self, agent: str) -> bool:
        """Has the next flush drop or replace an agent that is damaged or at rest; whether there is
        one."""
        known = agent in self.damage or agent in self.resting
        self.damage.pop(agent, None)
        self.resting.pop(agent, None)
        return known

    def _collect(self, held: Sequence[Held]) -> _Delta:
        delta = _Delta()
        mirrors: dict[str, tuple[Memory, Mirror]] = {}
        by_digest: dict[bytes, tuple[Memory, Master]] = {}
        for memory, some, masters in held:
            mirrors |= {agent: (memory, mirror) for agent, mirror in some.items()}
            by_digest |= {one.digest: (memory, one) for one in masters}
        found = [master for _, master in by_digest.values()]
        recency = {one.serial: 0 if one.holders else one.last_used for one in found}
        by_serial = {one.serial: (memory, one) for memory, one in by_digest.values()}
        old = {
            agent: kept
            for agent, kept in self._mirrors.items()
            if (agent not in mirrors and agent not in self.damage and agent not in self.resting)
            or (agent in mirrors and kept.content != mirrors[agent][1].content)
        }
        new = {
            agent: held_by
            for agent, held_by in mirrors.items()
            if agent not in self._mirrors or agent in old
        }
        for memory, mirror in new.values():
            by_serial |= {one.serial: (memory, one) for one in mirror.uses.masters}
        for serial, (memory, master) in by_serial.items():
            if serial not in self._ids:
                delta.ids[serial] = self._new_master(delta, memory, master)
        ids = {**self._ids, **delta.ids}
        users = self._users.copy()
        for kept in old.values():
            users.subtract(set(kept.masters))
        for agent, (memory, mirror) in new.items():
            kept = self._new_mirror(delta, agent, memory, mirror, ids)
            delta.mirrors[agent] = kept
            users.update(set(kept.masters))
        self._drop(delta, old)
        wanted = {ids[serial]: when for serial, when in recency.items()}
        delta.digests = {one.digest: ids[one.serial] for one in found}
        # Masters that no memory has, and that agents at rest use or that were moved here, are
        # brought up when a prompt has their segment.
        for digest, key in self._digests.items():
            if digest not in delta.digests and (users[key] > 0 or key in self.asleep):
                wanted[key] = 0 if users[key] > 0 else self._recency.get(key, 0)
                delta.digests[digest] = key
        delta.recency = wanted
        delta.gone = {
            key for key in (*self._masters, *delta.masters) if not users[key] and key not in wanted
        }
        self._drop_masters(delta.changes, delta.gone)
        changed = {k: (when,) for k, when in wanted.items() if self._recency.get(k) != when}
        delta.changes.put["findable"] = dict(changed)
        delta.changes.drop["findable"] = self._recency.keys() - wanted.keys()
        return delta

    def _number(self) -> int:
        self._next += 1
        return self._next - 1

    def _rows(
        self, delta: _Delta, memory: Memory, pages: Pages, rows: int, is_master: bool
    ) -> int | None:
        """The number of a new group; None for no rows."""
        if not rows:
            return None
        key = self._number()
        read = self._directory.identity.row_codec(is_master).read
        delta.fresh[key] = FreshRows(rows, is_master, lambda: read(memory.pool, pages, rows))
        delta.pages.append((memory, pages))
        return key

    def _new_master(self, delta: _Delta, memory: Memory, master: Master) -> int:
        group = self._rows(delta, memory, master.pages, master.length, is_master=True)
        key = self._number()
        delta.changes.put.setdefault("masters", {})[key] = master_row(master, group)
        delta.masters[key] = group
        delta.positions = max(delta.positions, master.origin + master.length)
        return key

    def _new_mirror(
        self,
        delta: _Delta,
        agent: str,
        memory: Memory,
        mirror: Mirror,
        ids: Mapping[int, int],
    ) -> _Kept:
        rows = len(mirror.own_position)
        group = self._rows(delta, memory, mirror.own_pages, rows, is_master=False)
        masters = [ids[one.serial] for one in mirror.uses.masters]
        key = self._number()
        row = mirror_row(agent, mirror, masters, group)
        delta.changes.put.setdefault("mirrors", {})[key] = row
        delta.positions = max(delta.positions, mirror.length)
        return _Kept(mirror.content, key, group, masters)

    def _drop(self, delta: _Delta, old: Mapping[str, _Kept]) -> None:
        for agent, kept in old.items():
            delta.changes.drop.setdefault("mirrors", set()).add(kept.key)
            if kept.group is not None:
                delta.changes.drop.setdefault("groups", set()).add(kept.group)
            delta.mirrors.setdefault(agent, None)

    def _drop_masters(self, changes: Changes, gone: set[int]) -> None:
        changes.drop["masters"] = gone & self._masters.keys()
        groups = {self._masters[key] for key in changes.drop["masters"]} - {None}
        changes.drop.setdefault("groups", set()).update(groups)  # type: ignore[arg-type]

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
        for serial, key in delta.ids.items():
            self._know(key, serial)
        self._forget_masters(delta.gone)
        self._recency, self._digests = delta.recency, delta.digests

    def _forget_masters(self, gone: Iterable[int]) -> None:
        for key in gone:
            self._masters.pop(key, None)
            self._users.pop(key, None)
            self.asleep.pop(key, None)
            if key in self._serials:
                self._ids.pop(self._serials.pop(key), None)

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
