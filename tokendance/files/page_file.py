"""Files of rows: safetensors, one tensor for each group of pages.

A group is what one Master or one Mirror has: its rows, without the padding of its last page, in
``[layers, 2, rows, Hk, D]``, of each layer its keys and then its values. A group is contiguous, so
that it is read, checked and moved by itself, and a header has one entry for each.

The format is written and read here, and not by its library, because every write has to go through
`Disk`, group by group without a second copy in memory, and because nothing of a header that
somebody else may have written is taken for granted.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from tokendance.files.disk import Disk, read_at
from tokendance.files.errors import DamagedError

FORMAT = "tokendance.pages"
DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
}
"""What safetensors calls the dtypes of pools."""
_NAMES = {**DTYPES, torch.uint8: "U8"}  # coded rows are bytes

_LARGEST_HEADER = 100_000_000  # that the library reads


def hasher() -> Any:
    """The checksum of rows and records: BLAKE2b of 16 bytes."""
    return hashlib.blake2b(digest_size=16)


def header_of(
    shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, metadata: Mapping[str, str]
) -> bytes:
    """What stands in front of the tensors of these names and shapes, which follow in this order."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + _product(shape) * dtype.itemsize
        fields[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_file(
    disk: Disk,
    path: Path,
    scratch: Path,
    header: bytes,
    groups: Iterator[Iterator[memoryview]],
) -> list[bytes]:
    """Writes a file that is there as a whole, and on the medium, when this returns.

    Args:
        scratch: its name until then; whoever finds one of that name may remove it.
        groups: of each group its bytes, piece by piece.

    Returns:
        The checksum of each group.
    """
    sums = []
    file = disk.create(scratch)
    try:
        try:
            disk.write(file, memoryview(header))
            for pieces in groups:
                summed = hasher()
                for piece in pieces:
                    summed.update(piece)
                    disk.write(file, piece)
                sums.append(summed.digest())
            disk.sync(file)
        finally:
            os.close(file)
        disk.rename(scratch, path)
    except BaseException:
        remove(disk, scratch)
        raise
    try:
        disk.sync_directory(path.parent)
    except BaseException:
        remove(disk, path)
        raise
    return sums


def remove(disk: Disk, path: Path) -> bool:
    """Removes a file that nobody needs, if that can be done now: the next `open` finds it again."""
    try:
        disk.unlink(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


class PageFile:
    """A file of rows that is open for reading; its groups are checked when they are read.

    Args:
        path: of the file.
        metadata: that it must have: files of other stores and other files of this one are refused.
        dtype: of its tensors.

    Raises:
        OSError: it cannot be opened or read.
        DamagedError: it is no such file.
    """

    def __init__(self, path: Path, metadata: Mapping[str, str], dtype: torch.dtype) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY)
        try:
            self._entries, self._start = self._read_header(metadata, dtype)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> PageFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        os.close(self._file)

    def _damaged(self, wanted: object, got: object) -> DamagedError:
        return DamagedError(f"{self.path}: expected {wanted}, got {got}")

    def _read_header(
        self, metadata: Mapping[str, str], dtype: torch.dtype
    ) -> tuple[dict[str, tuple[list[int], int, int]], int]:
        size = os.fstat(self._file).st_size
        head = bytearray(8)
        if read_at(self._file, 0, memoryview(head)) < 8:
            raise self._damaged("a safetensors file", f"{size} bytes")
        (length,) = struct.unpack("<Q", head)
        if length > min(_LARGEST_HEADER, size - 8):
            raise self._damaged(f"a header within {size} bytes", f"one of {length} bytes")
        text = bytearray(length)
        read_at(self._file, 8, memoryview(text))
        try:
            fields = json.loads(bytes(text))
        except (ValueError, RecursionError) as error:
            raise self._damaged("a header of JSON", error) from None
        found = fields.get("__metadata__") if isinstance(fields, dict) else None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise self._damaged(f"metadata of {FORMAT}", found)
        for name, value in metadata.items():
            if found.get(name) != value:
                raise self._damaged(f"{name} {value!r}", repr(found.get(name)))
        entries = {}
        for name, entry in fields.items():
            if name != "__metadata__":
                entries[name] = self._checked_entry(name, entry, dtype)
        return entries, 8 + length

    def _checked_entry(
        self, name: str, entry: Any, dtype: torch.dtype
    ) -> tuple[list[int], int, int]:
        try:
            kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            whole = all(type(one) is int and one >= 0 for one in (*shape, begin, end))
        except (KeyError, TypeError, ValueError):
            whole = False
        if not whole or kind != _NAMES[dtype] or end - begin != _product(shape) * dtype.itemsize:
            raise self._damaged(f"a tensor of {_NAMES[dtype]} at {name}", entry)
        return shape, begin, end

    def read(
        self, name: str, shape: Sequence[int], sizes: Iterable[int], checksum: bytes
    ) -> Iterator[bytearray]:
        """The bytes of a group, in pieces of these sizes. The checksum is compared behind the last.

        Raises:
            DamagedError: there is no such group, or it has other bytes. What was given before is
                not to be trusted.
        """
        found, at, end = self._entries.get(name, ([], 0, 0))
        if found != list(shape):
            raise self._damaged(f"{list(shape)} at group {name}", found or "none")
        summed = hasher()
        for size in sizes:
            data = bytearray(size)
            count = read_at(self._file, self._start + at, memoryview(data))
            at += size
            if count < size:
                raise self._damaged(
                    f"{self._start + end} bytes, up to the end of group {name}",
                    os.fstat(self._file).st_size,
                )
            summed.update(data)
            yield data
        if summed.digest() != checksum:
            raise self._damaged(
                f"rows of group {name} as they were written (checksum {checksum.hex()})",
                f"others ({summed.hexdigest()})",
            )


def _product(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
