"""Compares two runs of the benchmarks by their fractions of ceiling, not by time.

    python -m bench.compare before.json after.json [--tolerance 0.1]

Both files come from ``make bench``. Machines and their noise differ; a fraction of what the same
machine could do in the same minute differs less. The exit status is 1 if a benchmark lost more than
the tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

FIGURE = "fraction_of_ceiling"


def fractions(path: Path) -> dict[str, float]:
    """Fraction of ceiling by name of the benchmark."""
    runs = json.loads(path.read_text())["benchmarks"]
    return {run["name"]: run["extra_info"][FIGURE] for run in runs if FIGURE in run["extra_info"]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.1, help="loss that is noise, relative")
    options = parser.parse_args(arguments)
    before, after = fractions(options.before), fractions(options.after)
    worse = 0
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            print(f"{name:<64} only {'after' if name in after else 'before'}")
            continue
        lost = after[name] < before[name] * (1 - options.tolerance)
        worse += lost
        change = after[name] / before[name]
        print(
            f"{name:<64} {before[name]:5.2f} {after[name]:5.2f}  x{change:.2f}"
            f"{'  worse' if lost else ''}"
        )
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
