"""Masters and Mirrors as rows of a catalogue, and back.

What comes back is checked field by field: a row with a good checksum that no store has written
must not lead an operator out of its arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tokendance.files.catalogue import Row
from tokendance.host.mirror import Master, Mirror, Use, Uses, no_pages, pages_for
from tokendance.host.segments import Segment

_DIGEST = 16
T = TypeVar("T", int, bytes)


class FieldError(Exception):
    """A field is not as expected."""


def _expect(holds: bool, field: str, wanted: object, got: object) -> None:
    if not holds:
        raise FieldError(f"expected {wanted} at {field}, got {got}")


def master_row(master: Master, group: int | None) -> Row:
    """A Master whose rows are in this group; None where it has none."""
    return (
        master.digest,
        master.length,
        master.origin,
        master.context,
        int(master.exact),
        b"".join(sorted(master.seen)),
        group,
    )


def master_of(row: Row, max_position: int, serial: int | None = None) -> tuple[Master, int | None]:
    """The Master, as yet without pages, and its group.

    Args:
        serial: that the Master has had in this process; None: it gets one.

    Raises:
        FieldError: for what `master_row` never gives.
    """
    digest, context, seen = (_typed(row[i], bytes, name) for i, name in _MASTER_BYTES)
    length, origin, exact = (_typed(row[i], int, name) for i, name in _MASTER_INTS)
    for name, value in (("digest", digest), ("context", context)):
        _expect(len(value) in (0, _DIGEST), name, f"0 or {_DIGEST} bytes", len(value))
    _expect(len(seen) % _DIGEST == 0, "seen", f"{_DIGEST} bytes each", len(seen))
    _expect(length >= 0 and origin >= 0, "length and origin", "at least 0", (length, origin))
    end = origin + length
    _expect(end <= max_position, "length", f"rows up to position {max_position}", end)
    master = Master(
        digest=digest,
        length=length,
        origin=origin,
        context=context,
        exact=bool(exact),
        seen=frozenset(_split(seen)),
        computed=length,
    )
    if serial is not None:
        master.serial = serial
    return master, _group(row[6], length)


_MASTER_BYTES = ((0, "digest"), (3, "context"), (5, "seen"))
_MASTER_INTS = ((1, "length"), (2, "origin"), (4, "exact"))


def mirror_row(agent: str, mirror: Mirror, masters: list[int], group: int | None) -> Row:
    """A Mirror whose own rows are in this group, and whose uses are of Masters of these ids."""
    return (
        agent.encode(errors="surrogatepass"),
        mirror.length,
        mirror.exact_length,
        _packed([segment.length for segment in mirror.segments]),
        bytes(int(segment.is_shared) for segment in mirror.segments),
        b"".join(one.digest + one.stem + one.space for one in mirror.segments),
        b"".join(_packed(segment.token_ids) for segment in mirror.segments),
        np.array(masters, dtype="<i8").tobytes(),
        _packed(mirror.uses.delta),
        _packed(mirror.uses.length),
        mirror.uses.masks.astype("<u4").tobytes(),
        _packed(mirror.own_position),
        group,
    )


def agent_of(row: Row) -> str:
    """The name of a Mirror's agent.

    Raises:
        FieldError: it is none.
    """
    try:
        return _typed(row[0], bytes, "agent").decode(errors="surrogatepass")
    except UnicodeDecodeError as error:
        raise FieldError(f"expected UTF-8 at agent, got {error}") from None


def masters_of(row: Row) -> list[int]:
    """The ids of the Masters that a Mirror uses, one for each use."""
    found: list[int] = _unpacked(row[7], "use_master", "<i8").tolist()
    return found


def mirror_of(
    row: Row, masters: Mapping[int, Master], block_size: int, max_position: int
) -> tuple[Mirror, int | None]:
    """The Mirror, as yet without pages, and its group.

    Raises:
        FieldError: for what `mirror_row` never gives, or a Master that is not among ``masters``.
    """
    length, exact = _typed(row[1], int, "length"), _typed(row[2], int, "exact_length")
    segments = _segments_of(row)
    rows = sum(segment.length for segment in segments)
    _expect(length == rows, "length", f"{rows} tokens of its segments", length)
    _expect(length <= max_position, "length", f"at most {max_position}", length)
    _expect(0 <= exact <= length, "exact_length", f"0..{length}", exact)
    own = _unpacked(row[11], "own_position")
    bounded = np.concatenate([[-1], own, [length]])
    falls = np.flatnonzero(np.diff(bounded) <= 0)[:1]
    got = [bounded[i : i + 2].tolist() for i in falls.tolist()]
    _expect(not len(falls), "own_position", f"ascending positions below {length}", got)
    mirror = Mirror(
        segments=tuple(segments),
        length=length,
        uses=_uses_of(row, masters, length, block_size),
        own_pages=no_pages(),
        own_position=own.astype(np.int32),
        exact_length=exact,
    )
    return mirror, _group(row[12], len(own))


def _segments_of(row: Row) -> list[Segment]:
    lengths = _unpacked(row[3], "segment_length")
    kinds, digests = (
        _typed(row[i], bytes, n) for i, n in ((4, "segment_kind"), (5, "segment_digests"))
    )
    tokens = _unpacked(row[6], "token_ids").astype(np.int32)
    count = len(lengths)
    _expect(bool((lengths >= 0).all()), "segment_length", "at least 0", lengths.tolist())
    total = int(lengths.sum(dtype=np.int64))
    _expect(total == len(tokens), "token_ids", f"{total} tokens", len(tokens))
    _expect(not (tokens < 0).any(), "token_ids", "at least 0", tokens[tokens < 0][:1].tolist())
    _expect(len(kinds) == count, "segment_kind", f"{count} bytes", len(kinds))
    whole = 3 * _DIGEST * count
    _expect(len(digests) == whole, "segment_digests", f"{whole} bytes", len(digests))
    parts = _split(digests)
    segments, at = [], 0
    for i, size in enumerate(lengths.tolist()):
        token_ids = tokens[at : at + size].copy()
        token_ids.flags.writeable = False
        at += size
        segments.append(Segment(token_ids, bool(kinds[i]), *parts[3 * i : 3 * i + 3]))
    return segments


def _uses_of(row: Row, masters: Mapping[int, Master], rows: int, block_size: int) -> Uses:
    ids = masters_of(row)
    delta, length = _unpacked(row[8], "use_delta"), _unpacked(row[9], "use_length")
    for name, array in (("use_delta", delta), ("use_length", length)):
        _expect(len(array) == len(ids), name, f"{len(ids)} numbers", len(array))
    masks, at, end, uses = _unpacked(row[10], "masks", "<u4").astype(np.uint32), 0, 0, []
    for i, (key, begin, count) in enumerate(zip(ids, delta.tolist(), length.tolist(), strict=True)):
        _expect(key in masters, f"use_master[{i}]", "a Master that is whole", key)
        _expect(begin >= end, f"use_delta[{i}]", f"at least {end}", begin)
        most = min(masters[key].length, rows - begin)
        _expect(0 <= count <= most, f"use_length[{i}]", f"0..{most}", count)
        pages = pages_for(count, block_size)
        uses.append(Use(masters[key], begin, count, masks[at : at + pages]))
        at += pages
        end = begin + count
    _expect(at == len(masks), "masks", f"{at} pages", len(masks))
    return Uses.of(uses, block_size)


def _group(value: Any, rows: int) -> int | None:
    """Rows lie in a group, and none in none."""
    if rows:
        _expect(isinstance(value, int), "row_group", f"a group of {rows} rows", value)
    else:
        _expect(value is None, "row_group", "none for no rows", value)
    group: int | None = value
    return group


def _typed(value: Any, kind: type[T], field: str) -> T:
    _expect(type(value) is kind, field, kind.__name__, type(value).__name__)
    typed: T = value
    return typed


def _packed(numbers: Any) -> bytes:
    raw: bytes = np.asarray(numbers).astype("<i4").tobytes()
    return raw


def _unpacked(value: Any, field: str, dtype: str = "<i4") -> NDArray[Any]:
    raw, size = _typed(value, bytes, field), np.dtype(dtype).itemsize
    _expect(len(raw) % size == 0, field, f"numbers of {size} bytes", len(raw))
    return np.frombuffer(raw, dtype=dtype)


def _split(digests: bytes) -> list[bytes]:
    return [digests[i : i + _DIGEST] for i in range(0, len(digests), _DIGEST)]
