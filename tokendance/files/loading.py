"""What a directory holds, brought into the pages of a pool."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

from tokendance.device.pool import PagePool
from tokendance.files.catalogue import Contents, Row
from tokendance.files.directory import Directory, Progress
from tokendance.files.errors import DamagedError
from tokendance.files.page_file import PageFile
from tokendance.files.records import FieldError, agent_of, master_of, masters_of, mirror_of
from tokendance.host.books import Books, OutOfPagesError
from tokendance.host.mirror import Master, Mirror, Uses, pages_for


@dataclass(frozen=True)
class StoredMirror:
    """A Mirror in a directory.

    Attributes:
        agent: its name, as far as it can be read.
        key: its id in the catalogue.
        mirror: without pages as long as it is not loaded; None where it is damaged.
        group: of its own rows; None where it has none.
        masters: ids of the Masters that it uses.
    """

    agent: str
    key: int
    mirror: Mirror | None
    group: int | None
    masters: list[int]


@dataclass(frozen=True)
class StoredMaster:
    """A Master in a directory; see `StoredMirror`.

    Attributes:
        recency: when it was last used, if later rounds find it by its digest: 0 while somebody uses
            it. None where they do not.
        is_there: whether ``master`` is one that the books had before.
    """

    key: int
    master: Master | None
    group: int | None
    recency: int | None
    is_there: bool = False


@dataclass
class Listing:
    """All Masters and Mirrors of a directory, and what is wrong with some of them.

    Attributes:
        masters: by id.
        mirrors: by id, in the order in which they were committed.
        damage: of agents, by name, what is wrong with them.
    """

    masters: dict[int, StoredMaster] = field(default_factory=dict)
    mirrors: dict[int, StoredMirror] = field(default_factory=dict)
    damage: dict[str, str] = field(default_factory=dict)

    @property
    def whole(self) -> list[StoredMirror]:
        """The Mirrors of agents with which nothing is wrong."""
        return [one for one in self.mirrors.values() if one.agent not in self.damage]


def list_directory(
    directory: Directory,
    max_position: int,
    contents: Contents | None = None,
    serials: Mapping[int, int] | None = None,
) -> Listing:
    """What the catalogue says, each record checked; no row of keys and values is read.

    Args:
        directory: of the records.
        max_position: that a store's tables have.
        contents: some of the records; None: all, as they were when the directory was opened.
        serials: of Masters that have been in memory, by id.
    """
    contents = directory.contents if contents is None else contents
    rows, block = contents.rows, directory.identity.block_size
    found, serials = Listing(), serials or {}
    why: dict[int, str] = {}
    for key, row in _all(contents, "masters").items():
        master, group = None, None
        try:
            if key not in rows["masters"]:
                raise FieldError("expected a Master as it was written, got another")
            master, group = master_of(row, max_position, serials.get(key))
            _check_group(directory, group, master.length, is_master=True)
        except FieldError as error:
            master, why[key] = None, f"{error} of Master {key}"
        recency = rows["findable"].get(key, (None,))[0]
        found.masters[key] = StoredMaster(
            key, master, group, recency if isinstance(recency, int) else None
        )
    whole = {key: one.master for key, one in found.masters.items() if one.master is not None}
    for key, row in _all(contents, "mirrors").items():
        agent, mirror, group, masters = f"mirror {key}", None, None, []
        try:
            agent = agent_of(row)
            if key not in rows["mirrors"]:
                raise FieldError("expected a Mirror as it was written, got another")
            masters = masters_of(row)
            lost = [why[one] for one in masters if one in why]
            if lost:
                raise FieldError(lost[0])
            mirror, group = mirror_of(row, whole, block, max_position)
            _check_group(directory, group, len(mirror.own_position), is_master=False)
        except FieldError as error:
            mirror = None
            found.damage[agent] = f"{directory.path}: {error}"
        found.mirrors[key] = StoredMirror(agent, key, mirror, group, masters)
    return found


def _all(contents: Contents, table: str) -> dict[int, Row]:
    rows = {key: row for (name, key), row in contents.damaged.items() if name == table}
    return dict(sorted({**rows, **contents.rows[table]}.items()))


def use_instead(listing: Listing, there: Mapping[int, Master], block_size: int) -> None:
    """Has Mirrors use Masters that the books have, by the ids of those in the directory."""
    for key, master in there.items():
        listing.masters[key] = StoredMaster(key, master, None, None, is_there=True)
    for key, one in listing.mirrors.items():
        if one.mirror is not None and there.keys() & set(one.masters):
            uses = one.mirror.uses
            masters = [
                there.get(number, master)
                for number, master in zip(one.masters, uses.masters, strict=True)
            ]
            mirror = replace(
                one.mirror, uses=Uses(masters, uses.delta, uses.length, uses.masks, block_size)
            )
            listing.mirrors[key] = replace(one, mirror=mirror)


def _check_group(directory: Directory, group: int | None, rows: int, is_master: bool) -> None:
    if group is None:
        return
    found = directory.groups.get(group)
    if found is None or found.rows != rows:
        got = "none" if found is None else found.rows
        raise FieldError(f"expected {rows} rows at group {group}, got {got}")
    if found.is_master != is_master:
        raise FieldError(
            f"expected is_master {int(is_master)} at group {group}, got {found.is_master}"
        )


def load(
    directory: Directory,
    listing: Listing,
    agents: Iterable[str] | None,
    books: Books,
    pool: PagePool,
    guard: AbstractContextManager[object],
    idle: bool,
    progress: Progress | None = None,
    all_or_none: bool = False,
) -> list[StoredMirror]:
    """Brings agents and the Masters that they use into a pool, and their books.

    Agents whose rows are damaged are left out; ``listing.damage`` has them from then on.

    Args:
        agents: their names; None: all that are whole.
        guard: is held while the books are read or changed, and not while files are.
        idle: also Masters that no agent uses, as far as there are free pages.
        progress: is told.
        all_or_none: nothing is loaded where one of the agents is damaged.

    Returns:
        The Mirrors that have been loaded, their Masters in ``listing.masters``.

    Raises:
        OutOfPagesError: there are too few pages; nothing was loaded.
    """
    wanted = None if agents is None else set(agents)
    mirrors = [one for one in listing.whole if wanted is None or one.agent in wanted]
    used = {key for one in mirrors for key in one.masters}
    masters = [listing.masters[key] for key in sorted(used) if not listing.masters[key].is_there]
    block = pool.block_size
    needed = sum(pages_for(one.master.length, block) for one in masters if one.master)
    needed += sum(pages_for(len(one.mirror.own_position), block) for one in mirrors if one.mirror)
    with guard:
        free, room = books.free_pages, books.free_pages + books.evictable_pages
    if needed > (room if books.evicts else free):
        raise OutOfPagesError(
            f"capacity: expected {needed} pages for {len(mirrors)} agents of {directory.path}, got "
            f"{room}",
            needed - free if needed <= books.limit else 0,
        )
    if idle:
        masters += _idle_that_fit(listing, used, free - needed, block)
    loading = _Loading(directory, listing, books, pool, guard, all_or_none, progress)
    return loading.run(mirrors, masters)


def _idle_that_fit(
    listing: Listing, used: set[int], room: int, block_size: int
) -> list[StoredMaster]:
    """Masters that nobody uses, the last used first, as far as there is room."""
    rest = [one for key, one in listing.masters.items() if key not in used]
    found = []
    for one in sorted(rest, key=lambda one: -(one.recency or 0)):
        if one.recency is None or one.master is None:
            continue
        room -= pages_for(one.master.length, block_size)
        if room < 0:
            break
        found.append(one)
    return found


_Job = tuple[int | None, int, Master | Mirror | None]
"""A group, the id of whose rows it has, and the object that gets pages for them."""


class _Loading:
    """One call of `load`."""

    def __init__(
        self,
        directory: Directory,
        listing: Listing,
        books: Books,
        pool: PagePool,
        guard: AbstractContextManager[object],
        all_or_none: bool,
        progress: Progress | None,
    ) -> None:
        self._directory = directory
        self._listing = listing
        self._books = books
        self._pool = pool
        self._guard = guard
        self._all_or_none = all_or_none
        self._progress = progress
        self._taken: list[Master | Mirror] = []

    def run(self, mirrors: list[StoredMirror], masters: list[StoredMaster]) -> list[StoredMirror]:
        try:
            wrong = self._read(mirrors, masters)
            kept = [one for one in mirrors if not self._is_damaged(one, wrong)]
            if self._all_or_none and len(kept) < len(mirrors):
                self._give_back(list(self._taken))
                return []
            used = {key for one in kept for key in one.masters}
            unneeded = [
                one.master
                for one in masters
                if one.master and one.key not in used and one.recency is None
            ]
            damaged = [one.mirror for one in mirrors if one not in kept and one.mirror]
            self._give_back([*unneeded, *damaged])
        except BaseException:
            self._give_back(list(self._taken))
            raise
        with self._guard:
            return self._put(kept, [one for one in masters if one.key not in wrong])

    def _read(self, mirrors: list[StoredMirror], masters: list[StoredMaster]) -> dict[int, str]:
        """Fills pages file by file; returns what is wrong with groups, by id of the Master, or by
        that of the Mirror, negative."""
        wrong: dict[int, str] = {}
        jobs: list[_Job] = [(one.group, one.key, one.master) for one in masters]
        jobs += [(one.group, ~one.key, one.mirror) for one in mirrors]
        by_file: dict[int, list[tuple[int, int, Master | Mirror]]] = {}
        for group, key, owner in jobs:
            if group is not None and owner is not None:
                number = self._directory.groups[group].file
                by_file.setdefault(number, []).append((group, key, owner))
        total, done = sum(self._bytes(one[0]) for some in by_file.values() for one in some), 0
        for number in sorted(by_file):
            try:
                with self._directory.file(number) as file:
                    for group, key, owner in sorted(by_file[number], key=lambda job: job[0]):
                        try:
                            self._fill(file, group, owner)
                        except (DamagedError, OSError) as error:
                            wrong[key] = str(error)
                        done += self._bytes(group)
                        if self._progress is not None:
                            self._progress(done, total)
            except (DamagedError, OSError) as error:
                wrong |= {key: str(error) for _, key, _ in by_file[number]}
        return wrong

    def _fill(self, file: PageFile, group: int, owner: Master | Mirror) -> None:
        rows = self._directory.groups[group].rows
        with self._guard:
            pages = self._books.take_pages(pages_for(rows, self._pool.block_size))
        if isinstance(owner, Master):
            owner.pages = pages
        else:
            owner.own_pages = pages
        self._taken.append(owner)
        try:
            pieces = self._directory.pieces(file, group)
            codec = self._directory.identity.row_codec(isinstance(owner, Master))
            codec.write(pieces, self._pool, pages, rows)
        except (DamagedError, OSError):
            self._give_back([owner])
            raise

    def _bytes(self, group: int) -> int:
        return self._directory.bytes_of([group])

    def _give_back(self, owners: list[Master | Mirror]) -> None:
        for owner in owners:
            pages = owner.pages if isinstance(owner, Master) else owner.own_pages
            with self._guard:
                self._books.drop_pages(pages)
            if isinstance(owner, Master):
                owner.pages = pages[:0]
            else:
                owner.own_pages = pages[:0]

    def _is_damaged(self, one: StoredMirror, wrong: Mapping[int, str]) -> bool:
        for key in (~one.key, *one.masters):
            if key in wrong:
                self._listing.damage[one.agent] = wrong[key]
                return True
        return False

    def _put(self, mirrors: list[StoredMirror], masters: list[StoredMaster]) -> list[StoredMirror]:
        kept = []
        for one in sorted(masters, key=lambda one: one.recency or 0):
            if one.master is None or (one.master.length and not len(one.master.pages)):
                continue  # nobody needs it
            one.master.stored = (
                one.recency is not None and one.master.digest not in self._books.masters
            )
            one.master.last_used = one.recency or 0
            kept.append(one.master)
        self._books.take_over(kept)
        done = []
        for found in mirrors:
            if found.mirror is None:
                continue
            if found.agent in self._books.mirrors:  # committed meanwhile: that is newer
                self._books.hold(found.mirror.uses.masters)
                self._books.let_go(found.mirror.uses.masters)
                self._give_back([found.mirror])
                continue
            self._books.put(found.agent, found.mirror)
            done.append(found)
        return done
