"""Agents that pass from one store to another: directories that are written once.

An export is a directory like a store's own: the same formats, the same checks, and `DiffStore.open`
takes it too. A single file would need a second format for what the catalogue says.
"""

from __future__ import annotations

import errno
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tokendance.device.layer_ropes import LayerRope
from tokendance.device.pool import PagePool
from tokendance.files.directory import LOCK, Directory, Progress
from tokendance.files.disk import Disk, lock
from tokendance.files.durability import Chosen, Durability, Guard
from tokendance.files.errors import DamagedError
from tokendance.files.identity import Identity
from tokendance.files.loading import Listing, list_directory, load, use_instead
from tokendance.files.memory import DeviceMemory
from tokendance.files.page_file import hasher
from tokendance.host.books import Books
from tokendance.host.mirror import Master


@contextmanager
def new_directory(path: str | os.PathLike[str]) -> Iterator[Directory]:
    """A directory that is there as a whole when the block ends, or not at all.

    Raises:
        OSError: there is something at ``path``, or it cannot be written.
    """
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(
            errno.EEXIST, "path: expected nothing there, or an empty directory", str(path)
        )
    _remove_scratch(target)
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    disk = Disk()
    try:
        directory = Directory.open(scratch, create=True, disk=disk)
        try:
            yield directory
        finally:
            directory.close()
        disk.rename(scratch, target)
        disk.sync_directory(target.absolute().parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _remove_scratch(target: Path) -> None:
    """Removes what a process has left that was killed: nobody has its lock."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        try:
            unlock = lock(left / LOCK, shared=False)
        except OSError:
            continue
        shutil.rmtree(left, ignore_errors=True)
        unlock()


def export_agents(
    path: str | os.PathLike[str],
    identity: Identity,
    memory: DeviceMemory,
    ropes: Sequence[LayerRope],
    max_position: int,
    guard: Guard,
    chosen: Chosen,
) -> None:
    """Writes chosen agents, and Masters that later rounds find, to a new directory.

    Raises:
        OSError: there is something at ``path``, or it cannot be written.
    """
    with new_directory(path) as directory:
        directory.begin(identity)
        Durability(directory, memory, ropes, max_position, guard).write(chosen)


def import_agents(
    path: str | os.PathLike[str],
    identity: Identity,
    memory: DeviceMemory,
    ropes: Sequence[LayerRope],
    max_position: int,
    guard: Guard,
    taken: Callable[[], Container[str]],
    agents: Iterable[str] | None,
    progress: Progress | None = None,
) -> list[str]:
    """Brings agents of a directory into a store; returns their names.

    A Master that the store has in the same form is used, and not stored a second time.

    Raises:
        OSError, DamagedError, ValueError: as `Directory.open`.
        KeyError: an agent that is not there.
        DamagedError: one of them is damaged; nothing has changed, but for evictions.
        ValueError: it is of another model, or the store has an agent of the same name.
        OutOfPagesError: there are too few pages; nothing has changed, but for evictions.
    """
    books, pool = memory.books, memory.pool
    directory = Directory.open(path, writable=False)
    try:
        directory.identity.check_same(identity, path)
        directory.ropes.check_same(ropes, max_position, path)
        listing = list_directory(directory, max_position)
        known = {one.agent for one in listing.mirrors.values()}
        wanted = sorted(known) if agents is None else list(dict.fromkeys(agents))
        for agent in wanted:
            if agent not in known:
                raise KeyError(f"agents: expected some of {sorted(known)}, got {agent!r}")
        with guard:
            mine = [agent for agent in wanted if agent in taken()]
        if mine:
            raise ValueError(f"agents: expected names that the store does not have, got {mine}")
        _refuse_damaged(listing, wanted)
        with guard:
            alike = _masters_that_are_alike(listing, books)
            books.hold(list(alike.values()))
        try:
            used = {
                k for one in listing.mirrors.values() if one.agent in wanted for k in one.masters
            }
            needed = {key: master for key, master in alike.items() if key in used}
            there = _with_the_same_bits(directory, listing, pool, needed)
            use_instead(listing, there, pool.block_size)
            loaded = load(
                *(directory, listing, wanted, books, pool, guard),
                idle=False,
                progress=progress,
                all_or_none=True,
            )
            if len(loaded) < len(wanted):
                with guard:
                    for one in loaded:
                        books.drop(one.agent)
                _refuse_damaged(listing, wanted)
                raise ValueError("agents: expected names that nobody commits meanwhile")
        finally:
            with guard:
                books.let_go(list(alike.values()))
        return wanted
    finally:
        directory.close()


def _refuse_damaged(listing: Listing, wanted: Sequence[str]) -> None:
    damaged = {agent: listing.damage[agent] for agent in wanted if agent in listing.damage}
    for agent, why in damaged.items():
        whole = [one for one in wanted if one not in damaged]
        raise DamagedError(
            f"agents: expected whole ones, such as {whole[:5]}, got {agent!r}: {why}"
        )


def _masters_that_are_alike(listing: Listing, books: Books) -> dict[int, Master]:
    """By id of the directory, Masters of the books of which everything but the rows is the same."""
    found = {}
    for key, one in listing.masters.items():
        mine = books.masters.get(one.master.digest) if one.master is not None else None
        if mine is not None and one.group is not None and _same(mine, one.master):
            found[key] = mine
    return found


def _with_the_same_bits(
    directory: Directory, listing: Listing, pool: PagePool, alike: Mapping[int, Master]
) -> dict[int, Master]:
    found = {}
    for key, mine in alike.items():
        summed = hasher()
        codec = directory.identity.row_codec(is_master=True)
        for piece in codec.read(pool, mine.pages, mine.length):
            summed.update(piece)
        group = listing.masters[key].group
        if group is not None and summed.digest() == directory.groups[group].checksum:
            found[key] = mine
    return found


def _same(mine: Master, other: Master | None) -> bool:
    fields = ("length", "origin", "context", "exact", "seen")
    return all(getattr(mine, name) == getattr(other, name) for name in fields)
