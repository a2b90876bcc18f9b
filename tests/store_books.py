"""Books of a whole store: its own, and those of its tenants."""

from __future__ import annotations

import numpy as np
from symbolic_device import check_books

import tokendance as td


def check_store(store: td.DiffStore) -> None:
    """Counts everything anew, and that every page of the pool is one's alone."""
    pages: list[int] = []
    for one in (store, *store.tenants.values()):
        check_books(one.scheduler)
        used = np.flatnonzero(one.books._page_users).tolist()
        assert len(used) == one.stats().used_pages
        pages += used
    assert len(pages) == len(set(pages))
    stats = store.stats()
    every = [stats, *stats.tenants.values()]
    assert sum(one.total_pages for one in every) == store.pool.num_pages
    assert all(one.free_pages + one.used_pages == one.total_pages for one in every)
