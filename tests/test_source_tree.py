"""A checkout without its compiled modules says what has happened and what to type."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tokendance

PACKAGE = Path(tokendance.__file__).parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The sources without what is compiled."""
    directory = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(PACKAGE, directory / "tokendance", ignore=ignored)
    return directory


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of installed packages, with this one in it."""
    directory = tmp_path / "site"
    shutil.copytree(PACKAGE, directory / "tokendance", ignore=shutil.ignore_patterns("__pycache__"))
    information = directory / "tokendance-0.2.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: tokendance\nVersion: 0.2.0\n"
    )
    return directory


def info(*options: str, cwd: Path, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-m", "tokendance", "info"],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_beside_an_installed_package(checkout: Path, site: Path, tmp_path: Path) -> None:
    result = info(cwd=checkout, path=site)
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: _C.so: expected in ")
    assert f"imported the source tree {checkout} in place of the installed package" in message
    assert str(site / "tokendance") in message
    assert "Type `tokendance` in place of `python -m tokendance`" in message
    # What it says to type works.
    assert info(cwd=tmp_path, path=site).returncode == 0
    if sys.version_info >= (3, 11):
        assert info("-P", cwd=checkout, path=site).returncode == 0


def test_alone(checkout: Path, tmp_path: Path) -> None:
    others = tmp_path / "others"  # everything that is installed but this package
    others.mkdir()
    for entry in sys.path:
        for other in Path(entry).iterdir() if entry.endswith("site-packages") else ():
            if "tokendance" not in other.name and other.suffix != ".pth":
                (others / other.name).symlink_to(other)
    result = info("-S", cwd=checkout, path=others)
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()[-1]
    assert "this source tree is not built. Type `pip install .` and leave it, or" in message
