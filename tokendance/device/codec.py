"""Rows below the device in fewer bits: how, and how many bytes.

A page of keys has a scale per channel, one of values a scale per row and head: a few channels of
the keys are far larger than the others, in all rows, and the values have no such (KIVI, arXiv
2402.02750). `tokendance/coded_pages.h` says how a coded page lies in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokendance.device import operators as ops

CODES = ("exact", "e4m3", "int8", "int4")
"""How rows may be kept below the device."""


@dataclass(frozen=True)
class Codec:
    """How rows are kept in a tier below the device: ``Codec()`` as they are, bit for bit.

    Args:
        keys, values: ``"exact"``, ``"e4m3"``, ``"int8"`` or ``"int4"``.
        master_keys, master_values: the same of Masters; None: as those of own rows.

    Raises:
        ValueError: for another one, naming the argument.
    """

    keys: str = "exact"
    values: str = "exact"
    master_keys: str | None = None
    master_values: str | None = None

    def __post_init__(self) -> None:
        for name in ("keys", "values", "master_keys", "master_values"):
            code = getattr(self, name)
            if name.startswith("master") and code is None:
                object.__setattr__(self, name, getattr(self, name.removeprefix("master_")))
            elif code not in CODES:
                raise ValueError(
                    f"{name}: expected {', '.join(CODES[:-1])} or {CODES[-1]}, got {code!r}"
                )

    @property
    def of_own_rows(self) -> tuple[str, str]:
        """Of keys and of values."""
        return self.keys, self.values

    @property
    def of_masters(self) -> tuple[str, str]:
        """Of keys and of values."""
        return self.master_keys or self.keys, self.master_values or self.values

    @property
    def is_exact(self) -> bool:
        """Whether rows come back bit for bit."""
        return {*self.of_own_rows, *self.of_masters} == {"exact"}


EXACT = Codec()


class PageCodec:
    """Codes and decodes pages of the keys, or of the values, of a layer.

    Args:
        code: as of a `Codec`.
        block_size: rows of a page.
        shape: ``[Hk, D]`` of a row.
        dtype: of the rows; not quantized, unless they are kept as they are.
        per_channel: whether scales are the channels', as of keys, instead of the rows'.

    Attributes:
        page_bytes: of a coded page.
    """

    def __init__(
        self,
        code: str,
        block_size: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        per_channel: bool,
    ) -> None:
        heads, dims = shape
        self.code = code
        self._block = block_size
        self._per_channel = per_channel
        bits = {"exact": 8 * dtype.itemsize, "int4": 4}.get(code, 8)
        self._row_bytes = heads * dims * bits // 8
        scales = heads * (dims if per_channel else block_size)
        self._scale_bytes = 0 if code == "exact" else scales * dtype.itemsize
        self.page_bytes = self._scale_bytes + block_size * self._row_bytes

    def size(self, rows: int) -> int:
        """Bytes of so many rows: of full pages, and of one that ends behind its last row."""
        full, rest = divmod(rows, self._block)
        return full * self.page_bytes + bool(rest) * self._scale_bytes + rest * self._row_bytes

    def encode(
        self, pool: Tensor, page: Tensor, rows: Tensor, coded: Tensor, slot: Tensor | None = None
    ) -> None:
        """As `tokendance.device.operators.encode_pages`."""
        ops.encode_pages(pool, page, rows, self.code, self._per_channel, coded, slot)

    def decode(
        self, coded: Tensor, slot: Tensor | None, rows: Tensor, pool: Tensor, page: Tensor
    ) -> None:
        """As `tokendance.device.operators.decode_pages`."""
        ops.decode_pages(coded, slot, rows, self.code, self._per_channel, pool, page)


def page_codecs(
    codes: Sequence[str], block_size: int, shape: Sequence[int], dtype: torch.dtype
) -> tuple[PageCodec, PageCodec]:
    """Those of keys and of values."""
    keys, values = codes
    return (
        PageCodec(keys, block_size, shape, dtype, per_channel=True),
        PageCodec(values, block_size, shape, dtype, per_channel=False),
    )
