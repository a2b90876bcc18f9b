"""Planner of decisions and work lists: csrc/planner, C++ through pybind11, numpy in and out."""

from collections.abc import Callable
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

_Ints = NDArray[np.int32]
_Flags = NDArray[np.uint8]

ROUND_VERSION: int
"""Of the fields that it plans; `tokendance.host.round` wants its own."""

class Tiling(TypedDict):
    """Spans, uses and own rows of all agents; those of agent a lie between its two bounds."""

    span_indptr: _Ints  # [N + 1]
    span_end: _Ints
    span_kind: _Flags  # index in tokendance.host.decide.ROW_KINDS
    use_indptr: _Ints  # [N + 1]
    use_master: _Ints
    use_delta: _Ints
    use_length: _Ints
    use_kind: _Flags
    mask_indptr: _Ints  # [N + 1]
    masks: NDArray[np.uint32]
    own_indptr: _Ints  # [N + 1]
    own: _Ints  # positions that the agents compute and keep

class RoundDecision:
    """What a round reuses and computes, in numbers; csrc/planner/decide.h says what they mean.

    Args:
        place_indptr: ``[N + 1]`` places of each prompt.
        segment, is_shared: by place.
        segment_length: by segment, at least 1.
        prefix: ``[N]`` rows that are the agent's own KV of an earlier round.

    Raises:
        ValueError: a wrong shape, or a segment out of range.
    """

    def __init__(
        self,
        place_indptr: _Ints,
        segment: _Ints,
        is_shared: _Flags,
        segment_length: _Ints,
        prefix: _Ints,
    ) -> None: ...
    def match(
        self,
        *,
        exact_prefix: _Ints,  # [N]
        earlier_context: _Ints,  # by place
        agent_computes: _Flags,  # [N]
        segment_computes: _Flags,  # by segment
        stored: _Ints,  # by segment: Master, or -1
        stored_rows: _Ints,
        master_context: _Ints,  # by Master
        master_is_exact: _Flags,
        master_has_seen: _Flags,  # [masters, segments]
        known: _Flags,  # by segment
        replaceable: _Flags,
        shortest: int,
        alone: _Flags,  # by segment
        informed: bool,
        lone: bool,
        chain: Callable[[int, int], int],  # context, segment -> context
    ) -> None:
        """Decides. Raises ValueError for a wrong shape or a Master out of range."""

    @property
    def order(self) -> _Ints:
        """``[N]`` the agents in the order in which they must be computed."""

    @property
    def made(self) -> list[tuple[int, int, int, int, int, bool]]:
        """Agent (-1: alone), segment, origin, context, place and exactness of new Masters."""

    @property
    def unseen(self) -> _Ints:
        """By place: shared tokens that the Master has not seen; -1 where no run begins."""

    @property
    def exact_length(self) -> _Ints:
        """``[N]`` rows before the first inexact one."""

    def tile(self, repaired: _Ints, block_size: int) -> Tiling:
        """Puts it together. ``repaired``: by place, first rows of a use that are computed again."""

class WorkList(TypedDict):
    """Fields of the round (round.h) that collective attention works from, of their exact sizes."""

    work: _Ints  # [work, 8]
    work_rows: _Ints  # [work_rows]
    work_chunks: _Ints  # [work_chunks, 4]
    work_uses: _Ints  # [work_uses]
    row_partial_indptr: _Ints  # [rows + 1]
    row_partials: _Ints  # [partials]

class WorkCapacity(TypedDict):
    work: int
    work_rows: int
    work_chunks: int
    work_uses: int
    partials: int

def plan_work(
    row_agent: _Ints,
    row_position: _Ints,
    use_agent: _Ints,
    use_master: _Ints,
    use_delta: _Ints,
    use_length: _Ints,
    master_page_indptr: _Ints,
    own_length: _Ints,
    own_page_indptr: _Ints,
    own_position: _Ints,
    *,
    block_size: int,
    max_tile_rows: int,
    read_bound_rows: int = 1,
    target_items: int,
    max_splits: int,
    window: int = 0,
    row_position_bound: _Ints | None = None,
    own_position_bound: _Ints | None = None,
) -> WorkList:
    """Which query rows meet which pages in one work item; csrc/planner/work_list.h says how.

    Args:
        row_agent, row_position: ``[R]`` rows of the step; the rows of an agent are adjacent and
            ascend; agent -1 is padding.
        use_agent, use_master, use_delta, use_length: ``[U]``; agent -1 is padding.
        master_page_indptr: ``[M + 1]``.
        own_length, own_page_indptr: ``[N]``, ``[N + 1]``. ``own_length`` counts the rows that the
            step itself adds.
        own_position: ``[own_page_indptr[N] * block_size]``.
        block_size: rows of a page.
        max_tile_rows: query rows of an item at most: the kernel's tile height divided by the query
            heads of a KV head.
        read_bound_rows: up to so many query rows an item takes as long as reading its pages, beyond
            them in proportion to its rows.
        target_items: items that keep the device busy, for one KV head. Items that cost more than
            the step divided by this are split.
        max_splits: parts, at most, that the shared part of a tile and the own part of an agent are
            split into.
        window: sliding window, 0 = none.
        row_position_bound, own_position_bound: upper bounds, of the same shapes, where a device
            chooses positions later; ``row_position`` and ``own_position`` are lower bounds then.

    All arrays are int32 and contiguous. The result does not depend on anything but the arguments.

    Raises:
        ValueError: a wrong shape, an index out of range, rows that do not ascend.
    """

def work_capacity(
    *,
    agents: int,
    rows: int,
    uses: int,
    masters: int,
    max_tile_rows: int,
    target_items: int,
    max_splits: int,
) -> WorkCapacity:
    """Sizes that no work list of so many agents, rows, uses and Masters exceeds.

    They do not depend on how long the Masters are, so a launch may be captured in a CUDA graph.
    """
