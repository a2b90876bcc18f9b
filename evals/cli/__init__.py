"""The commands of ``python -m evals``: each a module, as in `tokendance.cli`."""

from __future__ import annotations

from collections.abc import Sequence

from tokendance import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status. ``argv`` defaults to the process's arguments."""
    return cli.main(argv, program="python -m evals", package=__name__)
