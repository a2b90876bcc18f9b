"""What agents' rows are without a store: dense keys and values, for what is put and what is run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from driving import GEOMETRY, ROPE, project
from torch import Tensor

import tokendance as td
from tokendance.device import operators as ops

Rows = list[tuple[Tensor, Tensor]]
"""Keys and values ``[length, 1, 64]`` of every layer."""


def computed(token_ids: Sequence[int] | np.ndarray) -> Rows:
    """What `driving.run_step` computes for these tokens at positions 0, 1, ..."""
    ids = torch.as_tensor(np.asarray(token_ids, dtype=np.int64))
    positions = torch.arange(len(ids), dtype=torch.int32)
    found = []
    for layer in range(GEOMETRY.num_layers):
        _, k, v = project(ids, layer)
        found.append((ops.rope_rotate(k, None, None, positions, ROPE.cos, ROPE.sin), v))
    return found


def drawn(length: int, rng: np.random.Generator) -> Rows:
    """Rows that no model has computed."""
    shape = (GEOMETRY.num_layers, 2, length, 1, 64)
    both = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    return [(layer[0], layer[1]) for layer in both]


def of_store(store: td.DiffStore, agent: str, length: int, plan: td.Plan | None = None) -> Rows:
    """An agent's rows, restored by one call."""
    rows = torch.full((GEOMETRY.num_layers, 2, length, 1, 64), torch.nan)
    layers = range(GEOMETRY.num_layers)
    slots = torch.arange(length)
    store.restore(agent, layers, list(rows[:, 0]), list(rows[:, 1]), slots, plan)
    return [(layer[0], layer[1]) for layer in rows]


def cut(rows: Rows, length: int) -> Rows:
    return [(k[:length], v[:length]) for k, v in rows]


def same(rows: Rows, expected: Rows) -> bool:
    """Bit for bit."""
    return all(
        torch.equal(a, b)
        for mine, other in zip(rows, expected, strict=True)
        for a, b in zip(mine, other, strict=True)
    )


def close(rows: Rows, expected: Rows) -> bool:
    """But for a rotation more."""
    return all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-4)
        for mine, other in zip(rows, expected, strict=True)
        for a, b in zip(mine, other, strict=True)
    )


def begins_with(found: Rows, rows: Rows) -> bool:
    """Whether rows are there, as far as there was room, and behind them nothing was written."""
    room, length = len(found[0][0]), len(rows[0][0])
    return same(cut(found, length), cut(rows, room)) and all(
        bool(side[length:].isnan().all()) for layer in found for side in layer
    )
