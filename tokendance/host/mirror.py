"""Masters, uses and Mirrors: what a store holds and what operators read (terms: docs/index.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, count
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from tokendance.host.round import IntArray, RoundExtents, agent_use
from tokendance.host.segments import Segment

Masks = NDArray[np.uint32]
Pages = NDArray[np.int32]


def pages_for(rows: int, block_size: int) -> int:
    """Pages that hold ``rows`` rows."""
    return -(-rows // block_size)


def slots_of(pages: Pages, rows: int, block_size: int) -> NDArray[np.int64]:
    """Pool rows (page * block_size + row of the page) of the first ``rows`` rows of a page list."""
    offsets = np.arange(block_size, dtype=np.int64)
    return (pages.astype(np.int64)[:, None] * block_size + offsets).ravel()[:rows]


def rows_of_pages(pages: int, rows: int, block_size: int) -> IntArray:
    """How many of the first ``rows`` rows of a page list each of so many pages has."""
    return np.clip(rows - block_size * np.arange(pages, dtype=np.int32), 0, block_size)


def slots_at(
    pages: Pages, rows: IntArray | NDArray[np.int64], block_size: int
) -> NDArray[np.int64]:
    """Pool rows of these rows of a page list."""
    return pages[rows // block_size].astype(np.int64) * block_size + rows % block_size


def no_pages() -> Pages:
    return np.empty(0, dtype=np.int32)


def no_positions() -> IntArray:
    return np.empty(0, dtype=np.int32)


@dataclass(eq=False)
class Master:
    """The KV of one segment in pages, with keys rotated where they were computed.

    Attributes:
        digest: of the segment; empty while an output is still being decoded.
        length: rows.
        origin: position at which row 0 was computed.
        context: chained digest of all that stood left of it.
        exact: every row was computed with only exact rows to its left.
        seen: digests of the shared segments that stood left of it.
        computed: rows that are computed, the first ones.
        pages: ``ceil(length / block_size)`` page ids.
        serial: a number that no other Master of this process has, but for copies of its rows in
            other tiers.
        holders: Mirrors and plans that use it.
        stored: whether the store can find it by its digest.
        last_used: the store's clock when it was last used.
        replaces: whether later rounds find it instead of another Master of the segment.
    """

    digest: bytes
    length: int
    origin: int
    context: bytes
    exact: bool
    seen: frozenset[bytes] = frozenset()
    computed: int = 0
    pages: Pages = field(default_factory=no_pages)
    serial: int = field(default_factory=count().__next__)
    holders: int = 0
    stored: bool = False
    last_used: int = 0
    replaces: bool = False

    @property
    def is_computed(self) -> bool:
        """Whether all rows are."""
        return self.computed >= self.length


class Use(NamedTuple):
    """One occurrence of a Master in one prompt.

    Attributes:
        master: whose rows are used.
        delta: position of the Master's row 0 in the prompt.
        length: rows used, a prefix of the Master.
        masks: uint32 ``[ceil(length / block_size)]``; bit i of a page's mask = an own row stands
            there. Of an item of `Uses`, a view: what is written is the prompt's.
    """

    master: Master
    delta: int
    length: int
    masks: Masks

    @property
    def shift(self) -> int:
        return self.delta - self.master.origin

    def override(self, rows: IntArray, block_size: int) -> None:
        """Marks rows of the Master as replaced by own rows."""
        bits = np.left_shift(np.uint32(1), (rows % block_size).astype(np.uint32))
        np.bitwise_or.at(self.masks, rows // block_size, bits)

    def overridden(self, block_size: int) -> IntArray:
        """The rows that own rows replace, ascending."""
        bits = (self.masks[:, None] >> np.arange(block_size, dtype=np.uint32)) & np.uint32(1)
        return np.flatnonzero(bits.ravel()).astype(np.int32)


class Uses(Sequence[Use]):
    """The uses of one prompt, ascending by delta, without overlap.

    A round has thousands: they are kept as arrays, and an item is made when it is asked for.

    Attributes:
        masters: of each use.
        serial: int64 ``[uses]``, the Masters' serial numbers.
        delta, length: int32 ``[uses]``.
        masks: uint32, of all uses one after the other.
    """

    def __init__(
        self,
        masters: list[Master],
        delta: IntArray,
        length: IntArray,
        masks: Masks,
        block_size: int,
        serial: NDArray[np.int64] | None = None,
    ) -> None:
        if serial is None:
            serial = np.array([master.serial for master in masters], dtype=np.int64)
        self.masters = masters
        self.serial = serial
        self.delta = delta
        self.length = length
        self.masks = masks
        self._block_size = block_size

    @classmethod
    def of(cls, uses: Sequence[Use], block_size: int) -> Uses:
        """The same uses, their masks copied."""
        return cls(
            [use.master for use in uses],
            np.array([use.delta for use in uses], dtype=np.int32),
            np.array([use.length for use in uses], dtype=np.int32),
            np.concatenate([np.empty(0, np.uint32), *[use.masks for use in uses]]),
            block_size,
        )

    @cached_property
    def page_indptr(self) -> IntArray:
        """int32 ``[uses + 1]``: where the masks of each use begin."""
        return _indptr(-(-self.length // self._block_size))

    def __len__(self) -> int:
        return len(self.masters)

    @overload
    def __getitem__(self, index: int) -> Use: ...
    @overload
    def __getitem__(self, index: slice) -> list[Use]: ...
    def __getitem__(self, index: int | slice) -> Use | list[Use]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]  # a negative index, and IndexError
        masks = self.masks[self.page_indptr[i] : self.page_indptr[i + 1]]
        return Use(self.masters[i], int(self.delta[i]), int(self.length[i]), masks)

    def cut(self, rows: int) -> Uses:
        """The uses of the prompt's first rows, masks copied; the last may be cut, too."""
        count = int(np.searchsorted(self.delta, rows))
        length = np.minimum(self.length[:count], rows - self.delta[:count])
        masks = self.masks[: self.page_indptr[count]].copy()
        if count and length[-1] < self.length[count - 1]:
            pages = int(self.page_indptr[count - 1]) + pages_for(int(length[-1]), self._block_size)
            masks = masks[:pages]
            if length[-1] % self._block_size:
                masks[-1] &= np.uint32((1 << int(length[-1] % self._block_size)) - 1)
        delta, serial = self.delta[:count].copy(), self.serial[:count].copy()
        return Uses(self.masters[:count], delta, length, masks, self._block_size, serial)

    def followed_by(self, other: Uses) -> Uses:
        """These and those behind them."""
        return Uses(
            self.masters + other.masters,
            np.concatenate([self.delta, other.delta]),
            np.concatenate([self.length, other.length]),
            np.concatenate([self.masks, other.masks]),
            self._block_size,
            np.concatenate([self.serial, other.serial]),
        )


def empty_masks(length: int, block_size: int) -> Masks:
    return np.zeros(pages_for(length, block_size), dtype=np.uint32)


@dataclass(eq=False)
class Mirror:
    """One agent's KV: its uses and its own rows.

    Attributes:
        segments: what the rows hold, in order; the last may be a decoded output.
        length: rows, the sum of the segments' lengths.
        uses: ascending by delta, without overlap.
        own_pages: pages of the own rows.
        own_position: int32, absolute positions of the own rows, ascending.
        exact_length: rows ``0 .. exact_length - 1`` are exact.
        content: a number that no other rows of this process have, but for copies in other tiers.
    """

    segments: tuple[Segment, ...]
    length: int
    uses: Uses
    own_pages: Pages
    own_position: IntArray
    exact_length: int
    content: int = field(default_factory=count().__next__)


def round_arrays(
    mirrors: Sequence[Mirror], block_size: int
) -> tuple[dict[str, IntArray], RoundExtents]:
    """The fields of a round that describe the agents' KV (no rows, no work), and their extents.

    Agent a of the round is ``mirrors[a]``. A Master that one prompt uses twice is listed twice.
    """
    ints = np.int32
    counts = [len(mirror.uses) for mirror in mirrors]
    use_agent = np.repeat(np.arange(len(mirrors), dtype=ints), counts)
    serial = np.concatenate([np.empty(0, np.int64), *[mirror.uses.serial for mirror in mirrors]])
    use_master, first = _numbered(use_agent, serial)
    all_masters = list(chain.from_iterable(mirror.uses.masters for mirror in mirrors))
    masters = [all_masters[use] for use in first]
    origin = np.array([master.origin for master in masters], dtype=ints)
    none = np.empty(0, dtype=ints)
    use_delta = np.concatenate([none, *[mirror.uses.delta for mirror in mirrors]])
    use_length = np.concatenate([none, *[mirror.uses.length for mirror in mirrors]])
    masks = np.concatenate([none, *[mirror.uses.masks.view(ints) for mirror in mirrors]])
    own_pages = [len(mirror.own_pages) for mirror in mirrors]
    own_position = np.zeros(sum(own_pages) * block_size, dtype=ints)
    at = 0
    for mirror in mirrors:
        own_position[at : at + len(mirror.own_position)] = mirror.own_position
        at += len(mirror.own_pages) * block_size

    arrays = {
        "use_agent": use_agent,
        "use_master": use_master,
        "use_delta": use_delta,
        "use_shift": use_delta - origin[use_master],
        "use_length": use_length,
        "use_page_indptr": _indptr(-(-use_length // block_size)),
        "use_masks": masks,
        "agent_use_indptr": _indptr(counts),
        "agent_use": agent_use(use_agent, use_master),
        "master_page_indptr": _indptr([len(master.pages) for master in masters]),
        "master_pages": np.concatenate([none, *[master.pages for master in masters]]),
        "own_length": np.array([len(mirror.own_position) for mirror in mirrors], dtype=ints),
        "own_page_indptr": _indptr(own_pages),
        "own_pages": np.concatenate([none, *[mirror.own_pages for mirror in mirrors]]),
        "own_position": own_position,
    }
    extents = RoundExtents(
        uses=len(use_agent),
        use_pages=len(masks),
        agents=len(mirrors),
        masters=len(masters),
        master_pages=len(arrays["master_pages"]),
        own_pages=sum(own_pages),
        block_size=block_size,
    )
    return arrays, extents


def _numbered(agent: IntArray, serial: NDArray[np.int64]) -> tuple[IntArray, NDArray[np.intp]]:
    """Numbers a round's Masters as they first appear: of each use, and the first use of each.

    The n-th use of one Master by one agent counts as a Master of its own.
    """
    order, is_first = _grouped(serial)
    # The uses of a Master come agent by agent, so that those of one agent are next to each other.
    again = ~is_first
    again[1:] &= agent[order][1:] == agent[order][:-1]
    if again.any():
        index = np.arange(len(order))
        occurrence = np.empty(len(order), dtype=np.int64)
        occurrence[order] = index - np.maximum.accumulate(np.where(again, 0, index))
        number = np.empty(len(order), dtype=np.int64)
        number[order] = np.cumsum(is_first) - 1
        order, is_first = _grouped(occurrence * len(order) + number)
    first = order[is_first]
    by_first = np.argsort(first)
    rank = np.empty(len(first), dtype=np.int32)
    rank[by_first] = np.arange(len(first), dtype=np.int32)
    number_of_use = np.empty(len(order), dtype=np.int32)
    number_of_use[order] = rank[np.cumsum(is_first) - 1]
    return number_of_use, first[by_first]


def _grouped(keys: NDArray[np.int64]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """An order in which equal keys are next to each other, as they came, and where each begins."""
    order = np.argsort(keys, kind="stable")
    is_first = np.ones(len(keys), dtype=bool)
    is_first[1:] = keys[order][1:] != keys[order][:-1]
    return order, is_first


def _indptr(lengths: Sequence[int] | IntArray) -> IntArray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)
