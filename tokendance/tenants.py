"""What a tenant has of a store's device: pages that are lent to it, and to nobody else."""

from __future__ import annotations

from dataclasses import replace

from tokendance.device.executor import Executor
from tokendance.host.scheduler import Scheduler
from tokendance.host.tenant_segments import TenantSegments
from tokendance.lock import StoreLock


class LentPages:
    """Pages of a pool and of host memory that a tenant has to itself.

    Args:
        lender: the scheduler of the store, whose guard is held.
        tenant: the name, for errors.
        pages, host_pages: how many.

    Raises:
        ValueError: more than are free, or held by nobody.
        OutOfPagesError: an engine's allocator, which does not say how many it has, has fewer.
    """

    def __init__(self, lender: Scheduler, tenant: str, pages: int, host_pages: int) -> None:
        books = lender.books
        there = books.free_pages + books.evictable_pages
        if pages > there:
            raise ValueError(
                f"quota: expected at most the {there} pages that nobody holds, got {pages}"
            )
        if host_pages > (lender.host_pages.num_free or 0):
            raise ValueError(
                f"host_quota: expected at most the {lender.host_pages.num_free} pages of host "
                f"memory that are free, got {host_pages}"
            )
        self._lender = lender
        shortage = (f"quota of tenant {tenant!r}", "give the tenant a larger quota")
        self.pages = books.lend(pages, shortage)
        on_host = lender.host_pages.allocate(host_pages)
        assert on_host is not None
        self.host_pages = lender.host_pages.lend(on_host, shortage)

    def scheduler(
        self, executor: Executor, lock: StoreLock, segments: TenantSegments, clears: bool
    ) -> Scheduler:
        """Books over these pages alone."""
        scheduler = Scheduler(
            replace(executor.profile, host_pages=self.host_pages.limit),
            self.pages,
            guard=lock,
            host_allocator=self.host_pages,
            segments=segments,
            clears=clears,
        )
        scheduler.windows = list(self._lender.windows)
        return scheduler

    def overwrite(self, executor: Executor) -> None:
        """Writes zeros to all of them; nobody uses one."""
        for allocator, write in (
            (self.pages, executor.clear),
            (self.host_pages, executor.clear_host),
        ):
            ids = allocator.allocate(allocator.limit)
            assert ids is not None, "pages that are still used"
            write(ids)
            allocator.free(ids)

    def give_back(self) -> None:
        """The lender has them again; its guard is held."""
        self._lender.books.take_back(self.pages)
        self._lender.host_pages.take_back(self.host_pages)
