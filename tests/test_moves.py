"""Pages between the device and host memory: the same bits, and no others touched."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from driving import GEOMETRY, ROPE
from torch import Tensor

import tokendance as td
from tokendance.device.executor import Executor
from tokendance.device.host_pages import ExactPages, runs_of

PAGES, HOST, BLOCK = 11, 7, 8


def test_pages_in_a_row_are_copied_together() -> None:
    pairs = [[3, 0], [4, 1], [5, 2], [6, 4], [7, 5], [9, 6], [8, 7], [0, 8]]
    found = runs_of(np.array(pairs, dtype=np.int32))
    assert found == [(3, 0, 3), (6, 4, 2), (9, 6, 1), (8, 7, 1), (0, 8, 1)]
    assert runs_of(np.array([[5, 5]], dtype=np.int32)) == [(5, 5, 1)]


def bits(pools: list[Tensor]) -> Tensor:
    return torch.stack([one.contiguous().view(torch.uint8) for one in pools])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8]
)
@pytest.mark.parametrize("packed", [False, True])
def test_moved_pages_have_the_same_bits(dtype: torch.dtype, packed: bool) -> None:
    """NaN and all: nothing is read as a number. ``packed``: an engine's keys beside its values."""
    quantized = dtype.itemsize == 1
    geometry = GEOMETRY if quantized else replace(GEOMETRY, dtype=dtype)
    shape = (PAGES, 2, BLOCK, 1, 64) if packed else (2, PAGES, BLOCK, 1, 64)
    raw = [torch.randint(0, 256, (*shape[:-1], 64 * dtype.itemsize)) for _ in range(2)]
    both = [one.to(torch.uint8).view(dtype) for one in raw]
    halves = [one.unbind(1 if packed else 0) for one in both]
    pool = td.PagePool([k for k, _ in halves], [v for _, v in halves])
    executor = Executor(geometry, ROPE, pool, HOST)
    assert isinstance(executor.host, ExactPages)
    sides = [[*one.k_pools, *one.v_pools] for one in (pool, executor.host.pool)]
    for layer in sides[1]:
        layer.view(torch.uint8).fill_(7)
    before = [bits(side) for side in sides]
    down = np.array([[9, 2, 8], [4, 0, 8], [5, 1, 3], [0, 6, 8]], dtype=np.int32)
    executor.move(down, to_host=True)
    here, there = map(bits, sides)
    assert torch.equal(here, before[0])
    assert torch.equal(there[:, down[:, 1]], here[:, down[:, 0]])
    assert (there[:, [3, 4, 5]] == 7).all()
    up = np.array([[2, 3], [0, 10], [6, 1]], dtype=np.int32)
    executor.move(up, to_host=False)
    again, same = map(bits, sides)
    assert torch.equal(same, there)
    assert torch.equal(again[:, up[:, 1]], there[:, up[:, 0]])
    others = [page for page in range(PAGES) if page not in up[:, 1]]
    assert torch.equal(again[:, others], before[0][:, others])
    executor.move(np.empty((0, 2), dtype=np.int32), to_host=True)
    executor.clear_host(np.array([1, 6], dtype=np.int32))
    cleared = bits(sides[1])
    assert not cleared[:, [1, 6]].any()
    assert torch.equal(cleared[:, [0, 2, 3, 4, 5]], there[:, [0, 2, 3, 4, 5]])
