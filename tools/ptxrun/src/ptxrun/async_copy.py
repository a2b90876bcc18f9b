"""cp.async: copies that land only at the wait that requires them, or never."""

from dataclasses import dataclass

import numpy as np

from .access import MemoryAccess, pick
from .dtypes import LOG2, UNSIGNED_DTYPE, i64, u8, u32

_EVERY_GROUP = 1 << 40


@dataclass(slots=True)
class PendingCopy:
    """One instruction's copies: for every thread its slot, the offset in shared memory, the bytes
    ([threads, size]) and the number of the group it belongs to."""

    position: int
    slots: np.ndarray
    offset: np.ndarray
    data: np.ndarray
    group: np.ndarray

    def subset(self, chosen):
        """The copies of some threads."""
        return PendingCopy(
            self.position,
            self.slots[chosen],
            self.offset[chosen],
            self.data[chosen],
            self.group[chosen],
        )


class AsyncCopies(MemoryAccess):
    __slots__ = ()

    def copy_async(self, position, to, of, size, source_size, mask):
        """Copy `size` bytes from global to shared memory; what is beyond source_size is zero."""
        chunk, selected = self.chunk, self.selection(mask)
        if selected is not None:
            if selected.size == 0:
                return
            to, of = to[selected], of[selected]
            source_size = None if source_size is None else source_size[selected]
        _, offset = self.locate(position, "shared", to, size, selected, write=True)
        data = np.zeros((to.size, size), u8)
        if source_size is None:
            sources = [(size, np.arange(to.size))]
        else:
            limit = np.minimum(source_size, u32(size))
            sources = [(int(value), np.flatnonzero(limit == value)) for value in np.unique(limit)]
        for nbytes, part in sources:
            if nbytes:
                lanes = part if selected is None else selected[part]
                self._read_source(position, of[part], size, lanes)
                data[part, :nbytes] = self._read_bytes(position, of[part], nbytes, lanes)
        if chunk.count_traffic:
            chunk.stats.shared_store_bytes += data.size
            self.count_banks(position, to, size, selected)
        if chunk.race:  # a copy may land from now on, and until it does
            chunk.race.access(position, pick(self.warp, selected), offset, size, write=True)
        slots = pick(self.slots, selected)
        group = chunk.copy_group[slots].copy()
        chunk.pending_copies.append(PendingCopy(position, slots, offset, data, group))

    def _read_source(self, position, address, size, lanes):
        """Fail when a source is not aligned to the whole copy."""
        misaligned = address & (size - 1) != 0
        if misaligned.any():
            first = int(np.argmax(misaligned))
            message = f"misaligned cp.async source ({size} bytes)"
            self.fail(position, message, int(lanes[first]), address[first])

    def _read_bytes(self, position, address, nbytes, lanes):
        step = nbytes if nbytes in (4, 8, 16) else 1
        element = min(step, 4)
        parts = []
        for start in range(0, nbytes, step):
            vectors = self.load_selected(
                position, "global", address + i64(start), element, step // element, lanes
            )
            parts.append(np.ascontiguousarray(np.stack(list(vectors), 1)).view(u8))
        return np.concatenate(parts, 1)

    def commit_group(self, mask):
        """Later copies belong to the next group."""
        self.chunk.copy_group[pick(self.slots, mask)] += 1

    def wait_group(self, allowed, mask):
        """Land all copies but those of the `allowed` newest groups."""
        slots = pick(self.slots, mask)
        self._land(slots, self.chunk.copy_group[slots] - allowed)

    def wait_all(self, mask):
        """Land all copies."""
        self._land(pick(self.slots, mask), _EVERY_GROUP)

    def _land(self, slots, end):
        """Write the pending copies of threads that belong to groups before `end`."""
        chunk = self.chunk
        if not chunk.pending_copies:
            return
        limit = np.full(chunk.thread_count, -1, i64)
        limit[slots] = end
        still_pending = []
        for copy in chunk.pending_copies:
            lands = copy.group < limit[copy.slots]
            if lands.any():
                _write_copy(chunk, copy if lands.all() else copy.subset(lands))
            if not lands.all():
                still_pending.append(copy.subset(~lands) if lands.any() else copy)
        chunk.pending_copies = still_pending


def _write_copy(chunk, copy):
    size = copy.data.shape[1]
    if chunk.race:
        warp = chunk.warp[copy.slots]
        chunk.race.access(copy.position, warp, copy.offset, size, write=True)
    element = min(size, 4)
    values = np.ascontiguousarray(copy.data).view(UNSIGNED_DTYPE[element])
    view = chunk.shared.view(element, size // element)
    view[copy.offset >> LOG2[size]] = values if size > element else values[:, 0]
