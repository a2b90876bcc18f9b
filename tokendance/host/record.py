"""What passes from the host half to the device half.

A `StepRecord` says everything about one forward pass that a device has to know, and nothing else:
no names, no segments, no counts of users. A `RestoreRecord` and an `AppendRecord` say it of rows
that pass between the pool and an engine's own cache. They are made of numpy arrays and ints, so
that they can be pickled and sent to any number of workers; the same calls give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from tokendance import _planner
from tokendance.host.mirror import Mirror, round_arrays
from tokendance.host.round import IntArray, RoundExtents, pack, require_round_version

require_round_version("tokendance._planner", getattr(_planner, "ROUND_VERSION", None))

VERSION = 3
"""Of the records' fields: a device half runs records of its own version only."""


@dataclass(frozen=True)
class WorkShape:
    """How attention's work is cut for a device.

    Attributes:
        max_tile_rows: query rows of one work item at most.
        read_bound_rows: up to so many query rows an item takes as long as reading its pages.
        target_items: work items that keep the device busy, for one KV head.
        max_splits: parts that the work of one tile is split into at most.
    """

    max_tile_rows: int
    read_bound_rows: int
    target_items: int
    max_splits: int = 64


@dataclass(frozen=True)
class DeviceProfile:
    """What the host half has to know of the devices that it plans for.

    `tokendance.device.Executor.profile` is that of a device; any other may be described by hand.

    Attributes:
        num_layers: of the model.
        num_pages, block_size: of the pool: pages, and rows of a page.
        page_bytes: keys and values of one page in all layers.
        max_position: positions that the rotation tables have.
        work: how attention's work is cut.
        host_pages: pages of host memory that suspended agents' rows may be moved to.
    """

    num_layers: int
    num_pages: int
    block_size: int
    page_bytes: int
    max_position: int
    work: WorkShape
    host_pages: int = 0


@dataclass(eq=False)
class PackedRound:
    """The fields of round.h in one buffer.

    Attributes:
        buffer: int32 ``[total]``.
        extents: the capacities of its fields.
    """

    buffer: IntArray
    extents: RoundExtents


@dataclass(eq=False)
class Copies:
    """What is copied before a step computes anything; each of them reads before any is written.

    Attributes:
        to_host: int32 ``[n, 3]``: a page of the pool, the host page that it is copied to, and the
            rows that it has.
        to_device: int32 ``[n, 2]``: a host page, and the page of the pool that it is copied to.
        rows: int64 ``[n, 2]``: a row of the pool (page * block_size + row of the page), and the row
            that it is copied to, in all layers.
    """

    to_host: IntArray = field(default_factory=lambda: np.empty((0, 3), np.int32))
    to_device: IntArray = field(default_factory=lambda: np.empty((0, 2), np.int32))
    rows: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 2), np.int64))


@dataclass(eq=False)
class MovedRows:
    """Rows of a pool that are copied to others of it, which none of them is.

    Attributes:
        source, target: int64 ``[n]``, rows of the pool (page * block_size + row of the page).
        position_from, position_to: int32 ``[n]``: where the keys are rotated, and are to be.
    """

    source: NDArray[np.int64]
    target: NDArray[np.int64]
    position_from: IntArray
    position_to: IntArray


@dataclass(eq=False)
class Choice:
    """Rows of one Master that `KeyDeviation` chooses from.

    Attributes:
        fresh: int64 ``[agents, length]``: the step's row of each agent that stands for each row of
            the Master; -1 where an agent uses fewer.
        slots: int64 ``[length]``: the Master's rows in the pool.
        positions: int32 ``[length]``: where they were rotated.
        count: how many rows are chosen.
    """

    fresh: NDArray[np.int64]
    slots: NDArray[np.int64]
    positions: IntArray
    count: int


@dataclass(eq=False)
class StepRecord:
    """One forward pass.

    Attributes:
        version: `VERSION`.
        number: records are run in this order.
        copies: done before anything else, in order.
        token_ids: int64 ``[R]``.
        positions: int32 ``[R]``: absolute positions of the rows.
        slots: int64 ``[R]``: the pool row that keeps each row's keys and values; -1: none does.
        logit_rows: int64: rows whose logits the engine wants.
        rounds: by sliding window (0 = none), the packed round with the work list of that window.
        choices: what `KeyDeviation` chooses from, at the end of layer ``choice_layer``.
        choice_layer: -1 where nothing is chosen.
        kept: int64, of a record that goes on with what was chosen: the rows of the record before
            that stay. None otherwise.
    """

    number: int
    token_ids: NDArray[np.int64]
    positions: IntArray
    slots: NDArray[np.int64]
    logit_rows: NDArray[np.int64]
    rounds: dict[int, PackedRound]
    copies: list[Copies] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    choice_layer: int = -1
    kept: NDArray[np.int64] | None = None
    version: int = VERSION

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.token_ids)

    def padded(self, rows: int) -> StepRecord:
        """The same with rows behind the last that nothing keeps: token 0, position 0, slot -1."""
        more = rows - self.num_rows
        return replace(
            self,
            token_ids=np.pad(self.token_ids, (0, more)),
            positions=np.pad(self.positions, (0, more)),
            slots=np.pad(self.slots, (0, more), constant_values=-1),
        )


@dataclass(eq=False)
class RestoreRecord:
    """Rows of agents that are written into an engine's own cache.

    Attributes:
        number: records of all kinds are run in this order.
        packed: the agents' KV, without query rows and work.
        slots: int64 ``[N, T]``: the row of the cache that position p of each agent goes to; -1:
            none does. Positions from T on are left out.
        copies: done before anything is read, once.
        version: `VERSION`.
    """

    number: int
    packed: PackedRound
    slots: NDArray[np.int64]
    copies: list[Copies] = field(default_factory=list)
    version: int = VERSION


@dataclass(eq=False)
class AppendRecord:
    """Rows that an engine computed with attention of its own, and that agents keep.

    Attributes:
        number: records of all kinds are run in this order.
        positions: int32 ``[R]``: absolute positions of the rows.
        slots: int64 ``[R]``: the pool row that keeps each.
        copies: done before anything is written.
        version: `VERSION`.
    """

    number: int
    positions: IntArray
    slots: NDArray[np.int64]
    copies: list[Copies] = field(default_factory=list)
    version: int = VERSION

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.slots)


def pack_mirrors(mirrors: Sequence[Mirror], block_size: int) -> PackedRound:
    """A round of agents' KV alone, as restore reads it."""
    arrays, extents = round_arrays(mirrors, block_size)
    return PackedRound(pack(arrays, extents), extents)


def pack_round(
    mirrors: Sequence[Mirror],
    row_agent: IntArray,
    row_position: IntArray,
    profile: DeviceProfile,
    window: int = 0,
    capacity: RoundExtents | None = None,
) -> PackedRound:
    """A round with the query rows of a step, in a buffer of ``capacity`` (or just large enough)."""
    arrays, extents = round_arrays(mirrors, profile.block_size)
    arrays, extents = with_work(arrays, extents, row_agent, row_position, profile.work, window)
    return PackedRound(pack(arrays, extents, capacity), capacity or extents)


def step_capacity(
    *,
    agents: int,
    rows: int,
    pages: int,
    masters: int,
    uses: int,
    masks: int,
    profile: DeviceProfile,
) -> RoundExtents:
    """Extents that hold every round of so many agents, rows, and so on, and its work list.

    Args:
        agents, rows: of a step.
        pages: of all Masters of a round; as many of own rows.
        masters: of a round. An agent's output is one.
        uses: of all agents.
        masks: pages of all uses, counted for each use.
    """
    shape = profile.work
    work = _planner.work_capacity(
        agents=agents,
        rows=rows,
        uses=uses,
        masters=masters,
        max_tile_rows=shape.max_tile_rows,
        target_items=shape.target_items,
        max_splits=shape.max_splits,
    )
    return RoundExtents(
        rows=rows,
        uses=uses,
        use_pages=masks,
        agents=agents,
        masters=masters,
        master_pages=pages,
        own_pages=pages,
        work=work["work"],
        work_rows=work["work_rows"],
        work_chunks=work["work_chunks"],
        work_uses=work["work_uses"],
        partials=work["partials"],
        block_size=profile.block_size,
    )


def with_work(
    arrays: Mapping[str, IntArray],
    extents: RoundExtents,
    row_agent: IntArray,
    row_position: IntArray,
    shape: WorkShape,
    window: int = 0,
) -> tuple[dict[str, IntArray], RoundExtents]:
    """Adds the query rows of a step, and their work list, to the fields of a round.

    Args:
        arrays, extents: as `round_arrays` gives them.
        row_agent, row_position: int32 ``[R]``; the rows of an agent are adjacent and ascend.
        shape: of the device that the work is cut for.
        window: sliding window that the work list may rely on; 0 = none.
    """
    work = _planner.plan_work(
        row_agent,
        row_position,
        arrays["use_agent"],
        arrays["use_master"],
        arrays["use_delta"],
        arrays["use_length"],
        arrays["master_page_indptr"],
        arrays["own_length"],
        arrays["own_page_indptr"],
        arrays["own_position"],
        block_size=extents.block_size,
        max_tile_rows=shape.max_tile_rows,
        read_bound_rows=shape.read_bound_rows,
        target_items=shape.target_items,
        max_splits=shape.max_splits,
        window=window,
    )
    extents = replace(
        extents,
        rows=len(row_agent),
        work=len(work["work"]),
        work_rows=len(work["work_rows"]),
        work_chunks=len(work["work_chunks"]),
        work_uses=len(work["work_uses"]),
        partials=len(work["row_partials"]),
    )
    fields = {
        "row_agent": row_agent,
        "row_position": row_position,
        "work": work["work"],
        "work_rows": work["work_rows"],
        "work_chunks": work["work_chunks"],
        "work_uses": work["work_uses"],
        "row_partial_indptr": work["row_partial_indptr"],
        "row_partials": work["row_partials"],
    }
    return {**arrays, **fields}, extents
