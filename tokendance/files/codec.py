"""Rows on disk in fewer bits.

Codes of a group's keys and values, layer after layer, each followed by its scales. Keys have a
scale per channel for up to 32 rows, values one per row and head: a few channels of the keys are far
larger than the others, in all rows, and the values have no such (KIVI, arXiv 2402.02750). A scale
is the largest element over the largest code, rounded up to bf16; an element is off by half a scale
at most, and by its own rounding to the rows' dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

_LARGEST = {"int8": 127, "int4": 7}
_ROWS = 32
"""That share the scales of their channels."""
_SCALE = torch.bfloat16.itemsize


@dataclass(frozen=True)
class Codec:
    """How rows are kept on disk: ``Codec()`` as they are, bit for bit.

    Args:
        keys, values: ``"exact"``, ``"int8"`` or ``"int4"``.

    Raises:
        ValueError: for another one, naming the argument.
    """

    keys: str = "exact"
    values: str = "exact"

    def __post_init__(self) -> None:
        for name in ("keys", "values"):
            kind = getattr(self, name)
            if kind != "exact" and kind not in _LARGEST:
                raise ValueError(f"{name}: expected exact, {' or '.join(_LARGEST)}, got {kind!r}")

    @property
    def is_exact(self) -> bool:
        """Whether rows come back bit for bit."""
        return self.keys == self.values == "exact"


class RowCodec:
    """Codes and decodes the keys or the values of a layer.

    Args:
        kind: as of a `Codec`.
        shape: ``[Hk, D]`` of a row.
        dtype: of the rows.
        per_channel: whether scales are the channels', for some rows, instead of the rows'.
    """

    def __init__(
        self, kind: str, shape: Sequence[int], dtype: torch.dtype, per_channel: bool
    ) -> None:
        self._kind = kind
        self._shape = tuple(shape)
        self._dtype = dtype
        self._per_channel = per_channel

    def size(self, rows: int) -> int:
        """Bytes of so many rows."""
        heads, dims = self._shape
        if self._kind == "exact":
            return rows * heads * dims * self._dtype.itemsize
        codes = rows * heads * dims // (2 if self._kind == "int4" else 1)
        return codes + _SCALE * self._scales(rows)

    def _scales(self, rows: int) -> int:
        heads, dims = self._shape
        return -(-rows // _ROWS) * heads * dims if self._per_channel else rows * heads

    def encode(self, piece: memoryview) -> memoryview:
        """Bytes of rows, in `size` bytes."""
        if self._kind == "exact" or not len(piece):
            return piece
        rows = torch.frombuffer(piece, dtype=self._dtype).view(-1, *self._shape)
        parts, count = self._parts(rows), len(rows)
        most = parts.abs().amax(dim=1 if self._per_channel else -1, keepdim=True).float()
        scale = _rounded_up(most / _LARGEST[self._kind])
        steps = scale.float()
        codes = (parts / torch.where(steps > 0, steps, 1.0)).round_().to(torch.int8)
        codes = codes.view(-1, *self._shape)[:count]
        if self._kind == "int4":
            codes = (codes[..., 0::2] & 15) | (codes[..., 1::2] << 4)
        both = (codes.reshape(-1).view(torch.uint8), scale.reshape(-1).view(torch.uint8))
        return torch.cat(both).numpy().data

    def decode(self, piece: bytearray) -> bytearray:
        """What `encode` was given, but for what it has lost."""
        if self._kind == "exact" or not len(piece):
            return piece
        count = self._rows_in(len(piece))
        raw = torch.frombuffer(piece, dtype=torch.int8)
        end = len(piece) - _SCALE * self._scales(count)
        codes = raw[:end]
        if self._kind == "int4":
            codes = torch.stack([(codes << 4) >> 4, codes >> 4], dim=-1)
        # Scales may begin at an odd byte.
        scale = raw[end:].clone().view(torch.bfloat16).float()
        shape = (-1, 1, *self._shape) if self._per_channel else (-1, self._shape[0], 1)
        steps = scale.view(shape)
        found = self._parts(codes.view(-1, *self._shape)) * steps
        most = torch.finfo(self._dtype).max  # half a scale more is infinite
        found = torch.where(steps.isfinite(), found.clamp_(-most, most), torch.nan)
        rows = found.view(-1, *self._shape)[:count].to(self._dtype)
        return bytearray(rows.view(torch.uint8).reshape(-1).numpy().data)

    def _parts(self, rows: Tensor) -> Tensor:
        """Rows by what shares scales, ``[groups, 32, Hk, D]`` and filled up, or as they are."""
        if not self._per_channel:
            return rows
        missing = -len(rows) % _ROWS
        whole = torch.cat([rows, rows.new_zeros(missing, *self._shape)]) if missing else rows
        return whole.view(-1, _ROWS, *self._shape)

    def _rows_in(self, size: int) -> int:
        low, high = 0, size
        while low < high:  # `size` grows with the rows
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.size(middle) < size else (low, middle)
        return low


def _rounded_up(x: Tensor) -> Tensor:
    """To bf16, of what is not negative."""
    bits = (x.contiguous().view(torch.int32) + 0xFFFF) >> 16
    return bits.to(torch.int16).view(torch.bfloat16)


class GroupCodec:
    """Codes and decodes groups: of each layer keys, then values.

    Args:
        codec: how.
        layers: of the model.
        shape: ``[Hk, D]`` of a row.
        dtype: of the rows.
    """

    def __init__(self, codec: Codec, layers: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        self._layers = layers
        self._parts = (
            RowCodec(codec.keys, shape, dtype, per_channel=True),
            RowCodec(codec.values, shape, dtype, per_channel=False),
        )

    def sizes(self, rows: int) -> list[int]:
        """Bytes of each piece of a group."""
        return [part.size(rows) for part in self._parts] * self._layers

    def encode(self, pieces: Iterable[memoryview]) -> Iterator[memoryview]:
        """Pieces as they lie in a pool, as they lie on disk."""
        return (part.encode(piece) for piece, part in zip(pieces, cycle(self._parts), strict=False))

    def decode(self, pieces: Iterable[bytearray]) -> Iterator[bytearray]:
        """The other way."""
        # Pieces first: their checksum is compared when one more is asked for than there are.
        return (part.decode(piece) for piece, part in zip(pieces, cycle(self._parts), strict=False))
