"""Crashes and failing disks: what is found afterwards is the state before, or the state after."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import faulty_disk
import kill_stores
import pytest
import torch
from driving import GEOMETRY, ROPE
from faulty_disk import Crash, FaultyDisk
from stored_rounds import contents, files_of, open_store, put, same_contents
from torch import Tensor

import tokendance as td
from tokendance.files import compaction, directory, transfer

Contents = dict[str, Tensor]
SEEDS = int(os.environ.get("CRASH_SEEDS", "1"))
"""How often the machine stops at each operation, each time with another part of its memory lost."""


def run(path: Path, told: Callable[[Contents], None]) -> td.DiffStore:
    """The run whose every operation fails once: a store is made, agents come, are replaced and
    released, and files are written anew. ``told`` hears of each state before its flush."""
    store = open_store(path)
    told({})
    put(store, {"ada": 21, "ben": 13})
    told(contents(store))
    store.flush()
    put(store, {"ada": 30, "eve": 9})
    told(contents(store))
    store.flush()
    store.release("ben")
    put(store, {"ben": 18})
    store.evict(1000)
    told(contents(store))
    store.flush()
    store.release("eve")
    told(contents(store))
    store.flush()
    return store


@contextmanager
def on(disk: FaultyDisk) -> Iterator[None]:
    """Directories are on this disk, and their files are written anew as soon as one row is not
    valid. Random rows are always the same."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compaction, "SLACK", -(1 << 40))
        patch.setattr(directory, "Disk", lambda: disk)
        patch.setattr(transfer, "Disk", lambda: disk)
        yield


@pytest.fixture(scope="module")
def operations(memory: Path) -> list[str]:
    """What the run does when nothing fails."""
    disk = FaultyDisk()
    with on(disk):
        store = run(memory / "whole", lambda _: None)
    assert store.agents == ["ada", "ben"]
    store.close()
    shutil.rmtree(memory / "whole")
    return disk.done


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory in memory, where there is one: what waits for a medium is not what is tested."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path_factory.mktemp("memory")
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


def test_the_run_makes_every_kind_of_operation(operations: list[str]) -> None:
    kinds = set(operations)
    assert kinds == {
        *("create", "write", "sync", "rename", "sync_directory", "unlink", "make_directory"),
        *("commit", "committed"),
    }
    assert 80 < len(operations) < 400


def opened(path: Path) -> Contents:
    """What is found, by a store that is whole: nothing wrong, nothing left over, and usable."""
    with open_store(path) as store:
        assert dict(store.damaged) == {}
        assert store.verify() == {}
        found = contents(store)
        known = {f"{number:08d}.safetensors" for number in store._on_disk._directory.files}
        names = set(os.listdir(path)) - {"lock", "catalogue.sqlite"}
        assert {name for name in names if not name.startswith("catalogue.sqlite-")} == known
        put(store, {"new": 11})
    with open_store(path) as store:
        assert store.agents == [*found, "new"]
    return found


def states_of(path: Path, disk: FaultyDisk) -> list[Contents]:
    """Runs until the process ends; returns what may be found: the states before and after."""
    states: list[Contents] = []
    with on(disk), pytest.raises(Crash):
        run(path, states.append)
    return states[-2:]


@pytest.mark.parametrize("power", [None, *range(SEEDS)])
def test_a_crash_at_any_operation_leaves_the_state_before_or_after(
    memory: Path, operations: list[str], power: int | None
) -> None:
    found_before = found_after = 0
    path, left = memory / "store", memory / "left"
    for at in range(len(operations)):
        fault = (
            faulty_disk.killed(path, left)
            if power is None
            else faulty_disk.without_power(path, left, 1000 * power + at)
        )
        states = states_of(path, FaultyDisk(at, fault))
        found = opened(left) if left.exists() else {}
        assert any(same_contents(found, one) for one in states or [{}]), operations[at]
        found_before += bool(states) and same_contents(found, states[0])
        found_after += bool(states) and same_contents(found, states[-1])
        shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(left, ignore_errors=True)
    assert found_before > 20
    assert found_after > 4


@pytest.mark.parametrize(
    "fault", [faulty_disk.NO_SPACE, faulty_disk.READ_ONLY, faulty_disk.BROKEN],
    ids=["full", "read_only", "broken"],
)  # fmt: skip
def test_a_disk_that_fails_at_any_operation_loses_nothing(
    memory: Path, operations: list[str], fault: object
) -> None:
    """Memory is as it was, disk is as it was, and the same store writes it when the disk works."""
    path = memory / "store"
    failed = 0
    for at in range(len(operations)):
        states: list[Contents] = []
        stores: list[td.DiffStore] = []
        with on(FaultyDisk(at, fault)):  # type: ignore[arg-type]
            for step in follow(path, states, stores):
                try:
                    step()
                except OSError:
                    failed += 1
                    if stores:
                        assert same_contents(contents(stores[0]), states[-1])
                    step()  # the disk fails once
            assert same_contents(contents(stores[0]), states[-1])
            stores.pop().close()
        assert same_contents(opened(path), states[-1]), operations[at]
        shutil.rmtree(path)
    # Nobody is told of files that could not be removed or put together: the next flush tries again.
    assert failed > len(operations) / 2


def follow(
    path: Path, states: list[Contents], stores: list[td.DiffStore]
) -> Iterator[Callable[[], object]]:
    """The steps of a run that touch the disk, each of which may be done twice."""
    states.append({})
    yield lambda: stores.append(open_store(path)) if not stores else None
    [store] = stores
    for rows, released in (
        ({"ada": 21, "ben": 13}, ()),
        ({"ada": 30, "eve": 9}, ()),
        ({"ben": 18}, ("ben",)),
        ({}, ("eve",)),
    ):
        for agent in released:
            store.release(agent)
        if rows:
            put(store, rows)
        store.evict(1000)
        states.append(contents(store))
        yield store.flush


def test_an_export_is_there_as_a_whole_or_not_at_all(
    tmp_path: Path,
) -> None:
    store = td.DiffStore(GEOMETRY, ROPE, "1MiB", block_size=8)
    want = put(store, {"ada": 21, "ben": 13})
    disk = FaultyDisk()
    with on(disk):
        store.export_agents(tmp_path / "whole")
    for at in range(len(disk.done)):
        try:
            with on(FaultyDisk(at, faulty_disk.NO_SPACE)):
                store.export_agents(tmp_path / "agents")
        except OSError:
            # It may be there already when the names cannot be synced.
            if not (tmp_path / "agents").exists():
                assert [one.name for one in tmp_path.iterdir()] == ["whole"]
                continue
        assert same_contents(opened(tmp_path / "agents"), want)
        shutil.rmtree(tmp_path / "agents")
    assert at > 10


def test_a_directory_that_has_vanished_is_named(tmp_path: Path) -> None:
    path = tmp_path / "store"
    store = open_store(path)
    put(store, {"ada": 21})
    store.flush()
    want = {**contents(store), **put(store, {"ben": 13})}
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="path: expected the store's directory, got none"):
        store.flush()
    path.mkdir()
    with pytest.raises(OSError, match="catalogue: expected the one that was opened, got another"):
        store.flush()
    assert files_of(path) == []
    path.rmdir()
    (tmp_path / "elsewhere").rename(path)
    store.close()
    assert same_contents(opened(path), want)


def test_stores_that_are_killed_lose_nothing(tmp_path: Path) -> None:
    """The short form of ``make crash``."""
    report = kill_stores.kill_many(tmp_path / "store", kills=12, seed=0)
    assert report.kills == 12
    assert report.losses == []
    assert report.flushed > 0
