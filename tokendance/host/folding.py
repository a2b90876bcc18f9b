"""Masters that one agent alone uses, as own rows of it.

A Master saves rows as long as several agents use it. For one alone it keeps rows that the agent
does not use, or that own rows replace, and a last page that is not full.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokendance.host.mirror import Master, Mirror, Pages, Uses, pages_for, slots_at, slots_of
from tokendance.host.record import MovedRows
from tokendance.host.round import IntArray


@dataclass(eq=False)
class Folding:
    """What becomes of a Mirror without the Masters that it alone uses.

    Attributes:
        mirror: as it is.
        masters: that it does without.
        uses: that it keeps.
        own_position: of all its own rows then.
        kept: own pages, the first ones, that stay as they are.
        source, position_from: of the own rows behind those, where they are now.
    """

    mirror: Mirror
    masters: list[Master]
    uses: Uses
    own_position: IntArray
    kept: int
    source: NDArray[np.int64]
    position_from: IntArray
    block_size: int

    @property
    def pages_needed(self) -> int:
        """Fresh pages."""
        return pages_for(len(self.own_position), self.block_size) - self.kept

    @property
    def pages_saved(self) -> int:
        """By how much the Mirror and its Masters have fewer."""
        before = len(self.mirror.own_pages) + sum(len(one.pages) for one in self.masters)
        return before - self.pages_needed - self.kept

    @property
    def is_current(self) -> bool:
        """Whether nobody else has come to use the Masters."""
        uses = Counter(self.mirror.uses.masters)
        return all(one.holders == uses[one] for one in self.masters)

    def moved(self, fresh: Pages) -> MovedRows:
        """What is copied to the fresh pages."""
        position = self.own_position[self.kept * self.block_size :]
        target = slots_of(fresh, len(position), self.block_size)
        return MovedRows(self.source, target, self.position_from, position)

    def folded(self, fresh: Pages) -> Mirror:
        """The Mirror over those pages: other rows, as whoever has copies of its pages sees it."""
        pages = np.concatenate([self.mirror.own_pages[: self.kept], fresh])
        mirror = self.mirror
        return Mirror(
            mirror.segments, mirror.length, self.uses, pages, self.own_position, mirror.exact_length
        )


def folding_of(mirror: Mirror, block_size: int, turns: bool = True) -> Folding | None:
    """How the Mirror does without Masters that it alone uses; None where that saves no page.

    Args:
        turns: whether keys that are moved have the bits that `restore` gives them. Otherwise only
            Masters are meant that stand where they were computed.
    """
    count = Counter(mirror.uses.masters)
    alone = {master for master, uses in count.items() if master.holders == uses}
    if not turns:
        alone -= {use.master for use in mirror.uses if use.shift}
    rows: Counter[Master] = Counter()
    for use in mirror.uses:
        if use.master in alone:
            rows[use.master] += use.length - len(use.overridden(block_size))
    # One whose pages would be as full as before saves nothing, and can be found by later rounds.
    alone = {one for one in alone if rows[one] < len(one.pages) * block_size}
    folding = _folding(mirror, block_size, alone)
    return folding if folding.pages_saved > 0 else None


def _folding(mirror: Mirror, block_size: int, alone: set[Master]) -> Folding:
    position = [mirror.own_position]
    from_ = [mirror.own_position]
    source = [slots_of(mirror.own_pages, len(mirror.own_position), block_size)]
    stay = []
    for use in mirror.uses:
        if use.master not in alone:
            stay.append(use)
            continue
        used = np.ones(use.length, dtype=bool)
        used[use.overridden(block_size)] = False
        rows = np.flatnonzero(used).astype(np.int32)
        position.append(use.delta + rows)
        from_.append(use.master.origin + rows)
        source.append(slots_at(use.master.pages, rows, block_size))
    first = min((int(one[0]) for one in position[1:] if len(one)), default=mirror.length)
    kept = int(np.searchsorted(mirror.own_position, first)) // block_size
    every = np.concatenate(position).astype(np.int32)
    order = np.argsort(every, kind="stable")
    moved = order[kept * block_size :]
    return Folding(
        mirror,
        list(alone),
        Uses.of(stay, block_size),
        every[order],
        kept,
        np.concatenate(source)[moved],
        np.concatenate(from_).astype(np.int32)[moved],
        block_size,
    )
