"""`key_deviation` of a group of agents against the best read of as many bytes.

Beside it: torch's operators, agent by agent.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokendance as td
from bench import by_torch, ceilings
from bench.mirrors import FLOATS
from tokendance.device import operators as ops

AGENTS, HEADS, HEAD_DIM = 8, 8, 128
FOOTPRINTS = {"1GiB": 1 << 30, "8MiB": 8 << 20}


@pytest.fixture(scope="module", params=FOOTPRINTS)
def footprint(request: Any) -> tuple[int, ceilings.Ceiling]:
    size = FOOTPRINTS[request.param]
    return size, ceilings.read(size)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("positions", ["one_shift", "own_position"])
def bench_key_deviation(measure: Any, footprint: Any, dtype: str, positions: str) -> None:
    """Cached keys stand at one shift from rotated fresh ones, or fresh ones are not rotated."""
    size, read = footprint
    row_bytes = HEADS * HEAD_DIM * FLOATS[dtype].itemsize
    tokens = size // (row_bytes * (AGENTS + 1)) // 16 * 16
    fresh = torch.empty(AGENTS * tokens, HEADS, HEAD_DIM, dtype=FLOATS[dtype]).normal_()
    cached = torch.empty(tokens // 16, 16, HEADS, HEAD_DIM, dtype=FLOATS[dtype]).normal_()
    rope = td.Rope.default(head_dim=HEAD_DIM, theta=10000.0, max_position=tokens + 700)
    row = torch.arange(AGENTS * tokens).view(AGENTS, tokens)
    at = torch.arange(tokens, dtype=torch.int32)
    position = None
    table_bytes = tokens * HEAD_DIM * 4
    if positions == "one_shift":
        position, table_bytes = (at + 700).repeat(AGENTS, 1), HEAD_DIM * 4
    out = torch.empty(tokens)
    agents, keys = fresh.view(AGENTS, tokens, HEADS, HEAD_DIM), cached.flatten(0, 1)
    deviation, found = by_torch.Deviation(keys), torch.empty(tokens)

    def deviate() -> None:
        if position is None:
            deviation(agents, keys, rope.cos[at], rope.sin[at], found)
        else:
            deviation(agents, keys, *by_torch.angles(rope, -700), found)

    index_bytes = AGENTS * tokens * (8 + (4 if position is not None else 0)) + tokens * (8 + 4 + 4)
    moved = (AGENTS + 1) * tokens * row_bytes + table_bytes + index_bytes
    measure(
        lambda: ops.key_deviation_out(
            *(fresh, row, position, cached, torch.arange(tokens), at),
            *(rope.cos, rope.sin, rope.interleaved, 1.0, out),
        ),
        ceilings={"read": read},
        floor=lambda rates: moved / rates["read"],
        bytes=moved,
        peers={"torch": deviate},
        warm=size == FOOTPRINTS["8MiB"],
    )
