"""``tokendance store``: what is in a store's directory, and whether it is whole.

No command needs the model or a pool: rows pass from file to file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from tokendance.files.directory import Directory

SUMMARY = "List, show, verify, export, import or tidy the directory of a store."

_STEPS = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="what", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text)
        one.add_argument("path", type=Path, help="the directory of a store")
        return one

    command("ls", "List the agents: rows, own rows, Masters, bytes.")
    show = command("show", "Show what the store is of, or what an agent's rows are.")
    show.add_argument("agent", nargs="?")
    command("verify", "Read every row and every record again, and name what is damaged.")
    export = command("export", "Write agents that are whole to a new directory.")
    export.add_argument("target", type=Path, help="a directory that is not there yet")
    export.add_argument("agents", nargs="*", help="default: all")
    take = command("import", "Bring agents of another directory into the store.")
    take.add_argument("source", type=Path, help="the directory of another store, or an export")
    take.add_argument("agents", nargs="*", help="default: all")
    command("gc", "Remove what is not valid any more, and what killed processes have left.")


def run(arguments: argparse.Namespace) -> int:
    from tokendance.files.errors import DamagedError

    commands: dict[str, Callable[[argparse.Namespace], int]] = {
        "ls": _ls,
        "show": _show,
        "verify": _verify,
        "export": _export,
        "import": _import,
        "gc": _gc,
    }
    try:
        return commands[arguments.what](arguments)
    except (OSError, ValueError, DamagedError) as error:
        print(f"tokendance store {arguments.what}: {error}", file=sys.stderr)
    except KeyError as error:
        print(f"tokendance store {arguments.what}: {error.args[0]}", file=sys.stderr)
    return 1


@contextmanager
def _opened(path: Path, writable: bool = False, damaged: bool = False) -> Iterator[Directory]:
    from tokendance.files.directory import Directory

    directory = Directory.open(path, writable=writable, damaged=damaged)
    try:
        yield directory
    finally:
        directory.close()


def _problem(directory: Directory) -> int:
    """Says what is wrong with a catalogue of which a part is missing."""
    if directory.problem:
        print(f"damaged: catalogue: {directory.problem}", file=sys.stderr)
        return 1
    return 0


def _ls(arguments: argparse.Namespace) -> int:
    from tokendance.files.copying import LONGEST, groups_of
    from tokendance.files.loading import list_directory

    with _opened(arguments.path, damaged=True) as directory:
        listing = list_directory(directory, LONGEST)
        lines = [("agent", "rows", "own", "masters", "bytes")]
        for one in listing.whole:
            assert one.mirror is not None
            size = directory.bytes_of(groups_of(listing, one))
            own, masters = len(one.mirror.own_position), len(set(one.masters))
            shown = (one.mirror.length, own, masters, size)
            lines.append((one.agent, *map(str, shown)))  # type: ignore[arg-type]
        widths = [max(len(line[i]) for line in lines) for i in range(5)]
        for line in lines:
            cells = [f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True)]
            print(f"{line[0]:<{widths[0]}}  {'  '.join(cells)}")
        gone = directory.file_bytes - directory.live_bytes
        print(
            f"{len(listing.whole)} agents, {len(listing.masters)} Masters, {len(directory.files)} "
            f"files, {directory.live_bytes} bytes of rows, {gone} not valid any more"
        )
        for agent, why in listing.damage.items():
            print(f"damaged: {agent}: {why}", file=sys.stderr)
        return 1 if _problem(directory) or listing.damage else 0


def _show(arguments: argparse.Namespace) -> int:
    from tokendance.files.copying import LONGEST
    from tokendance.files.loading import list_directory

    with _opened(arguments.path, damaged=True) as directory:
        status = _problem(directory)
        if arguments.agent is None:
            print(f"store: {directory.store}")
            for name, value in vars(directory.identity).items():
                print(f"{name}: {value}")
            print(f"positions: {directory.ropes.positions}")
            return status
        listing = list_directory(directory, LONGEST)
        known = {one.agent: one for one in listing.mirrors.values()}
        if arguments.agent not in known:
            raise KeyError(f"agent: expected one of {sorted(known)}, got {arguments.agent!r}")
        found = known[arguments.agent]
        if found.mirror is None:
            print(f"damaged: {found.agent}: {listing.damage[found.agent]}", file=sys.stderr)
            return 1
        mirror, at = found.mirror, 0
        own = len(mirror.own_position)
        print(f"{mirror.length} rows, {own} of them own, {mirror.exact_length} exact")
        for segment in mirror.segments:
            kind = "shared" if segment.is_shared else "private"
            print(f"segment {at:>7} {kind:<7} {segment.length:>7} rows  {segment.digest.hex()}")
            at += segment.length
        for key, use in zip(found.masters, mirror.uses, strict=True):
            replaced = len(use.overridden(directory.identity.block_size))
            print(
                f"use     {use.delta:>7} of Master {key}, {use.length} rows computed at "
                f"{use.master.origin}, {replaced} replaced"
            )
        return status


def _verify(arguments: argparse.Namespace) -> int:
    from tokendance.files.copying import LONGEST, damage_of
    from tokendance.files.loading import list_directory

    with _opened(arguments.path, damaged=True) as directory:
        found = directory.check_catalogue()
        problem = _problem(directory)
        if found:
            print(f"damaged: catalogue: {found}", file=sys.stderr)
        listing = list_directory(directory, LONGEST)
        with _progress("verify") as progress:
            damage = damage_of(directory, listing, progress)
        for agent, why in damage.items():
            print(f"damaged: {agent}: {why}", file=sys.stderr)
        whole = sum(one.agent not in damage for one in listing.mirrors.values())
        print(f"{whole} of {len(listing.mirrors)} agents are whole")
        return 1 if damage or problem or found else 0


def _export(arguments: argparse.Namespace) -> int:
    from tokendance.files.copying import copy_agents
    from tokendance.files.transfer import new_directory

    with _opened(arguments.path, damaged=True) as source:
        status = _problem(source)
        with new_directory(arguments.target) as target, _progress("export") as progress:
            left = copy_agents(source, target, arguments.agents or None, progress)
        return _said(left) or status


def _import(arguments: argparse.Namespace) -> int:
    from tokendance.files.copying import copy_agents

    with (
        _opened(arguments.path, writable=True) as target,
        _opened(arguments.source) as source,
        _progress("import") as progress,
    ):
        return _said(copy_agents(source, target, arguments.agents or None, progress))


def _said(left: dict[str, str]) -> int:
    for agent, why in left.items():
        print(f"left out: {agent}: {why}", file=sys.stderr)
    return 1 if left else 0


def _gc(arguments: argparse.Namespace) -> int:
    from tokendance.files.compaction import compact

    with _opened(arguments.path, writable=True) as directory, _progress("gc") as progress:
        print(f"{compact(directory, None, progress)} bytes removed")
    return 0


@contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal: tqdm's where it is installed."""
    if not sys.stderr.isatty():
        yield None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        bar = _Bar(label, sys.stderr)
        yield bar.update
        bar.end()
        return
    with tqdm(desc=label, unit="B", unit_scale=True, unit_divisor=1024, leave=False) as shown:

        def update(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield update


class _Bar:
    """A line of marks."""

    def __init__(self, label: str, stream: TextIO) -> None:
        self._label = label
        self._stream = stream
        self._shown = -1

    def update(self, done: int, total: int) -> None:
        marks = _STEPS * done // max(total, 1)
        if marks > self._shown:
            self._shown = marks
            self._stream.write(f"\r{self._label} [{'#' * marks:<{_STEPS}}]")
            self._stream.flush()

    def end(self) -> None:
        if self._shown >= 0:
            self._stream.write("\n")
