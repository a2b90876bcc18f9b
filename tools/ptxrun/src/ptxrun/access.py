"""Loads and stores: where addresses lie, whether they may be accessed, and what they cost."""

import numpy as np

from .dtypes import LOG2, UNSIGNED_DTYPE
from .lane_set import LaneSet
from .storage import LOCAL_WINDOW, SHARED_WINDOW, WINDOW_SHIFT
from .traffic import bank_count, sector_count

_WINDOWS = {1: ("local", LOCAL_WINDOW), 2: ("shared", SHARED_WINDOW)}


def pick(values, selected):
    """`values[selected]`, or all of them for None."""
    return values if selected is None else values[selected]


class MemoryAccess(LaneSet):
    """Memory instructions.

    `selected` are the indices of the threads whose guard holds, None when it is all of them;
    addresses and values are given for those only.
    """

    __slots__ = ()

    def selection(self, mask):
        """`selected` of a guard's mask."""
        if mask is None or mask.all():
            return None
        return np.flatnonzero(mask)

    def load(self, position, space, address, size, vector, mask):
        """`vector` arrays of elements of `size` bytes; 0 where the guard does not hold."""
        selected = self.selection(mask)
        if selected is None:
            return self.load_selected(position, space, address, size, vector, None)
        result = np.zeros((vector, self.count), UNSIGNED_DTYPE[size])
        if selected.size:
            loaded = self.load_selected(position, space, address[selected], size, vector, selected)
            result[:, selected] = loaded
        return result

    def load_selected(self, position, space, address, size, vector, selected):
        """As `load`, for selected threads."""
        parts = self.by_space(space, address)
        if len(parts) > 1:
            result = np.zeros((vector, address.size), UNSIGNED_DTYPE[size])
            for part_space, part, part_address in parts:
                lanes = part if selected is None else selected[part]
                result[:, part] = self.load_selected(
                    position, part_space, part_address, size, vector, lanes
                )
            return result
        [(space, _, address)] = parts
        width = size * vector
        storage, offset = self.locate(position, space, address, width, selected, write=False)
        self.account(position, space, address, offset, width, selected, write=False)
        if storage is None:
            result = np.zeros((vector, address.size), UNSIGNED_DTYPE[size])
            for buffer, part in self.by_buffer(offset):
                index = (address[part] - buffer.base) >> LOG2[width]
                result[:, part] = buffer.view(size, vector)[index].T
            return result
        values = storage.view(size, vector).take(offset >> LOG2[width], axis=0)
        return (values,) if vector == 1 else np.ascontiguousarray(values.T)

    def store(self, position, space, address, values, size, mask):
        """Store a tuple of arrays of elements of `size` bytes where the guard holds."""
        selected = self.selection(mask)
        if selected is not None:
            if selected.size == 0:
                return
            address, values = address[selected], tuple(value[selected] for value in values)
        self._store_selected(position, space, address, values, size, selected)

    def _store_selected(self, position, space, address, values, size, selected):
        parts = self.by_space(space, address)
        if len(parts) > 1:
            for part_space, part, part_address in parts:
                lanes = part if selected is None else selected[part]
                part_values = tuple(value[part] for value in values)
                self._store_selected(position, part_space, part_address, part_values, size, lanes)
            return
        [(space, _, address)] = parts
        vector = len(values)
        width = size * vector
        storage, offset = self.locate(position, space, address, width, selected, write=True)
        self.account(position, space, address, offset, width, selected, write=True)
        stored = values[0] if vector == 1 else np.stack(values, 1)
        if storage is not None:
            storage.view(size, vector)[offset >> LOG2[width]] = stored
            return
        for buffer, part in self.by_buffer(offset):
            index = (address[part] - buffer.base) >> LOG2[width]
            buffer.view(size, vector)[index] = stored[part]

    # ---- where ----
    def by_space(self, space, address):
        """[(space, part of the threads or None for all, addresses in that space)]"""
        if space != "generic":
            return ((space, None, address),)
        window = address >> WINDOW_SHIFT
        first = int(window[0])
        if (window == first).all():
            name, base = _WINDOWS.get(first, ("global", 0))
            return ((name, None, address - base),)
        parts = []
        for number in np.unique(window):
            name, base = _WINDOWS.get(int(number), ("global", 0))
            part = np.flatnonzero(window == number)
            parts.append((name, part, address[part] - base))
        return parts

    def by_buffer(self, index):
        """(buffer, threads that access it), for accesses to several buffers."""
        for number in np.unique(index):
            yield self.chunk.arena.buffers[number], np.flatnonzero(index == number)

    def locate(self, position, space, address, size, selected, write):
        """Check an access -> (storage, byte offsets in it).

        When threads access several global buffers: (None, index of every thread's buffer).
        """

        def fail(wrong, message):
            first = int(np.argmax(wrong))
            lane = first if selected is None else int(selected[first])
            self.fail(position, message, lane, address[first])

        chunk, verb = self.chunk, "store" if write else "load"
        if int(np.bitwise_or.reduce(address)) & (size - 1):
            fail(address & (size - 1) != 0, f"misaligned {size}-byte {verb}")
        low, high = int(address.min()), int(address.max()) + size
        if space == "global":
            buffer = chunk.arena.locate(low, high)
            if buffer is not None:
                if write and not buffer.writeable:
                    fail(address == low, f"store to read-only buffer {buffer.name}")
                return buffer, address - buffer.base
            index, outside = chunk.arena.locate_each(address, size)
            if outside.any():
                nearest = chunk.arena.describe(int(address[np.argmax(outside)]))
                fail(
                    outside,
                    f"out-of-bounds global {verb} of {size} bytes ({np.count_nonzero(outside)} of"
                    f" {address.size} threads; {nearest})",
                )
            for number in np.unique(index) if write else ():
                buffer = chunk.arena.buffers[number]
                if not buffer.writeable:
                    fail(index == number, f"store to read-only buffer {buffer.name}")
            return None, index
        if space == "shared":
            if low < 0 or high > chunk.shared_bytes:
                fail(
                    (address < 0) | (address + size > chunk.shared_bytes),
                    f"out-of-bounds shared {verb} of {size} bytes"
                    f" (block has {chunk.shared_bytes} bytes)",
                )
            base = self.cached(
                "shared base", lambda: chunk.block_in_chunk[self.slots] * chunk.shared_stride
            )
            return chunk.shared, address + pick(base, selected)
        if low < 0 or high > chunk.local_bytes:
            fail(
                (address < 0) | (address + size > chunk.local_bytes),
                f"out-of-bounds local {verb} of {size} bytes (frame has {chunk.local_bytes} bytes)",
            )
        return chunk.local, address + pick(self.slots, selected) * chunk.local_stride

    # ---- counters ----
    def account(self, position, space, address, offset, size, selected, write, atomic=False):
        """Count an access and show it to the race detector."""
        chunk = self.chunk
        if space == "local" or not (chunk.count_traffic or chunk.race):
            return
        if space == "global":
            if chunk.count_traffic:
                self._account_global(position, address, size, selected, write, atomic)
            return
        if chunk.count_traffic:
            stats, total = chunk.stats, address.size * size
            stats.shared_store_bytes += total if write else 0
            stats.shared_load_bytes += total if atomic or not write else 0
            self.count_banks(position, address, size, selected)
        if chunk.race:
            chunk.race.access(
                position,
                pick(self.warp, selected),
                offset,
                size,
                write,
                atomic,
                pick(self.lane, selected),
            )

    def _account_global(self, position, address, size, selected, write, atomic):
        arena, stats, warp = self.chunk.arena, self.chunk.stats, pick(self.warp, selected)
        loaded, stored = size * (atomic or not write), size * write  # bytes of a thread
        stats.global_load_bytes += loaded * address.size
        stats.global_store_bytes += stored * address.size
        warps, sectors, ideal = sector_count(warp, address, size)
        counters = stats.of_global_instruction(self.chunk.code.instructions[position])
        counters["warps"] += warps
        counters["sectors"] += sectors
        counters["ideal"] += ideal
        counters["bytes"] += size * address.size
        buffer = arena.locate(int(address.min()), int(address.max()) + size)
        if buffer is not None:
            parts = [(buffer, address.size, sectors, ideal)]
        else:
            index, _ = arena.locate_each(address, size)
            parts = [
                (each, part.size, *sector_count(warp[part], address[part], size)[1:])
                for each, part in self.by_buffer(index)
            ]
        for buffer, threads, sectors, ideal in parts:
            counters = stats.of_buffer(buffer.base)
            counters["load_bytes"] += loaded * threads
            counters["store_bytes"] += stored * threads
            counters["sectors"] += sectors
            counters["ideal"] += ideal

    def count_banks(self, position, address, size, selected):
        """Count the phases and wavefronts of an access to shared memory."""
        phases, wavefronts = bank_count(pick(self.warp_lane, selected), address, size)
        counters = self.chunk.stats.of_shared_instruction(self.chunk.code.instructions[position])
        counters["phases"] += phases
        counters["wavefronts"] += wavefronts
