"""Masters, uses and Mirrors: what a store holds and what operators read (terms: docs/index.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tokendance.pool import Pages
from tokendance.rounds import IntArray, RoundExtents
from tokendance.segments import Segment

Masks = NDArray[np.uint32]


def pages_for(rows: int, block_size: int) -> int:
    """Pages that hold ``rows`` rows."""
    return -(-rows // block_size)


def slots_of(pages: Pages, rows: int, block_size: int) -> NDArray[np.int64]:
    """Pool rows (page * block_size + row of the page) of the first ``rows`` rows of a page list."""
    offsets = np.arange(block_size, dtype=np.int64)
    return (pages.astype(np.int64)[:, None] * block_size + offsets).ravel()[:rows]


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
        pages: ``ceil(length / block_size)`` page ids.
        holders: Mirrors and plans that use it.
        stored: whether the store can find it by its digest.
        last_used: the store's clock when it was last used.
    """

    digest: bytes
    length: int
    origin: int
    context: bytes
    exact: bool
    seen: frozenset[bytes] = frozenset()
    pages: Pages = field(default_factory=no_pages)
    holders: int = 0
    stored: bool = False
    last_used: int = 0


@dataclass(eq=False)
class Use:
    """One occurrence of a Master in one prompt.

    Attributes:
        master: whose rows are used.
        delta: position of the Master's row 0 in the prompt.
        length: rows used, a prefix of the Master.
        masks: uint32 ``[ceil(length / block_size)]``; bit i of a page's mask = an own row stands
            there.
    """

    master: Master
    delta: int
    length: int
    masks: Masks

    @property
    def shift(self) -> int:
        return self.delta - self.master.origin

    def cut(self, length: int, block_size: int) -> Use:
        """The same use, of at most ``length`` rows."""
        if length >= self.length:
            return Use(self.master, self.delta, self.length, self.masks.copy())
        masks = self.masks[: pages_for(length, block_size)].copy()
        if length % block_size:
            masks[-1] &= np.uint32((1 << (length % block_size)) - 1)
        return Use(self.master, self.delta, length, masks)

    def override(self, rows: IntArray, block_size: int) -> None:
        """Marks rows of the Master as replaced by own rows."""
        bits = np.left_shift(np.uint32(1), (rows % block_size).astype(np.uint32))
        np.bitwise_or.at(self.masks, rows // block_size, bits)

    def overridden(self, block_size: int) -> IntArray:
        """The rows that own rows replace, ascending."""
        bits = (self.masks[:, None] >> np.arange(block_size, dtype=np.uint32)) & np.uint32(1)
        return np.flatnonzero(bits.ravel()).astype(np.int32)


def empty_masks(length: int, block_size: int) -> Masks:
    return np.zeros(pages_for(length, block_size), dtype=np.uint32)


def masks_of_first(rows: int, length: int, block_size: int) -> Masks:
    """Masks of a use of ``length`` rows, the first ``rows`` of which are replaced by own rows."""
    return _masks_of_first(rows, length, block_size).copy()


@lru_cache(maxsize=4096)
def _masks_of_first(rows: int, length: int, block_size: int) -> Masks:
    masks = empty_masks(length, block_size)
    full, rest = divmod(rows, block_size)
    masks[:full] = (1 << block_size) - 1
    if rest:
        masks[full] = (1 << rest) - 1
    return masks


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
    """

    segments: tuple[Segment, ...]
    length: int
    uses: list[Use]
    own_pages: Pages
    own_position: IntArray
    exact_length: int


def round_arrays(
    mirrors: Sequence[Mirror], block_size: int
) -> tuple[dict[str, IntArray], RoundExtents]:
    """The fields of a round that describe the agents' KV (no rows, no work), and their extents.

    Agent a of the round is ``mirrors[a]``. A Master that one prompt uses twice is listed twice.
    """
    index: dict[tuple[int, int], int] = {}
    masters: list[Master] = []
    uses: list[tuple[int, int, Use]] = []
    for agent, mirror in enumerate(mirrors):
        seen: dict[int, int] = {}
        for use in mirror.uses:
            key = id(use.master)
            occurrence = seen.get(key, 0)
            seen[key] = occurrence + 1
            master = index.setdefault((key, occurrence), len(masters))
            if master == len(masters):
                masters.append(use.master)
            uses.append((agent, master, use))

    ints = np.int32
    use_pages = [len(use.masks) for _, _, use in uses]
    master_pages = [len(master.pages) for master in masters]
    own_pages = [len(mirror.own_pages) for mirror in mirrors]
    agent_use = np.full((len(mirrors), len(masters)), -1, dtype=ints)
    for u, (agent, master, _) in enumerate(uses):
        agent_use[agent, master] = u
    own_position = np.zeros(sum(own_pages) * block_size, dtype=ints)
    at = 0
    for mirror in mirrors:
        own_position[at : at + len(mirror.own_position)] = mirror.own_position
        at += len(mirror.own_pages) * block_size

    arrays = {
        "use_agent": np.array([agent for agent, _, _ in uses], dtype=ints),
        "use_master": np.array([master for _, master, _ in uses], dtype=ints),
        "use_delta": np.array([use.delta for _, _, use in uses], dtype=ints),
        "use_shift": np.array([use.shift for _, _, use in uses], dtype=ints),
        "use_length": np.array([use.length for _, _, use in uses], dtype=ints),
        "use_page_indptr": _indptr(use_pages),
        "use_masks": _joined([use.masks for _, _, use in uses]).view(ints),
        "agent_use_indptr": _indptr([len(mirror.uses) for mirror in mirrors]),
        "agent_use": agent_use,
        "master_page_indptr": _indptr(master_pages),
        "master_pages": _joined([master.pages for master in masters]).view(ints),
        "own_length": np.array([len(mirror.own_position) for mirror in mirrors], dtype=ints),
        "own_page_indptr": _indptr(own_pages),
        "own_pages": _joined([mirror.own_pages for mirror in mirrors]).view(ints),
        "own_position": own_position,
    }
    extents = RoundExtents(
        uses=len(uses),
        use_pages=sum(use_pages),
        agents=len(mirrors),
        masters=len(masters),
        master_pages=sum(master_pages),
        own_pages=sum(own_pages),
        block_size=block_size,
    )
    return arrays, extents


def _indptr(lengths: Sequence[int]) -> IntArray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)


def _joined(parts: Sequence[NDArray[np.generic]]) -> NDArray[np.generic]:
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
