"""`rope_rotate` against the best copy of as many bytes.

Beyond the cache and inside it; with one shift for all rows, as of a reused segment, and with a
position of its own per row, as of fresh keys. Position and table reads are counted as bytes.
Beside it: torch's operators, which are told where all rows turn alike.
Quantized rows move as they are; fresh keys become quantized, and quantized ones are read out.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokendance as td
from bench import by_torch, ceilings
from bench.mirrors import DTYPES, FLOATS, QUANTIZED
from tokendance.device import operators as ops

HEADS, HEAD_DIM = 8, 128
FOOTPRINTS = {"1GiB": 2 << 30, "8MiB": 8 << 20}  # of what is read and written together
MAX_POSITION = 32768
ROPE = td.Rope.default(head_dim=HEAD_DIM, theta=10000.0, max_position=MAX_POSITION)


def _rows(count: int, dtype: torch.dtype) -> torch.Tensor:
    """``[count, HEADS, HEAD_DIM]`` of 256 random rows, over and over."""
    return torch.randn(256, HEADS, HEAD_DIM).to(dtype).repeat(count // 256, 1, 1)


@pytest.fixture(scope="module", params=FOOTPRINTS)
def footprint(request: Any) -> tuple[int, ceilings.Ceiling]:
    size = FOOTPRINTS[request.param]
    return size, ceilings.copy(size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positions", ["one_shift", "own_position"])
def bench_rope_rotate(measure: Any, footprint: Any, dtype: str, positions: str) -> None:
    size, copy = footprint
    row_bytes = HEADS * HEAD_DIM * DTYPES[dtype].itemsize
    rows = size // 2 // row_bytes
    x = _rows(rows, DTYPES[dtype])
    out = torch.empty_like(x)
    to = torch.arange(rows, dtype=torch.int32) % (MAX_POSITION - 700)
    origin = None
    table_bytes = rows * HEAD_DIM * 4  # cos and sin of half the dims
    if positions == "one_shift":
        origin, to, table_bytes = to, to + 700, HEAD_DIM * 4
    rotate = by_torch.Rotation(x)

    def turn() -> None:
        if origin is None:
            rotate(x, ROPE.cos[to], ROPE.sin[to], out)
        else:
            rotate(x, *by_torch.angles(ROPE, 700), out)

    index_bytes = rows * 4 * (1 if origin is None else 2)
    moved = 2 * rows * row_bytes + table_bytes + index_bytes
    measure(
        lambda: ops.rope_rotate_out(
            x, None, None, origin, to, ROPE.cos, ROPE.sin, ROPE.interleaved, 1.0, out
        ),
        ceilings={"copy": copy},
        floor=lambda rates: moved / rates["copy"],
        bytes=moved,
        peers={"torch": turn} if dtype in FLOATS else None,
        warm=size == FOOTPRINTS["8MiB"],
    )


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("direction", ["quantize", "read_out"])
def bench_conversion(measure: Any, footprint: Any, dtype: str, direction: str) -> None:
    """Fresh bf16 keys, rotated, into a quantized pool; and quantized ones, moved, into bf16."""
    size, copy = footprint
    rows = size // (3 * HEADS * HEAD_DIM) // 256 * 256
    x, out = (_rows(rows, of) for of in (torch.bfloat16, QUANTIZED[dtype]))
    scale = torch.full((HEADS,), 0.05)
    to = torch.arange(rows, dtype=torch.int32) % (MAX_POSITION - 700)
    origin, x_scale, out_scale, table_bytes = None, None, scale, rows * HEAD_DIM * 4
    if direction == "read_out":
        x, out, origin, to = out, x, to, to + 700
        x_scale, out_scale, table_bytes = scale, None, HEAD_DIM * 4
    moved = x.nbytes + out.nbytes + table_bytes + rows * 4 * (1 if origin is None else 2)
    measure(
        lambda: ops.rope_rotate_out(
            *(x, None, None, origin, to, ROPE.cos, ROPE.sin, ROPE.interleaved, 1.0, out),
            *(x_scale, out_scale),
        ),
        ceilings={"copy": copy},
        floor=lambda rates: moved / rates["copy"],
        bytes=moved,
    )
