"""Bytes that kernels read and write: numpy arrays at device addresses, shared and local memory."""

from bisect import bisect_right, insort

import numpy as np

from .dtypes import UNSIGNED_DTYPE, u8
from .errors import PtxError

POISON = np.array([0xFF, 0x7F], u8)  # repeated, a NaN as f16, bf16, f32, f64 and e4m3
GLOBAL_BASE = 0x1000000000
# Generic addresses from these on are windows on the thread's local and the block's shared memory.
WINDOW_SHIFT = 56
LOCAL_WINDOW, SHARED_WINDOW = 1 << WINDOW_SHIFT, 2 << WINDOW_SHIFT
GUARD_BYTES = 1 << 20  # between buffers, so that an overrun does not reach the next one


def align_up(value, alignment):
    """The smallest multiple of `alignment` that is not below `value`."""
    return (value + alignment - 1) // alignment * alignment


class Storage:
    """Raw bytes with views as vectors of unsigned integers."""

    def __init__(self, raw):
        self.raw = raw
        self._views = {}

    def view(self, element_bytes, vector):
        """Array of elements, or [n, vector] of them for vector > 1; a tail of bytes is left out."""
        key = (element_bytes, vector)
        if key not in self._views:
            size = element_bytes * vector
            whole = self.raw[: self.raw.nbytes // size * size].view(UNSIGNED_DTYPE[element_bytes])
            self._views[key] = whole.reshape(-1, vector) if vector > 1 else whole
        return self._views[key]


def poisoned(nbytes):
    """Storage of an even number of bytes that reads as NaN until it is written."""
    storage = Storage(np.empty(nbytes, u8))
    storage.raw.reshape(-1, 2)[:] = POISON
    return storage


class Buffer(Storage):
    """Bytes at a device address; `owner` keeps the memory alive."""

    def __init__(self, base, raw, name, writeable, owner):
        super().__init__(raw)
        self.base, self.end = base, base + raw.nbytes
        self.name, self.writeable, self.owner = name, writeable, owner


class Arena:
    """Global address space: buffers in ascending order with guards between them."""

    def __init__(self):
        self.buffers = []
        self._bases = []
        self._next = GLOBAL_BASE
        self._host_ranges = []  # (first host byte, end, device base, buffer), sorted
        self._arrays = set()  # bases of the buffers that are a user's arrays

    def add(self, raw, name, writeable=True, owner=None):
        """Give raw bytes (u8 array) a 4096-aligned device address of their own."""
        buffer = Buffer(self._next, raw, name, writeable, owner)
        self._bases.append(buffer.base)
        self.buffers.append(buffer)
        self._next = align_up(buffer.end + GUARD_BYTES, 4096)
        return buffer

    def address(self, array):
        """Device address of a C-contiguous numpy array; a slice lies within what it is cut from."""
        if not isinstance(array, np.ndarray):
            raise PtxError(f"pointer argument must be a numpy array, got {type(array).__name__}")
        if not array.flags.c_contiguous:
            raise PtxError("pointer argument is not C-contiguous")
        start, nbytes = array.ctypes.data, array.nbytes
        newest = bisect_right(self._host_ranges, (start, 1 << 62)) - 1
        # Slices that were registered first may start between this array and the one around it.
        for i in range(newest, max(newest - 8, -1), -1):
            first, end, _, buffer = self._host_ranges[i]
            if first <= start and start + nbytes <= end:
                return buffer.base + (start - first)
        raw = array.reshape(-1).view(u8) if nbytes else np.zeros(0, u8)
        name = f"{array.dtype}{list(array.shape)}"
        buffer = self.add(raw, name, array.flags.writeable, array)
        insort(self._host_ranges, (start, start + nbytes, buffer.base, buffer))
        self._arrays.add(buffer.base)
        return buffer.base

    def reset(self):
        """Forget every array that `address` has registered."""
        self.buffers = [buffer for buffer in self.buffers if buffer.base not in self._arrays]
        self._bases = [buffer.base for buffer in self.buffers]
        self._host_ranges, self._arrays = [], set()

    def locate(self, start, end):
        """The buffer that holds all of [start, end), or None."""
        i = bisect_right(self._bases, start) - 1
        return self.buffers[i] if i >= 0 and end <= self.buffers[i].end else None

    def locate_each(self, addresses, size):
        """Index of every access's buffer, and whether it lies outside of all buffers."""
        ends = np.array([buffer.end for buffer in self.buffers], np.int64)
        index = np.searchsorted(np.array(self._bases, np.int64), addresses, "right") - 1
        return index, (index < 0) | (addresses + size > ends[np.maximum(index, 0)])

    def describe(self, address):
        """Where an address lies, for an error message."""
        i = bisect_right(self._bases, address) - 1
        if i < 0:
            null = " (null pointer?)" if address < 4096 else ""
            return f"address {address:#x} is below every buffer{null}"
        buffer = self.buffers[i]
        return (
            f"nearest buffer: {buffer.name} at {buffer.base:#x}, {buffer.raw.nbytes} bytes;"
            f" offset {address - buffer.base}"
        )
