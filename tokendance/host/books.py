"""Who uses which page and which Master: the books of a store.

Plans lease pages, Mirrors own them and hold Masters, and Masters that nobody holds stay until their
pages are wanted. All of that is counted here and nowhere else: a page is free when the books say
so. What an allocator gives is checked; what this package's modules ask for is not.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from heapq import merge
from typing import TypeAlias
from weakref import WeakValueDictionary

import numpy as np

from tokendance.host.folding import Folding
from tokendance.host.mirror import Master, Mirror, Pages, no_pages
from tokendance.host.uncopied import Uncopied

Allocate: TypeAlias = Callable[[int], Sequence[int] | None]
"""Gives so many page ids that nobody else uses. None, or an exception, means that it has fewer."""

Free: TypeAlias = Callable[[Sequence[int]], None]
"""Takes page ids back."""


class OutOfPagesError(RuntimeError):
    """The pool has fewer free pages than asked for, and nothing is left to evict.

    Attributes:
        missing: pages that would have to come free; 0 where that would not help.
        on_host: whether pages of host memory are short.
    """

    def __init__(self, message: str, missing: int = 0, on_host: bool = False) -> None:
        super().__init__(message)
        self.missing = missing
        self.on_host = on_host


class PageAllocator(Uncopied, instead="make another for pages of its own"):
    """Page ids of a pool: of a list of its own, or of an engine's allocator.

    Args:
        num_pages: of the pool.
        allocate, free: the engine's; None for a list of its own.
        num_free: how many pages ``allocate`` could give now; None if the engine does not say.

    Attributes:
        limit: pages that it has at most, given ones among them.
        shortage: what is short, for the error of whoever gets no pages, and what may help.
        failure: what the engine's ``allocate`` raised when it was called last, if it did.
    """

    def __init__(
        self,
        num_pages: int,
        allocate: Allocate | None = None,
        free: Free | None = None,
        num_free: Callable[[], int] | None = None,
    ) -> None:
        self.num_pages = num_pages
        if allocate is None or free is None:
            ids = list(range(num_pages - 1, -1, -1))
            allocate, free, num_free = _popper(ids), ids.extend, ids.__len__
        self._allocate = allocate
        self._free = free
        self._num_free = num_free
        self.limit = num_pages
        self.shortage = ("capacity", "enlarge the store")
        self.failure: Exception | None = None

    def lend(self, pages: Pages, shortage: tuple[str, str]) -> PageAllocator:
        """An allocator that has pages which this one gave to itself, until `take_back`."""
        ids: list[int] = pages[::-1].tolist()
        part = PageAllocator(self.num_pages, _popper(ids), ids.extend, ids.__len__)
        part.limit = len(ids)
        part.shortage = shortage
        self.limit -= len(ids)
        return part

    def take_back(self, part: PageAllocator) -> None:
        """Ends a `lend`: all pages are free."""
        pages = part.allocate(part.limit)
        assert pages is not None, "pages that are still used"
        self.limit += part.limit
        part.limit = 0
        self.free(pages)

    @property
    def num_free(self) -> int | None:
        """Pages that could be given now; None if the engine does not say."""
        return None if self._num_free is None else self._num_free()

    def allocate(self, count: int) -> Pages | None:
        """Takes ``count`` pages; None if there are fewer.

        Raises:
            ValueError: the engine gave something else than ``count`` different page ids of the
                pool; it has got them back.
        """
        self.failure = None
        if count == 0:
            return no_pages()
        if count > self.limit:
            return None
        try:
            given = self._allocate(count)
        except Exception as error:  # whatever an engine's allocator raises when it is full
            self.failure = error.with_traceback(None)  # which would keep the callers' objects
            return None
        if given is None:
            return None
        pages = np.asarray(given)
        if pages.shape != (count,):
            wrong = f"{count} page ids, got {list(pages.shape)}"
        elif not np.issubdtype(pages.dtype, np.integer):
            wrong = f"integers, got {pages.dtype}"
        elif pages.min() < 0 or pages.max() >= self.num_pages:
            wrong = f"pages 0..{self.num_pages - 1}, got {pages.min()}..{pages.max()}"
        elif count > 1 and len(np.unique(pages)) < count:
            wrong = f"{count} different pages, got {len(np.unique(pages))}"
        else:
            return pages.astype(np.int32)
        self._free(given)
        raise ValueError(f"allocate: expected {wrong}")

    def free(self, pages: Pages) -> None:
        """Gives pages back."""
        if len(pages):
            self._free(pages.tolist())


def _popper(free: list[int]) -> Allocate:
    def allocate(count: int) -> list[int] | None:
        if count > len(free):
            return None
        taken = free[len(free) - count :]
        del free[len(free) - count :]
        return taken[::-1]

    return allocate


class Books(Uncopied, instead="make another over an allocator of its own"):
    """Users of the pages of a pool.

    Args:
        allocator: of the pages.
        tell: takes what a log has, as `Guard.tell` does.
        clears: pages that nobody uses any more are overwritten before the allocator has them: they
            wait until they are taken again, or for `to_be_cleared`.

    Attributes:
        masters: by digest, those that later rounds find: all their rows are computed.
        making: by digest, those that are being computed; a later plan may use them and waits for
            their rows.
        mirrors: by agent.
        evictions: Masters dropped to make room.
        folded: Masters whose rows have become own rows of the one agent that used them.
        pinned: agents that stay where they are.
        evicts: whether `take_pages` evicts. False where somebody else makes room, by moving what is
            longest unused to a lower tier.
        on_put: called with the name of an agent that gets a Mirror: what is elsewhere of it is
            older.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        tell: Callable[..., None] = lambda *_: None,
        clears: bool = False,
    ) -> None:
        self.masters: dict[bytes, Master] = {}
        self.making: dict[bytes, Master] = {}
        self.mirrors: dict[str, Mirror] = {}
        self.evictions = 0
        self.folded = 0
        self.pinned: set[str] = set()
        self.evicts = True
        self.on_put: Callable[[str], object] | None = None
        self._allocator = allocator
        self._tell = tell
        self._clears = clears
        self._uncleared = no_pages()  # that nobody uses
        self._page_users = np.zeros(allocator.num_pages, dtype=np.int32)
        self._used = 0
        # Stored Masters that nobody holds, the longest idle first, and how many pages they have.
        self._idle: OrderedDict[int, Master] = OrderedDict()
        self._idle_pages = 0
        self._clock = 0
        self._used_at: OrderedDict[str, int] = OrderedDict()  # agents, the longest unused first
        self._known: WeakValueDictionary[int, Master] = WeakValueDictionary()  # by serial

    # Pages ----------------------------------------------------------------------------------------

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return self._allocator.num_pages

    @property
    def limit(self) -> int:
        """Pages that there are for these books."""
        return self._allocator.limit

    @property
    def used_pages(self) -> int:
        """Pages that have a user here, idle Masters among them."""
        return self._used

    @property
    def evictable_pages(self) -> int:
        """Pages of Masters that nobody holds."""
        return self._idle_pages

    @property
    def free_pages(self) -> int:
        """Pages that can be taken without an eviction.

        Where an engine's allocator does not say how many it has, all that are not used here.
        """
        free = self._allocator.num_free
        return self.limit - self._used if free is None else free + len(self._uncleared)

    def state(self) -> tuple[int, ...] | None:
        """What is equal while nothing has changed that decides whether prompts fit; None where an
        engine's allocator does not say what it has."""
        if self._allocator.num_free is None:
            return None
        free = self.free_pages
        found = len(self.masters), len(self.making), len(self.mirrors)
        return free, self._idle_pages, self._clock, self.evictions, *found

    def take_pages(self, count: int) -> Pages:
        """Takes pages, evicting Masters that nobody uses, the longest idle first, if it `evicts`.

        Raises:
            OutOfPagesError: nothing was taken; Masters may have been evicted, unless the pool would
                have been too small without any of them.
            ValueError: the engine's allocator gave pages that are in use, or none of the pool.
        """
        pages = self._taken(count)
        self._page_users[pages] = 1
        self._used += count
        return pages

    def _allocate(self, count: int) -> Pages | None:
        """Of what the allocator has, and then of what was used here before."""
        again = 0
        if len(self._uncleared):
            again = max(count - (self._allocator.num_free or 0), 0)
        if again > len(self._uncleared):
            return None
        pages = self._allocator.allocate(count - again)
        if pages is None or not again:
            return pages
        pages = np.concatenate([pages, self._uncleared[:again]])
        self._uncleared = self._uncleared[again:]
        return pages

    @property
    def has_uncleared(self) -> bool:
        """Whether there are pages that `to_be_cleared` would give."""
        return len(self._uncleared) > 0

    def to_be_cleared(self) -> Pages:
        """Pages that nobody uses, which `cleared` is to be called with."""
        pages, self._uncleared = self._uncleared, no_pages()
        return pages

    def cleared(self, pages: Pages) -> None:
        """Gives pages back to the allocator that have been overwritten."""
        self._allocator.free(pages)

    def _taken(self, count: int) -> Pages:
        pages = self._allocate(count)
        if pages is None:
            held = self._used - self._idle_pages
            free = None if self._allocator.num_free is None else self.free_pages
            reach = self.limit - held if free is None else free + self._idle_pages
            if self.evicts and count <= reach:
                pages = self._evict_and_take(count, free)
        if pages is None:
            short, remedy = self._allocator.shortage
            self._tell(
                "refused %d pages: %d are free, and %d evictable, of %d",
                *(count, self.free_pages, self._idle_pages, self.limit),
            )
            raise OutOfPagesError(
                f"{short}: expected {count} free pages, got {self.free_pages} and "
                f"{self._idle_pages} of idle Masters, of {self.limit}; release or suspend "
                f"agents, or {remedy}",
                max(count - self.free_pages, 1) if count <= self.limit else 0,
            ) from self._allocator.failure
        used = self._page_users[pages] > 0
        if used.any():
            self._allocator.free(pages[~used])
            raise ValueError(f"allocate: expected pages not in use, got {pages[used].tolist()}")
        return pages

    def _evict_and_take(self, count: int, free: int | None) -> Pages | None:
        if free is not None:
            self.evict(count - free)
            return self._allocate(count)
        # An engine that does not say what it has is asked again after each Master.
        while self._idle:
            self.evict(1)
            pages = self._allocator.allocate(count)
            if pages is not None:
                return pages
        return None

    def lend(self, count: int, shortage: tuple[str, str]) -> PageAllocator:
        """Lends as many pages, for which Masters that nobody uses are evicted.

        Raises:
            OutOfPagesError, ValueError: as `take_pages`.
        """
        return self._allocator.lend(self._taken(count), shortage)

    def take_back(self, part: PageAllocator) -> None:
        """See `PageAllocator.take_back`."""
        self._allocator.take_back(part)

    def share_pages(self, pages: Pages) -> None:
        """Adds one user to each page."""
        self._page_users[pages] += 1

    def drop_pages(self, pages: Pages) -> None:
        """Takes one user from each page; pages without users go back to the pool."""
        if not len(pages):
            return
        self._page_users[pages] -= 1
        left = self._page_users[pages]
        assert (left >= 0).all(), "pages that were given back before"
        unused = pages[left == 0]
        self._used -= len(unused)
        if self._clears:
            self._uncleared = np.concatenate([self._uncleared, unused])
        else:
            self._allocator.free(unused)

    def evict(self, pages: int) -> int:
        """Drops idle Masters, the longest idle first, until so many pages have been given back.

        Returns:
            Pages given back: fewer if there were no more idle Masters, more if the last one had
            more. Those that somebody reads are given back later, and do not count.
        """
        parts = [no_pages()]
        given = 0
        while given < pages and self._idle:
            _, master = self._idle.popitem(last=False)
            del self.masters[master.digest]
            master.stored = False
            self._idle_pages -= len(master.pages)
            given += int(np.count_nonzero(self._page_users[master.pages] == 1))
            parts.append(master.pages)
        self.evictions += len(parts) - 1
        self.drop_pages(np.concatenate(parts))
        if len(parts) > 1:
            self._tell("evicted %d Masters of %d pages", len(parts) - 1, sum(map(len, parts)))
        return given

    # Masters --------------------------------------------------------------------------------------

    def hold(self, masters: Sequence[Master]) -> None:
        """Keeps Masters from being evicted until they are let go, as often as each is held."""
        for master in masters:
            if master.holders == 0:
                self._known[master.serial] = master
                if master.stored:
                    self._no_longer_idle(master)
            master.holders += 1
            self._touch(master)

    def let_go(self, masters: Sequence[Master], unused_since: int | None = None) -> None:
        """Ends a `hold`. A Master that nothing refers to any more gives its pages back.

        One that is stored counts as used now, or is the next to leave if it has not been used after
        ``unused_since``.
        """
        for master in masters:
            master.holders -= 1
            if master.holders:
                continue
            if master.stored:
                self._idle[master.serial] = master
                self._idle_pages += len(master.pages)
                if unused_since is None or master.last_used > unused_since:
                    self._touch(master)
                else:
                    self._idle.move_to_end(master.serial, last=False)
            else:
                self.withdraw(master)
                self.drop_pages(master.pages)

    def is_idle(self, master: Master) -> bool:
        """Whether the Master is stored here and nobody holds it."""
        return self._idle.get(master.serial) is master

    def idle_pages_of(self, masters: Sequence[Master]) -> int:
        """Pages of those among the Masters that nobody holds yet; each counts once."""
        idle = {one.serial: len(one.pages) for one in masters if one.serial in self._idle}
        return sum(idle.values())

    def _touch(self, master: Master) -> None:
        self._clock += 1
        master.last_used = self._clock

    def _no_longer_idle(self, master: Master) -> None:
        del self._idle[master.serial]
        self._idle_pages -= len(master.pages)

    def find(self, digest: bytes) -> Master | None:
        """The Master of a digest that is stored, or is being computed."""
        making = self.making.get(digest)
        if making is not None and making.replaces:
            return making
        return self.masters.get(digest) or making

    def announce(self, master: Master) -> None:
        """Lets later plans find a Master that is going to be computed.

        The first one of a digest stays, unless this one replaces it.
        """
        if master.replaces:
            self.making[master.digest] = master
        elif master.digest not in self.masters:
            self.making.setdefault(master.digest, master)

    def withdraw(self, master: Master) -> None:
        """Ends an `announce`: nobody computes the Master any more."""
        if self.making.get(master.digest) is master:
            del self.making[master.digest]

    def publish(self, master: Master) -> None:
        """Lets later rounds find a finished Master by its digest.

        The first one of a digest stays, unless this one replaces it. The Master is held by whoever
        computed it.
        """
        self.withdraw(master)
        if master.replaces and not master.stored:
            self.forget(master.digest)
        if not master.stored and master.digest not in self.masters:
            self.masters[master.digest] = master
            master.stored = True

    def known(self, serial: int) -> Master | None:
        """The Master of a serial number, if it is stored here or somebody holds it."""
        master = self._known.get(serial)
        return master if master is not None and (master.stored or master.holders) else None

    def forget(self, digest: bytes) -> None:
        """Lets nobody find the stored Master of a digest any more, if there is one."""
        master = self.masters.pop(digest, None)
        if master is None:
            return
        master.stored = False
        if not master.holders:
            self._no_longer_idle(master)
            self.drop_pages(master.pages)

    def take_over(self, masters: Sequence[Master]) -> None:
        """Masters that are new here, the longest idle first, whose pages have been taken.

        One that says when it was last used keeps that; the clock goes on from there.
        """
        for master in masters:
            if master.last_used:
                self._clock = max(self._clock, master.last_used)
            else:
                self._touch(master)
            self._known[master.serial] = master
            if master.stored:
                self.masters[master.digest] = master
                self._idle[master.serial] = master
                self._idle_pages += len(master.pages)

    # Mirrors --------------------------------------------------------------------------------------

    def put(self, agent: str, mirror: Mirror) -> None:
        """Makes ``mirror`` the agent's KV; its earlier one is dropped.

        One use of each of the Mirror's own pages is taken over, and its Masters are held.
        """
        self.hold(mirror.uses.masters)
        if agent in self.mirrors:
            self.drop(agent)
        self.mirrors[agent] = mirror
        self.touch(agent)
        if self.on_put is not None:
            self.on_put(agent)

    def touch(self, agent: str) -> None:
        """The agent's Mirror, if it has one, is used now."""
        if agent in self.mirrors:
            self._clock += 1
            self._used_at[agent] = self._clock
            self._used_at.move_to_end(agent)

    def drop(self, agent: str, to_lower_tier: bool = False) -> None:
        """Forgets the agent's Mirror. Those of its Masters that nobody has used since, and that
        nobody holds, are the next to leave if its rows are in a lower tier."""
        mirror = self.mirrors.pop(agent)
        used_at = self._used_at.pop(agent)
        self.let_go(mirror.uses.masters, used_at if to_lower_tier else None)
        self.drop_pages(mirror.own_pages)

    def fold(self, agent: str, folding: Folding, fresh: Pages) -> None:
        """Lets an agent do without Masters that it alone used: copies of their rows are in
        ``fresh``, which become its own.

        They are the next to leave; the agent counts as unused as long as before.
        """
        before, mirror = self.mirrors[agent], folding.folded(fresh)
        gone = Counter(before.uses.masters)
        gone.subtract(mirror.uses.masters)
        self.share_pages(before.own_pages[: folding.kept])
        self.mirrors[agent] = mirror
        self.folded += len(folding.masters)
        self.let_go(list(gone.elements()), self._used_at[agent])
        self.drop_pages(before.own_pages)

    def by_last_use(self) -> list[str]:
        """All agents, the longest unused first."""
        return list(self._used_at)

    def coldest(self, pages: int, stays: Callable[[str], bool]) -> tuple[list[str], list[Master]]:
        """What could leave for so many pages, the longest unused first: agents, and idle Masters.

        A Master that a Mirror needs stays as long as that does.

        Args:
            stays: says so of agents, besides the pinned ones.
        """
        agents: list[str] = []
        masters: list[Master] = []
        given = 0
        mine: Iterable[tuple[int, str | Master]] = (
            (used_at, agent)
            for agent, used_at in self._used_at.items()
            if agent not in self.pinned and not stays(agent)
        )
        idle: Iterable[tuple[int, str | Master]] = (
            (one.last_used, one) for one in self._idle.values()
        )
        for _, one in merge(mine, idle, key=lambda pair: pair[0]):
            if given >= pages:
                break
            if isinstance(one, Master):
                masters.append(one)
                given += len(one.pages)
            else:
                agents.append(one)
                given += self._pages_with(self.mirrors[one])
        return agents, masters

    def _pages_with(self, mirror: Mirror) -> int:
        """Pages that come free when a Mirror leaves, and Masters that nobody else uses."""
        alone = int((self._page_users[mirror.own_pages] == 1).sum())
        for master, uses in Counter(mirror.uses.masters).items():
            if master.holders == uses:
                alone += len(master.pages)
        return alone
