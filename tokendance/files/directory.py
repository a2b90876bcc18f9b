"""The directory of a store: page files, a catalogue that says what is valid in them, and a lock.

What is written becomes valid at one instant, the end of the catalogue's transaction. Before it, all
rows that the transaction names are on the medium under their final names: a page file is written
under another name, synced and renamed, and the directory is synced. After it, files in which
nothing is valid any more are removed. Whatever a process leaves behind that dies in between, the
next `open` removes.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeAlias

from tokendance.files.catalogue import Catalogue, Changes, Contents, Row
from tokendance.files.disk import Disk, lock
from tokendance.files.errors import DamagedError
from tokendance.files.identity import Identity, RopeTables
from tokendance.files.lock_note import read_generation, write_generation
from tokendance.files.page_file import FORMAT, PageFile, header_of, remove, write_file

CATALOGUE = "catalogue.sqlite"
LOCK = "lock"
_PAGES = re.compile(r"(\d{8})\.safetensors")
_SCRATCH = re.compile(r"\d{8}\.tmp")
_OWN = {CATALOGUE, f"{CATALOGUE}-wal", f"{CATALOGUE}-shm", LOCK}
GROUPS = 100_000
"""Tensors of one file at most: their header stays within what readers of safetensors take."""
_SMALLEST = 512
"""Bytes of a database: SQLite takes less for an empty one, and makes it anew."""

Progress: TypeAlias = Callable[[int, int], None]
"""Is told how many bytes of how many are done."""


class Group(NamedTuple):
    """Where the rows of one Master or Mirror lie.

    Attributes:
        file: number of the page file.
        rows: how many.
        is_master: whether they are a Master's, and coded as such; 0 or 1.
        checksum: of their bytes.
    """

    file: int
    rows: int
    is_master: int
    checksum: bytes


@dataclass(frozen=True)
class FreshRows:
    """Rows that are written for the first time.

    Attributes:
        rows: how many.
        is_master: whether they are a Master's.
        pieces: gives their bytes, of each layer its keys and then its values.
    """

    rows: int
    is_master: bool
    pieces: Callable[[], Iterator[memoryview]]


class Directory:
    """What is valid in a directory, and the only way to change it; made by `open`.

    Attributes:
        path: of the directory.
        contents: of the catalogue, as it was when the directory was opened.
        groups: by number.
        files: bytes of the rows in each page file, by number.
    """

    def __init__(self, path: Path, disk: Disk, catalogue: Catalogue, writable: bool) -> None:
        self.path = path
        self._disk = disk
        self._catalogue = catalogue
        self._writable = writable
        self._exit = ExitStack()
        self._process = os.getpid()
        self.contents: Contents = catalogue.read()
        facts = {row[0]: row[1] for row in self.contents.rows["facts"].values()}
        if not facts and (catalogue.generation or self.contents.problem):
            raise DamagedError(
                f"{catalogue.path}: expected what the store is of, got none; "
                f"{self.contents.problem}"
            )
        self._facts = {str(name): str(value) for name, value in facts.items()}
        self.groups = {
            key: Group(*row)  # type: ignore[arg-type]
            for key, row in self.contents.rows["groups"].items()
        }
        self.files = {key: int(row[0]) for key, row in self.contents.rows["files"].items()}  # type: ignore[arg-type]

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        create: bool = False,
        writable: bool = True,
        disk: Disk | None = None,
        damaged: bool = False,
    ) -> Directory:
        """Opens a directory, and takes its lock until `close`.

        Args:
            path: of the directory.
            create: makes it where there is none, or an empty one; `begin` says what it is of.
            writable: alone; otherwise beside others that read.
            disk: makes the file operations.
            damaged: also one whose catalogue lacks rows, for reading what is left.

        Raises:
            StoreInUseError: another process has it open.
            OSError: it is not there, or cannot be read or written.
            DamagedError: its catalogue is not as it was written.
            ValueError: it is something else than a store.
        """
        path, disk = Path(path), disk or Disk()
        _check_is_store(path, disk, create)
        with ExitStack() as undo:
            undo.callback(lock(path / LOCK, not writable))
            catalogue = Catalogue(path / CATALOGUE, disk, writable)
            undo.callback(catalogue.close)
            found = cls(path, disk, catalogue, writable)
            found._exit = undo.pop_all()
        try:
            problem = found.problem
            if problem and not damaged:
                raise DamagedError(
                    f"{catalogue.path}: expected all that was written, got another catalogue: "
                    f"{problem}; `tokendance store export` writes what is whole to another "
                    "directory"
                )
            if found.is_new and (found._has_page_files() or not create):
                raise DamagedError(f"{catalogue.path}: expected a store, got an empty one")
            if writable and not problem:
                found._remove_leftovers()
                write_generation(path / LOCK, catalogue.generation)
        except BaseException:
            found.close()
            raise
        return found

    def close(self) -> None:
        """Gives the lock back. The directory is what it was after the last `write`.

        A fork of the process that opened it has neither the lock nor the catalogue.
        """
        if os.getpid() == self._process:
            self._exit.close()

    @property
    def problem(self) -> str:
        """What is wrong with the catalogue as a whole; empty where nothing is."""
        return self.contents.problem or self._rolled_back()

    def _rolled_back(self) -> str:
        noted = read_generation(self.path / LOCK)
        if noted is not None and noted > self._catalogue.generation:
            return (
                f"it ends with transaction {self._catalogue.generation}, and there have been "
                f"{noted}"
            )
        return ""

    # What it is of --------------------------------------------------------------------------------

    @property
    def store(self) -> str:
        """A name that no other directory has, which stands in its page files too."""
        return self._facts.get("store", "")

    @cached_property
    def identity(self) -> Identity:
        """Whose rows these are."""
        return Identity.from_json(self._facts.get("identity", ""), self._catalogue.path)

    @property
    def ropes(self) -> RopeTables:
        """What the keys were rotated with."""
        return RopeTables.from_json(self._facts.get("ropes", ""), self._catalogue.path)

    def _has_page_files(self) -> bool:
        return any(_PAGES.fullmatch(name) for name in os.listdir(self.path))

    @property
    def is_new(self) -> bool:
        """Whether nobody has said yet what it is of."""
        return not self._facts

    @property
    def tenant(self) -> str | None:
        """Whose directory it is; None: that of a store."""
        return self._facts.get("tenant")

    @property
    def key_check(self) -> str:
        """By what the tenant's key is known."""
        return self._facts.get("key", "")

    def begin(
        self, identity: Identity, tenant: Callable[[str], tuple[str, str]] | None = None
    ) -> None:
        """Says of a new directory what it is of.

        Args:
            tenant: for the name that the directory gets, the tenant's own, and by what its key is
                known; None: it is no tenant's.
        """
        facts = {
            "store": secrets.token_hex(16),
            "identity": identity.to_json(),
            "ropes": RopeTables().to_json(),
        }
        if tenant is not None:
            facts["tenant"], facts["key"] = tenant(facts["store"])
        rows = {i: (name, value) for i, (name, value) in enumerate(facts.items(), 1)}
        self._commit(Changes(put={"facts": dict(rows)}))
        self._disk.sync_directory(self.path)
        self._facts = facts

    def _path_of(self, file: int) -> Path:
        return self.path / f"{file:08d}.safetensors"

    def _metadata(self, file: int) -> dict[str, str]:
        return {"format": FORMAT, "version": "1", "store": self.store, "file": str(file)}

    def _remove_leftovers(self) -> None:
        valid = {self._path_of(file).name for file in self.files}
        for name in sorted(os.listdir(self.path)):
            if _SCRATCH.fullmatch(name) or (_PAGES.fullmatch(name) and name not in valid):
                remove(self._disk, self.path / name)

    # Reading --------------------------------------------------------------------------------------

    def records(self, masters: Iterable[int], mirrors: Iterable[int]) -> Contents:
        """Some records as they are now, with all that is findable among the Masters."""
        rows: dict[str, dict[int, Row]] = {}
        damaged: dict[tuple[str, int], Row] = {}
        wanted = {"masters": list(masters), "mirrors": list(mirrors)}
        for table, ids in wanted.items():
            rows[table], others = self._catalogue.read_some(table, ids)
            damaged |= {(table, key): row for key, row in others.items()}
        found, _ = self._catalogue.read_some("findable", wanted["masters"])
        return Contents({**rows, "findable": found}, damaged)

    def file(self, number: int) -> PageFile:
        """A page file, open for reading.

        Raises:
            OSError: it is not there, or cannot be read.
            DamagedError: it is none of this directory's.
        """
        path = self._path_of(number)
        try:
            return PageFile(path, self._metadata(number), self.identity.stored_dtype)
        except FileNotFoundError:
            raise DamagedError(f"{path}: expected a page file, got none") from None

    def verify(
        self, progress: Progress | None = None, groups: Set[int] | None = None
    ) -> dict[int, str]:
        """Reads rows, and says of each group that is not as it was written what is wrong.

        Args:
            progress: is told.
            groups: which; None: all.
        """
        wrong: dict[int, str] = {}
        wanted = self.groups.keys() if groups is None else groups & self.groups.keys()
        total, done = self.bytes_of(wanted), 0

        def read(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(done, total)

        for number, members in self.by_file().items():
            chosen = [key for key in members if key in wanted]
            if chosen:
                wrong |= self.wrong_in(number, chosen, read)
        return wrong

    def wrong_in(
        self, number: int, groups: list[int], read: Callable[[int], None] = lambda _: None
    ) -> dict[int, str]:
        """What is wrong with groups of one file; ``read`` hears how many bytes have been read."""
        wrong: dict[int, str] = {}
        try:
            with self.file(number) as file:
                for key in groups:
                    try:
                        for piece in self.pieces(file, key):
                            read(len(piece))
                    except (DamagedError, OSError) as error:
                        wrong[key] = str(error)
        except (DamagedError, OSError) as error:
            wrong |= dict.fromkeys(groups, str(error))
        return wrong

    def check_catalogue(self) -> str:
        """What is wrong with the catalogue; empty where nothing is."""
        return self._catalogue.check()

    def pieces(self, file: PageFile, group: int) -> Iterator[bytearray]:
        """The bytes of a group, of each layer its keys and then its values; see `PageFile.read`."""
        _, rows, is_master, checksum = self.groups[group]
        identity = self.identity
        sizes = identity.row_codec(is_master).sizes(rows)
        return file.read(str(group), identity.shape(rows, is_master), sizes, checksum)

    def stream(self, group: int) -> Iterator[memoryview]:
        """The same as `FreshRows` gives it."""
        with self.file(self.groups[group].file) as file:
            for piece in self.pieces(file, group):
                yield memoryview(piece)

    def by_file(self) -> dict[int, list[int]]:
        """The groups that lie in each file."""
        members: dict[int, list[int]] = {file: [] for file in self.files}
        for key, group in self.groups.items():
            members.setdefault(group.file, []).append(key)
        return members

    @property
    def live_bytes(self) -> int:
        """Bytes of valid rows."""
        return self.bytes_of(self.groups)

    def bytes_of(self, groups: Iterable[int]) -> int:
        """Bytes of the rows of groups."""
        found = (self.groups[key] for key in groups)
        return sum(self.identity.group_bytes(one.rows, one.is_master) for one in found)

    def bytes_of_fresh(self, rows: FreshRows) -> int:
        """Bytes that rows will have."""
        return self.identity.group_bytes(rows.rows, rows.is_master)

    @property
    def file_bytes(self) -> int:
        """Bytes of all rows in the page files, valid or not."""
        return sum(self.files.values())

    # Writing --------------------------------------------------------------------------------------

    def write(
        self,
        changes: Changes,
        fresh: Mapping[int, FreshRows],
        ropes: RopeTables | None = None,
    ) -> None:
        """Makes rows and records valid together, or neither; both are on the medium then.

        Args:
            changes: rows of the catalogue, but for those of groups and files; dropped groups are
                among them.
            fresh: the rows of new groups, by number.
            ropes: tables that keys have been rotated with, if others than before.

        Raises:
            OSError: something cannot be written; everything is as it was, and may be tried again.
        """
        self.check_writable()
        if ropes is not None and ropes != self.ropes:
            changes.put["facts"] = {3: ("ropes", ropes.to_json())}
        if not changes and not fresh:
            return
        dropped = changes.drop.get("groups", set())
        groups = {key: group for key, group in self.groups.items() if key not in dropped}
        added: dict[int, int] = {}
        try:
            keys = list(fresh)
            for at in range(0, len(keys), GROUPS):
                part = {key: fresh[key] for key in keys[at : at + GROUPS]}
                number = self._free_number()
                written = self._write_rows(number, part)
                added[number] = sum(map(self.bytes_of_fresh, part.values()))
                groups |= written
                changes.put.setdefault("groups", {}).update(written)
            changes.put["files"] = {number: (size,) for number, size in added.items()}
            valid = {group.file for group in groups.values()}
            dead = {file for file in self.files if file not in valid}
            changes.drop["files"] = dead
            self._commit(changes)
        except Exception:
            self._take_back(added)
            raise
        if ropes is not None:
            self._facts["ropes"] = ropes.to_json()
        self.groups = groups
        self.files |= added
        for file in dead:
            del self.files[file]
            remove(self._disk, self._path_of(file))

    def _commit(self, changes: Changes) -> None:
        self._catalogue.write(changes)
        write_generation(self.path / LOCK, self._catalogue.generation)

    def _write_rows(self, number: int, fresh: Mapping[int, FreshRows]) -> dict[int, Group]:
        shape = self.identity.shape
        shapes = {str(key): shape(one.rows, one.is_master) for key, one in fresh.items()}
        header = header_of(shapes, self.identity.stored_dtype, self._metadata(number))
        path = self._path_of(number)
        pieces = (one.pieces() for one in fresh.values())
        sums = write_file(self._disk, path, path.with_suffix(".tmp"), header, pieces)
        return {
            key: Group(number, one.rows, int(one.is_master), checksum)
            for (key, one), checksum in zip(fresh.items(), sums, strict=True)
        }

    def _free_number(self) -> int:
        """Of no file that is there, valid or not."""
        taken = [int(found[1]) for name in os.listdir(self.path) if (found := _PAGES.match(name))]
        return max([0, *self.files, *taken]) + 1

    def _take_back(self, numbers: Iterable[int]) -> None:
        """Removes files that no transaction has made valid, if the catalogue can say so."""
        try:
            valid = self._catalogue.generation_on_disk() != self._catalogue.generation
        except (OSError, DamagedError):
            return
        for number in numbers if not valid else ():
            remove(self._disk, self._path_of(number))

    def check_writable(self) -> None:
        """Raises what keeps the directory from being written."""
        if not self._writable:
            raise OSError(
                errno.EROFS, "path: expected a store opened to be written", str(self.path)
            )
        if os.getpid() != self._process:
            raise RuntimeError(
                f"{self.path}: expected the process that opened the store, {self._process}, got "
                f"{os.getpid()}: a fork shares its lock and must not write"
            )
        if not self.path.is_dir():
            raise FileNotFoundError(
                errno.ENOENT, "path: expected the store's directory, got none", str(self.path)
            )


def _check_is_store(path: Path, disk: Disk, create: bool) -> None:
    """Makes a directory where there is none, if that is wanted; refuses what is something else."""
    if not path.exists():
        if not create:
            raise FileNotFoundError(errno.ENOENT, "path: expected a store, got nothing", str(path))
        disk.make_directory(path)
        disk.sync_directory(path.absolute().parent)
    if not path.is_dir():
        raise NotADirectoryError(
            errno.ENOTDIR, "path: expected the directory of a store, got a file", str(path)
        )
    names = set(os.listdir(path))
    if CATALOGUE in names and (path / CATALOGUE).stat().st_size >= _SMALLEST:
        return
    pages = sorted(name for name in names if _PAGES.fullmatch(name))
    if pages:
        raise DamagedError(
            f"{path / CATALOGUE}: expected the catalogue of {len(pages)} page files, got none"
        )
    others = sorted(name for name in names - _OWN if not _SCRATCH.fullmatch(name))
    if others or not create:
        raise ValueError(
            f"path: expected {'an empty directory or ' if create else ''}the directory of a store, "
            f"got {path} with {others[:3] or 'nothing in it'}"
        )
