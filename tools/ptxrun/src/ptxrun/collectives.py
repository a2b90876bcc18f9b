"""Instructions that exchange values among the lanes of a warp."""

import numpy as np

from .access import MemoryAccess
from .dtypes import i64, u16, u32
from .integers import clz
from .storage import SHARED_WINDOW

_POISON_WORD = u32(0x7FFF7FFF)


class Collectives(MemoryAccess):
    __slots__ = ()

    def warp_barrier(self):
        """`bar.warp.sync`: orders the lanes' accesses; the scheduler makes them wait."""
        if self.chunk.race:
            self.chunk.race.warp_barrier(self.warp)

    def _in_warps(self, values):
        """[warps, 32] with every thread's value in its lane's place, and which places are taken."""
        grid = np.zeros((self.chunk.warp_count, 32), values.dtype)
        taken = np.zeros((self.chunk.warp_count, 32), bool)
        grid.reshape(-1)[self.warp_lane] = values
        taken.reshape(-1)[self.warp_lane] = True
        return grid, taken

    def shuffle(self, mode, values, by, clamp, key):
        """`shfl.sync` -> (values, predicate); a key remembers the lanes of constant operands."""
        if key is None:
            source, inside = self._shuffle_source(mode, by, clamp)
        else:
            source, inside = self.cached(
                ("shuffle", key), lambda: self._shuffle_source(mode, by, clamp)
            )
        slots = np.full(self.chunk.warp_count * 32, _POISON_WORD)
        slots[self.warp_lane] = values
        return slots[source], inside

    def _shuffle_source(self, mode, by, clamp):
        """Where every lane reads (32 * warp + lane) and whether that is inside its segment."""
        lane = self.lane.astype(i64)
        by, clamp = np.asarray(by).astype(i64) & 31, np.asarray(clamp).astype(i64)
        segment, bound = (clamp >> 8) & 31, clamp & 31
        last = (lane & segment) | (bound & ~segment & 31)
        if mode == "up":
            source = lane - by
            inside = source >= last
        else:
            source = {
                "down": lane + by,
                "bfly": lane ^ by,
                "idx": (lane & segment) | (by & ~segment & 31),
            }[mode]
            inside = source <= last
        return self.warp * 32 + np.where(inside, source, lane), inside

    def match(self, values, mask):
        """`match.any`: the lanes of the mask with the same value."""
        grid, taken = self._in_warps(values)
        same = (grid[self.warp] == values[:, None]) & taken[self.warp]
        return np.packbits(same, axis=1, bitorder="little").view(u32)[:, 0] & mask

    def reduce(self, operation, values, mask, absolute, nan):
        """`redux.sync` over the lanes of the mask."""
        grid, _ = self._in_warps(np.abs(values) if absolute else values)
        mask = np.broadcast_to(np.asarray(mask), (self.count,)) & self.present()
        takes_part = (mask[:, None] >> np.arange(32, dtype=u32)) & u32(1) != 0
        function, neutral = _reduction(operation, values.dtype, nan)
        chosen = np.where(takes_part, grid[self.warp], values.dtype.type(neutral))
        return function.reduce(chosen, axis=1, dtype=values.dtype)

    def elect(self, mask):
        """`elect.sync` -> (the lowest lane of the mask, whether it is this one)."""
        mask = np.broadcast_to(np.asarray(mask), (self.count,)) & self.present()
        leader = u32(31) - clz(mask & (~mask + u32(1)))
        return leader, leader == self.lane

    # ---- 8x8 matrices of 16-bit elements ----
    def _rows(self, position, space, address, number, write):
        """Row addresses of the first 8 * number lanes of every warp -> byte offsets."""
        warps = self.full_warps(position)
        selected = np.arange(self.count).reshape(warps, 32)[:, : 8 * number].reshape(-1)
        address = address[selected] - (SHARED_WINDOW if space == "generic" else 0)
        _, offset = self.locate(position, "shared", address, 16, selected, write)
        self.account(position, "shared", address, offset, 16, selected, write)
        return warps, offset

    def ldmatrix(self, position, space, address, number, transposed):
        """`number` registers, each a row-major (or transposed) matrix over the warp's lanes."""
        warps, offset = self._rows(position, space, address, number, write=False)
        rows = self.chunk.shared.view(4, 4).take(offset >> 4, axis=0)
        matrices = rows.view(u16).reshape(warps, number, 8, 8)
        if transposed:
            matrices = np.ascontiguousarray(matrices.transpose(0, 1, 3, 2))
        registers = matrices.view(u32).reshape(warps, number, 32)
        return [np.ascontiguousarray(registers[:, i]).reshape(-1) for i in range(number)]

    def stmatrix(self, position, space, address, values, transposed):
        """Inverse of `ldmatrix`."""
        number = len(values)
        warps, offset = self._rows(position, space, address, number, write=True)
        registers = np.stack([value.reshape(warps, 32) for value in values], 1)
        matrices = registers.view(u16).reshape(warps, number, 8, 8)
        if transposed:
            matrices = np.ascontiguousarray(matrices.transpose(0, 1, 3, 2))
        self.chunk.shared.view(4, 4)[offset >> 4] = matrices.reshape(-1, 8).view(u32)

    def movmatrix(self, position, value):
        """A matrix transposed."""
        warps = self.full_warps(position)
        matrices = np.ascontiguousarray(value).view(u16).reshape(warps, 8, 8)
        return np.ascontiguousarray(matrices.transpose(0, 2, 1)).reshape(-1).view(u32)


def _reduction(operation, dtype, nan):
    """A ufunc and its neutral value."""
    if operation in ("min", "max"):
        lowest = operation == "max"
        if dtype.kind == "f":
            ufunc = {
                ("min", True): np.minimum,
                ("max", True): np.maximum,
                ("min", False): np.fmin,
                ("max", False): np.fmax,
            }[operation, nan]
            return ufunc, -np.inf if lowest else np.inf
        limits = np.iinfo(dtype)
        return (np.maximum, limits.min) if lowest else (np.minimum, limits.max)
    return {
        "add": (np.add, 0),
        "and": (np.bitwise_and, ~dtype.type(0)),
        "or": (np.bitwise_or, 0),
        "xor": (np.bitwise_xor, 0),
    }[operation]
