"""PTX of the operators' kernels as the tools that judge it need it."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The cases of kernels and what executes them belong to the tests, which are no package.
if str(ROOT / "tests") not in sys.path:
    sys.path.insert(0, str(ROOT / "tests"))

import cuda_params  # noqa: E402, F401
import ptx_backend  # noqa: E402

PREFIX = "tokendance_"
_ENTRY = re.compile(r"^[ \t]*(?:\.visible\s+)?\.entry\s+(\w+)", re.M)
_LOC = re.compile(r"^[ \t]*\.loc\s+(\d+)\s+(\d+)(?:.*inlined_at\s+(\d+)\s+(\d+))?", re.M)
_FILE = re.compile(r'^[ \t]*\.file\s+(\d+)\s+"([^"]+)"', re.M)


def lines_around(ptx: str, line: int) -> tuple[list[str], int]:
    """The lines of the kernel that a line of the PTX, from 1, stands in, and which it is of them,
    from 0."""
    here = sum(map(len, ptx.split("\n")[: line - 1])) + line - 1
    begin, end = max(ptx.rfind(".entry ", 0, here), 0), ptx.find(".entry ", here)
    return ptx[begin : None if end < 0 else end].rstrip().split("\n"), ptx.count("\n", begin, here)


def operators() -> list[str]:
    """Operators that have a plan and kernels in csrc/cuda."""
    plans = ptx_backend.CUDA_SOURCES.glob("*_plan.h")
    names = (path.name.removesuffix("_plan.h") for path in plans)
    return sorted(name for name in names if (ptx_backend.CUDA_SOURCES / f"{name}.cu").exists())


def only_kernels(ptx: str, names: Collection[str]) -> str:
    """The PTX without its other kernels; every line keeps its number."""
    starts = [match.start() for match in _ENTRY.finditer(ptx)]
    found = [match.group(1) for match in _ENTRY.finditer(ptx)]
    text = ptx[: starts[0]]
    for name, start, end in zip(found, starts, [*starts[1:], len(ptx)], strict=True):
        body = ptx[start:end]
        text += body if name in names else "\n" * body.count("\n")
    return text


class SourceLines:
    """Which line of csrc an instruction of nvcc's PTX was made of."""

    def __init__(self, ptx: str) -> None:
        files = {int(number): Path(name) for number, name in _FILE.findall(ptx)}
        self._files = {
            number: path for number, path in files.items() if (ROOT / "csrc") in path.parents
        }
        self._lines = ptx.split("\n")
        self._locations: list[tuple[int, int] | None] = []
        current: tuple[int, int] | None = None
        for line in self._lines:
            if location := _LOC.match(line):
                file, number, outer_file, outer_number = location.groups()
                if int(file) in self._files:
                    current = int(file), int(number)
                elif outer_file and int(outer_file) in self._files:
                    current = int(outer_file), int(outer_number)
            elif _ENTRY.match(line):
                current = None
            self._locations.append(current)

    def __call__(self, line: int) -> str:
        """`file:line: text` for a line of the PTX, from 1; the caller of an inlined function that
        is not the project's. Empty where nothing is known."""
        location = self._locations[line - 1]
        if location is not None and location[1] == 0:  # the compiler moved it here
            location = self._location_of_use(line)
        if location is None:
            return ""
        path, number = self._files[location[0]], location[1]
        return f"{path.name}:{number}: {_source(path)[number - 1].strip()}"

    def _location_of_use(self, line: int) -> tuple[int, int] | None:
        """Where the result of an instruction is used first."""
        result = re.search(r"%\w+", self._lines[line - 1])
        if result is None:
            return None
        used = re.compile(re.escape(result.group()) + r"\b")
        for text, location in zip(self._lines[line:], self._locations[line:], strict=True):
            if _ENTRY.match(text):
                return None
            if location is not None and location[1] > 0 and used.search(text):
                return location
        return None


@functools.cache
def _source(path: Path) -> list[str]:
    return path.read_text().splitlines()
