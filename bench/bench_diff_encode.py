"""`diff_encode` of ten agents against the best read of as many bytes.

Beside it: torch's operators, which turn a Master's rows for every agent that uses them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import by_torch, ceilings
from bench.mirrors import DTYPES, FLOATS, make_round
from tokendance.device import operators as ops

AGENTS, PRIVATE, OVERRIDDEN, SEGMENTS = 10, 16, 4, 4
SIZES = {"1GiB": 1 << 30, "8MiB": 8 << 20}  # bytes of all agents' dense rows


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def bench_diff_encode(measure: Any, dtype: str, size: str) -> None:
    """Dense caches that differ from the Masters in the first rows of every segment."""
    row_bytes = 2 * 8 * 128 * DTYPES[dtype].itemsize
    shared = max(SIZES[size] // AGENTS // row_bytes - PRIVATE, 64) // 64 * 64
    case = make_round(
        agents=AGENTS,
        shared=shared,
        private=PRIVATE,
        segments=SEGMENTS,
        overridden=OVERRIDDEN,
        pool_dtype=DTYPES[dtype],
    )
    slots = torch.arange(AGENTS * case.length).view(AGENTS, case.length)
    k_in, v_in = ([torch.empty(slots.numel(), 8, 128, dtype=DTYPES[dtype])] for _ in range(2))
    ops.diff_restore(case.k_pools, case.v_pools, *case.tables, case.round, slots, k_in, v_in)
    length = torch.full((AGENTS,), case.length, dtype=torch.int32)
    own = AGENTS * (PRIVATE + SEGMENTS * OVERRIDDEN)
    moved = (shared + slots.numel() + own) * row_bytes
    measure(
        lambda: ops.diff_encode(
            *(k_in, v_in, slots, length, case.k_pools, case.v_pools),
            *case.tables,
            case.round,
        ),
        ceilings={"read": ceilings.read(moved)},
        floor=lambda rates: moved / rates["read"],
        bytes=moved,
        peers={"torch": by_torch.Encoding(case, *k_in, *v_in)} if dtype in FLOATS else None,
        warm=size == "8MiB",
    )
