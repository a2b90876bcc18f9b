"""Directories that are not as they were written: what is wrong is named, the rest is usable."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from driving import GEOMETRY, ROPE, make_store, run_round, tokens
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from stored_rounds import (
    contents,
    files_of,
    flip,
    group_of,
    open_store,
    play,
    prompts,
    put,
    same_contents,
)
from torch import Tensor

import tokendance as td
from tokendance.files.catalogue import VERSION, Catalogue, Changes, Row
from tokendance.files.copying import LONGEST, copy_agents, damage_of
from tokendance.files.directory import CATALOGUE, Directory
from tokendance.files.disk import Disk
from tokendance.files.loading import list_directory

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "100"))
"""Of damaged directories; ``make fuzz`` takes more."""


def make(path: Path) -> dict[str, Tensor]:
    """Three agents in two files; returns their rows."""
    with open_store(path) as store:
        rows = put(store, {"ada": 21, "ben": 13})
        store.flush()
        rows |= put(store, {"eve": 30})
    assert len(files_of(path)) == 2
    return rows


def check(path: Path, want: dict[str, Tensor], damaged: dict[str, str]) -> None:
    """These agents are named as damaged, with this reason; the others are as they were."""
    with open_store(path) as store:
        assert store.damaged.keys() == damaged.keys()
        for agent, reason in damaged.items():
            assert reason in store.damaged[agent]
            with pytest.raises(td.DamagedError, match=f"expected one that is whole, got '{agent}'"):
                store.length(agent)
        whole = {agent: rows for agent, rows in want.items() if agent not in damaged}
        assert same_contents(contents(store), whole)
        if damaged:
            assert store.verify().keys() >= damaged.keys()


def test_one_bit_of_an_agents_rows_damages_that_agent(tmp_path: Path) -> None:
    path = tmp_path / "store"
    want = make(path)
    file, begin = group_of(path, "ada")
    flip(file, begin + 1000)
    check(path, want, {"ada": f"{file}: expected rows of group"})
    # It stays on disk until somebody decides.
    check(path, want, {"ada": f"{file}: expected rows of group"})
    with open_store(path) as store:
        store.release("ada")
        assert dict(store.damaged) == {}
    check(path, {agent: want[agent] for agent in ("ben", "eve")}, {})


def test_damage_is_logged_and_not_imported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "store"
    want = make(path)
    file, begin = group_of(path, "ada")
    flip(file, begin)
    with make_store() as store:
        for agents in (None, ["ada"], ["ada", "ben"]):
            with pytest.raises(
                td.DamagedError, match=r"agents: expected whole ones, .*, got 'ada'"
            ):
                store.import_agents(path, agents)
            assert (store.agents, store.stats().used_pages) == ([], 0)
        assert store.import_agents(path, ["ben"]) == ["ben"]
        assert torch.equal(contents(store)["ben"], want["ben"])
    with open_store(path):
        assert f"agent 'ada' is left out: {file}: expected rows" in caplog.text


def test_a_damaged_agent_is_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with open_store(path) as store:
        play(td.KVCollector(store), prompts())
        want = contents(store)
    flip(*group_of(path, "b"))
    with open_store(path) as store:
        assert list(store.damaged) == ["b"]
        play(td.KVCollector(store), {"b": prompts()["b"]}, durable=True)
        assert dict(store.damaged) == {}
        assert store.length("b") == len(want["b"][0, 0])
        found = contents(store)
    check(path, found, {})


def test_a_damaged_master_damages_all_who_use_it(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with open_store(path) as store:
        collector = td.KVCollector(store)
        news = td.shared(tokens(1, 64))
        run_round(
            collector, {name: [news, td.private(tokens(i, 9))] for i, name in enumerate("abc")}
        )
        run_round(collector, {"d": [td.private(tokens(9, 30))]})
        want = contents(store)
    directory = Directory.open(path, writable=False)
    [master] = directory.contents.rows["masters"].values()
    with directory.file(directory.groups[master[-1]].file) as file:
        begin = file._entries[str(master[-1])][1] + file._start
    directory.close()
    flip(file.path, begin)
    reason = f"{file.path}: expected rows of group {master[-1]}"
    check(path, want, dict.fromkeys("abc", reason))
    with open_store(path) as store:  # the Master is not found any more, and computed again
        run_round(td.KVCollector(store), {"a": [news]})
        assert store.stats().masters == 1
        want["a"] = contents(store)["a"]
    check(path, want, dict.fromkeys("bc", reason))


@pytest.mark.parametrize("kept", [0, 7, 8, 100, 4000])
def test_a_file_that_is_cut_damages_whose_rows_are_gone(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "store"
    want = make(path)
    file, _ = group_of(path, "eve")
    os.truncate(file, kept)
    check(path, want, {"eve": f"{file}: expected"})


def test_a_file_that_is_cut_at_its_end_keeps_the_groups_before(tmp_path: Path) -> None:
    path = tmp_path / "store"
    want = make(path)
    (file, begin), (same, later) = group_of(path, "ada"), group_of(path, "ben")
    assert file == same
    first, last = ("ada", "ben") if begin < later else ("ben", "ada")
    os.truncate(file, file.stat().st_size - 1)
    check(path, want, {last: f"{file}: expected {file.stat().st_size + 1} bytes"})
    assert first in want


@pytest.mark.parametrize(
    ("replace", "reason"),
    [
        (lambda file, other: file.unlink(), "expected a page file, got none"),
        (lambda file, other: shutil.copy(other, file), "expected store '"),
        (lambda file, other: file.write_bytes(b"PK\3\4" * 999), "expected a header within"),
        (lambda file, other: shutil.copy(file.with_stem("00000001"), file), "expected file '2'"),
    ],
    ids=["missing", "of another store", "of another kind", "of another number"],
)
def test_foreign_files_are_refused(
    tmp_path: Path, replace: Callable[[Path, Path], object], reason: str
) -> None:
    path = tmp_path / "store"
    want = make(path)
    make(tmp_path / "other")
    file, _ = group_of(path, "eve")
    replace(file, tmp_path / "other" / file.name)
    check(path, want, {"eve": f"{file}: {reason}"})


def refused(path: Path, match: str) -> None:
    """And nothing is removed or changed by it."""
    before = {one.name: one.read_bytes() for one in path.iterdir() if one.suffix != ".sqlite-shm"}
    with pytest.raises((td.DamagedError, ValueError), match=match):
        open_store(path)
    after = {one.name: one.read_bytes() for one in path.iterdir()}
    assert {name: after.get(name) for name in before if "sqlite-" not in name} == {
        name: raw for name, raw in before.items() if "sqlite-" not in name
    }


def test_a_catalogue_that_is_gone_or_another_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store"
    make(path)
    catalogue = path / CATALOGUE
    raw = catalogue.read_bytes()
    catalogue.unlink()
    refused(path, "catalogue.sqlite: expected the catalogue of 2 page files, got none")
    for raw_left in (b"", raw[:1], raw[:511]):
        catalogue.write_bytes(raw_left)
        refused(path, "catalogue.sqlite: expected the catalogue of 2 page files, got none")
    catalogue.write_bytes(b"junk" * 2048)
    refused(path, "catalogue.sqlite: expected a catalogue of a store, got file is not a database")
    catalogue.unlink()
    other = sqlite3.connect(catalogue)
    other.execute("CREATE TABLE masters (id INTEGER PRIMARY KEY)")
    other.commit()
    other.close()
    refused(path, "catalogue.sqlite: expected a catalogue of a store, got another file")
    catalogue.write_bytes(raw[: len(raw) // 2])
    refused(path, "catalogue.sqlite: expected")
    catalogue.write_bytes(raw)
    run_sql(path, "PRAGMA user_version=99")
    refused(path, f"catalogue.sqlite: expected version {VERSION}, got 99")


def run_sql(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path / CATALOGUE)
    connection.execute(statement)
    connection.commit()
    connection.close()


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"path: expected an empty directory or .*notes.txt"):
        open_store(tmp_path)
    with pytest.raises(NotADirectoryError, match="path: expected the directory of a store"):
        open_store(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError):
        open_store(tmp_path / "missing" / "store")
    assert [one.name for one in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("statement", "match"),
    [
        ("DELETE FROM mirrors WHERE id=(SELECT max(id) FROM mirrors)", r"it has \d+ rows, of \d+"),
        ("DELETE FROM facts", "expected what the store is of, got none"),
        ("DELETE FROM state", "its row of counts is damaged"),
        ("UPDATE state SET total=x'00'", "its row of counts is damaged"),
        ("CREATE TRIGGER t AFTER UPDATE ON state BEGIN SELECT 1; END", "expected the tables of"),
        ("UPDATE facts SET value='{}' WHERE name='identity'", "expected what a store is of, got"),
    ],
)
def test_a_catalogue_that_lacks_something_is_refused(
    tmp_path: Path, statement: str, match: str
) -> None:
    path = tmp_path / "store"
    make(path)
    run_sql(path, statement)
    refused(path, match)


def test_an_earlier_record_is_noticed(tmp_path: Path) -> None:
    """Each row is whole, and not all are of the same instant."""
    path = tmp_path / "store"
    make(path)
    connection = sqlite3.connect(path / CATALOGUE)
    earlier = connection.execute("SELECT * FROM findable").fetchall()
    with open_store(path) as store:
        news = [td.shared(tokens(5, 40))]
        run_round(td.KVCollector(store), {"dan": news})
        store.release("ada")
        store.release("dan")
    later = connection.execute("SELECT * FROM findable").fetchall()
    for row in set(earlier) - set(later):
        statement = "UPDATE findable SET recency=?, sum=? WHERE id=?"
        connection.execute(statement, (row[1], row[2], row[0]))
    connection.commit()
    connection.close()
    refused(path, "its rows are not those that were written last")


def test_a_log_that_ends_early_is_noticed(tmp_path: Path) -> None:
    """SQLite goes back to an earlier state without a word."""
    path, left = tmp_path / "store", tmp_path / "left"
    store = open_store(path)
    rows = put(store, {"ada": 21})
    store.flush()
    rows |= put(store, {"ben": 13})
    store.flush()
    shutil.copytree(path, left)  # as a process leaves it that is killed
    store.close()
    whole = tmp_path / "whole"
    shutil.copytree(left, whole)
    check(whole, rows, {})
    log = left / f"{CATALOGUE}-wal"
    flip(log, log.stat().st_size - 3000)
    (left / f"{CATALOGUE}-shm").unlink()
    with pytest.raises(td.DamagedError, match="it ends with transaction 2, and there have been 3"):
        open_store(left)
    assert len(files_of(left)) == 2


# Records that are whole and wrong ---------------------------------------------------------------


def change(path: Path, table: str, key: int, edit: Callable[[list[object]], None]) -> None:
    """Writes a record with its checksum as a store would."""
    catalogue = Catalogue(path / CATALOGUE, Disk(), True)
    row: list[object] = list(catalogue.read().rows[table][key])
    edit(row)
    catalogue.write(Changes(put={table: {key: tuple(row)}}))  # type: ignore[arg-type]
    catalogue.close()


def setting(index: int, value: object) -> Callable[[list[object]], None]:
    return lambda row: row.__setitem__(index, value)


def packed(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(4, "little", signed=True) for number in numbers)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (setting(1, 3), r"expected \d+ tokens of its segments at length, got 3"),
        (setting(1, "21"), "expected int at length, got str"),
        (setting(2, 99), r"expected 0\.\.21 at exact_length, got 99"),
        (setting(3, packed(-1, 22)), r"expected at least 0 at segment_length, got \[-1, 22\]"),
        (setting(3, b"abc"), "expected numbers of 4 bytes at segment_length, got 3"),
        (setting(4, b""), "expected 2 bytes at segment_kind, got 0"),
        (setting(5, b"x" * 16), "expected 96 bytes at segment_digests, got 16"),
        (setting(6, packed(1, 2)), "expected 21 tokens at token_ids, got 2"),
        (setting(6, packed(*[-7] * 21)), r"expected at least 0 at token_ids, got \[-7\]"),
        (setting(7, (777).to_bytes(8, "little")), r"a Master that is whole at use_master\[0\]"),
        (setting(8, packed(1, 2)), "expected 1 numbers at use_delta, got 2"),
        (setting(8, packed(-1)), r"expected at least 0 at use_delta\[0\], got -1"),
        (setting(9, packed(17)), r"expected 0\.\.16 at use_length\[0\], got 17"),
        (setting(10, b""), "expected 2 pages at masks, got 0"),
        (setting(10, bytes(12)), "expected 2 pages at masks, got 3"),
        (setting(11, packed(4, 3, 2, 1, 0)), "expected ascending positions below 21"),
        (setting(11, packed(0, 1, 2, 3, 21)), "expected ascending positions below 21"),
        (setting(11, packed(0, 1)), "expected 2 rows at group"),
        (setting(12, None), "expected a group of 5 rows at row_group, got None"),
        (setting(12, 999), "expected 5 rows at group 999, got none"),
    ],
)
def test_records_that_no_store_writes_are_refused(
    tmp_path: Path, edit: Callable[[list[object]], None], text: str
) -> None:
    path = tmp_path / "store"
    want = make(path)
    directory = Directory.open(path, writable=False)
    rows = directory.contents.rows["mirrors"]
    directory.close()
    [key] = [key for key, row in rows.items() if row[0] == b"ada"]
    change(path, "mirrors", key, edit)
    with open_store(path) as store:
        assert list(store.damaged) == ["ada"]
        assert re.search(text, store.damaged["ada"]), store.damaged["ada"]
        whole = {agent: want[agent] for agent in ("ben", "eve")}
        assert same_contents(contents(store), whole)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (setting(0, b"short"), "expected 0 or 16 bytes at digest, got 5"),
        (setting(1, -1), "expected at least 0 at length and origin"),
        (setting(2, 5000), "expected rows up to position 4096 at length, got 50"),
        (setting(3, 7), "expected bytes at context, got int"),
        (setting(5, b"odd"), "expected 16 bytes each at seen, got 3"),
        (setting(6, 999), "rows at group 999, got none"),
    ],
)
def test_masters_that_no_store_writes_are_refused(
    tmp_path: Path, edit: Callable[[list[object]], None], text: str
) -> None:
    path = tmp_path / "store"
    want = make(path)
    directory = Directory.open(path, writable=False)
    rows = directory.contents.rows
    directory.close()
    [mirror] = [row for row in rows["mirrors"].values() if row[0] == b"eve"]
    key = int.from_bytes(mirror[7], "little")  # type: ignore[arg-type]
    change(path, "masters", key, edit)
    with open_store(path) as store:
        assert list(store.damaged) == ["eve"]
        assert text in store.damaged["eve"]
        assert same_contents(contents(store), {agent: want[agent] for agent in ("ada", "ben")})


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "store"
    want = make(path)
    directory = Directory.open(path, writable=False)
    rows = directory.contents.rows["mirrors"]
    directory.close()
    [key] = [key for key, row in rows.items() if row[0] == b"ada"]
    change(path, "mirrors", key, setting(0, b"\xff\xfe"))
    with open_store(path) as store:
        assert list(store.damaged) == [f"mirror {key}"]
        assert same_contents(contents(store), {agent: want[agent] for agent in ("ben", "eve")})


# Any bytes --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole() -> Iterator[Whole]:
    """A store as a killed process leaves it, in memory where there is such a directory."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as base:
        path = Path(base) / "whole"
        torch.manual_seed(1)
        store = open_store(path)
        earlier = put(store, {"ada": 21, "ben": 13})
        store.flush()
        rows = {**earlier, **put(store, {"ada": 18, "eve": 30})}
        store.flush()
        shutil.copytree(path, Path(base) / "killed")
        store.close()
        yield Whole(Path(base), rows, earlier)


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, int, str, int, bytes]:
    """Which store, which of its files, what happens to it, where, and what is put there."""
    return (
        draw(st.sampled_from(["whole", "killed"])),
        draw(st.integers(0, 5)),
        draw(st.sampled_from(["flip", "put", "cut", "insert", "zero"])),
        draw(st.integers(0, 1 << 40)),
        draw(st.binary(min_size=1, max_size=64)),
    )


def damaged(raw: bytes, kind: str, at: int, new: bytes) -> bytes:
    # Half of the places are near the front, where headers are.
    at = at % (min(len(raw), 4096) if at % 2 else max(len(raw), 1)) if raw else 0
    if kind == "flip" and raw:
        return raw[:at] + bytes([raw[at] ^ (1 << new[0] % 8)]) + raw[at + 1 :]
    if kind == "put":
        return raw[:at] + new + raw[at + len(new) :]
    if kind == "cut":
        return raw[:at]
    if kind == "insert":
        return raw[:at] + new + raw[at:]
    return raw[:at] + bytes(4096) + raw[at + 4096 :]


class Whole(NamedTuple):
    """Stores to be damaged, the rows of their agents, and those of an earlier flush."""

    base: Path
    rows: dict[str, Tensor]
    earlier: dict[str, Tensor]

    def __repr__(self) -> str:
        return f"Whole({self.base})"


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(damages(), min_size=1, max_size=3))
def test_any_damage_is_refused_or_harmless(
    whole: Whole, what: list[tuple[str, int, str, int, bytes]]
) -> None:
    """Whatever is still given out is as it was written, and what is not is named."""
    base, want, earlier = whole
    path = base / "damaged"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(base / what[0][0], path)
    names = sorted(os.listdir(path))
    chosen = {names[number % len(names)] for _, number, *_ in what}
    assume(
        not {"lock", f"{CATALOGUE}-wal"} <= chosen
    )  # one is what the damage to the other shows by
    for _, number, kind, at, new in what:
        file = path / names[number % len(names)]
        file.write_bytes(damaged(file.read_bytes(), kind, at, new))
    exported, problem = read_without_a_pool(path, base / "exported")
    for agent, rows in exported.items():
        # What is left of a log that has lost its end is an earlier state, and said to be so.
        same = torch.equal(rows, want[agent])
        assert same or (problem and torch.equal(rows, earlier[agent]))
    try:
        store = open_store(path)
    except (td.DamagedError, ValueError):
        return
    with store:
        found = contents(store)
        assert all(torch.equal(rows, want[agent]) for agent, rows in found.items())
        assert len(found) + len(store.damaged) >= len(want)
        assert not problem
        assert exported.keys() == found.keys()
        verified = store.verify()
        assert verified.keys() >= store.damaged.keys()


def read_without_a_pool(path: Path, target: Path) -> tuple[dict[str, Tensor], str]:
    """What the commands find and export, and what they say is wrong with the catalogue."""
    shutil.rmtree(target, ignore_errors=True)
    try:
        source = Directory.open(path, writable=False, damaged=True)
    except (td.DamagedError, ValueError) as error:
        return {}, str(error)
    copy = Directory.open(target, create=True)
    try:
        source.check_catalogue()
        wrong = damage_of(source, list_directory(source, LONGEST))
        left = copy_agents(source, copy)
        assert wrong.keys() >= left.keys()
        problem = source.problem
    except (td.DamagedError, ValueError) as error:
        return {}, str(error)
    finally:
        source.close()
        copy.close()
    with td.DiffStore.open(target, GEOMETRY, ROPE, "1MiB") as store:
        assert dict(store.damaged) == {}
        return contents(store), problem


def test_the_rows_of_a_record_are_summed_by_kind_and_place() -> None:
    from tokendance.files.catalogue import sum_of

    rows: list[Row] = [(1, 2), (12,), (1, None), (1, b""), (1, ""), ("1", 2), (b"1", 2), (2, 1)]
    sums = {sum_of("masters", 1, row) for row in rows}
    sums |= {sum_of("masters", 2, rows[0]), sum_of("mirrors", 1, rows[0])}
    assert len(sums) == len(rows) + 2
