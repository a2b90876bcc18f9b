"""Exact checks of the rounding helpers against rational arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
from ptxrun import rounding, small_floats

EMIN = {
    "f32": (-149, 24, 127),
    "f64": (-1074, 53, 1023),
    "bf16": (-133, 8, 127),
    "f16": (-24, 11, 15),
}


def rnd(v, ty, mode="rn"):
    """Fraction -> nearest value of the format (as Fraction) or +-inf"""
    emin, p, emax = EMIN[ty]
    if v == 0:
        return Fraction(0)
    sg, a = (-1, -v) if v < 0 else (1, v)
    e = a.numerator.bit_length() - a.denominator.bit_length()
    if Fraction(2) ** e > a:
        e -= 1
    q = Fraction(2) ** max(e - p + 1, emin)
    k, rem = divmod(a, q)
    if mode == "rn":
        k += 1 if rem * 2 > q or (rem * 2 == q and k & 1) else 0
    elif (mode == "rp" and sg > 0) or (mode == "rm" and sg < 0):
        k += rem > 0
    r = k * q
    if r >= Fraction(2) ** (emax + 1):
        return sg * float("inf")
    return sg * r


def bits(r, n, lo=0, hi=255):
    e = r.integers(lo, hi, n).astype("u4")
    return (
        (r.integers(0, 2, n).astype("u4") << 31)
        | (e << 23)
        | r.integers(0, 1 << 23, n).astype("u4")
    ).view("f4")


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize(("lo", "hi"), [(0, 255), (110, 140), (55, 70), (127, 128)])
def test_fma_f32(mode, lo, hi):
    r = np.random.default_rng(lo + hi)
    n = 3000
    a, b, c = bits(r, n, lo, hi), bits(r, n, lo, hi), bits(r, n, lo, hi)
    # near ties: short mantissas
    a[: n // 2] = (a[: n // 2].view("u4") & 0xFFFFF000).view("f4")
    b[: n // 2] = (b[: n // 2].view("u4") & 0xFFFFF000).view("f4")
    with np.errstate(all="ignore"):
        got = rounding.fma_f32(a, b, c, mode)
    for i in range(n):
        e = rnd(Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i])), "f32", mode)
        if abs(e) == float("inf") or abs(e) > Fraction(3.4e38):
            continue
        assert np.isfinite(got[i]) and Fraction(float(got[i])) == e, (
            a[i],
            b[i],
            c[i],
            got[i],
            float(e),
        )


def test_fma_f64():
    r = np.random.default_rng(1)
    n = 3000
    a, b = r.standard_normal(n), r.standard_normal(n)
    c = np.where(r.random(n) < 0.5, -a * b, r.standard_normal(n) * 10.0 ** r.integers(-20, 3, n))
    g = rounding.fma_f64(a, b, c)
    bad = sum(
        Fraction(g[i]) != rnd(Fraction(a[i]) * Fraction(b[i]) + Fraction(c[i]), "f64")
        for i in range(n)
    )
    assert bad <= 2


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_bf16_f16_rounding(mode):
    r = np.random.default_rng(2)
    x = np.concatenate([bits(r, 3000), bits(r, 3000, 100, 145)])
    x[:500] = (x[:500].view("u4") & 0xFFFF8000).view("f4")
    with np.errstate(all="ignore"):
        g, h = small_floats.bf16_to_f32(small_floats.to_bf16(x, mode)), small_floats.to_f16(x, mode)
    for i in range(x.size):
        e = rnd(Fraction(float(x[i])), "bf16", mode)
        if abs(e) != float("inf") and np.isfinite(g[i]):
            assert Fraction(float(g[i])) == e
        if abs(x[i]) < 65000:
            assert Fraction(float(h[i])) == rnd(Fraction(float(x[i])), "f16", mode), x[i]


def test_bf16_fma_exact():
    r = np.random.default_rng(3)
    n = 4000
    a, b, c = ((bits(r, n, 100, 150).view("u4") & 0xFFFF0000).view("f4") for _ in range(3))
    g = small_floats.bf16_to_f32(small_floats.to_bf16(small_floats.fma_exact(a, b, c)))
    for i in range(n):
        assert Fraction(float(g[i])) == rnd(
            Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i])), "bf16"
        )


def test_add_mul_directed():
    r = np.random.default_rng(4)
    n = 2000
    a, b = bits(r, n, 90, 160), bits(r, n, 90, 160)
    for mode in ("rz", "rm", "rp"):
        s, m, d = (
            rounding.add_f32(a, b, mode),
            rounding.mul_f32(a, b, mode),
            rounding.div_f32(a, b, mode),
        )
        for i in range(n):
            A, B = Fraction(float(a[i])), Fraction(float(b[i]))
            for got, v in ((s, A + B), (m, A * B), (d, A / B)):
                e = rnd(v, "f32", mode)
                if np.isfinite(got[i]) and abs(e) < Fraction(3e38):
                    assert Fraction(float(got[i])) == e
