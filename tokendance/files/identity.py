"""Whose keys and values a directory holds: what must be the same to read them again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch

from tokendance.device.codec import Codec
from tokendance.device.geometry import BLOCK_SIZES, KVGeometry
from tokendance.device.layer_ropes import LayerRope
from tokendance.device.pool import PagePool
from tokendance.device.quantization import Quantization
from tokendance.files.errors import DamagedError
from tokendance.files.page_file import DTYPES
from tokendance.files.rows import RowCodec

_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
_GEOMETRY = ("num_layers", "num_q_heads", "num_kv_heads", "head_dim")


@dataclass(frozen=True)
class Identity:
    """What a directory's rows were computed by, and how they are kept.

    Attributes:
        model: its name.
        num_layers, num_q_heads, num_kv_heads, head_dim: of its KV cache.
        dtype: of the model.
        page_dtype: of the rows.
        k_scale, v_scale: of quantized rows, ``[L][Hk]``; empty otherwise.
        block_size: rows of a page.
        codec: of rows on disk: of own rows' keys and values, and of Masters'.
    """

    model: str
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    page_dtype: str
    k_scale: tuple[tuple[float, ...], ...]
    v_scale: tuple[tuple[float, ...], ...]
    block_size: int
    codec: tuple[str, str, str, str] = ("exact", "exact", "exact", "exact")

    @classmethod
    def of(
        cls, model: str, geometry: KVGeometry, pool: PagePool, codec: Codec | None = None
    ) -> Identity:
        """Raises ``ValueError`` for a codec beside a quantized pool."""
        kept, codec = pool.quantization, codec or Codec()
        if kept is not None and not codec.is_exact:
            raise ValueError(f"codec: expected none beside a quantized pool, got {codec}")
        return cls(
            model=model,
            **{name: getattr(geometry, name) for name in _GEOMETRY},
            dtype=_name(geometry.dtype),
            page_dtype=_name(pool.dtype),
            k_scale=() if kept is None else _numbers(kept.k_scale),
            v_scale=() if kept is None else _numbers(kept.v_scale),
            block_size=pool.block_size,
            codec=(*codec.of_own_rows, *codec.of_masters),
        )

    @classmethod
    def from_json(cls, text: str, where: object) -> Identity:
        """Raises ``DamagedError`` for what `to_json` never gives."""
        try:
            fields: dict[str, Any] = json.loads(text)
            for name in ("k_scale", "v_scale"):
                fields[name] = tuple(tuple(map(float, row)) for row in fields[name])
            fields["codec"] = tuple(fields.get("codec", cls.codec))
            found = cls(**fields)
            found._check()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedError(f"{where}: expected what a store is of, got {error}") from None
        return found

    def _check(self) -> None:
        numbers = [getattr(self, name) for name in _GEOMETRY]
        if not all(type(one) is int for one in numbers) or self.block_size not in BLOCK_SIZES:
            raise ValueError(f"{numbers} with pages of {self.block_size}")
        _ = self.geometry, self.quantization, Codec(*self.codec)
        if self.k_scale and not Codec(*self.codec).is_exact:
            raise ValueError(f"{self.codec} of {self.page_dtype}")
        if self.page_dtype not in _NAMES or not isinstance(self.model, str):
            raise ValueError(f"{self.page_dtype} of {self.model}")

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @property
    def geometry(self) -> KVGeometry:
        return KVGeometry(
            self.num_layers, self.num_q_heads, self.num_kv_heads, self.head_dim, _NAMES[self.dtype]
        )

    @property
    def rows_dtype(self) -> torch.dtype:
        """Of the rows."""
        return _NAMES[self.page_dtype]

    @property
    def quantization(self) -> Quantization | None:
        if not self.k_scale:
            return None
        scales = [
            torch.tensor(scale, dtype=torch.float32, device="cpu")
            for scale in (self.k_scale, self.v_scale)
        ]
        return Quantization(self.rows_dtype, *scales)

    @property
    def is_exact(self) -> bool:
        """Whether rows on disk are those of a pool, bit for bit."""
        return Codec(*self.codec).is_exact

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of the tensors on disk."""
        return self.rows_dtype if self.is_exact else torch.uint8

    @cached_property
    def _row_codecs(self) -> tuple[RowCodec, RowCodec]:
        codec, shape = Codec(*self.codec), (self.num_kv_heads, self.head_dim)
        own, masters = (
            RowCodec(codes, self.num_layers, self.block_size, shape, self.rows_dtype)
            for codes in (codec.of_own_rows, codec.of_masters)
        )
        return own, masters

    def row_codec(self, is_master: bool | int) -> RowCodec:
        """Between rows of a pool and those on disk, of own rows or of Masters."""
        return self._row_codecs[bool(is_master)]

    def shape(self, rows: int, is_master: bool | int) -> list[int]:
        """Of the tensor that holds so many rows."""
        if self.is_exact:
            return [self.num_layers, 2, rows, self.num_kv_heads, self.head_dim]
        return [self.group_bytes(rows, is_master)]

    def group_bytes(self, rows: int, is_master: bool | int) -> int:
        """Bytes of so many rows of one Master or Mirror."""
        return sum(self.row_codec(is_master).sizes(rows))

    def check_same(self, mine: Identity, where: object) -> None:
        """Raises ``ValueError``, naming what differs, for a store of another model or other pages.

        Args:
            mine: of the store that is to have the rows.
            where: the directory of this one.
        """
        names = {"page_dtype": "pool", "k_scale": "quantization", "v_scale": "quantization"}
        for name in asdict(self):
            if name == "codec":
                continue  # how they are kept, and not whose they are
            theirs, here = getattr(self, name), getattr(mine, name)
            if theirs != here:
                field = f"geometry.{name}" if name in (*_GEOMETRY, "dtype") else name
                raise ValueError(
                    f"{names.get(name, field)}: expected that of {where}, {theirs!r}, got {here!r}"
                )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _numbers(scale: torch.Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, scale.cpu().tolist()))


@dataclass(frozen=True)
class RopeTables:
    """The rotation tables of a directory's keys, as far as rows may have been rotated with them.

    Attributes:
        levels: for 16 positions, twice as many, and so on, the digests of each layer's tables up to
            there, so that directories can be compared that have come to different lengths.
    """

    levels: tuple[tuple[int, tuple[str, ...]], ...] = ()

    @classmethod
    def of(cls, ropes: Sequence[LayerRope], needed: int, max_position: int) -> RopeTables:
        """Of ``needed`` positions and, so that it changes rarely, up to twice as many."""
        levels, positions = [], 16
        while needed:
            positions = min(positions, max_position)
            levels.append((positions, tuple(_digests(ropes, positions))))
            if positions >= needed:
                break
            positions *= 2
        return cls(tuple(levels))

    @property
    def positions(self) -> int:
        """How many have been compared."""
        return self.levels[-1][0] if self.levels else 0

    @classmethod
    def from_json(cls, text: str, where: object) -> RopeTables:
        """Raises ``DamagedError`` for what `to_json` never gives."""
        try:
            levels = tuple((count, tuple(digests)) for count, digests in json.loads(text))
            if not all(type(count) is int and count > 0 for count, _ in levels):
                raise ValueError("positions that are no numbers")
        except (ValueError, TypeError) as error:
            raise DamagedError(f"{where}: expected rotation tables, got {error}") from None
        return cls(levels)

    def to_json(self) -> str:
        return json.dumps(self.levels)

    def check_same(self, ropes: Sequence[LayerRope], max_position: int, where: object) -> None:
        """Raises ``ValueError`` for other tables, or shorter ones."""
        if self.positions > max_position:
            raise ValueError(
                f"rope: expected at least {self.positions} positions for {where}, got "
                f"{max_position}"
            )
        if self.levels and tuple(_digests(ropes, self.positions)) != self.levels[-1][1]:
            self._refuse(where)

    def joined(self, other: RopeTables, where: object) -> RopeTables:
        """The longer ones of two directories; raises ``ValueError`` for others, as far as both have
        come."""
        known = dict(other.levels)
        if any(known.get(count, digests) != digests for count, digests in self.levels):
            self._refuse(where)
        return max(self, other, key=lambda one: one.positions)

    def _refuse(self, where: object) -> None:
        raise ValueError(
            f"rope: expected the tables that the keys of {where} were rotated with, got others"
        )


def _digests(ropes: Sequence[LayerRope], positions: int) -> list[str]:
    made: dict[int, str] = {}
    for rope in ropes:
        if id(rope) not in made:
            hasher = hashlib.blake2b(digest_size=16)
            for table in (rope.cos, rope.sin):
                hasher.update(repr(tuple(table.shape[1:])).encode())
                hasher.update(table[:positions].cpu().numpy().tobytes())
            hasher.update(repr((rope.interleaved, rope.attention_factor)).encode())
            made[id(rope)] = hasher.hexdigest()
    return [made[id(rope)] for rope in ropes]
