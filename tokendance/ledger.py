"""Who uses which page and which Master: the books of a `DiffStore`.

Plans lease pages, Mirrors own them and hold Masters, and Masters that nobody holds stay until their
pages are wanted. All of that is counted here, for the modules of this package: nothing here checks
what it is given.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tokendance.mirror import Master, Mirror, no_pages
from tokendance.pool import OutOfPagesError, PagePool, Pages


class Ledger:
    """Users of the pages of a pool.

    Attributes:
        masters: by digest, those that later rounds find.
        mirrors: by agent.
        evictions: Masters dropped to make room.
    """

    def __init__(self, pool: PagePool) -> None:
        self.masters: dict[bytes, Master] = {}
        self.mirrors: dict[str, Mirror] = {}
        self.evictions = 0
        self._pool = pool
        self._page_users = np.zeros(pool.num_pages, dtype=np.int32)
        self._clock = 0

    @property
    def used_pages(self) -> int:
        """Pages that have a user."""
        return int(np.count_nonzero(self._page_users))

    # Pages ----------------------------------------------------------------------------------------

    def take_pages(self, count: int) -> Pages:
        """Takes pages, evicting Masters that nobody uses, the longest unused first.

        Raises:
            OutOfPagesError: nothing was taken; Masters may have been evicted, unless the pool would
                have been too small without any of them.
            ValueError: the engine's allocator gave pages that are in use, or none of the pool.
        """
        while True:
            try:
                pages = self._pool.allocate(count)
                break
            except OutOfPagesError as error:
                within_reach = count <= self._pool.num_pages - self._pinned_pages()
                if not within_reach or not self._evict_one():
                    raise OutOfPagesError(
                        f"capacity: expected {count} free pages, got fewer, and every Master is in "
                        f"use ({error}); release agents or enlarge the store"
                    ) from error
        used = self._page_users[pages] > 0
        if used.any():
            self._pool.free(pages[~used])
            raise ValueError(f"allocate: expected pages not in use, got {pages[used].tolist()}")
        self._page_users[pages] += 1
        return pages

    def share_pages(self, pages: Pages) -> None:
        """Adds one user to each page."""
        self._page_users[pages] += 1

    def drop_pages(self, pages: Pages) -> None:
        """Takes one user from each page; pages without users go back to the pool."""
        self._page_users[pages] -= 1
        assert (self._page_users[pages] >= 0).all(), "pages that were given back before"
        self._pool.free(pages[self._page_users[pages] == 0])

    def _pinned_pages(self) -> int:
        """Pages that stay in use whatever is evicted."""
        users = self._page_users.copy()
        for master in self.masters.values():
            if master.holders == 0:
                users[master.pages] -= 1
        return int(np.count_nonzero(users))

    def _evict_one(self) -> bool:
        idle = [master for master in self.masters.values() if master.holders == 0]
        if not idle:
            return False
        oldest = min(idle, key=lambda master: master.last_used)
        self.masters.pop(oldest.digest)
        oldest.stored = False
        self.drop_pages(oldest.pages)
        self.evictions += 1
        return True

    # Masters --------------------------------------------------------------------------------------

    def hold(self, masters: Sequence[Master]) -> None:
        """Keeps Masters from being evicted until they are let go, as often as each is held."""
        for clock, master in enumerate(masters, self._clock + 1):
            master.holders += 1
            master.last_used = clock
        self._clock += len(masters)

    def let_go(self, masters: Sequence[Master]) -> None:
        """Ends a `hold`. A Master that nothing refers to any more gives its pages back."""
        for master in masters:
            master.holders -= 1
            if master.holders == 0 and not master.stored:
                self.drop_pages(master.pages)
                master.pages = no_pages()

    def publish(self, master: Master) -> None:
        """Lets later rounds find a Master by its digest; the first one of a digest stays."""
        if not master.stored and master.digest not in self.masters:
            self.masters[master.digest] = master
            master.stored = True

    def take_over(self, masters: Sequence[Master]) -> None:
        """Masters of another store, the longest unused first, whose pages have been taken."""
        for master in masters:
            self._clock += 1
            master.last_used = self._clock
            if master.stored:
                self.masters[master.digest] = master

    # Mirrors --------------------------------------------------------------------------------------

    def put(self, agent: str, mirror: Mirror) -> None:
        """Makes ``mirror`` the agent's KV; its earlier one is dropped.

        One use of each of the Mirror's own pages is taken over, and its Masters are held.
        """
        self.hold(mirror.uses.masters)
        if agent in self.mirrors:
            self.drop(agent)
        self.mirrors[agent] = mirror

    def drop(self, agent: str) -> None:
        """Forgets the agent's Mirror."""
        mirror = self.mirrors.pop(agent)
        self.let_go(mirror.uses.masters)
        self.drop_pages(mirror.own_pages)
