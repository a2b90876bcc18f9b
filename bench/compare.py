"""Compares two runs of the benchmarks by their fractions of ceiling, not by time.

    python -m bench.compare before.json after.json [--tolerance 0.1]

Both files come from ``make bench``. Machines and their noise differ; a fraction of what the same
machine could do in the same minute differs less. The exit status is 1 if a benchmark lost more than
the tolerance. Planning and layer calls have no ceiling: their times stand below, not judged.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

FIGURE = "fraction_of_ceiling"
TIME = "us_per_"  # what a name of a time starts with; what follows is per what


def figures(path: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Fractions of ceiling by name of the benchmark, and microseconds by name and per what."""
    runs = json.loads(path.read_text())["benchmarks"]
    found = {run["name"]: run["extra_info"] for run in runs}
    fractions = {name: info[FIGURE] for name, info in found.items() if FIGURE in info}
    times = {
        f"{name}, us per {key.removeprefix(TIME)}": value
        for name, info in found.items()
        for key, value in info.items()
        if key.startswith(TIME)
    }
    return fractions, times


def lines(
    before: Mapping[str, float], after: Mapping[str, float], tolerance: float | None
) -> Iterator[tuple[str, bool]]:
    """A line per name, and whether more than the ``tolerance`` was lost; None judges nothing."""
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            yield f"{name:<64} only {'after' if name in after else 'before'}", False
            continue
        lost = tolerance is not None and after[name] < before[name] * (1 - tolerance)
        numbers = f"{before[name]:5.2f} {after[name]:5.2f}  x{after[name] / before[name]:.2f}"
        yield f"{name:<64} {numbers}{'  worse' if lost else ''}", lost


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__.split("\n")[0]
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.1, help="loss that is noise, relative")
    options = parser.parse_args(arguments)
    fractions, times = zip(figures(options.before), figures(options.after), strict=True)
    worse = False
    for line, lost in lines(*fractions, options.tolerance):
        print(line)
        worse |= lost
    if any(times):
        print("\ntimes, which depend on the machine and are not judged; less is better:")
        for line, _ in lines(*times, None):
            print(line)
    return int(worse)


if __name__ == "__main__":
    sys.exit(main())
