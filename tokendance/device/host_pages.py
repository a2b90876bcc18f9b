"""Pages of host memory: what is below the device, as it is or in fewer bits."""

from __future__ import annotations

from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tokendance.device import operators as ops
from tokendance.device.codec import Codec, page_codecs
from tokendance.device.pool import PagePool
from tokendance.device.rounds import RoundTensors
from tokendance.host.round import IntArray, RoundExtents


class HostPages(Protocol):
    """Host memory that pages of a pool are copied to, and back from."""

    @property
    def block_size(self) -> int:
        """Rows of a page."""

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, keys and values of all layers."""

    def take(self, pool: PagePool, copies: IntArray) -> None:
        """Copies pages of the pool; on a GPU nobody waits for it.

        Args:
            copies: int32 ``[n, 3]``: the pool's page, the one of host memory, and the rows that it
                has.
        """

    def give(self, pool: PagePool, copies: IntArray) -> None:
        """Copies pages to the pool, likewise: int32 ``[n, 2]``, a page of host memory, and the
        pool's."""

    def clear(self, pages: IntArray) -> None:
        """Overwrites pages with zeros."""

    def pages_of(self, part: int, pages: IntArray) -> tuple[Tensor, Tensor]:
        """As `PagePool.pages_of`."""


class ExactPages:
    """Pages of host memory as they lie in a pool, pinned where that is on a GPU.

    Args:
        pool: of the device.
        num_pages: how many.

    Attributes:
        pool: the pages as a pool.
    """

    def __init__(self, pool: PagePool, num_pages: int) -> None:
        shape, parts = pool.k_pools[0].shape, 2 * pool.num_layers
        # A layer's pages side by side, as in the pool: pages in a row are copied together.
        self._rows = torch.empty(
            (parts, num_pages, *shape[1:]),
            dtype=pool.dtype,
            device="cpu",
            pin_memory=pool.device.type == "cuda",
        )
        layers = list(self._rows.unbind())
        self.pool = PagePool(layers[0::2], layers[1::2], quantization=pool.quantization)
        self.block_size = pool.block_size
        self.page_bytes = pool.page_bytes
        self.pages_of = self.pool.pages_of

    def take(self, pool: PagePool, copies: IntArray) -> None:
        if pool.device.type == "cpu":
            _copy_rows(pool, self.pool, copies)
            return
        for page, kept, count in runs_of(copies[:, :2]):
            for part, there in enumerate(self._rows):
                here = pool.part(part)[page : page + count]
                there[kept : kept + count].copy_(here, non_blocking=True)

    def give(self, pool: PagePool, copies: IntArray) -> None:
        if pool.device.type == "cpu":
            _copy_rows(self.pool, pool, copies)
            return
        for kept, page, count in runs_of(copies):
            for part, there in enumerate(self._rows):
                here = pool.part(part)[page : page + count]
                here.copy_(there[kept : kept + count], non_blocking=True)

    def clear(self, pages: IntArray) -> None:
        self._rows.view(torch.uint8).index_fill_(1, _int64(pages), 0)


def _copy_rows(source: PagePool, target: PagePool, copies: IntArray) -> None:
    """Pages between pools in memory, as own rows that are restored: all layers in one call, which
    sees that they are more than the caches hold."""
    block, count = source.block_size, len(copies)
    extents = RoundExtents(agents=1, own_pages=count, block_size=block)
    arrays = {
        "own_length": np.array([count * block], dtype=np.int32),
        "own_page_indptr": np.array([0, count], dtype=np.int32),
        "own_pages": copies[:, 0],
        "own_position": np.arange(count * block, dtype=np.int32),
    }
    rows = copies[:, 1:2].astype(np.int64) * block + np.arange(block)
    table = torch.empty(1, 0, dtype=torch.float32, device="cpu")  # no row is rotated
    ops.diff_restore(
        source.k_pools,
        source.v_pools,
        table,
        table,
        False,
        RoundTensors.from_arrays(arrays, extents),
        torch.from_numpy(rows.reshape(1, -1)),
        target.k_pools,
        target.v_pools,
    )


def runs_of(pairs: IntArray) -> list[tuple[int, int, int]]:
    """Pairs of pages ``[n, 2]`` of which each is one behind the one before it, in both columns: the
    first one and how many."""
    breaks = np.flatnonzero((np.diff(pairs, axis=0) != 1).any(axis=1)) + 1
    begins = np.concatenate([[0], breaks])
    counts = np.diff(np.concatenate([begins, [len(pairs)]]))
    return [
        (int(pairs[begin, 0]), int(pairs[begin, 1]), int(count))
        for begin, count in zip(begins, counts, strict=True)
    ]


class CodedPages:
    """Pages of host memory in fewer bits.

    The CPU codes them; pages of a GPU are copied first, and the caller waits for it.

    Args:
        pool: of the device; not quantized.
        num_pages: how many.
        codec: how. Masters are kept as own rows: a page may hold either.

    Raises:
        ValueError: a codec that tells Masters from own rows, or one beside a quantized pool.
    """

    def __init__(self, pool: PagePool, num_pages: int, codec: Codec) -> None:
        if codec.of_masters != codec.of_own_rows:
            raise ValueError(
                f"host_codec: expected one for Masters and own rows, whose pages are the same, got "
                f"{codec}"
            )
        if pool.quantization is not None:
            raise ValueError(f"host_codec: expected none beside a quantized pool, got {codec}")
        shape = pool.k_pools[0].shape
        codecs = page_codecs(codec.of_own_rows, pool.block_size, shape[2:], pool.dtype)
        self._codecs = codecs * pool.num_layers
        self._dtype, self._shape = pool.dtype, shape[1:]
        self.block_size = pool.block_size
        self.page_bytes = sum(one.page_bytes for one in self._codecs)
        self._bytes = torch.empty((num_pages, self.page_bytes), dtype=torch.uint8, device="cpu")
        ends = accumulate(one.page_bytes for one in self._codecs)
        starts = accumulate((one.page_bytes for one in self._codecs[:-1]), initial=0)
        self._parts = [self._bytes[:, a:b] for a, b in zip(starts, ends, strict=True)]

    def take(self, pool: PagePool, copies: IntArray) -> None:
        page, slot, rows = copies.T
        counts = torch.from_numpy(np.ascontiguousarray(rows, np.int32))
        for part, (codec, there) in enumerate(zip(self._codecs, self._parts, strict=True)):
            pages, at = pool.pages_of(part, page)
            codec.encode(pages, at, counts, there, _int64(slot))

    def give(self, pool: PagePool, copies: IntArray) -> None:
        slot, page = copies.T
        at = _int64(page).to(pool.device)
        for part in range(len(self._parts)):
            here = pool.part(part)
            if pool.device.type == "cpu":
                self._decode(part, slot, here, at)
            else:
                here.index_copy_(0, at, self.pages_of(part, slot)[0].to(pool.device))

    def clear(self, pages: IntArray) -> None:
        self._bytes.index_fill_(0, _int64(pages), 0)

    def pages_of(self, part: int, pages: IntArray) -> tuple[Tensor, Tensor]:
        found = torch.empty((len(pages), *self._shape), dtype=self._dtype, device="cpu")
        at = torch.arange(len(pages), dtype=torch.int64, device="cpu")
        self._decode(part, pages, found, at)
        return found, at

    def _decode(self, part: int, slots: IntArray, pool: Tensor, at: Tensor) -> None:
        full = torch.full((len(slots),), self.block_size, dtype=torch.int32, device="cpu")
        self._codecs[part].decode(self._parts[part], _int64(slots), full, pool, at)


def host_pages(pool: PagePool, num_pages: int, codec: Codec) -> HostPages:
    """Host memory for so many pages of a pool.

    Raises:
        ValueError: as `CodedPages`.
    """
    if codec.is_exact:
        return ExactPages(pool, num_pages)
    return CodedPages(pool, num_pages, codec)


def host_page_bytes(pool: PagePool, codec: Codec) -> int:
    """Bytes of one page there.

    Raises:
        ValueError: as `CodedPages`.
    """
    return pool.page_bytes if codec.is_exact else CodedPages(pool, 0, codec).page_bytes


def _int64(pages: IntArray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pages, np.int64))
