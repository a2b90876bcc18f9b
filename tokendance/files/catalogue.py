"""The catalogue of a store's directory: which Masters and Mirrors there are, and where rows lie.

SQLite keeps its tables. SQLite does not notice a byte that changes inside a value, so every row
has a checksum of its own, and one more row counts the others and adds their checksums up: a row
that has vanished, or has become an earlier one, is noticed too.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias
from urllib.parse import quote

from tokendance.files.disk import Disk
from tokendance.files.errors import DamagedError
from tokendance.files.page_file import hasher

VERSION = 2
_APPLICATION = 0x746B6443  # "tkdC"

Value: TypeAlias = int | str | bytes | None
Row: TypeAlias = tuple[Value, ...]

COLUMNS = {
    "facts": ("name", "value"),
    "files": ("bytes",),
    "groups": ("file", "rows", "is_master", "checksum"),
    "masters": ("digest", "length", "origin", "context", "exact", "seen", "row_group"),
    "findable": ("recency",),
    "mirrors": (
        *("agent", "length", "exact_length", "segment_length", "segment_kind", "segment_digests"),
        *("token_ids", "use_master", "use_delta", "use_length", "masks", "own_position"),
        "row_group",
    ),
    "state": ("generation", "count", "total"),
}
"""Columns of each table, besides ``id`` and ``sum``. No table has an index: what has none cannot
disagree with its table."""

_SCHEMA = {
    name: f"CREATE TABLE {name} (id INTEGER PRIMARY KEY, {', '.join(columns)}, sum)"
    for name, columns in COLUMNS.items()
}
_SUMMED = [name for name in COLUMNS if name != "state"]


@dataclass
class Changes:
    """What one transaction does: rows that it puts, and ids that it drops, by table."""

    put: dict[str, dict[int, Row]] = field(default_factory=dict)
    drop: dict[str, set[int]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(self.put.values()) or any(self.drop.values())


@dataclass(frozen=True)
class Contents:
    """What a catalogue holds.

    Attributes:
        rows: those that are whole, by table and id.
        damaged: the others.
        problem: what is wrong with the catalogue as a whole: rows are missing, or too many.
    """

    rows: dict[str, dict[int, Row]]
    damaged: dict[tuple[str, int], Row]
    problem: str = ""


def sum_of(table: str, key: int, values: Row) -> bytes:
    """The checksum of a row: every value begins with its kind and size, so that no two run
    together."""
    summed = hasher()
    for value in (table, key, *values):
        if isinstance(value, int):
            raw, kind = struct.pack("<q", value), b"i"
        elif isinstance(value, str):
            raw, kind = value.encode(errors="surrogatepass"), b"s"
        elif isinstance(value, bytes):
            raw, kind = value, b"b"
        else:  # None, or a number that no catalogue has
            raw, kind = repr(value).encode(), b"?"
        summed.update(kind + struct.pack("<q", len(raw)))
        summed.update(raw)
    checksum: bytes = summed.digest()
    return checksum


class Catalogue:
    """Tables of one directory; see `COLUMNS`.

    Args:
        path: of the database. It is made where there is none.
        disk: ends its transactions.
        writable: whether anything will be changed.

    Raises:
        OSError: it cannot be opened.
        DamagedError: it is no catalogue of this version.

    Attributes:
        generation: how many transactions there have been.
    """

    def __init__(self, path: Path, disk: Disk, writable: bool) -> None:
        self.path = path
        self._disk = disk
        self._sums: dict[str, dict[int, int]] = {}
        self._total = 0
        self.generation = 0
        if writable and not path.exists():
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))  # its log gets the same mode
        mode = "rw" if writable else "ro"
        if not writable and not os.access(path.parent, os.W_OK):
            mode += "" if path.with_name(path.name + "-wal").exists() else "&immutable=1"
        with self._errors():
            self._connection = sqlite3.connect(
                f"file:{quote(str(path))}?mode={mode}",
                uri=True,
                isolation_level=None,
                check_same_thread=False,
            )
        try:
            with self._errors():
                self._prepare(writable)
            self._inode = _inode(path)
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        with self._errors():
            self._connection.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What SQLite raises, as what it means."""
        try:
            yield
        except sqlite3.Error as error:
            text = str(error)
            meanings = {
                "full": errno.ENOSPC,
                "readonly": errno.EROFS,
                "unable to open": errno.ENOENT,
                "locked": errno.EBUSY,
                "I/O": errno.EIO,
            }
            for part, number in meanings.items():
                if part in text:
                    raise OSError(number, f"catalogue: {text}", str(self.path)) from error
            raise DamagedError(f"{self.path}: expected a catalogue of a store, got {text}") from (
                error
            )

    def _prepare(self, writable: bool) -> None:
        run = self._connection.execute
        self._connection.text_factory = lambda raw: raw.decode(errors="surrogateescape")
        run("PRAGMA trusted_schema=OFF")
        run("PRAGMA cell_size_check=ON")
        schema = dict(run("SELECT name, sql FROM sqlite_master").fetchall())
        application = self._pragma("application_id")
        if not schema and not application and writable:
            self._begin_log()
            run("BEGIN IMMEDIATE")
            for statement in _SCHEMA.values():
                run(statement)
            run(f"PRAGMA application_id={_APPLICATION}")
            run(f"PRAGMA user_version={VERSION}")
            self._write_state(0, 0, 0)
            self._disk.commit(self._connection)
            return
        if application != _APPLICATION:
            raise DamagedError(f"{self.path}: expected a catalogue of a store, got another file")
        version = self._pragma("user_version")
        if version != VERSION:
            raise DamagedError(f"{self.path}: expected version {VERSION}, got {version}")
        if schema != _SCHEMA:
            raise DamagedError(f"{self.path}: expected the tables of a catalogue, got {schema}")
        with self.path.open("rb") as file:
            versions = file.read(20)[18:]
        if versions != b"\2\2":  # of who may write it and who may read it: those who know logs
            raise DamagedError(f"{self.path}: expected a catalogue with a log, got {versions!r}")
        if writable:
            self._begin_log()

    def _begin_log(self) -> None:
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=FULL")

    def _pragma(self, name: str) -> int:
        value: int = self._connection.execute(f"PRAGMA {name}").fetchone()[0]
        return value

    # Reading --------------------------------------------------------------------------------------

    def read(self) -> Contents:
        """All rows, each checked; what is wrong is said and not raised."""
        rows: dict[str, dict[int, Row]] = {}
        damaged: dict[tuple[str, int], Row] = {}
        problem = ""
        for table in COLUMNS:
            found = rows[table] = {}
            sums = self._sums[table] = {}
            for order in ("", " DESC"):  # from the other end, where a page between is damaged
                try:
                    with self._errors():
                        for key, values, checksum in self._select(table, order):
                            if key in sums:
                                break
                            sums[key] = int.from_bytes(checksum, "little")
                            if sum_of(table, key, values) == checksum:
                                found[key] = values
                            else:
                                damaged[table, key] = values
                    break
                except (DamagedError, OSError) as error:
                    problem = problem or str(error)
        state = rows.pop("state").get(1)
        if state is None or not isinstance(state[0], int) or not isinstance(state[2], bytes):
            return Contents(rows, damaged, problem or "its row of counts is damaged")
        self.generation = state[0]
        self._total = sum(sum(self._sums[table].values()) for table in _SUMMED) % (1 << 128)
        count = sum(len(self._sums[table]) for table in _SUMMED)
        damaged_here = {key: why for key, why in damaged.items() if key[0] != "state"}
        if count != state[1]:
            problem = problem or f"it has {count} rows, of {state[1]!r} that were written"
        elif not damaged_here and self._total != int.from_bytes(state[2], "little"):
            problem = problem or "its rows are not those that were written last"
        return Contents(rows, damaged_here, problem)

    def _select(self, table: str, order: str) -> Iterator[tuple[int, Row, bytes]]:
        columns = ", ".join(("id", *COLUMNS[table], "sum"))
        for found in self._connection.execute(f"SELECT {columns} FROM {table} ORDER BY id{order}"):
            checksum = found[-1] if type(found[-1]) is bytes else b""
            yield found[0], found[1:-1], checksum[:16]

    def read_some(self, table: str, ids: Iterable[int]) -> tuple[dict[int, Row], dict[int, Row]]:
        """Rows of a table by their ids: those that are whole, and the others."""
        rows: dict[int, Row] = {}
        damaged: dict[int, Row] = {}
        columns = ", ".join((*COLUMNS[table], "sum"))
        with self._errors():
            for key in ids:
                found = self._connection.execute(
                    f"SELECT {columns} FROM {table} WHERE id=?", (key,)
                ).fetchone()
                values = (None,) * len(COLUMNS[table]) if found is None else found[:-1]
                whole = found is not None and sum_of(table, key, values) == found[-1]
                (rows if whole else damaged)[key] = values
        return rows, damaged

    def check(self) -> str:
        """What SQLite finds wrong with the database; empty where nothing is."""
        with self._errors():
            found = [line for (line,) in self._connection.execute("PRAGMA integrity_check")]
        return "" if found == ["ok"] else "; ".join(found)

    # Writing --------------------------------------------------------------------------------------

    def write(self, changes: Changes) -> None:
        """Makes all changes, or none; they are on the medium when this returns.

        Raises:
            OSError: they cannot be written, or the directory is not there any more.
        """
        if not changes:
            return
        if _inode(self.path) != self._inode:
            raise OSError(
                errno.ENOENT, "catalogue: expected the one that was opened, got another or none",
                str(self.path),
            )  # fmt: skip
        sums = {
            table: {key: sum_of(table, key, row) for key, row in rows.items()}
            for table, rows in changes.put.items()
        }
        total, count = self._total, sum(len(self._sums[table]) for table in _SUMMED)
        for table in _SUMMED:
            known = self._sums[table]
            gone = changes.drop.get(table, set()) | changes.put.get(table, {}).keys()
            old = [known[key] for key in gone if key in known]
            new = [int.from_bytes(one, "little") for one in sums.get(table, {}).values()]
            total += sum(new) - sum(old)
            count += len(new) - len(old)
        total %= 1 << 128
        with self._errors():
            self._transact(changes, sums, count, total)
        self.generation += 1
        self._total = total
        for table in _SUMMED:
            for key in changes.drop.get(table, ()):
                self._sums[table].pop(key, None)
            self._sums[table] |= {
                key: int.from_bytes(one, "little") for key, one in sums.get(table, {}).items()
            }

    def _transact(
        self,
        changes: Changes,
        sums: Mapping[str, Mapping[int, bytes]],
        count: int,
        total: int,
    ) -> None:
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            self._check_generation()
            for table, ids in changes.drop.items():
                connection.executemany(f"DELETE FROM {table} WHERE id=?", [(i,) for i in ids])
            for table, rows in changes.put.items():
                marks = ", ".join("?" * (len(COLUMNS[table]) + 2))
                connection.executemany(
                    f"INSERT OR REPLACE INTO {table} VALUES ({marks})",
                    [(key, *row, sums[table][key]) for key, row in rows.items()],
                )
            self._write_state(self.generation + 1, count, total)
            self._disk.commit(connection)
        except BaseException as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            if not isinstance(error, Exception) or self._found() != self.generation + 1:
                raise
            # It is there although its end has failed: whether on the medium, another transaction
            # makes sure, or raises.
            connection.execute("BEGIN IMMEDIATE")
            self._write_state(self.generation + 1, count, total)
            connection.execute("COMMIT")

    def generation_on_disk(self) -> int:
        """Of the last transaction that has ended."""
        with self._errors():
            return self._found()

    def _found(self) -> int:
        found: int = self._connection.execute("SELECT generation FROM state").fetchone()[0]
        return found

    def _check_generation(self) -> None:
        if self._found() != self.generation:
            raise OSError(
                errno.EIO,
                f"catalogue: expected generation {self.generation}, got {self._found()}; close the "
                "store and open it again",
                str(self.path),
            )

    def _write_state(self, generation: int, count: int, total: int) -> None:
        values = (generation, count, total.to_bytes(16, "little"))
        self._connection.execute(
            "INSERT OR REPLACE INTO state VALUES (?, ?, ?, ?, ?)",
            (1, *values, sum_of("state", 1, values)),
        )


def _inode(path: Path) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return (0, 0)
    return found.st_dev, found.st_ino
