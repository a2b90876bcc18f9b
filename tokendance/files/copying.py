"""Agents from one directory to another, without a pool: what the commands do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import numpy as np

from tokendance.files.catalogue import Changes, Row
from tokendance.files.directory import Directory, FreshRows, Progress
from tokendance.files.identity import RopeTables
from tokendance.files.loading import Listing, StoredMirror, list_directory

LONGEST = (1 << 31) - 1
"""Positions that a record may name: the tables that say more are not at hand."""


def damage_of(
    directory: Directory, listing: Listing, progress: Progress | None = None
) -> dict[str, str]:
    """What is wrong, by agent, after all rows have been read."""
    groups = directory.verify(progress)
    named = dict(listing.damage)
    seen: set[int] = set()
    for one in listing.whole:
        for group in groups_of(listing, one):
            if group in groups:
                named[one.agent] = groups[group]
                seen.add(group)
    return named | {f"group {key}": why for key, why in groups.items() if key not in seen}


def groups_of(listing: Listing, one: StoredMirror) -> list[int]:
    """The groups that a Mirror needs, its Masters' among them."""
    found = [one.group, *(listing.masters[key].group for key in dict.fromkeys(one.masters))]
    return [group for group in found if group is not None]


def copy_agents(
    source: Directory,
    target: Directory,
    agents: Iterable[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Copies agents and their Masters into another directory, all of them in one instant.

    Args:
        source: any directory.
        target: one that is open for writing, of the same model and pages, or a new one.
        agents: their names; None: all, and Masters that nobody uses.

    Returns:
        What is wrong with agents that were left out, by name.

    Raises:
        KeyError: an agent that is not there.
        ValueError: the target has an agent of the name, or other rows.
        OSError: it cannot be written; it is as it was.
    """
    listing = list_directory(source, LONGEST)
    known = {one.agent: one for one in listing.mirrors.values()}
    wanted = list(known) if agents is None else list(dict.fromkeys(agents))
    for agent in wanted:
        if agent not in known:
            raise KeyError(f"agents: expected some of {sorted(known)}, got {agent!r}")
    if target.is_new:
        target.begin(source.identity)
    target.identity.check_same(source.identity, target.path)
    if target.identity.codec != source.identity.codec:
        raise ValueError(
            f"codec: expected that of {target.path}, {target.identity.codec}, got "
            f"{source.identity.codec} of {source.path}"
        )
    ropes = target.ropes.joined(source.ropes, target.path)
    there = list_directory(target, LONGEST)
    mine = sorted({one.agent for one in there.mirrors.values()} & set(wanted))
    if mine:
        raise ValueError(f"agents: expected names that {target.path} does not have, got {mine}")
    left = {agent: listing.damage[agent] for agent in wanted if agent in listing.damage}
    chosen = [known[agent] for agent in wanted if agent not in left]
    needed = {group for one in chosen for group in groups_of(listing, one)}
    wrong = source.verify(progress, needed)
    for one in chosen:
        for group in groups_of(listing, one):
            if group in wrong:
                left[one.agent] = wrong[group]
    whole = [one for one in chosen if one.agent not in left]
    _Copy(source, target, listing).write(whole, agents is None, ropes)
    return left


class _Copy:
    """One call of `copy_agents`: records get new numbers."""

    def __init__(self, source: Directory, target: Directory, listing: Listing) -> None:
        self._source = source
        self._target = target
        self._listing = listing
        rows = target.contents.rows
        self._next = 1 + max([0, *rows["masters"], *rows["mirrors"], *target.groups])
        self._there = {self._content(target, row): key for key, row in rows["masters"].items()}
        self._findable = {
            rows["masters"][key][0] for key in rows["findable"] if key in rows["masters"]
        }
        self._changes = Changes(put={"masters": {}, "mirrors": {}, "findable": {}})
        self._fresh: dict[int, FreshRows] = {}

    def _content(self, directory: Directory, row: Row) -> Row:
        """What makes two Masters the same, whatever their numbers."""
        group = directory.groups.get(row[-1])  # type: ignore[arg-type]
        return (*row[:-1], None if group is None else group.checksum)

    def write(self, mirrors: list[StoredMirror], idle: bool, ropes: RopeTables) -> None:
        numbers: dict[int, int] = {}
        used = {key for one in mirrors for key in one.masters}
        if idle:
            wrong = self._source.verify(groups=self._idle_groups(used))
            used |= {
                key
                for key, one in self._listing.masters.items()
                if one.master and one.recency is not None and one.group not in wrong
            }
        for key in sorted(used):
            numbers[key] = self._master(key)
        for one in mirrors:
            self._mirror(one, numbers)
        self._target.write(self._changes, self._fresh, ropes)

    def _idle_groups(self, used: set[int]) -> set[int]:
        found = {one.group for key, one in self._listing.masters.items() if key not in used}
        return {group for group in found if group is not None}

    def _number(self) -> int:
        self._next += 1
        return self._next - 1

    def _rows(self, group: int | None) -> int | None:
        if group is None:
            return None
        number = self._number()
        there = self._source.groups[group]
        stream = partial(self._source.stream, group)
        self._fresh[number] = FreshRows(there.rows, bool(there.is_master), stream)
        return number

    def _master(self, key: int) -> int:
        row = self._source.contents.rows["masters"][key]
        content = self._content(self._source, row)
        if content in self._there:
            return self._there[content]
        number = self._there[content] = self._number()
        self._changes.put["masters"][number] = (*row[:-1], self._rows(row[-1]))  # type: ignore[arg-type]
        recency = self._listing.masters[key].recency
        if recency is not None and row[0] not in self._findable:
            self._changes.put["findable"][number] = (recency,)
            self._findable.add(row[0])
        return number

    def _mirror(self, one: StoredMirror, numbers: Mapping[int, int]) -> None:
        row = list(self._source.contents.rows["mirrors"][one.key])
        row[7] = np.array([numbers[key] for key in one.masters], dtype="<i8").tobytes()
        row[-1] = self._rows(one.group)
        self._changes.put["mirrors"][self._number()] = tuple(row)
