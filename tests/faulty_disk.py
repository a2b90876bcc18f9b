"""A disk that ends the process, fails, or loses power at the n-th operation on it."""

from __future__ import annotations

import errno
import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

from tokendance.files.disk import Disk


class Crash(BaseException):
    """The process has ended here: nothing that comes later has happened."""


class FaultyDisk(Disk):
    """Counts operations, and does something in place of one of them.

    Args:
        at: the number of the operation, from 0; None: none.
        fault: is called in its place, with this disk and what it would have done. Of a write, half
            has been done.
    """

    def __init__(
        self, at: int | None = None, fault: Callable[[FaultyDisk], None] | None = None
    ) -> None:
        self.at = at
        self.fault = fault
        self.done: list[str] = []
        self.names: dict[int, Path] = {}  # of open files
        self.synced: dict[
            Path, int
        ] = {}  # bytes that are on the medium, of files that were written
        self.entries: dict[Path, Path | None] = {}  # new names that are not, and the old ones
        self.gone: dict[Path, bytes] = {}  # removed files whose removal is not

    def _step(self, name: str) -> bool:
        self.done.append(name)
        if len(self.done) - 1 != self.at:
            return False
        assert self.fault is not None
        self.fault(self)
        return True

    def create(self, path: Path) -> int:
        self._step("create")
        file = super().create(path)
        self.names[file] = path
        self.synced[path] = 0
        self.entries[path] = None
        return file

    def write(self, file: int, data: memoryview) -> None:
        if len(self.done) == self.at:
            super().write(file, data[: len(data) // 2])
        self._step("write")
        super().write(file, data)

    def sync(self, file: int) -> None:
        self._step("sync")
        super().sync(file)
        self.synced[self.names[file]] = os.fstat(file).st_size

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename")
        super().rename(source, target)
        if source in self.synced:
            self.synced[target] = self.synced.pop(source)
        self.entries.pop(source, None)
        self.entries[target] = source

    def sync_directory(self, path: Path) -> None:
        self._step("sync_directory")
        super().sync_directory(path)
        for known in [one for one in (*self.entries, *self.gone) if one.parent == path]:
            self.entries.pop(known, None)
            self.gone.pop(known, None)

    def unlink(self, path: Path) -> None:
        self._step("unlink")
        if path.exists():
            self.gone[path] = path.read_bytes()
        super().unlink(path)
        self.entries.pop(path, None)

    def make_directory(self, path: Path) -> None:
        self._step("make_directory")
        super().make_directory(path)

    def commit(self, connection: sqlite3.Connection) -> None:
        self._step("commit")
        super().commit(connection)
        self._step("committed")


def fails_with(number: int) -> Callable[[FaultyDisk], None]:
    """The operation is refused."""

    def fault(_: FaultyDisk) -> None:
        raise OSError(number, os.strerror(number))

    return fault


NO_SPACE, READ_ONLY, BROKEN = (
    fails_with(number) for number in (errno.ENOSPC, errno.EROFS, errno.EIO)
)


def killed(path: Path, left: Path) -> Callable[[FaultyDisk], None]:
    """The process is killed: ``left`` is what ``path`` is at that instant."""

    def fault(_: FaultyDisk) -> None:
        _copy(path, left)
        raise Crash

    return fault


def without_power(path: Path, left: Path, seed: int) -> Callable[[FaultyDisk], None]:
    """The machine stops: of what was not synced anything may have happened to the last pages, and
    names may be the old ones or the new ones, which ``seed`` decides."""

    def fault(disk: FaultyDisk) -> None:
        draw = random.Random(seed)
        _copy(path, left)
        for name, size in disk.synced.items():
            file = left / name.relative_to(path)
            if file.exists() and file.stat().st_size > size:
                raw = file.read_bytes()
                end = draw.choice([size, draw.randint(size, len(raw)), len(raw)])
                torn = draw.choice([raw[size:end], bytes(end - size), draw.randbytes(end - size)])
                file.write_bytes(raw[:size] + torn)
        for name, old in disk.entries.items():
            file = left / name.relative_to(path)
            if file.exists() and draw.random() < 0.5:
                if old is None:
                    file.unlink()
                else:
                    file.rename(left / old.relative_to(path))
        for name, raw in disk.gone.items():
            if draw.random() < 0.5:
                (left / name.relative_to(path)).write_bytes(raw)
        raise Crash

    return fault


def _copy(path: Path, left: Path) -> None:
    shutil.rmtree(left, ignore_errors=True)
    if path.exists():
        shutil.copytree(path, left)
