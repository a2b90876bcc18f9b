"""What the instructions of the operators that move rows allow, whatever memory does.

    python -m bench.loops
    python -m bench.loops --attention 10    decode steps for so many seconds, for a profiler

In one thread, in cycles per cache line of keys and values that is read or written: the operator
over a few rows again and again, which stay in the caches of the core; the same over as many
different rows as the benchmarks inside the cache have; and the ceiling, the best copy or read of as
many bytes. Where the first is not well below the last, arithmetic binds and not memory. Cycles are
those of the clock that a chain of additions shows. The decode step is the first of the benchmarks',
in fp32 over pages that stay in the cache, as a part of one thread's GEMM rate, measured in turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

import tokendance as td
from bench import ceilings
from bench.mirrors import DECODE, FLOATS, make_round
from tokendance.device import operators as ops

HEADS, HEAD_DIM = 8, 128
AGENTS = 8
PRIVATE = 16  # own rows at the start of a prompt
FOOTPRINT = 8 << 20  # bytes in the cache
FEW_ROWS = 2
BLOCK = 16
SHIFT = 7  # of all rows
LINE = 64
ROUNDS = 25
STEPS = 20  # of decode, which take about as long as the matrix product


@dataclass(frozen=True)
class Call:
    """A call of an operator: what it moves, and the least seconds that takes by these ceilings."""

    run: Callable[[], object]
    moved: int
    ceilings: Mapping[str, ceilings.Ceiling]
    floor: Callable[[Mapping[str, float]], float]


def rope_rotate(dtype: torch.dtype, resident: bool) -> Call:
    rows = FOOTPRINT // 2 // (HEADS * HEAD_DIM * dtype.itemsize)
    kept = FEW_ROWS if resident else rows
    x = torch.randn(kept, HEADS, HEAD_DIM).to(dtype)
    out = torch.empty_like(x)
    row = torch.arange(rows) % kept  # rows written again, which one thread may do
    position = torch.arange(rows, dtype=torch.int32)
    to = position + SHIFT
    cos, sin, interleaved = _tables(rows)
    moved = 2 * rows * HEADS * HEAD_DIM * dtype.itemsize
    return Call(
        lambda: ops.rope_rotate_out(*(x, row, row, position, to, cos, sin, interleaved, 1.0, out)),
        moved,
        {"copy": ceilings.copy(moved)},
        lambda rates: moved / rates["copy"],
    )


def key_deviation(dtype: torch.dtype, resident: bool) -> Call:
    row_bytes = HEADS * HEAD_DIM * dtype.itemsize
    tokens = FOOTPRINT // (row_bytes * (AGENTS + 1)) // BLOCK * BLOCK
    kept = BLOCK if resident else tokens
    fresh = torch.randn(AGENTS * kept, HEADS, HEAD_DIM).to(dtype)
    cached = torch.randn(kept // BLOCK, BLOCK, HEADS, HEAD_DIM).to(dtype)
    row = torch.arange(AGENTS * tokens).view(AGENTS, tokens)
    cached_row = torch.arange(tokens)
    if resident:
        row, cached_row = row % FEW_ROWS, cached_row % FEW_ROWS
    position = torch.arange(tokens, dtype=torch.int32)
    fresh_position = (position + SHIFT).repeat(AGENTS, 1)
    cos, sin, interleaved = _tables(tokens)
    out = torch.empty(tokens)
    moved = (AGENTS + 1) * tokens * row_bytes
    return Call(
        lambda: ops.key_deviation_out(
            *(fresh, row, fresh_position, cached, cached_row, position),
            *(cos, sin, interleaved, 1.0, out),
        ),
        moved,
        {"read": ceilings.read(moved)},
        lambda rates: moved / rates["read"],
    )


def diff_restore(dtype: torch.dtype, resident: bool) -> Call:
    return _mirrored(dtype, resident, encodes=False)


def diff_encode(dtype: torch.dtype, resident: bool) -> Call:
    return _mirrored(dtype, resident, encodes=True)


def _mirrored(dtype: torch.dtype, resident: bool, encodes: bool) -> Call:
    """Agents that share Masters at one shift. If ``resident``, all Masters' pages are one and the
    same, all own pages another, and dense rows are those of the two."""
    row_bytes = 2 * HEADS * HEAD_DIM * dtype.itemsize
    shared = (FOOTPRINT // AGENTS // row_bytes - PRIVATE) // BLOCK * BLOCK
    case = make_round(
        agents=AGENTS,
        shared=shared,
        private=PRIVATE,
        segments=1,
        num_kv_heads=HEADS,
        head_dim=HEAD_DIM,
        block_size=BLOCK,
        pool_dtype=dtype,
        resident_pages=1 if resident else 0,
    )
    case.round.use_shift[:] = SHIFT
    length = PRIVATE + shared
    slots = torch.arange(AGENTS * length).view(AGENTS, length)
    if resident:
        slots %= BLOCK
        slots[:, :PRIVATE] += BLOCK
    dense = [torch.empty(AGENTS * length, HEADS, HEAD_DIM, dtype=dtype) for _ in range(2)]
    pools = case.k_pools, case.v_pools

    def restore() -> None:
        ops.diff_restore(*pools, *case.tables, case.round, slots, dense[:1], dense[1:])

    restore()
    written = AGENTS * length * row_bytes
    moved = written + (shared + AGENTS * PRIVATE) * row_bytes
    if not encodes:
        return Call(
            restore,
            moved,
            {"copy": ceilings.copy(moved), "fill": ceilings.fill(written)},
            lambda rates: max(moved / rates["copy"], written / rates["fill"]),
        )
    lengths = torch.full((AGENTS,), length, dtype=torch.int32)
    return Call(
        lambda: ops.diff_encode(
            dense[:1], dense[1:], slots, lengths, *pools, *case.tables, case.round
        ),
        moved,
        {"read": ceilings.read(moved)},
        lambda rates: moved / rates["read"],
    )


def _tables(positions: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
    rope = td.Rope.default(head_dim=HEAD_DIM, theta=10000.0, max_position=positions + SHIFT)
    return rope.cos, rope.sin, rope.interleaved


OPERATORS = (rope_rotate, key_deviation, diff_encode, diff_restore)


def best(call: Call) -> float:
    """Seconds of the best of several calls, ceilings sampled in between."""
    took = float("inf")
    for _ in range(ROUNDS):
        for ceiling in call.ceilings.values():
            ceiling.sample()
        call.run()  # its rows come back into the cache
        took = min(took, ceilings.seconds(call.run))
    return took


def attention_of_gemm(seconds: float) -> float:
    """Decode steps and a matrix product in turns: the median of the ratios of their rates."""
    (num_kv_heads, group, head_dim), agents, shared, private = DECODE[0]
    case = make_round(
        agents=agents,
        shared=shared,
        private=private,
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        resident_pages=4,
    )
    flops = 4 * agents * (shared + private) * num_kv_heads * group * head_dim
    gemm, attention = ceilings.gemm(), case.attention()

    def several() -> None:
        for _ in range(STEPS):
            attention()

    fractions, end = [], time.monotonic() + seconds
    while not fractions or time.monotonic() < end:
        rate = gemm.sample()
        attention()  # its pages come back into the cache
        fractions.append(STEPS * flops / ceilings.seconds(several) / rate)
    return statistics.median(fractions)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.loops", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--attention", type=float, metavar="SECONDS", help="the decode step alone")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.attention is not None:
        print(
            f"a decode step: {attention_of_gemm(options.attention):.2f} of one thread's GEMM rate"
        )
        return 0
    clock = ceilings.clock()
    for _ in range(ROUNDS):
        clock.sample()
    print(f"one thread at {clock.rate / 1e9:.2f} GHz, cycles a line of {LINE} bytes:")
    columns = ("instructions", "in the cache", "ceiling", "allow", "reached")
    print(" " * 20 + "".join(f"{column:>14}" for column in columns))
    for operator in OPERATORS:
        for name, dtype in FLOATS.items():
            alone, cached = operator(dtype, True), operator(dtype, False)
            seconds = best(alone), best(cached)
            floor = cached.floor({name: each.rate for name, each in cached.ceilings.items()})
            lines = cached.moved / LINE
            cycles = [time * clock.rate / lines for time in (*seconds, floor)]
            allow, reached = (floor / time for time in seconds)
            numbers = [*(f"{count:14.1f}" for count in cycles), f"{allow:14.2f}{reached:14.2f}"]
            print(f"{operator.__name__ + ' ' + name:20}" + "".join(numbers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
