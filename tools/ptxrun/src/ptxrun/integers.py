"""Integer and bit instructions, on arrays of lanes (see the PTX ISA for each)."""

import numpy as np

from .dtypes import i8, i16, i32, i64, u8, u16, u32, u64

_ALL64 = u64(0xFFFFFFFFFFFFFFFF)
_NOT_FOUND = u32(0xFFFFFFFF)


def _bits(x):
    return 8 * x.dtype.itemsize


def idiv(a, b):
    """Quotient toward zero; all ones for a zero divisor."""
    a, b = np.broadcast_arrays(np.asarray(a), np.asarray(b))
    dtype = a.dtype.type
    zero = b == 0
    divisor = np.where(zero, dtype(1), b)
    quotient = a // divisor
    if a.dtype.kind == "u":
        return np.where(zero, dtype(np.iinfo(dtype).max), quotient)
    inexact = (a - quotient * divisor) != 0
    quotient = quotient + (inexact & ((a < 0) != (divisor < 0)))
    return np.where(zero, dtype(-1), quotient.astype(dtype))


def irem(a, b):
    """Remainder of `idiv`; the dividend for a zero divisor."""
    a, b = np.broadcast_arrays(np.asarray(a), np.asarray(b))
    zero = b == 0
    divisor = np.where(zero, a.dtype.type(1), b)
    return np.where(zero, a, a - idiv(a, divisor) * divisor)


def mul_hi(a, b):
    """High half of the product."""
    a, b = np.broadcast_arrays(np.asarray(a), np.asarray(b))
    if a.dtype.itemsize < 8:
        signed = {1: i16, 2: i32, 4: i64}
        wide = (signed if a.dtype.kind == "i" else {1: u16, 2: u32, 4: u64})[a.dtype.itemsize]
        return ((a.astype(wide) * b.astype(wide)) >> wide(_bits(a))).astype(a.dtype)
    x, y = a.astype(u64), b.astype(u64)
    mask, half = u64(0xFFFFFFFF), u64(32)
    x_low, x_high, y_low, y_high = x & mask, x >> half, y & mask, y >> half
    middle = x_high * y_low + ((x_low * y_low) >> half)
    high = x_high * y_high + (middle >> half) + ((x_low * y_high + (middle & mask)) >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, u64(0)) - np.where(b < 0, x, u64(0))
        return high.astype(i64)
    return high


def shl(a, count):
    """Left shift of an unsigned array by u32 counts; 0 from the width on."""
    a, count = np.asarray(a), np.asarray(count)
    inside = np.minimum(count, u32(_bits(a) - 1)).astype(a.dtype)
    return np.where(count >= _bits(a), a.dtype.type(0), a << inside)


def shr(a, count):
    """Right shift by u32 counts; 0 or the sign from the width on."""
    a, count = np.asarray(a), np.asarray(count)
    shifted = a >> np.minimum(count, u32(_bits(a) - 1)).astype(a.dtype)
    if a.dtype.kind == "i":
        return shifted
    return np.where(count >= _bits(a), a.dtype.type(0), shifted)


def shf(a, b, count, right, clamp):
    """Funnel shift of b:a."""
    count = np.asarray(count)
    count = (np.minimum(count, u32(32)) if clamp else count & u32(31)).astype(u64)
    both = np.asarray(a).astype(u64) | (np.asarray(b).astype(u64) << u64(32))
    return ((both >> count) if right else (both << count) >> u64(32)).astype(u32)


_LOP3 = {
    0x3C: lambda a, b, c: a ^ b,
    0x6A: lambda a, b, c: (a & b) ^ c,
    0x78: lambda a, b, c: a ^ (b & c),
    0x80: lambda a, b, c: a & b & c,
    0x96: lambda a, b, c: a ^ b ^ c,
    0xA8: lambda a, b, c: (a | b) & c,
    0xC0: lambda a, b, c: a & b,
    0xCA: lambda a, b, c: (a & b) | (~a & c),
    0xE0: lambda a, b, c: a & (b | c),
    0xE8: lambda a, b, c: (a & b) | (a & c) | (b & c),
    0xEA: lambda a, b, c: (a & b) | c,
    0xF8: lambda a, b, c: a | (b & c),
    0xFC: lambda a, b, c: a | b,
    0xFE: lambda a, b, c: a | b | c,
}


def lop3(a, b, c, table):
    """Any function of three bits, given by its truth table; common ones take few operations."""
    if table in _LOP3:
        return _LOP3[table](a, b, c)
    result = u32(0) & a
    for row in range(8):
        if table >> row & 1:
            result = result | (
                (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
            )
    return result


# For each mode and each value of the selector: the bytes of b:a to take.
_PRMT_BYTES = {
    "f4e": [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]],
    "b4e": [[0, 7, 6, 5], [1, 0, 7, 6], [2, 1, 0, 7], [3, 2, 1, 0]],
    "rc8": [[0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3]],
    "ecl": [[0, 1, 2, 3], [1, 1, 2, 3], [2, 2, 2, 3], [3, 3, 3, 3]],
    "ecr": [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 2, 2], [0, 1, 2, 3]],
    "rc16": [[0, 1, 0, 1], [2, 3, 2, 3], [0, 1, 0, 1], [2, 3, 2, 3]],
}


def prmt(a, b, selector, mode=None):
    """Bytes of b:a picked by the selector, or by a mode and its low two bits."""
    a, b, selector = np.broadcast_arrays(np.asarray(a), np.asarray(b), np.asarray(selector))
    both = a.astype(u64) | (b.astype(u64) << u64(32))
    result = np.zeros(a.shape, u32)
    table = np.array(_PRMT_BYTES[mode], u64)[selector & u32(3)] if mode else None
    for i in range(4):
        if table is not None:
            byte = ((both >> (table[..., i] * u64(8))) & u64(0xFF)).astype(u32)
        else:
            pick = (selector >> u32(4 * i)) & u32(0xF)
            byte = ((both >> ((pick & u32(7)).astype(u64) * u64(8))) & u64(0xFF)).astype(u32)
            sign = np.where(byte & u32(0x80), u32(0xFF), u32(0))
            byte = np.where(pick & u32(8), sign, byte)
        result |= byte << u32(8 * i)
    return result


def prmt_const(a, b, selector):
    """`prmt` with a selector known beforehand that replicates no sign."""
    if selector == 0x5410:
        return (a & u32(0xFFFF)) | (b << u32(16))
    if selector == 0x7632:
        return (a >> u32(16)) | (b & u32(0xFFFF0000))
    result = u32(0)
    for i in range(4):
        pick = selector >> (4 * i) & 7
        source = a if pick < 4 else b
        shift = 8 * (pick & 3) - 8 * i
        moved = source >> u32(shift) if shift >= 0 else source << u32(-shift)
        result = result | (moved & u32(0xFF << (8 * i)))
    return result


def popc(x):
    """Number of one bits."""
    return np.bitwise_count(x).astype(u32)


def clz(x):
    """Number of leading zero bits."""
    x = np.asarray(x)
    width = _bits(x)
    for shift in (1, 2, 4, 8, 16, 32):
        if shift < width:
            x = x | (x >> x.dtype.type(shift))
    return u32(width) - np.bitwise_count(x).astype(u32)


def bfind(x, shift_amount=False):
    """Position of the highest bit that is not the sign, or the shift that brings it to the top."""
    x = np.asarray(x)
    if x.dtype.kind == "i":
        x = np.where(x < 0, ~x, x).astype(u32 if x.dtype.itemsize == 4 else u64)
    leading = clz(x)
    found = leading if shift_amount else u32(_bits(x) - 1) - leading
    return np.where(leading == _bits(x), _NOT_FOUND, found)


_REVERSED_BYTE = np.array([int(f"{i:08b}"[::-1], 2) for i in range(256)], u8)


def brev(x):
    """Bits in reverse order."""
    x = np.ascontiguousarray(x)
    reversed_bytes = _REVERSED_BYTE[x.view(u8).reshape(-1, x.dtype.itemsize)][:, ::-1]
    return np.ascontiguousarray(reversed_bytes).view(x.dtype).reshape(-1)


def _low_ones(count):
    """u64 with `count` low ones; all from 64 on."""
    inside = np.minimum(count, u32(63)).astype(u64)
    return np.where(count >= 64, _ALL64, (u64(1) << inside) - u64(1))


def bfe(a, position, length):
    """Extract a bit field; a signed one is extended with its top bit."""
    a = np.asarray(a)
    signed, width = a.dtype.kind == "i", _bits(a)
    position = np.asarray(position) & u32(0xFF)
    length = np.asarray(length) & u32(0xFF)
    bits = a.astype(u64)
    if width == 32:
        bits = bits & u64(0xFFFFFFFF)
    beyond = position >= width
    field = np.where(beyond, u64(0), bits >> np.minimum(position, u32(63)).astype(u64))
    field = field & _low_ones(length)
    if signed:
        top = np.minimum(position + length - u32(1), u32(width - 1)).astype(u64)
        negative = ((bits >> top) & u64(1) == 1) & (length != 0)
        room = np.where(beyond, u32(0), u32(width) - np.minimum(position, u32(width)))
        field = np.where(negative, field | ~_low_ones(np.minimum(length, room)), field)
    return field.astype(a.dtype)


def bfi(a, b, position, length):
    """Insert the low `length` bits of a into b at a position."""
    a, b = np.asarray(a), np.asarray(b)
    position = np.asarray(position) & u32(0xFF)
    length = np.asarray(length) & u32(0xFF)
    shift = np.minimum(position, u32(63)).astype(u64)
    mask = np.where(position >= _bits(a), u64(0), _low_ones(length) << shift)
    result = (b.astype(u64) & ~mask) | ((a.astype(u64) << shift) & mask)
    return result.astype(b.dtype)


def szext(a, length, wrap, signed):
    """Keep the low `length` bits, extended with zeros or the sign."""
    a, length = np.asarray(a), np.asarray(length)
    length = ((length & u32(31)) if wrap else np.minimum(length, u32(32))).astype(u64)
    ones = (u64(1) << length) - u64(1)
    value = a.astype(u64) & u64(0xFFFFFFFF) & ones
    if signed:
        sign = (value >> (np.maximum(length, u64(1)) - u64(1))) & u64(1)
        value = np.where((length > 0) & (sign == 1), value | ~ones, value)
    return value.astype(u32)


def bmsk(position, length, clamp):
    """A mask of `length` ones from a position on."""
    position, length = np.asarray(position).astype(u64), np.asarray(length).astype(u64)
    if clamp:
        position, length = np.minimum(position, u64(32)), np.minimum(length, u64(32))
    else:
        position, length = position & u64(31), length & u64(31)
    ones = (u64(1) << length) - u64(1)
    return ((ones << position) & u64(0xFFFFFFFF)).astype(u32)


def _elements(x, dtype):
    """u32 lanes -> (lanes, elements per register) of i32."""
    count = 4 // np.dtype(dtype).itemsize
    return np.ascontiguousarray(x).view(dtype).reshape(-1, count).astype(i32)


def _dot(x, y, c):
    return ((x * y).sum(1).astype(i32).view(u32) + c).astype(u32)


def dp4a(a, b, c, a_signed, b_signed):
    """Dot product of four bytes, plus c."""
    a, b = np.broadcast_arrays(np.asarray(a), np.asarray(b))
    return _dot(_elements(a, i8 if a_signed else u8), _elements(b, i8 if b_signed else u8), c)


def dp2a(a, b, c, a_signed, b_signed, high):
    """Dot product of two 16-bit numbers and the low or high two bytes of b, plus c."""
    a, b = np.broadcast_arrays(np.asarray(a), np.asarray(b))
    y = _elements(b, i8 if b_signed else u8)
    return _dot(_elements(a, i16 if a_signed else u16), y[:, 2:] if high else y[:, :2], c)
