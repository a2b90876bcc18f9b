"""`python -m tools.check_wheel`: what it refuses to hand out."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tools import check_wheel

CONTENTS = ("_C.so", "_planner.cpython-311-x86_64-linux-gnu.so", "py.typed", "_planner.pyi")


def wheel(folder: Path, names, size=10) -> Path:
    path = folder / "tokendance-0.1.0-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(f"tokendance/{name}", b"\0" * size)
    return path


def test_a_wheel_with_all_that_it_needs_passes(tmp_path, capsys):
    check_wheel.check_contents(wheel(tmp_path, CONTENTS))
    assert "0.0 MB" in capsys.readouterr().out


@pytest.mark.parametrize("missing", CONTENTS)
def test_a_wheel_without_something_is_refused(tmp_path, missing):
    with pytest.raises(SystemExit, match="expected"):
        check_wheel.check_contents(wheel(tmp_path, set(CONTENTS) - {missing}))


def test_modules_of_two_pythons_are_refused(tmp_path):
    two = (*CONTENTS, "_planner.cpython-310-x86_64-linux-gnu.so")
    with pytest.raises(SystemExit, match="modules: expected"):
        check_wheel.check_contents(wheel(tmp_path, two))


def test_a_wheel_that_is_too_large_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="size: expected less than"):
        check_wheel.check_contents(wheel(tmp_path, CONTENTS, check_wheel.MOST_BYTES // 4))
