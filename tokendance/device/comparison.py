"""How far two agents' rows are from each other."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from tokendance.device import operators as ops
from tokendance.device.executor import Executor
from tokendance.device.rounds import RoundTensors
from tokendance.host.record import PackedRound
from tokendance.host.round import IntArray


def squared_differences(
    executor: Executor,
    packed: PackedRound,
    positions: IntArray,
    parts: NDArray[np.int64],
    num_parts: int,
) -> NDArray[np.float64]:
    """Sums of squares of what one agent's rows differ by from another's, and of the other's.

    Both are restored side by side, layer by layer. On a rank of a tensor-parallel engine they are
    sums over its heads: those of all ranks are added.

    Args:
        packed: the KV of the two agents, as `pack_mirrors` gives it.
        positions: int32 ``[R]``, of the rows that are compared; the second agent has all of them.
        parts: ``[R]``, in which of ``num_parts`` parts each row counts.

    Returns:
        fp64 ``[layers, keys or values, difference or norm, parts]``.
    """
    device, geometry, pool = executor.device, executor.geometry, executor.pool
    rows = int(positions.max()) + 1 if len(positions) else 0
    round_ = RoundTensors(torch.from_numpy(packed.buffer).to(device), packed.extents)
    slots = torch.arange(2 * rows, device=device).view(2, rows)
    shape = (2 * rows, geometry.num_kv_heads, geometry.head_dim)
    k, v = (torch.empty(shape, dtype=geometry.dtype, device=device) for _ in range(2))
    part = torch.from_numpy(parts).to(device)
    at = torch.from_numpy(positions.astype(np.int64)).to(device)
    sums = []
    for layer in range(geometry.num_layers):
        rope = executor.ropes[layer]
        ops.diff_restore(
            [pool.k_pools[layer]],
            [pool.v_pools[layer]],
            rope.cos,
            rope.sin,
            rope.interleaved,
            round_,
            slots,
            [k],
            [v],
            *pool.scales_of([layer]),
        )
        for x in (k.double(), v.double()):
            other = x[rows + at]
            difference = (x[at] - other).square().sum((1, 2))
            for each in (difference, other.square().sum((1, 2))):
                sums.append(each.new_zeros(num_parts).index_add_(0, part, each))
    return torch.stack(sums).cpu().numpy().reshape(-1, 2, 2, num_parts)
