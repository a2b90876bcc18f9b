"""Short names for numpy's types, used here and in generated code, and how PTX types map to them."""

import numpy as np

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
i8, i16, i32, i64 = np.int8, np.int16, np.int32, np.int64
f16, f32, f64 = np.float16, np.float32, np.float64
pred = np.bool_

BY_NAME = {
    "u8": u8,
    "i8": i8,
    "u16": u16,
    "i16": i16,
    "u32": u32,
    "i32": i32,
    "u64": u64,
    "i64": i64,
    "f16": f16,
    "f32": f32,
    "f64": f64,
    "pred": pred,
}

# Formats that numpy lacks are kept as unsigned bits.
OF_PTX_TYPE = {
    "u8": "u8",
    "b8": "u8",
    "s8": "i8",
    "e4m3": "u8",
    "e5m2": "u8",
    "u16": "u16",
    "b16": "u16",
    "s16": "i16",
    "f16": "f16",
    "bf16": "u16",
    "e4m3x2": "u16",
    "e5m2x2": "u16",
    "u32": "u32",
    "b32": "u32",
    "s32": "i32",
    "f32": "f32",
    "f16x2": "u32",
    "bf16x2": "u32",
    "tf32": "u32",
    "u64": "u64",
    "b64": "u64",
    "s64": "i64",
    "f64": "f64",
    "pred": "pred",
}

SIZE = {name: np.dtype(dtype).itemsize for name, dtype in BY_NAME.items()}
UNSIGNED_OF_SIZE = {1: "u8", 2: "u16", 4: "u32", 8: "u64"}
UNSIGNED_DTYPE = {1: u8, 2: u16, 4: u32, 8: u64}
UNSIGNED_OF = {"i8": "u8", "i16": "u16", "i32": "u32", "i64": "u64"}
TWICE_AS_WIDE = {"u8": "u16", "i8": "i16", "u16": "u32", "i16": "i32", "u32": "u64", "i32": "i64"}
LOG2 = {1: 0, 2: 1, 4: 2, 8: 3, 16: 4, 32: 5}


def unsigned(name: str) -> str:
    """The unsigned type of the same size, for an integer type."""
    return UNSIGNED_OF.get(name, name)
