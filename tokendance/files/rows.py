"""Rows between the pages of a pool and the bytes of a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from tokendance.device.pool import PagePool
from tokendance.host.mirror import Pages, slots_of


def read_rows(pool: PagePool, pages: Pages, rows: int) -> Iterator[memoryview]:
    """The bytes of the first ``rows`` rows of a page list, of each layer keys and then values.

    The padding of the last page is left out: it may hold rows of whoever had the page before.
    """
    at = torch.from_numpy(pages.astype(np.int64)).to(pool.device)
    for layer in range(pool.num_layers):
        for pools in (pool.k_pools, pool.v_pools):
            # torch selects e4m3 by index as bytes only.
            found = _bits(pools[layer]).index_select(0, at).flatten(0, 1)[:rows]
            yield found.cpu().contiguous().view(torch.uint8).numpy().reshape(-1).data


def write_rows(pool: PagePool, pages: Pages, rows: int, pieces: Iterable[bytearray]) -> None:
    """Fills the first ``rows`` rows of a page list with what `read_rows` gave."""
    slots = torch.from_numpy(slots_of(pages, rows, pool.block_size)).to(pool.device)
    keys: Tensor | None = None
    shape = (rows, *pool.k_pools[0].shape[2:])
    for i, piece in enumerate(pieces):
        found = torch.frombuffer(piece, dtype=torch.uint8).view(pool.dtype)
        there = found.reshape(shape).to(pool.device)
        if keys is None:
            keys = there
        else:
            pool.write_rows(i // 2, keys, there, slots)
            keys = None


def _bits(pages: Tensor) -> Tensor:
    return pages.view(torch.uint8) if pages.element_size() == 1 else pages
