"""Rows as the operators store, move and gather them, bit for bit, in plain PyTorch.

A *row tensor* is ``[rows, heads, D]``, or paged ``[pages, block_size, heads, D]`` where row ``r``
is row ``r % block_size`` of page ``r // block_size``. `tokendance.testing.reference` builds the
operators on these.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "dequantize_rows",
    "exact_rotation",
    "fused_multiply_add",
    "gather_rows",
    "move_rows",
    "quantize_rows",
    "scatter_rows",
]

# Quantized rows ---------------------------------------------------------------------------------

_LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
_E4M3_NAN = 0x7F


def quantize_rows(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What every operator stores of rows: times the reciprocal scale, limited, to nearest even.

    Args:
        x: fp32 ``[n, heads, D]``.
        scale: fp32 ``[heads]``; None for 1.
        dtype: ``torch.float8_e4m3fn`` or ``torch.int8``.

    Returns:
        ``[n, heads, D]``; NaN is NaN in e4m3 (of positive sign) and 0 in int8.
    """
    largest = _LARGEST[dtype]
    y = x if scale is None else x * (1.0 / scale)[:, None]
    missing = y.isnan()
    y = torch.where(missing, 0.0, y.clamp(-largest, largest))
    if dtype == torch.int8:
        return y.round().to(torch.int8)
    bits = y.to(dtype).view(torch.uint8)
    nan = torch.tensor(_E4M3_NAN, dtype=torch.uint8, device=x.device)
    return torch.where(missing, nan, bits).view(dtype)


def dequantize_rows(x: Tensor, scale: Tensor | None) -> Tensor:
    """What rows ``[n, heads, D]`` with scales ``[heads]`` (None for 1) stand for, in fp32."""
    return x.float() if scale is None else x.float() * scale[:, None]


# Rotation ---------------------------------------------------------------------------------------


def fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c`` of fp32 tensors, rounded once to fp32, bit for bit what ``fmaf`` gives.

    The product of two fp32 values is exact in fp64. Their sum with ``c`` is not, and rounding it to
    fp64 and then to fp32 could round twice; so the fp64 sum is rounded to odd first, after which
    the second rounding is right (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums:
    proved algorithms using rounding to odd", 2008).
    """
    product = a.double() * b.double()
    addend = c.double().expand_as(product)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)  # exact: total + error = product + addend
    bits = total.view(torch.int64)
    inexact_and_even = (error != 0) & total.isfinite() & (bits & 1 == 0)
    away = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where(inexact_and_even, bits + away, bits).view(torch.float64).float()


def _pairs(x: Tensor, rotary_dim: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the first and the second elements of all rotated pairs of ``x [..., D]``."""
    if interleaved:
        return x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2]
    return x[..., : rotary_dim // 2], x[..., rotary_dim // 2 : rotary_dim]


def _angles(cos: Tensor, sin: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin ``[n, 1, rotary_dim / 2]`` of signed positions ``[n]``: cos is even, sin odd."""
    row = position.abs().long()
    cosine, sine = cos[row], sin[row]
    return cosine[:, None], torch.where(position[:, None] < 0, -sine, sine)[:, None]


def exact_rotation(
    x: Tensor,
    position: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    attention_factor: float = 1.0,
) -> Tensor:
    """Rotates rows by signed positions in fp64, without any rounding to a storage type.

    Args:
        x: ``[n, heads, D]``, any floating dtype.
        position: ``[n]`` integers, negative to rotate backwards; their magnitudes index the tables.
        cos, sin: fp32 ``[max_position, rotary_dim / 2]``.
        interleaved: pairs ``(2i, 2i+1)`` instead of ``(i, i + rotary_dim/2)``.
        attention_factor: multiplies the rotary dims after the rotation.

    Returns:
        fp64 ``[n, heads, D]``.
    """
    cosine, sine = _angles(cos.double(), sin.double(), position)
    rotated = x.double().clone()
    first, second = _pairs(rotated, 2 * cos.shape[1], interleaved)
    new_first = (first * cosine - second * sine) * attention_factor
    new_second = (second * cosine + first * sine) * attention_factor
    first.copy_(new_first)
    second.copy_(new_second)
    return rotated


def move_rows(
    x: Tensor,
    shift: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    attention_factor: float = 1.0,
    dtype: torch.dtype | None = None,
    x_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    """Moves rows by signed shifts, bit for bit what every operator does.

    One rotation in fp32 in the order of ``rope.h``, then one rounding; a row of shift 0 keeps its
    bits (but for ``attention_factor``, and where scales or another dtype ask for other ones).

    Args:
        x, shift, cos, sin, interleaved, attention_factor: as for :func:`exact_rotation`.
        dtype: of the result; that of ``x`` by default.
        x_scale, out_scale: fp32 ``[heads]`` of a quantized ``x`` and a quantized result.

    Returns:
        ``[n, heads, D]`` of ``dtype``.
    """
    dtype = dtype or x.dtype
    rotary_dim = 2 * cos.shape[1]
    cosine, sine = _angles(cos, sin, shift)
    before = dequantize_rows(x, x_scale)
    after = before.clone()
    x_first, x_second = _pairs(before, rotary_dim, interleaved)
    first, second = _pairs(after, rotary_dim, interleaved)
    first.copy_(fused_multiply_add(x_first, cosine, -(x_second * sine)))
    second.copy_(fused_multiply_add(x_second, cosine, x_first * sine))
    stays = (shift == 0)[:, None, None]
    after = torch.where(stays, before, after)
    if attention_factor != 1.0:
        for part in _pairs(after, rotary_dim, interleaved):
            part.mul_(torch.tensor(attention_factor, dtype=torch.float32, device=x.device))
    moved = quantize_rows(after, out_scale, dtype) if dtype in _LARGEST else after.to(dtype)
    if attention_factor != 1.0 or dtype != x.dtype or x_scale is not None:
        return moved
    return torch.where(stays, x, moved)  # NaN bits, too, stay as they are


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index [n]`` of a row tensor, as ``[n, heads, D]``."""
    if x.dim() == 4:
        return x[index // x.shape[1], index % x.shape[1]]
    return x[index]


def scatter_rows(x: Tensor, index: Tensor, rows: Tensor) -> None:
    """Writes ``rows [n, heads, D]`` to the rows ``index [n]`` of a row tensor."""
    if x.dim() == 4:
        x[index // x.shape[1], index % x.shape[1]] = rows
    else:
        x[index] = rows
