"""Rows between pages and the bytes of a file, which may keep them in fewer bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from tokendance.device.codec import PageCodec, page_codecs
from tokendance.device.host_pages import HostPages
from tokendance.device.pool import PagePool, bits_of
from tokendance.host.mirror import Pages, pages_for, rows_of_pages, slots_of


class RowCodec:
    """Codes and decodes the rows of a Master or of a Mirror: of each layer keys, then values.

    Args:
        codes: of keys and of values, as of a `Codec`.
        layers: of the model.
        block_size: rows of a page.
        shape: ``[Hk, D]`` of a row.
        dtype: of the rows.
    """

    def __init__(
        self,
        codes: Sequence[str],
        layers: int,
        block_size: int,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        self._codecs = page_codecs(codes, block_size, shape, dtype) * layers
        self._page_shape = (block_size, *shape)
        self._dtype = dtype

    def sizes(self, rows: int) -> list[int]:
        """Bytes of each piece."""
        return [one.size(rows) for one in self._codecs]

    def read(self, pool: PagePool | HostPages, pages: Pages, rows: int) -> Iterator[memoryview]:
        """The bytes of the first ``rows`` rows of a page list, of each layer keys and then values.

        The padding of the last page is left out: it may hold rows of whoever had the page before.
        """
        for part, codec in enumerate(self._codecs):
            found, at = pool.pages_of(part, pages)
            if codec.code == "exact":
                # torch selects e4m3 by index as bytes only.
                dense = bits_of(found).index_select(0, at).flatten(0, 1)[:rows]
                yield dense.view(torch.uint8).numpy().reshape(-1).data
                continue
            coded = torch.empty((len(pages), codec.page_bytes), dtype=torch.uint8, device="cpu")
            codec.encode(found, at, self._counts(rows), coded)
            yield coded.numpy().reshape(-1)[: codec.size(rows)].data

    def write(self, pieces: Iterable[bytearray], pool: PagePool, pages: Pages, rows: int) -> None:
        """Fills the first ``rows`` rows of a page list with what `read` gave, but for what is lost
        by its codes."""
        slots = torch.from_numpy(slots_of(pages, rows, pool.block_size)).to(pool.device)
        keys: Tensor | None = None
        for part, piece in enumerate(pieces):
            there = self._decoded(self._codecs[part], piece, rows).to(pool.device)
            if keys is None:
                keys = there
            else:
                pool.write_rows(part // 2, keys, there, slots)
                keys = None

    def _decoded(self, codec: PageCodec, piece: bytearray, rows: int) -> Tensor:
        raw = torch.frombuffer(piece, dtype=torch.uint8)
        if codec.code == "exact":
            return raw.view(self._dtype).view(rows, *self._page_shape[1:])
        counts = self._counts(rows)
        coded = torch.empty((len(counts), codec.page_bytes), dtype=torch.uint8, device="cpu")
        coded.view(-1)[: len(raw)] = raw
        found = torch.empty((len(counts), *self._page_shape), dtype=self._dtype, device="cpu")
        at = torch.arange(len(counts), dtype=torch.int64, device="cpu")
        codec.decode(coded, None, counts, found, at)
        return found.flatten(0, 1)[:rows]

    def _counts(self, rows: int) -> Tensor:
        block = self._page_shape[0]
        return torch.from_numpy(rows_of_pages(pages_for(rows, block), rows, block))
