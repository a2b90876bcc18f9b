"""Pages of host memory: what is below the device, as it is or in fewer bits."""

from __future__ import annotations

from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tokendance.device.codec import Codec, page_codecs
from tokendance.device.pool import PagePool
from tokendance.host.round import IntArray


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
    """

    def __init__(self, pool: PagePool, num_pages: int) -> None:
        shape, layers = pool.k_pools[0].shape, pool.num_layers
        self._rows = torch.empty(
            (num_pages, 2 * layers, *shape[1:]),
            dtype=pool.dtype,
            device="cpu",
            pin_memory=pool.device.type == "cuda",
        )
        parts = [self._rows[:, part] for part in range(2 * layers)]
        self._pool = PagePool(parts[0::2], parts[1::2], quantization=pool.quantization)
        self.block_size = pool.block_size
        self.page_bytes = pool.page_bytes
        self.pages_of = self._pool.pages_of

    def take(self, pool: PagePool, copies: IntArray) -> None:
        if pool.device.type == "cpu":
            _copy_rows(pool, self._pool, copies)
            return
        for page, kept, _ in copies.tolist():
            for part, there in enumerate(self._rows[kept]):
                there.copy_(pool.part(part)[page], non_blocking=True)

    def give(self, pool: PagePool, copies: IntArray) -> None:
        if pool.device.type == "cpu":
            _copy_rows(self._pool, pool, copies)
            return
        for kept, page in copies.tolist():
            for part, here in enumerate(self._rows[kept]):
                pool.part(part)[page].copy_(here, non_blocking=True)

    def clear(self, pages: IntArray) -> None:
        self._rows.view(torch.uint8).index_fill_(0, _int64(pages), 0)


def _copy_rows(source: PagePool, target: PagePool, copies: IntArray) -> None:
    """Pages between pools in memory, by the operator that moves rows."""
    offsets = np.arange(source.block_size, dtype=np.int64)
    rows = copies[:, :2].astype(np.int64).T[..., None] * source.block_size + offsets
    read, written = torch.from_numpy(rows.reshape(2, -1))
    for layer in range(source.num_layers):
        k, v = source.k_pools[layer], source.v_pools[layer]
        target.write_rows(layer, k, v, written, read)


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
