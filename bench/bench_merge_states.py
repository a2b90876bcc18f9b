"""`merge_states` of four partials against what memory can do.

It reads four times what it writes, and memory is faster to read than to copy: the floor is the best
copy of as many rows as are written, and beside it the best read of the others.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import by_torch, ceilings
from bench.mirrors import FLOATS
from tokendance.device import operators as ops

PARTIALS, HEADS, HEAD_DIM = 4, 32, 128
SIZES = {"1GiB": 1 << 30, "8MiB": 8 << 20}  # bytes of what is read and written together


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
def bench_merge_states(measure: Any, dtype: str, size: str) -> None:
    row_bytes = HEADS * (HEAD_DIM * FLOATS[dtype].itemsize + 4)  # with the LSEs of its heads
    rows = SIZES[size] // ((PARTIALS + 1) * row_bytes)
    shape = (PARTIALS, rows, HEADS)
    partial_out = torch.empty(*shape, HEAD_DIM, dtype=FLOATS[dtype]).normal_()
    partial_lse = torch.randn(shape)
    out, lse = torch.empty_like(partial_out[0]), torch.empty_like(partial_lse[0])
    merge = by_torch.merge_states(partial_out, partial_lse)
    copied, others = 2 * rows * row_bytes, (PARTIALS - 1) * rows * row_bytes
    measure(
        lambda: ops.merge_states_out(partial_out, partial_lse, None, out, lse),
        ceilings={"copy": ceilings.copy(copied), "read": ceilings.read(others)},
        floor=lambda rates: copied / rates["copy"] + others / rates["read"],
        bytes=copied + others,
        peers={"torch": lambda: merge(out, lse)},
        warm=size == "8MiB",
    )
