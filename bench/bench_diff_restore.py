"""`diff_restore` of ten agents against what memory can do, and against dense restore.

It writes ten times what it reads, and memory is slower to write than to read: the floor is the
longer of the best copy of as many bytes and the best fill of the bytes written. ``of_copy`` is the
fraction of the copy alone.

Dense restore makes each agent's rows in a buffer of its own first: copies the Master's rows at the
speed of memcpy, rotates the keys with our own `rope_rotate`, puts own rows in, and scatters the
result into the cache; and the same by torch's operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import ceilings
from bench.mirrors import BenchRound, make_round
from tokendance import ops
from tokendance.mirror import Mirror, Use

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AGENTS, PRIVATE, OVERRIDDEN, SEGMENTS = 10, 64, 4, 4
# Bytes of all agents' dense rows: what is written.
SIZES = {"1GiB": 1 << 30, "4MiB": 4 << 20}


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotation by torch's operators, ``[rows, Hk, D]`` in fp32."""
    half = x.shape[-1] // 2
    a, b = x[..., :half].float(), x[..., half:].float()
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def bench_diff_restore(measure: Any, dtype: str, size: str) -> None:
    layers = 2
    row_bytes = 2 * layers * 8 * 128 * DTYPES[dtype].itemsize
    shared = max(SIZES[size] // AGENTS // row_bytes - PRIVATE, 64) // 64 * 64
    case = make_round(
        agents=AGENTS,
        shared=shared,
        private=PRIVATE,
        segments=SEGMENTS,
        overridden=OVERRIDDEN,
        num_layers=layers,
        dtype=DTYPES[dtype],
    )
    slots = torch.arange(AGENTS * case.length).view(AGENTS, case.length)
    caches = [torch.empty(slots.numel(), 8, 128, dtype=DTYPES[dtype]) for _ in range(2 * layers)]
    k_out, v_out = caches[0::2], caches[1::2]
    own = AGENTS * (PRIVATE + SEGMENTS * OVERRIDDEN)
    read = shared - SEGMENTS * OVERRIDDEN + own  # no agent reads the rows that all override
    moved = (read + slots.numel()) * row_bytes
    peers = {
        "dense": lambda: _dense(case, slots, caches),
        "torch": lambda: _torch(case, slots, caches),
    }
    written = slots.numel() * row_bytes
    copy, fill = ceilings.copy(moved), ceilings.fill(written)
    measure(
        lambda: ops.diff_restore(
            case.k_pools, case.v_pools, *case.tables, case.round, slots, k_out, v_out
        ),
        ceilings={"copy": copy, "fill": fill},
        floor=lambda rates: max(moved / rates["copy"], written / rates["fill"]),
        facts=lambda seconds: {"of_copy": moved / copy.rate / seconds["call"]},
        bytes=moved,
        peers=peers,
    )


Move = Callable[[Tensor, Tensor], Tensor]  # (rows, their shifts) -> moved rows
Scatter = Callable[[Tensor, Tensor, Tensor], object]  # (cache, slots, rows)


def _restore_densely(
    case: BenchRound, slots: Tensor, caches: list[Tensor], move: Move, scatter: Scatter
) -> None:
    """Materialise, rotate, scatter: agent by agent. ``caches``: K and V of each layer in turn."""
    for agent, mirror in enumerate(case.mirrors):
        for layer, pools in enumerate(zip(case.k_pools, case.v_pools, strict=True)):
            for part, pages in enumerate(pools):
                pool, cache = pages.flatten(0, 1), caches[2 * layer + part]
                dense = torch.cat([pool[_rows(use, case)] for use in mirror.uses])
                if part == 0:
                    dense = move(dense, _shifts(mirror))
                _put_own_rows(case, agent, pool, dense)
                scatter(cache, slots[agent, PRIVATE:], dense)
                _write_private(case, agent, pool, slots, cache)


def _dense(case: BenchRound, slots: Tensor, caches: list[Tensor]) -> None:
    """Each pass as fast as we can make it."""

    def move(rows: Tensor, shift: Tensor) -> Tensor:
        to = torch.arange(PRIVATE, case.length, dtype=torch.int32)
        ops.rope_rotate_(rows, None, to - shift, to, *case.tables)
        return rows

    def scatter(cache: Tensor, targets: Tensor, rows: Tensor) -> None:
        ops.rope_rotate_out(rows, None, targets, None, None, *case.tables, 1.0, cache)

    _restore_densely(case, slots, caches, move, scatter)


def _torch(case: BenchRound, slots: Tensor, caches: list[Tensor]) -> None:
    """By torch's operators only."""

    def move(rows: Tensor, shift: Tensor) -> Tensor:
        at = shift.long().abs()
        return _rotated(rows, case.rope.cos[at], case.rope.sin[at] * shift.sign()[:, None])

    def scatter(cache: Tensor, targets: Tensor, rows: Tensor) -> None:
        cache.index_copy_(0, targets, rows)

    _restore_densely(case, slots, caches, move, scatter)


def _rows(use: Use, case: BenchRound) -> slice:
    """The Master's pages are adjacent here: its rows are one piece, copied by memcpy."""
    first = int(use.master.pages[0]) * case.block_size
    return slice(first, first + use.length)


def _shifts(mirror: Mirror) -> Tensor:
    """Of every row of the uses, int32."""
    return torch.cat([torch.full((u.length,), u.shift, dtype=torch.int32) for u in mirror.uses])


def _put_own_rows(case: BenchRound, agent: int, pool: Tensor, dense: Tensor) -> None:
    mirror = case.mirrors[agent]
    first = int(mirror.own_pages[0]) * case.block_size
    position = torch.from_numpy(mirror.own_position).long()
    inside = position >= PRIVATE
    dense[position[inside] - PRIVATE] = pool[first : first + len(position)][inside]


def _write_private(
    case: BenchRound, agent: int, pool: Tensor, slots: Tensor, cache: Tensor
) -> None:
    mirror = case.mirrors[agent]
    first = int(mirror.own_pages[0]) * case.block_size
    position = torch.from_numpy(mirror.own_position[:PRIVATE]).long()
    cache[slots[agent, position]] = pool[first : first + PRIVATE]
