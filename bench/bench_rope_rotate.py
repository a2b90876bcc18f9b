"""`rope_rotate` against the best copy of as many bytes.

Beyond the cache and inside it; with one shift for all rows, as of a reused segment, and with a
position of its own per row, as of fresh keys. Position and table reads are counted as bytes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokendance as td
from bench import ceilings
from tokendance import ops

HEADS, HEAD_DIM = 8, 128
FOOTPRINTS = {"1GiB": 2 << 30, "8MiB": 8 << 20}  # of what is read and written together
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_POSITION = 32768


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
    x = torch.empty(rows, HEADS, HEAD_DIM, dtype=DTYPES[dtype]).normal_()
    out = torch.empty_like(x)
    rope = td.Rope.default(head_dim=HEAD_DIM, theta=10000.0, max_position=MAX_POSITION)
    to = torch.arange(rows, dtype=torch.int32) % (MAX_POSITION - 700)
    origin = None
    table_bytes = rows * HEAD_DIM * 4  # cos and sin of half the dims
    if positions == "one_shift":
        origin, to, table_bytes = to, to + 700, HEAD_DIM * 4
    index_bytes = rows * 4 * (1 if origin is None else 2)
    moved = 2 * rows * row_bytes + table_bytes + index_bytes
    measure(
        lambda: ops.rope_rotate_out(
            x, None, None, origin, to, rope.cos, rope.sin, rope.interleaved, 1.0, out
        ),
        ceilings={"copy": copy},
        floor=lambda rates: moved / rates["copy"],
        bytes=moved,
    )
