"""Rounding of the interpreter's own arithmetic, exactly, against rational numbers."""

from fractions import Fraction

import numpy as np
import pytest
from ptxrun.rounding import add_f32, div_f32, fma_f32, fma_f64, mul_f32
from ptxrun.small_floats import bf16_to_f32, fma_exact, to_bf16, to_f16

# Exponent of the smallest step, bits of the significand, largest exponent.
FORMATS = {
    "f32": (-149, 24, 127),
    "f64": (-1074, 53, 1023),
    "bf16": (-133, 8, 127),
    "f16": (-24, 11, 15),
}
INFINITY = float("inf")


def rational(x):
    return Fraction(float(x))


def rounded(value, name, mode="rn"):
    """A Fraction rounded to a format: a Fraction, or an infinity beyond its range."""
    smallest, precision, largest = FORMATS[name]
    if value == 0:
        return value
    sign, size = (-1, -value) if value < 0 else (1, value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1
    step = Fraction(2) ** max(exponent - precision + 1, smallest)
    steps, rest = divmod(size, step)
    if mode == "rn":
        steps += rest * 2 > step or (rest * 2 == step and steps & 1)
    elif (mode == "rp" and sign > 0) or (mode == "rm" and sign < 0):
        steps += rest > 0
    return sign * (steps * step if steps * step < Fraction(2) ** (largest + 1) else INFINITY)


def random_f32(random, n, low=0, high=255):
    """Random bits with biased exponents in [low, high)."""
    sign = random.integers(0, 2, n).astype("u4") << 31
    exponent = random.integers(low, high, n).astype("u4") << 23
    return (sign | exponent | random.integers(0, 1 << 23, n).astype("u4")).view("f4")


def shorten(x, bits):
    """Significands with `bits` zeros at the end: their products come near ties."""
    return (x.view("u4") >> bits << bits).view("f4")


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize(("low", "high"), [(0, 255), (110, 140), (55, 70), (127, 128)])
def test_fma_f32(mode, low, high):
    random, n = np.random.default_rng(low + high), 3000
    a, b, c = (random_f32(random, n, low, high) for _ in range(3))
    a[: n // 2], b[: n // 2] = shorten(a[: n // 2], 12), shorten(b[: n // 2], 12)
    with np.errstate(all="ignore"):
        results = fma_f32(a, b, c, mode)
    for x, y, z, result in zip(a, b, c, results, strict=True):
        want = rounded(rational(x) * rational(y) + rational(z), "f32", mode)
        if abs(want) < Fraction(3.4e38):
            assert np.isfinite(result), (x, y, z)
            assert rational(result) == want, (x, y, z)


def test_fma_f64():
    random, n = np.random.default_rng(1), 3000
    a, b = random.standard_normal(n), random.standard_normal(n)
    scaled = random.standard_normal(n) * 10.0 ** random.integers(-20, 3, n)
    c = np.where(random.random(n) < 0.5, -a * b, scaled)
    wrong = 0
    for x, y, z, result in zip(a, b, c, fma_f64(a, b, c), strict=True):
        want = rounded(rational(x) * rational(y) + rational(z), "f64")
        wrong += rational(result) != want
    assert wrong <= 2


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_bf16_and_f16(mode):
    random = np.random.default_rng(2)
    values = np.concatenate([random_f32(random, 3000), random_f32(random, 3000, 100, 145)])
    values[:500] = shorten(values[:500], 15)
    with np.errstate(all="ignore"):
        as_bf16, as_f16 = bf16_to_f32(to_bf16(values, mode)), to_f16(values, mode)
    for x, small, half in zip(values, as_bf16, as_f16, strict=True):
        want = rounded(rational(x), "bf16", mode)
        if abs(want) != INFINITY and np.isfinite(small):
            assert rational(small) == want, x
        if abs(x) < 65000:
            assert rational(half) == rounded(rational(x), "f16", mode), x


def test_bf16_fma():
    random, n = np.random.default_rng(3), 4000
    a, b, c = (shorten(random_f32(random, n, 100, 150), 16) for _ in range(3))
    results = bf16_to_f32(to_bf16(fma_exact(a, b, c)))
    for x, y, z, result in zip(a, b, c, results, strict=True):
        want = rounded(rational(x) * rational(y) + rational(z), "bf16")
        assert rational(result) == want, (x, y, z)


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_directed_rounding(mode):
    random, n = np.random.default_rng(4), 2000
    a, b = random_f32(random, n, 90, 160), random_f32(random, n, 90, 160)
    results = add_f32(a, b, mode), mul_f32(a, b, mode), div_f32(a, b, mode)
    for x, y, *got in zip(a, b, *results, strict=True):
        p, q = rational(x), rational(y)
        for result, value in zip(got, (p + q, p * q, p / q), strict=True):
            want = rounded(value, "f32", mode)
            if np.isfinite(result) and abs(want) < Fraction(3e38):
                assert rational(result) == want, (x, y)
