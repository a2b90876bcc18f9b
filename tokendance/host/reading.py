"""Rows that are read while others may let go of them."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from tokendance.host.mirror import Master, Mirror, no_pages

if TYPE_CHECKING:
    from tokendance.host.scheduler import Scheduler


class Reading:
    """Keeps agents' rows where they are while somebody reads them: ``with Reading(...):``.

    May be entered any number of times, by several threads at once. Whoever enters it makes sure
    that the rows are there: by doing so in the turn in which the Mirrors were looked up, or because
    they are another reading's already.

    Args:
        scheduler: whose books they stand in.
        mirrors: agents' rows, of the store or of plans.
        masters: besides those that the Mirrors use.

    Attributes:
        pages: that stay. A Master in them may be evicted, but not its pages.
    """

    def __init__(
        self, scheduler: Scheduler, mirrors: Sequence[Mirror], masters: Sequence[Master] = ()
    ) -> None:
        self._scheduler = scheduler
        used = {one.serial: one for one in masters}
        used |= {one.serial: one for mirror in mirrors for one in mirror.uses.masters}
        parts = [mirror.own_pages for mirror in mirrors] + [one.pages for one in used.values()]
        self.pages = np.unique(np.concatenate([no_pages(), *parts]))

    def __enter__(self) -> Reading:
        with self._scheduler.guard:
            self._scheduler.books.share_pages(self.pages)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is GeneratorExit:  # perhaps of a generator that is garbage: see `collect`
            self._scheduler.dropped.append(self)
        else:
            self.end()

    def end(self) -> None:
        """Ends what was entered once."""
        with self._scheduler.guard:
            self._scheduler.books.drop_pages(self.pages)
