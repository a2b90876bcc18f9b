"""The file operations of a store's directory: the one place where bytes pass to the system.

Every guarantee rests on their order. Tests put a disk in this one's place that fails at the n-th
operation, or forgets what was not synced before it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

from tokendance.files.errors import StoreInUseError


class Disk:
    """Operations on files; paths are absolute or relative to the process."""

    def create(self, path: Path) -> int:
        """Opens a new file for writing; it must not exist."""
        return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)

    def write(self, file: int, data: memoryview) -> None:
        """Appends all of ``data``."""
        while len(data):
            data = data[os.write(file, data) :]

    def sync(self, file: int) -> None:
        """Returns when the file's bytes are on the medium."""
        os.fsync(file)

    def rename(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def sync_directory(self, path: Path) -> None:
        """Returns when the directory's entries are on the medium."""
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def make_directory(self, path: Path) -> None:
        os.mkdir(path, 0o700)

    def commit(self, connection: sqlite3.Connection) -> None:
        """Ends a transaction; it is on the medium when this returns (``synchronous=FULL``)."""
        connection.execute("COMMIT")


def read_at(file: int, offset: int, buffer: memoryview) -> int:
    """Fills ``buffer`` from the file; returns how many bytes there were."""
    done = 0
    while done < len(buffer):
        count = os.preadv(file, [buffer[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def lock(path: Path, shared: bool) -> Callable[[], None]:
    """Takes a directory's lock until the function that is returned is called, or the process ends.

    Args:
        path: of the file that is locked.
        shared: for reading alone, beside others that read.

    Raises:
        StoreInUseError: somebody else has it.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        if not shared or error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        try:
            file = os.open(path, os.O_RDONLY)  # of a medium that cannot be written
        except FileNotFoundError:
            return lambda: None  # where nobody can write, nobody has to be kept out
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(file, 32, 0).decode(errors="replace").split(" ")[0].strip()
        os.close(file)
        if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
            raise
        raise StoreInUseError(
            errno.EWOULDBLOCK,
            f"path: expected a store that nobody else has open, got one that process "
            f"{holder or 'unknown'} has",
            str(path.parent),
        ) from None
    return lambda: os.close(file)
