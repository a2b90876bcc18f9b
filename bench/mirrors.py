"""Rounds of any size to measure operators with: pools, Mirrors, and the work list of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tokendance as td
from tokendance.device import operators as ops
from tokendance.device.executor import work_shape
from tokendance.device.rounds import RoundTensors
from tokendance.host.mirror import Master, Mirror, Use, Uses, empty_masks, pages_for, round_arrays
from tokendance.host.record import with_work

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTIZED = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8}
DTYPES = FLOATS | QUANTIZED
# (Hk, G, D), N, S, P of decode steps.
DECODE = [
    ((3, 3, 64), 16, 4096, 256),
    ((4, 7, 128), 16, 4096, 256),
    ((8, 4, 128), 16, 4096, 256),
    ((8, 4, 128), 32, 4096, 256),
    ((8, 1, 128), 64, 16384, 64),
    ((8, 8, 128), 8, 1024, 1024),
    ((3, 3, 64), 64, 1024, 64),
]
UNEVEN = 8  # pages of segments that may differ in length
LONGER = 3  # private tokens that the agent which made the Masters had more than these


@dataclass
class BenchRound:
    """A round whose agents use the same Masters, in different orders.

    Attributes:
        k_pools, v_pools: per layer ``[num_pages, block_size, Hk, D]``.
        mirrors: of the agents.
        q: ``[R, Hq, D]``, the agents' last rows.
    """

    geometry: td.KVGeometry
    block_size: int
    rope: td.Rope
    k_pools: list[Tensor]
    v_pools: list[Tensor]
    mirrors: list[Mirror]
    round: RoundTensors
    q: Tensor

    @property
    def length(self) -> int:
        """Rows of every agent's KV."""
        return self.mirrors[0].length

    @property
    def tables(self) -> tuple[Tensor, Tensor, bool]:
        return self.rope.cos, self.rope.sin, self.rope.interleaved

    def master_rows(self, use: Use) -> slice:
        """Of a pool ``[rows, Hk, D]``: pages of a Master are adjacent, unless they are resident."""
        first = int(use.master.pages[0]) * self.block_size
        return slice(first, first + use.length)

    def attention_arguments(self) -> list[Any]:
        """Of `collective_attention_out` of the agents' last rows, into memory of its own."""
        rows, heads, head_dim = self.q.shape
        floats = self.round.extents.partials * heads * (head_dim + 1)
        out = torch.empty_like(self.q)
        lse, workspace = (
            torch.empty(*shape, device=self.q.device) for shape in ((rows, heads), (floats,))
        )
        return [
            *(self.q, self.k_pools[0], self.v_pools[0], *self.tables, self.round),
            *(head_dim**-0.5, 0, 0.0, None, 1.0, workspace, out, lse),
        ]

    def attention(self) -> Callable[[], None]:
        """`collective_attention` of the agents' last rows, into memory of its own."""
        arguments = self.attention_arguments()
        return lambda: ops.collective_attention_out(*arguments)


def make_round(
    *,
    agents: int,
    shared: int,
    private: int,
    rows: int = 1,
    segments: int = 4,
    overridden: int = 0,
    num_layers: int = 1,
    num_kv_heads: int = 8,
    group: int = 1,
    head_dim: int = 128,
    dtype: torch.dtype = torch.float32,
    block_size: int = 16,
    dense: bool = False,
    resident_pages: int = 0,
    pool_dtype: torch.dtype | None = None,
    shuffled: bool = False,
    device: torch.device | str = "cpu",
) -> BenchRound:
    """A round of ``agents`` prompts: ``private`` own rows, then ``shared`` rows in ``segments``.

    Agent a has the segments in the order a, a + 1, ...; no use has shift 0.

    Args:
        rows: query rows of every agent, its last ones.
        overridden: rows at the start of every segment that agents keep themselves.
        group: G.
        dense: every agent has all of its rows as own rows, as engines without sharing do.
        resident_pages: Masters consist of so many pages, over and over, and Mirrors of as many
            others, so that none comes from memory; 0 = each has pages of its own.
        pool_dtype: of keys and values where they are quantized; their scales are 1.
        shuffled: every agent has the segments in an order of its own, and they differ in length
            where they have pages enough: then shifts differ from use to use.
    """
    geometry = td.KVGeometry(num_layers, group * num_kv_heads, num_kv_heads, head_dim, dtype)
    lengths = [shared // segments] * segments
    orders = [np.roll(np.arange(segments), -agent) for agent in range(agents)]
    if shuffled:
        rng = np.random.default_rng(0)
        orders = [rng.permutation(segments) for _ in range(agents)]
        if (pages := lengths[0] // block_size) >= UNEVEN:
            more = block_size * rng.integers(-pages // 2, pages // 2, segments // 2)
            evened = np.concatenate([more, np.zeros(segments % 2, more.dtype), -more])
            lengths = [lengths[0] + int(rows) for rows in evened]
    begins = private + LONGER + np.cumsum([0, *lengths[:-1]])
    masters = [
        Master(b"", length, int(begin), b"", True)
        for length, begin in zip(lengths, begins, strict=True)
    ]
    taken = 0

    def take(count: int) -> np.ndarray:
        nonlocal taken
        taken += count
        return np.arange(taken - count, taken, dtype=np.int32)

    mirrors = []
    for master in masters if not dense else []:
        master.pages = take(pages_for(master.length, block_size))
    for agent in range(agents):
        own = [np.arange(private)]
        uses = []
        end = private
        for s in orders[agent]:
            master, length = masters[s], lengths[s]
            delta, end = end, end + length
            if dense:
                own.append(np.arange(delta, delta + length))
                continue
            use = Use(master, delta, length, empty_masks(length, block_size))
            use.override(np.arange(overridden), block_size)
            own.append(np.arange(delta, delta + overridden))
            uses.append(use)
        position = np.concatenate(own).astype(np.int32)
        pages = take(pages_for(len(position), block_size))
        kept = Uses.of(uses, block_size)
        mirrors.append(Mirror((), end, kept, pages, position, 0))
    shape = (max(taken, 1), block_size, num_kv_heads, head_dim)
    pools = [
        torch.empty(shape, dtype=dtype, device=device).normal_().to(pool_dtype or dtype)
        for _ in range(2 * num_layers)
    ]
    row_agent = np.repeat(np.arange(agents, dtype=np.int32), rows)
    total = private + sum(lengths)
    row_position = np.tile(np.arange(total - rows, total, dtype=np.int32), agents)
    arrays, extents = round_arrays(mirrors, block_size)
    if resident_pages:
        for i, name in enumerate(("master_pages", "own_pages")):
            arrays[name] = arrays[name] % resident_pages + i * resident_pages
    arrays, extents = with_work(
        arrays, extents, row_agent, row_position, work_shape(geometry, device, pool_dtype)
    )
    rope = td.Rope.default(head_dim=head_dim, theta=10000.0, max_position=total + LONGER)
    return BenchRound(
        geometry,
        block_size,
        rope.to(device),
        pools[0::2],
        pools[1::2],
        mirrors,
        RoundTensors.from_arrays(arrays, extents, device=device),
        torch.randn(agents * rows, group * num_kv_heads, head_dim, dtype=dtype, device=device),
    )
