"""A set of threads that execute together, and what they know about themselves."""

import numpy as np

from .dtypes import BY_NAME, u32, u64
from .errors import PtxError

FULL_WARP = u32(0xFFFFFFFF)


class LaneSet:
    """Threads of one chunk, in ascending order.

    `slots` number them in the chunk; `rows` are their places in the scheduler's register arrays,
    None when those hold exactly these threads. Blocks of generated code see one array element per
    thread.
    """

    __slots__ = ("_cache", "chunk", "count", "known_complete", "lane", "rows", "slots", "warp")

    def __init__(self, chunk, slots, rows):
        self.chunk, self.slots, self.rows = chunk, slots, rows
        self.count = slots.size
        self.warp, self.lane = chunk.warp[slots], chunk.lane[slots]
        self.known_complete = False
        self._cache = {}

    def cached(self, key, compute):
        """`compute()` once for this set of threads."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    @property
    def warp_lane(self):
        """32 * warp + lane of every thread."""
        return self.cached("warp_lane", lambda: self.chunk.warp_lane[self.slots])

    def warp_count(self):
        """Number of warps that have threads here."""
        warp = self.warp
        return self.cached("warps", lambda: int(np.count_nonzero(warp[1:] != warp[:-1])) + 1)

    # ---- values ----
    def special(self, name):
        """A special register."""
        if name.startswith("clock") or name == "globaltimer":
            ticks = self.chunk.tick()
            if name in ("clock64", "globaltimer"):
                return np.full(self.count, u64(ticks))
            return np.full(
                self.count, u32(ticks >> 32 if name == "clock_hi" else ticks & 0xFFFFFFFF)
            )
        return self.cached(name, lambda: self.chunk.special(self, name))

    def param(self, offset, dtype):
        """A kernel parameter at a byte offset."""

        def read():
            scalar = np.dtype(BY_NAME[dtype])
            raw = self.chunk.params[offset : offset + scalar.itemsize]
            return np.full(self.count, raw.view(scalar)[0])

        return self.cached((offset, dtype), read)

    # ---- warps ----
    def ballot(self, predicate):
        """u32 for every thread: which lanes of its warp are here with a true predicate."""
        votes = np.zeros((self.chunk.warp_count, 32), bool)
        votes.reshape(-1)[self.warp_lane] = predicate
        return np.packbits(votes, axis=1, bitorder="little").view(u32)[:, 0][self.warp]

    def present(self, mask=None):
        """u32 for every thread: which lanes of its warp are here (and in the mask)."""
        if mask is not None:
            return self.ballot(mask)
        return self.cached("present", lambda: self.ballot(np.ones(self.count, bool)))

    def complete(self):
        """Whether every warp is here with all of its lanes that have not exited."""
        if not self.known_complete:
            live = self.chunk.live[self.warp]
            self.known_complete = bool((self.present() == live).all())
        return self.known_complete

    def full_warps(self, position):
        """Number of warps; fails unless all of them have 32 lanes here."""
        if self.count & 31 or not (self.present() == FULL_WARP).all():
            self.fail(position, "warp-wide matrix instruction executed by a partial warp", 0)
        return self.count >> 5

    # ---- errors ----
    def fail(self, position, message, lane, address=None):
        """Raise PtxError about the instruction at a position and a thread of this set."""
        instruction = self.chunk.code.instructions[position]
        thread = self.chunk.thread_name(int(self.slots[lane]))
        where = f", address {int(address):#x}" if address is not None else ""
        raise PtxError(
            f"{self.chunk.name}: {message}; PTX line {instruction.line}:"
            f' "{instruction.text}"; thread {thread}{where}'
        )
