"""`python -m tools.check_wheel`: what it refuses to hand out."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import pytest

from tools import check_wheel

CONTENTS = ("_C.so", "_planner.cpython-311-x86_64-linux-gnu.so", "py.typed", "_planner.pyi")


def wheel(folder: Path, names, size=10, version="0.2.0") -> Path:
    path = folder / f"tokendance-{version}-cp311-cp311-linux_x86_64.whl"
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


def test_the_changelog_begins_with_the_version_that_is_built():
    project = (check_wheel.ROOT / "pyproject.toml").read_text()
    (version,) = re.findall(r'^version = "(.+)"$', project, re.M)
    assert check_wheel.version_of_the_changelog() == version


def test_a_wheel_of_another_version_than_the_changelogs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(check_wheel, "ROOT", tmp_path)
    (tmp_path / "CHANGELOG.md").write_text("# Changes\n\n## 1.2.3 (2026-12-01)\n\n## 1.2.2\n")
    check_wheel.check_version(wheel(tmp_path, CONTENTS, version="1.2.3"))
    with pytest.raises(SystemExit, match=r"expected 1\.2\.3, as in .*, got 1\.2\.2"):
        check_wheel.check_version(wheel(tmp_path, CONTENTS, version="1.2.2"))
    (tmp_path / "CHANGELOG.md").write_text("# Changes\n\n## 1.2.3 (not released yet)\n")
    with pytest.raises(SystemExit, match="a heading with a version and its date"):
        check_wheel.check_version(wheel(tmp_path, CONTENTS, version="1.2.3"))
