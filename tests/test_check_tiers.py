"""What `make test` leaves out (tests/check_tiers.py), and what runs it (tools/checks.py)."""

from __future__ import annotations

import subprocess
import types
from pathlib import Path

import check_tiers
import pytest

from tools import checks
from tools.checks import Part


class Item:
    """A test, as far as tiers look at it."""

    def __init__(self, path, name, *marks, fixtures=(), **params):
        self.path, self.nodeid, self.marks = path, f"{path.name}::{name}", set(marks)
        self.fixturenames, self.callspec = fixtures, types.SimpleNamespace(params=params)

    def get_closest_marker(self, name):
        return name if name in self.marks else None

    def add_marker(self, name):
        self.marks.add(name)


def test_of_ptx_a_sample_is_left_that_the_sources_decide(tmp_path, monkeypatch):
    monkeypatch.setattr(check_tiers, "SAMPLE", 3)
    path = tmp_path / "test_some.py"

    def marked(sources, text):
        path.write_text(text)
        monkeypatch.setattr(check_tiers, "_digest_of_kernels", lambda: sources)
        executed = [Item(path, f"executed[{i}]", fixtures=("ptx",)) for i in range(10)]
        executed += [Item(path, f"operator[{i}]", backend="ptx") for i in range(10)]
        usual = [Item(path, "on_cpu", backend="cpu"), Item(path, "usual")]
        long = [Item(path, "long", "slow"), Item(path, "model", "model", fixtures=("ptx",))]
        check_tiers.mark([*executed, *usual, *long])
        assert all("ptx" in item.marks for item in executed)
        assert not any("rest" in item.marks or "ptx" in item.marks for item in usual)
        assert all("rest" in item.marks for item in long)
        left = {item.nodeid for item in executed if "rest" not in item.marks}
        assert len(left) == 3
        return left

    first = marked(b"kernels", "tests")
    assert marked(b"kernels", "tests") == first
    assert marked(b"other kernels", "tests") != first
    assert marked(b"kernels", "other tests") != first


def part(name, minutes, *paths, command="true"):
    return Part(name, command, minutes, paths)


def test_what_is_touched_comes_first():
    parts = [part("a", 1, "csrc/"), part("b", 1, "docs/x.md"), part("c", 1, "tests/", "bench/")]

    def order(*files):
        return "".join(one.name for one in checks.in_order(parts, files))

    assert order() == "abc"
    assert order("docs/x.md") == "bac"
    assert order("docs/x.md.old", "README.md") == "abc"
    assert order("bench/gpu.py", "docs/x.md") == "bca"


def test_what_does_not_fit_is_left_out_and_said(capfd):
    parts = [part("long", 30), part("short", 2), part("other", 3)]
    assert checks.run(parts, 4.0) == 0
    lines = capfd.readouterr().out.splitlines()[-3:]
    assert lines[0] == "long             left out: takes 30 min, 4.0 were left"
    assert lines[1].startswith("short            passed in 0.0 min")
    assert lines[2].startswith("other            passed in 0.0 min")
    assert checks.run(parts, 2.5) == 0
    assert "other            left out: takes 3 min" in capfd.readouterr().out


def test_a_part_that_fails_ends_no_other(capfd):
    parts = [part("bad", 1, command="exit 3"), part("good", 1, command="echo said")]
    assert checks.run(parts, None) == 1
    out = capfd.readouterr().out
    assert "said\n" in out
    assert "bad              FAILED in 0.0 min\ngood             passed in 0.0 min\n" in out


def test_without_nvcc_its_parts_are_not_run(monkeypatch, capfd):
    monkeypatch.setattr(checks, "find_nvcc", lambda: None)
    assert checks.run([Part("ptx", "exit 1", 1, (), needs_nvcc=True), part("good", 1)], None) == 0
    out = capfd.readouterr().out
    assert "ptx              NOT RUN: there is no nvcc\ngood             passed" in out


def test_unknown_parts_are_refused(capsys):
    with pytest.raises(SystemExit):
        checks.main(["sanitizer"])
    assert "part: expected some of sanitizers, " in capsys.readouterr().err


def test_the_list_has_every_part(capsys):
    assert checks.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(checks.PARTS)


def test_changes_are_those_since_main(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "ROOT", tmp_path)

    def git(*arguments):
        names = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
        subprocess.run(["git", *names, *arguments], cwd=tmp_path, check=True, capture_output=True)

    assert checks.changed_files() == []  # no repository
    git("init", "-b", "main")
    for name in ("one", "two", "three"):
        (tmp_path / name).write_text(name)
    git("add", ".")
    git("commit", "-m", "first")
    assert checks.changed_files() == []
    git("checkout", "-b", "branch")
    (tmp_path / "one").write_text("changed")
    git("commit", "-am", "second")
    (tmp_path / "two").write_text("not committed")
    assert checks.changed_files() == ["one", "two"]
    git("branch", "-D", "main")
    assert checks.changed_files() == []


def test_paths_of_parts_exist():
    root = Path(checks.__file__).resolve().parent.parent
    named = {path for one in checks.PARTS for path in one.paths}
    assert {path for path in named if not (root / path).exists()} == set()
