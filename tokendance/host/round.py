"""The round as the operators see it: named int32 fields in one packed buffer.

This mirrors ``csrc/include/tokendance/round.h``, which documents every field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

ROUND_VERSION = 2
"""Of the fields and extents; a change of either counts it up."""

AGENT_USE_FIELDS = 2
WORK_FIELDS = 8
CHUNK_FIELDS = 4
FIELD_ALIGNMENT = 4

IntArray = NDArray[np.int32]


def require_round_version(built: str, version: int | None) -> None:
    """Raises ``ImportError`` if ``built``, a binary of this package, has rounds of another version.

    Planner, operators and this module are built and installed together: one that was left from
    before would take one field for another. None: it does not say, as before version 2.
    """
    if version != ROUND_VERSION:
        raise ImportError(
            f"{built}: expected rounds of version {ROUND_VERSION}, got {version}; "
            "build and install tokendance again"
        )


@dataclass(frozen=True)
class RoundExtents:
    """Capacities of the fields, in the order in which operators take them (``extents``)."""

    rows: int = 0
    uses: int = 0
    use_pages: int = 0
    agents: int = 0
    masters: int = 0
    master_pages: int = 0
    own_pages: int = 0
    work: int = 0
    work_rows: int = 0
    work_chunks: int = 0
    work_uses: int = 0
    partials: int = 0
    block_size: int = 16

    def as_list(self) -> list[int]:
        return [getattr(self, field.name) for field in fields(self)]

    def covers(self, other: RoundExtents) -> bool:
        """Whether a buffer of these capacities holds a round of ``other``'s."""
        return self.block_size == other.block_size and all(
            a >= b for a, b in zip(self.as_list(), other.as_list(), strict=True)
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every field, in the order in which they are packed."""
        return {
            "row_agent": (self.rows,),
            "row_position": (self.rows,),
            "use_agent": (self.uses,),
            "use_master": (self.uses,),
            "use_delta": (self.uses,),
            "use_shift": (self.uses,),
            "use_length": (self.uses,),
            "use_page_indptr": (self.uses + 1,),
            "use_masks": (self.use_pages,),
            "agent_use_indptr": (self.agents + 1,),
            "agent_use": (self.uses, AGENT_USE_FIELDS),
            "master_page_indptr": (self.masters + 1,),
            "master_pages": (self.master_pages,),
            "own_length": (self.agents,),
            "own_page_indptr": (self.agents + 1,),
            "own_pages": (self.own_pages,),
            "own_position": (self.own_pages * self.block_size,),
            "work": (self.work, WORK_FIELDS),
            "work_rows": (self.work_rows,),
            "work_chunks": (self.work_chunks, CHUNK_FIELDS),
            "work_uses": (self.work_uses,),
            "row_partial_indptr": (self.rows + 1,),
            "row_partials": (self.partials,),
        }

    def offsets(self) -> tuple[dict[str, tuple[int, int]], int]:
        """``{field: (offset, length)}`` in ints, and the length of the whole buffer."""
        ranges: dict[str, tuple[int, int]] = {}
        at = 0
        for name, shape in self.shapes().items():
            length = int(np.prod(shape, dtype=np.int64))
            ranges[name] = (at, length)
            at += -(-length // FIELD_ALIGNMENT) * FIELD_ALIGNMENT
        return ranges, at


_NO_AGENT = ("row_agent", "use_agent", "agent_use")


def agent_use(use_agent: IntArray, use_master: IntArray) -> IntArray:
    """The field ``agent_use``: {Master, use} of each agent, ascending by Master."""
    masters = int(use_master.max(initial=0)) + 1
    order = np.argsort(use_agent.astype(np.int64) * masters + use_master)  # no pair comes twice
    return np.stack((use_master[order], order), axis=1).astype(np.int32)


def pack(
    arrays: Mapping[str, IntArray], filled: RoundExtents, capacity: RoundExtents | None = None
) -> IntArray:
    """Packs fields of exactly ``filled``'s shapes into a buffer of ``capacity`` (or just that).

    A field that is left out is zero (an indptr is all 0). Empty slots are filled as round.h says.
    Raises ``ValueError`` for an unknown field, a wrong shape, or a capacity that is too small.
    """
    capacity = capacity or filled
    if not capacity.covers(filled):
        raise ValueError(f"capacity: expected at least {filled}, got {capacity}")
    shapes, target = filled.shapes(), capacity.shapes()
    unknown = set(arrays) - set(shapes)
    if unknown:
        raise ValueError(f"arrays: unknown fields {sorted(unknown)}")
    ranges, total = capacity.offsets()
    buffer = np.zeros(total, dtype=np.int32)
    for name, shape in shapes.items():
        offset, length = ranges[name]
        view = buffer[offset : offset + length].reshape(target[name])
        if name in _NO_AGENT:
            view[...] = -1
        if name not in arrays:
            continue
        array = np.asarray(arrays[name])
        if array.shape != shape:
            raise ValueError(f"{name}: expected {list(shape)}, got {list(array.shape)}")
        view[tuple(slice(0, size) for size in shape)] = array
        if name.endswith("indptr"):
            view[shape[0] :] = array[-1]
    return buffer
