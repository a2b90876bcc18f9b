"""f32 and f64 arithmetic with PTX's rounding modes, on arrays of lanes.

`mode` is `rn` (to nearest even), `rz` (toward zero), `rm` (down) or `rp` (up).
"""

import numpy as np

from .dtypes import f16, f32, f64, i8, i16, i32, i64, u8, u16, u32, u64

_SMALLEST_NORMAL_F16 = f16(6.104e-05)
_INT_RANGE = {dtype: np.iinfo(dtype) for dtype in (i8, u8, i16, u16, i32, u32, i64, u64)}


def flush_subnormals(x):
    """`.ftz`: subnormal numbers become zeros of their sign."""
    tiny = np.finfo(x.dtype).tiny if x.dtype != f16 else _SMALLEST_NORMAL_F16
    return np.where(np.abs(x) < tiny, np.copysign(x.dtype.type(0), x), x)


def saturate(x):
    """`.sat`: clamp to [0, 1]; NaN becomes 0."""
    zero, one = x.dtype.type(0), x.dtype.type(1)
    return np.where(np.isnan(x), zero, np.clip(x, zero, one))


def relu(x):
    """`.relu`: negative numbers become 0; NaN stays."""
    return np.where(np.isnan(x), x, np.maximum(x, x.dtype.type(0)))


def round_directed(rounded, exact, mode):
    """Move `rounded` (nearest) one step where `exact` (f64) lies on the other side of it."""
    wide = rounded.astype(f64)
    if mode == "rz":
        zero = rounded.dtype.type(0)
        return np.where(np.abs(wide) > np.abs(exact), np.nextafter(rounded, zero), rounded)
    infinity = rounded.dtype.type(np.inf)
    if mode == "rm":
        return np.where(wide > exact, np.nextafter(rounded, -infinity), rounded)
    if mode == "rp":
        return np.where(wide < exact, np.nextafter(rounded, infinity), rounded)
    raise ValueError(mode)


def to_f32(x, mode="rn"):
    """f64 -> f32."""
    nearest = np.asarray(x).astype(f32)
    return nearest if mode == "rn" else round_directed(nearest, x, mode)


def _sum_error(a, b, total):
    """Exact a + b - total for total = fl(a + b) (Knuth's TwoSum)."""
    rest = total - a
    return (a - (total - rest)) + (b - rest)


def _round_to_odd(total, error):
    """An f64 sum whose last bit is sticky, so that rounding it again to f32 is exact.

    Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using
    rounding to odd" (2008).
    """
    even = (np.asarray(total).view(u64) & u64(1)) == 0
    toward = np.where(error > 0, np.inf, -np.inf)
    return np.where((error != 0) & np.isfinite(total) & even, np.nextafter(total, toward), total)


def fma_f32(a, b, c, mode="rn"):
    """Exactly rounded a * b + c in f32."""
    a, b, c = np.asarray(a), np.asarray(b), np.asarray(c)
    product = a.astype(f64) * b  # exact: 24 + 24 bits
    total = product + c
    if mode == "rn":
        # Rounding twice differs only at a tie of the f32 format or among its subnormals.
        tie = (np.atleast_1d(total).view(u64) & u64(0x1FFFFFFF)) == u64(0x10000000)
        if not (tie | (np.abs(total) < 1.2e-38)).any():
            return total.astype(f32)
    error = _sum_error(product, c.astype(f64), total)
    return to_f32(_round_to_odd(total, error), mode)


def add_f32(a, b, mode):
    """Exactly rounded a + b in f32."""
    a, b = np.asarray(a).astype(f64), np.asarray(b).astype(f64)
    total = a + b
    return to_f32(_round_to_odd(total, _sum_error(a, b, total)), mode)


def mul_f32(a, b, mode):
    """Exactly rounded a * b in f32."""
    return to_f32(np.asarray(a).astype(f64) * b, mode)


def div_f32(a, b, mode="rn"):
    """a / b in f32."""
    if mode == "rn":
        return np.asarray(a, f32) / b
    return to_f32(np.asarray(a).astype(f64) / np.asarray(b).astype(f64), mode)


def sqrt_f32(a, mode="rn"):
    """Square root in f32."""
    return np.sqrt(a) if mode == "rn" else to_f32(np.sqrt(np.asarray(a).astype(f64)), mode)


def _split_f64(x):
    """High and low halves of a significand (Veltkamp)."""
    scaled = x * f64(134217729.0)
    high = scaled - (scaled - x)
    return high, x - high


def fma_f64(a, b, c):
    """a * b + c in f64: exact product (Dekker), sum in long double; within 2^-63 of the sum."""
    a, b, c = np.asarray(a), np.asarray(b), np.asarray(c)
    product = a * b
    with np.errstate(all="ignore"):
        a_high, a_low = _split_f64(a)
        b_high, b_low = _split_f64(b)
        product_error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + (
            a_low * b_low
        )
        total = product + c
        sum_error = _sum_error(product, c, total)
        exact = total.astype(np.longdouble) + (sum_error.astype(np.longdouble) + product_error)
        finite = np.isfinite(product) & np.isfinite(product_error) & np.isfinite(total)
    return np.where(finite, exact.astype(f64), total)


def round_to_integer(x, mode):
    """Integral float: `rni`, `rzi`, `rmi` or `rpi`."""
    return {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](x)


def float_to_int(x, mode, dtype):
    """`cvt` to an integer type: out of range clamps, NaN gives 0 or the type's own value."""
    from_f64 = x.dtype == f64
    value = round_to_integer(x.astype(f64), mode)
    limits = _INT_RANGE[dtype]
    nan = np.isnan(value)
    value = np.where(nan, 0.0, value)
    above, below = value >= float(limits.max), value <= float(limits.min)
    inside = np.where(above | below, 0.0, value)
    result = _to_u64(inside) if dtype is u64 else inside.astype(i64).astype(dtype)
    result = np.where(above, dtype(limits.max), np.where(below, dtype(limits.min), result))
    if nan.any():
        result = np.where(nan, _int_of_nan(dtype, from_f64), result)
    return result


def _int_of_nan(dtype, from_f64):
    if dtype in (u64, i64) or from_f64:
        sign_bit = 1 << (8 * np.dtype(dtype).itemsize - 1)
        return np.asarray(sign_bit, u64).astype(dtype)
    return dtype(0)


def _to_u64(x):
    half = 9223372036854775808.0
    upper = x >= half
    high = np.where(upper, x - half, 0).astype(i64).astype(u64) + u64(1 << 63)
    return np.where(upper, high, np.where(upper, 0, x).astype(i64).astype(u64))


def saturate_int(x, dtype):
    """`cvt.sat` between integer types, and 64-bit sums to `s32`."""
    limits = _INT_RANGE[dtype]
    if x.dtype == u64:
        return np.minimum(x, u64(limits.max)).astype(dtype)
    low, high = max(limits.min, -(2**63)), min(limits.max, 2**63 - 1)
    return np.clip(x.astype(i64), low, high).astype(dtype)


def float_min_max(a, b, which, nan=False, xorsign_abs=False):
    """`min` / `max` of floats: -0 is below +0, and NaN is returned only with `nan`."""
    if xorsign_abs:
        negative = np.signbit(a) ^ np.signbit(b)
        a, b = np.abs(a), np.abs(b)
    if which == "min":
        result = np.minimum(a, b) if nan else np.fmin(a, b)
        negative_zero = np.signbit(a) | np.signbit(b)
    else:
        result = np.maximum(a, b) if nan else np.fmax(a, b)
        negative_zero = np.signbit(a) & np.signbit(b)
    zeros = (a == 0) & (b == 0)
    if zeros.any():
        zero = result.dtype.type(0)
        result = np.where(zeros, np.where(negative_zero, -zero, zero), result)
    return np.where(negative, -result, result) if xorsign_abs else result


def _through_f64(function):
    def rounded_once(x):
        return function(np.asarray(x).astype(f64)).astype(f32)

    return rounded_once


# The hardware approximates these; here they are right to f32's accuracy.
rsqrt = _through_f64(lambda x: 1.0 / np.sqrt(x))
exp2 = _through_f64(np.exp2)
log2 = _through_f64(np.log2)
sin = _through_f64(np.sin)
cos = _through_f64(np.cos)
tanh = _through_f64(np.tanh)
