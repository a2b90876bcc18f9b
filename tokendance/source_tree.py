"""What to do where Python imports a source tree whose compiled modules are not there."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


def missing(library: Path) -> ImportError:
    """The error for a compiled module that is not beside the sources, and what to type."""
    package = Path(__file__).resolve().parent
    found = f"{library.name}: expected in {library.parent}, got nothing"
    installed = _installed_package()
    if installed is None or installed == package or not any(installed.rglob(library.name)):
        return ImportError(
            f"{found}: this source tree is not built. Type `pip install .` and leave it, or "
            "`python setup.py build_ext --inplace` and stay"
        )
    return ImportError(
        f"{found}: Python has imported the source tree {package.parent} in place of the installed "
        f"package {installed}, because it looks into the current directory first. Type "
        "`tokendance` in place of `python -m tokendance`, or `python -P` in place of `python` "
        "(3.11 or newer), or leave the directory"
    )


def _installed_package() -> Path | None:
    try:
        return Path(str(distribution("tokendance").locate_file("tokendance"))).resolve()
    except PackageNotFoundError:
        return None
