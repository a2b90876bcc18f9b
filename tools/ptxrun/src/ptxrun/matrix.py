"""`mma.sync`: fragments of a warp's registers -> matrices -> fragments.

The fragment layouts are those of the PTX ISA, "Matrix Fragments for mma.m16n8k*".
"""

import functools

import numpy as np

from .dtypes import f16, f32, f64, i8, i32, i64, u8, u16, u32
from .small_floats import bf16_to_f32, fp8_to_f32

_LANE = np.arange(32)
_GROUP, _LANE_IN_GROUP = _LANE >> 2, _LANE & 3

ELEMENT_BYTES = {"f16": 2, "bf16": 2, "tf32": 4, "e4m3": 1, "e5m2": 1, "s8": 1, "u8": 1}


@functools.cache
def _fragment(role, registers, elements):
    """Row and column (each [registers, elements, 32 lanes]) of every element of a fragment.

    `role` is `a`, `b`, or the accumulator with one (`c32`) or two (`c16`) elements a register.
    """
    register = np.arange(registers)[:, None, None]
    element = np.arange(elements)[None, :, None]
    group, lane = _GROUP[None, None], _LANE_IN_GROUP[None, None]
    if role == "a":
        row = group + 8 * (register & 1)
        column = lane * elements + 4 * elements * (register >> 1) + element
    elif role == "b":
        row = lane * elements + 4 * elements * register + element
        column = group
    elif role == "c32":
        row = group + 8 * (register >> 1)
        column = lane * 2 + (register & 1)
    else:
        row = group + 8 * register
        column = lane * 2 + element
    shape = (registers, elements, 32)
    return np.broadcast_to(row, shape), np.broadcast_to(column, shape)


def _unpack(register, ptx_type):
    """u32 lanes -> (lanes, elements per register) of f32 or i32."""
    register = np.ascontiguousarray(register)
    if ptx_type == "f16":
        return register.view(f16).reshape(-1, 2).astype(f32)
    if ptx_type == "bf16":
        return bf16_to_f32(register.view(u16)).reshape(-1, 2)
    if ptx_type == "tf32":
        return (register & u32(0xFFFFE000)).view(f32).reshape(-1, 1)
    if ptx_type in ("e4m3", "e5m2"):
        return fp8_to_f32(register.view(u8), ptx_type).reshape(-1, 4)
    return register.view({"s8": i8, "u8": u8}[ptx_type]).reshape(-1, 4).astype(i32)


def _gather(registers, warps, shape, role, ptx_type, dtype):
    """Registers of every warp -> [warps, *shape]."""
    accumulator = ptx_type in ("f32", "s32")
    elements = 1 if accumulator else 4 // ELEMENT_BYTES[ptx_type]
    matrix = np.empty((warps, *shape), dtype)
    row, column = _fragment(role, len(registers), elements)
    for i, register in enumerate(registers):
        values = register if accumulator else _unpack(register, ptx_type)
        values = values.reshape(warps, 32, elements)
        for j in range(elements):
            matrix[:, row[i, j], column[i, j]] = values[:, :, j]
    return matrix


def mma(warps, m, n, k, d_type, a_type, b_type, c_type, a_regs, b_regs, c_regs):
    """D = A B + C for every warp; sums are exact up to f64 and rounded once.

    Registers are lists of arrays of warps * 32 lanes: u32 for A and B, and f32, i32 or u32 (f16x2)
    for C. Returns the registers of D.
    """
    accumulate = i64 if d_type == "s32" else f64
    a = _gather(a_regs, warps, (m, k), "a", a_type, accumulate)
    b = _gather(b_regs, warps, (k, n), "b", b_type, accumulate)
    c = _gather(c_regs, warps, (m, n), "c16" if c_type == "f16" else "c32", c_type, accumulate)
    d = np.matmul(a, b) + c
    if d_type != "f16":
        d = d.astype(i32 if d_type == "s32" else f32)
        row, column = _fragment("c32", 4, 1)
        return [np.ascontiguousarray(d[:, row[i, 0], column[i, 0]]).reshape(-1) for i in range(4)]
    row, column = _fragment("c16", 2, 2)
    halves = np.stack([d.astype(f16)[:, row[:, j], column[:, j]] for j in range(2)], -1)
    return [np.ascontiguousarray(halves[:, i]).view(u32).reshape(-1) for i in range(2)]
