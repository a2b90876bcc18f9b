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

from bench import by_torch, ceilings
from bench.mirrors import DTYPES, QUANTIZED, BenchRound, make_round
from tokendance.device import operators as ops
from tokendance.host.mirror import Mirror

AGENTS, PRIVATE, OVERRIDDEN, SEGMENTS = 10, 16, 4, 4
LAYERS, HEADS, HEAD_DIM = 1, 8, 128
# Bytes of all agents' dense rows: what is written.
SIZES = {"1GiB": 1 << 30, "8MiB": 8 << 20}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def bench_diff_restore(measure: Any, dtype: str, size: str) -> None:
    case, slots, caches = _make(SIZES[size], DTYPES[dtype], DTYPES[dtype])
    moved = torch.empty_like(caches[0][: case.length - PRIVATE])
    rows, rotate = torch.empty_like(_bits(moved)), by_torch.Rotation(moved)
    peers = {
        "dense": lambda: _dense(case, slots, caches, rows),
        "torch": lambda: _torch(case, slots, caches, rows, moved, rotate),
    }
    _measure(measure, case, slots, caches, peers=peers)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", QUANTIZED)
def bench_restore_read_out(measure: Any, dtype: str, size: str) -> None:
    """Out of quantized pools into caches of bf16."""
    scales = torch.full((LAYERS, HEADS), 0.05)
    case, slots, caches = _make(SIZES[size], QUANTIZED[dtype], torch.bfloat16)
    _measure(measure, case, slots, caches, scales, scales)


def _make(
    size: int, stored: torch.dtype, written: torch.dtype
) -> tuple[BenchRound, Tensor, list[Tensor]]:
    """A round whose rows take ``size`` bytes once ``written``, their slots, and where they go: a
    cache for K and one for V of each layer in turn."""
    row_bytes = 2 * LAYERS * HEADS * HEAD_DIM * written.itemsize
    case = make_round(
        agents=AGENTS,
        shared=max(size // AGENTS // row_bytes - PRIVATE, 64) // 64 * 64,
        private=PRIVATE,
        segments=SEGMENTS,
        overridden=OVERRIDDEN,
        num_layers=LAYERS,
        num_kv_heads=HEADS,
        head_dim=HEAD_DIM,
        pool_dtype=stored,
    )
    slots = torch.arange(AGENTS * case.length).view(AGENTS, case.length)
    shape = (slots.numel(), HEADS, HEAD_DIM)
    return case, slots, [torch.empty(shape, dtype=written) for _ in range(2 * LAYERS)]


def _measure(
    measure: Any,
    case: BenchRound,
    slots: Tensor,
    caches: list[Tensor],
    *scales: Tensor,
    peers: dict[str, Callable[[], object]] | None = None,
) -> None:
    # No agent reads the rows that all override.
    own = AGENTS * (PRIVATE + SEGMENTS * OVERRIDDEN)
    rows = case.length - PRIVATE - SEGMENTS * OVERRIDDEN + own
    written = sum(cache.nbytes for cache in caches)
    moved = written + rows * 2 * LAYERS * HEADS * HEAD_DIM * case.k_pools[0].itemsize
    copy, fill = ceilings.copy(moved), ceilings.fill(written)
    measure(
        lambda: ops.diff_restore(
            *(case.k_pools, case.v_pools, *case.tables, case.round, slots),
            *(caches[0::2], caches[1::2], *scales),
        ),
        ceilings={"copy": copy, "fill": fill},
        floor=lambda rates: max(moved / rates["copy"], written / rates["fill"]),
        facts=lambda seconds: {"of_copy": moved / copy.rate / seconds["call"]},
        bytes=moved,
        peers=peers,
    )


def _bits(rows: Tensor) -> Tensor:
    """As torch can index them: it has no kernels of e4m3 for that."""
    return rows.view(torch.uint8) if rows.dtype.itemsize == 1 else rows


Move = Callable[[Tensor, Tensor], Tensor]  # (rows, their shifts) -> moved rows
Scatter = Callable[[Tensor, Tensor, Tensor], object]  # (cache, slots, rows)


def _restore_densely(
    case: BenchRound,
    slots: Tensor,
    caches: list[Tensor],
    rows: Tensor,
    move: Move,
    scatter: Scatter,
) -> None:
    """Materialise, rotate, scatter: agent by agent. ``caches``: K and V of each layer in turn;
    ``rows``: room for the bits of an agent's shared rows."""
    for agent, mirror in enumerate(case.mirrors):
        for layer, pools in enumerate(zip(case.k_pools, case.v_pools, strict=True)):
            for part, pages in enumerate(pools):
                pool, cache = pages.flatten(0, 1), caches[2 * layer + part]
                torch.cat([_bits(pool)[case.master_rows(use)] for use in mirror.uses], out=rows)
                dense = rows.view(pool.dtype)
                if part == 0:
                    dense = move(dense, _shifts(mirror))
                _put_own_rows(case, agent, pool, dense)
                scatter(cache, slots[agent, PRIVATE:], dense)
                _write_private(case, agent, pool, slots, cache)


def _dense(case: BenchRound, slots: Tensor, caches: list[Tensor], rows: Tensor) -> None:
    """Each pass as fast as we can make it."""

    def move(rows: Tensor, shift: Tensor) -> Tensor:
        to = torch.arange(PRIVATE, case.length, dtype=torch.int32)
        ops.rope_rotate_(rows, None, to - shift, to, *case.tables)
        return rows

    def scatter(cache: Tensor, targets: Tensor, rows: Tensor) -> None:
        ops.rope_rotate_out(rows, None, targets, None, None, *case.tables, 1.0, cache)

    _restore_densely(case, slots, caches, rows, move, scatter)


def _torch(
    case: BenchRound,
    slots: Tensor,
    caches: list[Tensor],
    rows: Tensor,
    moved: Tensor,
    rotate: by_torch.Rotation,
) -> None:
    """By torch's operators only; ``moved``: room for turned rows."""

    def move(rows: Tensor, shift: Tensor) -> Tensor:
        at = shift.long().abs()
        sin = case.rope.sin[at] * shift.sign()[:, None]
        return rotate(rows, case.rope.cos[at], sin, moved)

    def scatter(cache: Tensor, targets: Tensor, rows: Tensor) -> None:
        _bits(cache).index_copy_(0, targets, _bits(rows))

    _restore_densely(case, slots, caches, rows, move, scatter)


def _shifts(mirror: Mirror) -> Tensor:
    """Of every row of the uses, int32."""
    return torch.cat([torch.full((u.length,), u.shift, dtype=torch.int32) for u in mirror.uses])


def _put_own_rows(case: BenchRound, agent: int, pool: Tensor, dense: Tensor) -> None:
    mirror = case.mirrors[agent]
    first = int(mirror.own_pages[0]) * case.block_size
    position = torch.from_numpy(mirror.own_position).long()
    inside = position >= PRIVATE
    own = _bits(pool)[first : first + len(position)]
    _bits(dense)[position[inside] - PRIVATE] = own[inside]


def _write_private(
    case: BenchRound, agent: int, pool: Tensor, slots: Tensor, cache: Tensor
) -> None:
    mirror = case.mirrors[agent]
    first = int(mirror.own_pages[0]) * case.block_size
    position = torch.from_numpy(mirror.own_position[:PRIVATE]).long()
    _bits(cache)[slots[agent, position]] = _bits(pool)[first : first + PRIVATE]
