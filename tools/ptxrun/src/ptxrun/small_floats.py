"""bf16, f16, tf32 and fp8: conversions and packing, on arrays of lanes."""

import functools

import numpy as np

from .dtypes import f16, f32, f64, u8, u16, u32
from .rounding import round_directed

_BF16_NAN = u16(0x7FFF)
_FP8_MAX = {"e4m3": 448.0, "e5m2": 57344.0}
_FP8_NAN = u8(0x7F)


def bf16_to_f32(bits):
    """u16 bits of bf16 -> f32."""
    return (np.asarray(bits).astype(u32) << u32(16)).view(f32)


def to_bf16(x, mode="rn"):
    """f32 or f64 -> u16 bits of bf16."""
    x = np.asarray(x)
    if x.dtype == f64:
        x = _f64_to_f32_odd(x)
    bits = np.ascontiguousarray(x).view(u32)
    high = bits >> u32(16)
    if mode == "rn":
        result = (bits + (u32(0x7FFF) + (high & u32(1)))) >> u32(16)
    elif mode == "rna":
        result = (bits + u32(0x8000)) >> u32(16)
    elif mode == "rz":
        result = high
    elif mode in ("rm", "rp"):
        negative = (bits >> u32(31)) == 1
        away = negative if mode == "rm" else ~negative
        result = high + (((bits & u32(0xFFFF)) != 0) & away)
    else:
        raise ValueError(mode)
    result = result.astype(u16)
    nan = np.isnan(x)
    return np.where(nan, _BF16_NAN, result) if nan.any() else result


def _f64_to_f32_odd(x):
    """f64 -> f32 rounded to odd, so that rounding once more is exact."""
    nearest = x.astype(f32)
    wide = nearest.astype(f64)
    inexact = (wide != x) & np.isfinite(nearest) & ~np.isnan(x)
    inexact |= np.isinf(nearest) & np.isfinite(x)
    bits = nearest.view(u32).copy()
    bits -= ((np.abs(wide) > np.abs(x)) & inexact).astype(u32)
    bits |= inexact.astype(u32)
    return bits.view(f32)


def to_f16(x, mode="rn"):
    """f32 or f64 -> f16."""
    x = np.asarray(x)
    nearest = x.astype(f16)
    return nearest if mode == "rn" else round_directed(nearest, x.astype(f64), mode)


def to_tf32(x, mode):
    """f32 -> f32 bits (u32) with the low 13 bits rounded away."""
    bits = np.ascontiguousarray(x).view(u32)
    if mode == "rna":
        rounded = bits + u32(0x1000)
    elif mode == "rn":
        rounded = bits + (u32(0xFFF) + ((bits >> u32(13)) & u32(1)))
    else:
        rounded = bits
    special = (bits & u32(0x7F800000)) == u32(0x7F800000)
    return np.where(special, bits, rounded & u32(0xFFFFE000))


def fma_exact(a, b, c):
    """a * b + c as f64, for f16 or bf16 values: the product is exact."""
    return np.asarray(a).astype(f64) * b + c


def pack2(low, high):
    """Two u16 halves -> u32."""
    return np.asarray(low).astype(u32) | (np.asarray(high).astype(u32) << u32(16))


def unpack_f16x2(x):
    """u32 -> f16 array of twice the length, low half first."""
    return np.ascontiguousarray(x).view(f16)


def pack_f16x2(x):
    """Inverse of `unpack_f16x2`."""
    return np.ascontiguousarray(x).view(u32)


def unpack_bf16x2(x):
    """u32 -> f32 array of twice the length, low half first."""
    return bf16_to_f32(np.ascontiguousarray(x).view(u16))


def pack_bf16x2(x):
    """Inverse of `unpack_bf16x2`, rounding to nearest."""
    return np.ascontiguousarray(to_bf16(x)).view(u32)


def _fp8_dtype(kind):
    import ml_dtypes  # only fp8 needs it

    return {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[kind]


@functools.cache
def _fp8_values(kind):
    return np.arange(256, dtype=u8).view(_fp8_dtype(kind)).astype(f32)


def fp8_to_f32(bits, kind):
    """u8 bits of e4m3 or e5m2 -> f32."""
    return _fp8_values(kind)[bits]


def f32_to_fp8(x, kind):
    """f32 -> u8 bits, to nearest, clamped to the largest finite number (`.satfinite`)."""
    x = np.asarray(x).astype(f32)
    largest = f32(_FP8_MAX[kind])
    bits = np.clip(x, -largest, largest).astype(_fp8_dtype(kind)).view(u8)
    return np.where(np.isnan(x), _FP8_NAN, bits)
