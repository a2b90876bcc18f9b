"""Integer arithmetic and bit instructions against Python's integers."""

import numpy as np

M32, M64, M128 = (1 << 32) - 1, (1 << 64) - 1, (1 << 128) - 1


def signed(value, bits=32):
    """The number that the low bits stand for in two's complement."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def divide(a, b):
    """Quotient toward zero."""
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


def split_bytes(value, count=4):
    return [(value >> 8 * i) & 255 for i in range(count)]


def reversed_bits(value):
    return int(f"{value:032b}"[::-1], 2)


# ---- pseudo-code of the PTX ISA ----
def bfe(a, b, c, width, of_signed):
    position, length, top = b & 0xFF, c & 0xFF, width - 1
    sign = a >> min(position + length - 1, top) & 1 if of_signed and length else 0
    result = 0
    for i in range(width):
        inside = i < length and position + i <= top
        result |= ((a >> (position + i) & 1) if inside else sign) << i
    return result


def bfi(a, b, c, d, width):
    position, length, result = c & 0xFF, d & 0xFF, b
    for i in range(length):
        if position + i < width:
            result = result & ~(1 << (position + i)) | ((a >> i & 1) << (position + i))
    return result


def prmt(a, b, c, mode=None):
    q = c & 3
    selectors = {
        None: [(c >> 4 * i) & 15 for i in range(4)],
        "f4e": [q, q + 1, q + 2, q + 3],
        "b4e": [q, (q - 1) % 8, (q - 2) % 8, (q - 3) % 8],
        "rc8": [q] * 4,
        "ecl": [max(q, i) for i in range(4)],
        "ecr": [min(q, i) for i in range(4)],
        "rc16": [2 * (q & 1), 2 * (q & 1) + 1] * 2,
    }[mode]
    available = split_bytes(a) + split_bytes(b)
    result = 0
    for i, selector in enumerate(selectors):
        byte = available[selector & 7]
        if selector & 8:
            byte = 255 if byte & 128 else 0
        result |= byte << 8 * i
    return result


def lop3(a, b, c, table):
    result = 0
    for row in range(8):
        if table >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


def expected_of_ints(x, y):
    """What `ints` stores for signed x and y: 31 numbers of 32 bits and 8 of 64, in order."""
    ux, uy = x & M32, y & M32
    words = [
        x + y,
        x - y,
        x * y,
        (x * y) >> 32,
        (ux * uy) >> 32,
        divide(x, y or 1),
        x - divide(x, y or 1) * (y or 1),
        ux // (uy | 1),
        ux % (uy | 1),
        32 - ux.bit_length(),
        bin(ux).count("1"),
        reversed_bits(ux),
        (ux & -ux).bit_length(),
        x >> (uy & 31),
        ux >> (uy & 31),
        x << (uy & 31),
        ((uy << 32 | ux) << 5) >> 32,
        (uy << 32 | ux) >> (ux & 31),
        prmt(ux, uy, 0x3715),
        prmt(ux, uy, ux & 0x7777),
        min(x, y),
        max(ux, uy),
        abs(x),
        (x & y) | (~x & 0x0F0F0F0F) ^ y,
        7
        + sum(signed(a, 8) * signed(b, 8) for a, b in zip(*map(split_bytes, (x, y)), strict=True)),
        signed(x, 24) * signed(y, 24),
        abs(x - y) + 3,
        (ux >> 5) & 0x3F,
        signed(x, 16),
        signed(y >> 3, 8),
        5 if x == y else 6 if x < y else 7,
    ]
    a, b = signed(x * y, 64), signed((y << 32) ^ x, 64)
    ua, ub = a & M64, b & M64
    long_words = [
        a + b,
        a * b,
        divide(b, a | 1),
        ub % ((a | 1) & M64),
        b >> (ux & 63),
        (a * b) >> 64,
        (ua * ub) >> 64,
        64 - ub.bit_length() + 100 * bin(ub).count("1"),
    ]
    return words, long_words


def test_arithmetic(kernels):
    n = 400
    random = np.random.default_rng(11)
    a = random.integers(-(2**31), 2**31, n).astype("i4")
    b = random.integers(-(2**31), 2**31, n).astype("i4")
    a[:20] = random.integers(-20, 20, 20)
    b[:30] = random.integers(-5, 6, 30)
    b[40:60] = a[40:60]
    a[60], b[61] = 0, 0
    out, long_out = np.zeros((31, n), "i4"), np.zeros((8, n), "i8")
    kernels.launch("ints", 4, 128, [a, b, out, long_out, n])
    for i, (x, y) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        words, long_words = expected_of_ints(x, y)
        assert out[:, i].tolist() == [signed(word, 32) for word in words], (x, y)
        assert long_out[:, i].tolist() == [signed(word, 64) for word in long_words], (x, y)


def expected_of_bits(x, y, z, following):
    """What `bits` stores, modulo 2^32 and 2^64; None where there is no instruction."""
    sx, sy, sz = signed(x), signed(y), signed(z)
    both = y << 32 | x

    def find(value):
        return value.bit_length() - 1 if value else M32

    def clamp(value):
        return max(-(2**31), min(2**31 - 1, value))

    words = [
        bfe(x, y, z, 32, False),
        bfe(x, y, z, 32, True),
        bfi(x, following, y, z, 32),
        (both << (z & 31)) >> 32,
        both >> (z & 31),
        (both << min(z, 32)) >> 32,
        both >> min(z, 32),
        prmt(x, y, z),
        find(x),
        find(x if sx >= 0 else ~x & M32),
        31 - find(x) if x else M32,
        reversed_bits(x),
        x << y if y < 32 else 0,
        x >> min(y, 40),
        sx >> min(y, 31),
        clamp(sx + sy),
        clamp(sx - sy),
        (sx * sy) >> 32,
        ((x * y) >> 32) + z,
        abs(sx - sy) + z,
        *[prmt(x, y, z, mode) for mode in ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")],
        max(0, min(255, sx)),
        max(-128, min(127, sx)),
        signed(x, 8),
        x if sz >= 0 else y,
        lop3(x, y, z, 0x5B),
        1 if sx < sy else 2,
        signed(x, 16) * split_bytes(y)[0] + signed(x >> 16, 16) * split_bytes(y)[1] + z,
        M32 if sx > sy else 0,
    ]
    a, b = x << 32 | y, z << 32 | x
    position, length = y & 127, z & 127
    product = (a * b + a - (b << 64 | b)) & M128
    long_words = [
        bfe(a, position, length, 64, False),
        bfe(a, position, length, 64, True),
        bfi(a, b, position, length, 64),
        product,
        product >> 64,
        a + b,
        a - b,
        signed(a, 64) >> min(position, 63),
        a << position if position < 64 else 0,
    ]
    return words, long_words


def test_bits(instructions):
    n = 600
    random = np.random.default_rng(0)
    a, b, c = (random.integers(0, 2**32, n).astype("u4") for _ in range(3))
    b[:400] = random.integers(0, 70, 400)
    c[:400] = random.integers(0, 70, 400)
    a[:8] = [0, 1, M32, 1 << 31, 255, 128, 300, 0x7FFFFFFF]
    out, long_out = np.zeros((34, n), "u4"), np.zeros((9, n), "u8")
    instructions.launch("4bits", 5, 128, [a, b, c, out, long_out, n])
    for i, values in enumerate(zip(*(x.tolist() for x in (a, b, c, np.roll(a, -1))), strict=True)):
        words, long_words = expected_of_bits(*values)
        assert out[:, i].tolist() == [word & M32 for word in words], values
        assert long_out[:, i].tolist() == [word & M64 for word in long_words], values
