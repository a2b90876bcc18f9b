"""What a store holds, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from tokendance.device.executor import Executor
from tokendance.host.books import Books
from tokendance.host.mirror import Master, no_pages
from tokendance.host.scheduler import Scheduler
from tokendance.tiers import Tiers


@dataclass(frozen=True)
class TierStats:
    """What one tier holds.

    Attributes:
        agents: whose Mirrors are there, and in no tier above.
        masters: that are there. On disk: those that no tier above has.
        used_bytes: of pages in use, those of plans and of suspended agents too; on disk, of all
            rows in the files, valid or not.
        capacity: bytes that the tier may have; None: as many as there is room for.
        demoted: Mirrors and Masters that have left it for a lower tier since the store was made.
        evictions: Masters dropped from it to make room.
    """

    agents: int
    masters: int
    used_bytes: int
    capacity: int | None
    demoted: int
    evictions: int


@dataclass(frozen=True)
class StoreStats:
    """What a store holds. Rows are tokens; bytes are keys and values of all layers.

    Dense bytes are of the model's dtype, the others of the pool's: what a quantized pool saves is
    part of `compression`.

    Attributes:
        agents, masters: Mirrors and Masters.
        dense_rows: rows that the agents' KV would have if each were stored densely.
        master_rows: rows of Masters, each counted once.
        own_rows: rows that agents keep themselves (private, overridden, decoded).
        dense_bytes: bytes of ``dense_rows``.
        row_bytes: bytes of ``master_rows + own_rows``: the least that this content takes.
        stored_bytes: bytes of the pages that hold them.
        total_pages, used_pages: of the pool, without those of tenants, or of a tenant's quota; used
            ones hold rows, plans' included.
        free_pages: that can be taken without an eviction. Where an engine's allocator does not say
            how many it has, those that the store does not use.
        evictable_pages: of Masters that no Mirror and no plan uses.
        held_pages: used ones that are not evictable.
        evictions: Masters dropped to make room since the store was made.
        folded: Masters whose rows have become own rows of the one agent that used them, likewise.
        tiers: by name, ``"device"``, ``"host"`` and ``"disk"``, as far as there are such, what each
            holds. The other fields are of the device alone.
        tenants: by name, what each tenant holds. Nothing of it is counted in the rest.
    """

    agents: int
    masters: int
    dense_rows: int
    master_rows: int
    own_rows: int
    dense_bytes: int
    row_bytes: int
    stored_bytes: int
    total_pages: int
    used_pages: int
    free_pages: int
    evictable_pages: int
    held_pages: int
    evictions: int
    folded: int
    tiers: Mapping[str, TierStats] = field(default_factory=dict)
    tenants: Mapping[str, StoreStats] = field(default_factory=dict)

    @property
    def padding(self) -> float:
        """Stored bytes over the bytes of the rows: 1.0 means that every page is full."""
        return self.stored_bytes / self.row_bytes if self.row_bytes else 1.0

    @property
    def compression(self) -> float:
        """Dense bytes over stored bytes."""
        return self.dense_bytes / self.stored_bytes if self.stored_bytes else 1.0


def count(scheduler: Scheduler, executor: Executor, tiers: Tiers) -> StoreStats:
    """Counts rows, pages and bytes; the guard is held."""
    books, pool = scheduler.books, executor.pool
    masters, outputs = _masters_of(books)
    own_pages = [mirror.own_pages for mirror in books.mirrors.values()]
    own_pages += [master.pages for master in (*masters.values(), *outputs.values())]
    pages = np.unique(np.concatenate(own_pages)) if own_pages else no_pages()
    master_rows = sum(master.length for master in masters.values())
    own_rows = sum(len(mirror.own_position) for mirror in books.mirrors.values())
    own_rows += sum(master.length for master in outputs.values())
    dense_rows = sum(mirror.length for mirror in books.mirrors.values())
    return StoreStats(
        agents=len(books.mirrors),
        masters=len(masters),
        dense_rows=dense_rows,
        master_rows=master_rows,
        own_rows=own_rows,
        dense_bytes=dense_rows * executor.geometry.row_bytes,
        row_bytes=(master_rows + own_rows) * pool.row_bytes,
        stored_bytes=len(pages) * pool.page_bytes,
        total_pages=books.limit,
        used_pages=books.used_pages,
        free_pages=books.free_pages,
        evictable_pages=books.evictable_pages,
        held_pages=books.used_pages - books.evictable_pages,
        evictions=books.evictions,
        folded=books.folded,
        tiers=_tiers(scheduler, executor, tiers, len(masters)),
    )


def _masters_of(books: Books) -> tuple[dict[int, Master], dict[int, Master]]:
    """Masters by id, and apart those that hold what one agent has decoded."""
    masters = {id(master): master for master in books.masters.values()}
    outputs: dict[int, Master] = {}
    for mirror in books.mirrors.values():
        for master in mirror.uses.masters:
            shared = master.stored or master.holders > 1
            (masters if shared else outputs)[id(master)] = master
    return masters, outputs


def _tiers(
    scheduler: Scheduler, executor: Executor, tiers: Tiers, masters: int
) -> dict[str, TierStats]:
    books, page_bytes = scheduler.books, executor.pool.page_bytes
    found = {
        "device": TierStats(
            agents=len(books.mirrors),
            masters=masters,
            used_bytes=books.used_pages * page_bytes,
            capacity=books.limit * page_bytes,
            demoted=tiers.demoted["device"],
            evictions=books.evictions,
        )
    }
    if tiers.host is not None:
        assert executor.host is not None
        there, pages, page_bytes = tiers.host.books, scheduler.host_pages, executor.host.page_bytes
        found["host"] = TierStats(
            agents=len(there.mirrors),
            masters=len(_masters_of(there)[0]),
            used_bytes=(pages.limit - (pages.num_free or 0)) * page_bytes,
            capacity=pages.limit * page_bytes,
            demoted=tiers.demoted["host"],
            evictions=there.evictions,
        )
    if tiers.disk is not None:
        found["disk"] = TierStats(
            agents=len(tiers.on_disk),
            masters=tiers.disk.masters_below(tiers.has_master),
            used_bytes=tiers.disk.file_bytes,
            capacity=tiers.disk.capacity,
            demoted=0,
            evictions=tiers.disk.evictions,
        )
    return found
