"""``tokendance store``: commands over the directory of a store."""

from __future__ import annotations

import builtins
import errno
import io
import os
import re
import sys
from pathlib import Path

import pytest
from driving import GEOMETRY, ROPE
from stored_rounds import (
    contents,
    continued,
    files_of,
    flip,
    group_of,
    open_store,
    play,
    prompts,
    put,
    same_contents,
)

import tokendance as td
from tokendance.cli import main


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store after two rounds of three agents, of which one was released."""
    with open_store(tmp_path / "store") as store:
        collector = td.KVCollector(store, "producer")
        play(collector, prompts(), durable=True)
        play(collector, continued(prompts()))
        store.release("c")
    return tmp_path / "store"


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Status, output and errors of a command."""
    status = main(["store", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_ls_lists_agents(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = said(capsys, "ls", path)
    assert (status, err) == (0, "")
    head, *rows, total = out.splitlines()
    assert head.split() == ["agent", "rows", "own", "masters", "bytes"]
    with open_store(path) as store:
        for agent, row in zip(store.agents, rows, strict=True):
            mirror = store.mirror(agent)
            masters = {one.serial: one.length for one in mirror.uses.masters}
            kept = sum(masters.values()) + len(mirror.own_position)
            want = [agent, mirror.length, len(mirror.own_position), len(masters)]
            assert row.split() == [*map(str, want), str(kept * GEOMETRY.row_bytes)]
        stats = store.stats()
    files = len(files_of(path))
    assert re.match(
        rf"2 agents, \d+ Masters, {files} files, {stats.row_bytes} bytes of rows", total
    )


def test_show_says_what_a_store_and_an_agent_are(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = said(capsys, "show", path)
    assert (status, err) == (0, "")
    facts = dict(line.split(": ", 1) for line in out.splitlines())
    assert facts["num_layers"] == "2"
    assert facts["page_dtype"] == "float32"
    assert facts["block_size"] == "8"
    status, out, err = said(capsys, "show", path, "b")
    assert (status, err) == (0, "")
    with open_store(path) as store:
        mirror = store.mirror("b")
    own = len(mirror.own_position)
    assert out.startswith(f"{mirror.length} rows, {own} of them own, {mirror.exact_length} exact\n")
    assert re.findall(r"rows  (\w{32})$", out, re.M) == [s.digest.hex() for s in mirror.segments]
    assert re.findall(r"^use +(\d+) of", out, re.M) == [str(use.delta) for use in mirror.uses]
    status, out, err = said(capsys, "show", path, "x")
    assert (status, out) == (1, "")
    assert err == "tokendance store show: agent: expected one of ['a', 'b'], got 'x'\n"


def test_verify_names_the_damaged(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "verify", path) == (0, "2 of 2 agents are whole\n", "")
    file, begin = group_of(path, "a")
    flip(file, begin + 77)
    status, out, err = said(capsys, "verify", path)
    assert (status, out) == (1, "1 of 2 agents are whole\n")
    assert re.fullmatch(
        rf"damaged: a: {re.escape(str(file))}: expected rows of group \d+ as they were written "
        r"\(checksum \w{32}\), got others \(\w{32}\)\n",
        err,
    )


def used_by(store: td.DiffStore) -> set[int]:
    return {one.serial for agent in "ab" for one in store.mirror(agent).uses.masters}


def test_agents_are_exported_and_imported(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_store(path) as store:
        want = contents(store)
        masters, used = store.stats().masters, len(used_by(store))
    assert said(capsys, "export", path, tmp_path / "one", "b") == (0, "", "")
    assert said(capsys, "export", path, tmp_path / "all") == (0, "", "")
    with open_store(tmp_path / "all") as store:
        assert same_contents(contents(store), want)
        assert store.stats().masters == masters
    with open_store(tmp_path / "other") as store:
        rows = put(store, {"ada": 30})
    assert said(capsys, "import", tmp_path / "other", tmp_path / "one") == (0, "", "")
    assert said(capsys, "import", tmp_path / "other", tmp_path / "all", "a") == (0, "", "")
    with open_store(tmp_path / "other") as store:
        assert same_contents(contents(store), {**rows, **want})
        assert len(used_by(store)) == used  # what both use is there once
        assert store.verify() == {}
    status, out, err = said(capsys, "import", tmp_path / "other", tmp_path / "all")
    assert (status, out) == (1, "")
    assert "agents: expected names that" in err
    assert "got ['a', 'b']" in err
    assert said(capsys, "export", path, tmp_path / "no", "x")[2].startswith(
        "tokendance store export: agents: expected some of ['a', 'b'], got 'x'"
    )
    assert not (tmp_path / "no").exists()


def test_other_rows_are_not_imported(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = td.KVGeometry(3, 2, 1, 64, GEOMETRY.dtype)
    td.DiffStore.open(tmp_path / "layers", other, ROPE, "1MiB").close()
    _, _, err = said(capsys, "import", tmp_path / "layers", path)
    assert "geometry.num_layers: expected that of" in err
    rope = td.Rope.default(head_dim=64, theta=500.0, max_position=700)
    with td.DiffStore.open(tmp_path / "rope", GEOMETRY, rope, "1MiB", block_size=8) as store:
        put(store, {"ada": 600})
    status, _, err = said(capsys, "import", tmp_path / "rope", path)
    assert status == 1
    assert "rope: expected the tables that the keys of" in err


def test_what_is_whole_is_exported_of_a_damaged_store(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_store(path) as store:
        want = contents(store)
    file, begin = group_of(path, "a")
    flip(file, begin)
    status, out, err = said(capsys, "export", path, tmp_path / "whole")
    assert (status, out) == (1, "")
    assert err.startswith(f"left out: a: {file}: expected rows of group")
    with open_store(tmp_path / "whole") as store:
        assert same_contents(contents(store), {"b": want["b"]})


def test_gc_removes_what_is_not_valid(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_store(path) as store:
        want = contents(store)
        store.release("a")
        store.flush()
        gone = store._on_disk._directory.file_bytes - store._on_disk._directory.live_bytes
    (path / "00000099.safetensors").write_bytes(b"left by a killed process")
    (path / "00000100.tmp").write_bytes(b"")
    assert gone > 0
    assert said(capsys, "gc", path) == (0, f"{gone} bytes removed\n", "")
    assert "00000099.safetensors" not in files_of(path)
    assert not (path / "00000100.tmp").exists()
    with open_store(path) as store:
        assert same_contents(contents(store), {"b": want["b"]})


def test_a_store_in_use_and_what_is_none_are_refused(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_store(path):
        for command in (["ls", path], ["gc", path], ["export", path, tmp_path / "no"]):
            status, out, err = said(capsys, *command)
            assert (status, out) == (1, "")
            assert "path: expected a store that nobody else has open, got one that process" in err
    for what, text in (
        (tmp_path / "nothing", "path: expected a store, got nothing"),
        (tmp_path, "path: expected the directory of a store, got"),
        (path / "lock", "path: expected the directory of a store, got a file"),
    ):
        assert text in said(capsys, "verify", what)[2]


def test_a_medium_that_cannot_be_written_can_be_read(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = os.open

    def refused(name: str, flags: int, *rest: int) -> int:
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise OSError(errno.EROFS, "Read-only file system", str(name))
        return found(name, flags, *rest)

    monkeypatch.setattr(os, "open", refused)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert said(capsys, "verify", path) == (0, "2 of 2 agents are whole\n", "")
    (path / "lock").unlink()
    assert said(capsys, "verify", path) == (0, "2 of 2 agents are whole\n", "")
    status, out, err = said(capsys, "gc", path)
    assert (status, out) == (1, "")
    assert f"Read-only file system: '{path / 'lock'}'" in err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("with_tqdm", [True, False])
def test_a_terminal_shows_a_bar(
    path: Path, with_tqdm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if with_tqdm:
        pytest.importorskip("tqdm")
    found = builtins.__import__

    def without(name: str, *rest: object, **named: object) -> object:
        if name == "tqdm" and not with_tqdm:
            raise ImportError(name)
        return found(name, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    assert main(["store", "verify", str(path)]) == 0
    assert "verify" in stream.getvalue()
    if not with_tqdm:
        assert stream.getvalue().endswith(f"\rverify [{'#' * 40}]\n")
