"""Atomic operations, applied in lane order."""

import numpy as np

from .access import MemoryAccess
from .dtypes import LOG2, f16, u16
from .small_floats import bf16_to_f32, to_bf16

_SMALL_FLOATS = ("f16", "bf16", "f16x2", "bf16x2")
_COMBINE = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
_COMBINE_FLOATS = {"add": np.add, "min": np.fmin, "max": np.fmax}


class Atomics(MemoryAccess):
    __slots__ = ()

    def atomic(self, position, space, operation, kind, address, b, c, mask, wanted):
        """Old values of an atomic operation with operand b (and c for `cas`).

        `kind` is a numpy type name, or the PTX type of 16-bit floats. The result may be None when
        it is not wanted.
        """
        selected = self.selection(mask)
        if selected is None:
            return self._atomic(position, space, operation, kind, address, b, c, None, wanted)
        result = np.zeros(self.count, b.dtype)
        if selected.size:
            address, b, c = address[selected], b[selected], None if c is None else c[selected]
            old = self._atomic(position, space, operation, kind, address, b, c, selected, wanted)
            if wanted:
                result[selected] = old
        return result

    def _atomic(self, position, space, operation, kind, address, b, c, selected, wanted):
        parts = self.by_space(space, address)
        if len(parts) > 1:
            result = np.zeros(address.size, b.dtype)
            for part_space, part, part_address in parts:
                lanes = part if selected is None else selected[part]
                part_c = None if c is None else c[part]
                result[part] = self._atomic(
                    position,
                    part_space,
                    operation,
                    kind,
                    part_address,
                    b[part],
                    part_c,
                    lanes,
                    True,
                )
            return result
        [(space, _, address)] = parts
        size = b.dtype.itemsize
        storage, offset = self.locate(position, space, address, size, selected, write=True)
        self.account(position, space, address, offset, size, selected, write=True, atomic=True)
        if storage is not None:
            values = storage.view(size, 1).view(b.dtype)
            return _modify(values, offset >> LOG2[size], operation, kind, b, c, wanted)
        result = np.zeros(address.size, b.dtype)
        for buffer, part in self.by_buffer(offset):
            values = buffer.view(size, 1).view(b.dtype)
            index = (address[part] - buffer.base) >> LOG2[size]
            part_c = None if c is None else c[part]
            result[part] = _modify(values, index, operation, kind, b[part], part_c, True)
        return result


def _modify(values, index, operation, kind, b, c, wanted):
    """Apply the operation to values[index] in order -> old values (None when not wanted)."""
    plain = kind not in _SMALL_FLOATS
    if plain and not wanted and operation in _COMBINE:
        _COMBINE[operation].at(values, index, b)
        return None
    order = np.argsort(index, kind="stable")
    ordered = index[order]
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    if first.all():
        old = values[index]
        values[index] = _apply(operation, kind, old, b, c)
        return old
    starts, group = np.flatnonzero(first), np.cumsum(first) - 1
    old = np.empty(index.size, b.dtype)
    if plain and operation == "add" and b.dtype.kind in "iu":
        before = np.cumsum(b[order], dtype=b.dtype) - b[order]
        old[order] = values[ordered] + (before - before[starts][group])
        np.add.at(values, index, b)
        return old
    # Each round takes at most one lane for every address.
    turn = np.arange(index.size) - starts[group]
    for number in range(int(turn.max()) + 1):
        lanes = order[turn == number]
        old[lanes] = values[index[lanes]]
        round_c = None if c is None else c[lanes]
        values[index[lanes]] = _apply(operation, kind, old[lanes], b[lanes], round_c)
    return old


def _apply(operation, kind, a, b, c):
    """New value where the old one is a."""
    dtype = b.dtype.type
    if operation == "exch":
        return b
    if operation == "cas":
        return np.where(a == b, c, a)
    if operation == "inc":
        return np.where(a >= b, dtype(0), a + dtype(1))
    if operation == "dec":
        return np.where((a == 0) | (a > b), b, a - dtype(1))
    if kind not in _SMALL_FLOATS:
        return _COMBINE[operation](a, b)
    combine = _COMBINE_FLOATS[operation]
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    if kind[0] == "f":
        return combine(a.view(f16), b.view(f16)).view(dtype)
    return to_bf16(combine(bf16_to_f32(a.view(u16)), bf16_to_f32(b.view(u16)))).view(dtype)
