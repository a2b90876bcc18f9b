"""Dense caches that a round is restored into or encoded from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokendance.testing.layouts import Layout, StorageCopies, pools
from tokendance.testing.random_rounds import RandomRound


@dataclass(frozen=True)
class DenseCache:
    """Where dense KV of a round's agents lies, or is to lie.

    Attributes:
        k, v: per layer a row tensor, ``[rows, Hk, D]`` or paged.
        slot_mapping: int64 ``[N, T]`` row of ``k`` and ``v`` of position p of agent a.
    """

    k: list[Tensor]
    v: list[Tensor]
    slot_mapping: Tensor

    def copy(self, device: torch.device | str = "cpu") -> DenseCache:
        """A copy on ``device`` with the same strides, gaps and shared storages."""
        to = StorageCopies(device)
        return DenseCache([to(k) for k in self.k], [to(v) for v in self.v], to(self.slot_mapping))


def dense_cache(
    case: RandomRound,
    seed: int,
    *,
    page_size: int | None = 16,
    layout: Layout = "separate",
    skip: float = 0.0,
    spare_columns: int = 3,
    beyond: int = -1,
    dtype: torch.dtype | None = None,
) -> DenseCache:
    """Room for the dense KV of all agents, in random slots, NaN throughout.

    Args:
        page_size: rows of a page; None for ``[rows, Hk, D]``.
        layout: as for :func:`pools`.
        skip: share of slots that are -1.
        spare_columns: T is so much more than the longest prompt.
        beyond: the slot of positions beyond an agent's prompt.
        dtype: that of the pools by default.
    """
    rng = np.random.default_rng(seed)
    length = case.length.tolist()
    total = sum(length)
    rows_per_page = 1 if page_size is None else page_size
    num_pages = total // rows_per_page + 2
    k, v = [], []
    for pool in case.k_pool:
        k_rows, v_rows = pools(
            num_pages, rows_per_page, pool.shape[2], pool.shape[3], dtype or pool.dtype, layout
        )
        k.append(k_rows if page_size else k_rows[:, 0])
        v.append(v_rows if page_size else v_rows[:, 0])
    slots = torch.from_numpy(rng.permutation(num_pages * rows_per_page)[:total])
    slot_mapping = torch.full(
        (len(length), max([0, *length]) + spare_columns), beyond, dtype=torch.int64, device="cpu"
    )
    begin = 0
    for agent, count in enumerate(length):
        chosen = slots[begin : begin + count].clone()
        chosen[torch.from_numpy(rng.random(count) < skip)] = -1
        slot_mapping[agent, :count] = chosen
        begin += count
    return DenseCache(k, v, slot_mapping)
