"""Which tests `make test` leaves to `make test-all` (tools/checks.py): those marked ``rest``.

They are those marked slow or model, and of the tests that execute PTX all but a sample. The sample
is drawn by the sources of the kernels and of the tests, so that others are drawn when one of them
changes, and has tests of every operator and file.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parent.parent / "csrc"
SAMPLE = 40
"""Tests of a file that execute PTX and are not left out."""


def mark(items: Iterable[pytest.Item]) -> None:
    """Marks what executes PTX with ``ptx``, and with ``rest`` what is left out."""
    executed = defaultdict(list)
    for item in items:
        if any(map(item.get_closest_marker, ("slow", "model"))):
            item.add_marker("rest")
        if on_ptx(item):
            item.add_marker("ptx")
        if item.get_closest_marker("ptx") and not item.get_closest_marker("rest"):
            executed[item.path].append(item)
    sources = _digest_of_kernels() if executed else b""
    for path, tests in executed.items():
        seed = hashlib.blake2b(sources + path.read_bytes()).digest()
        for item in drawn(tests, seed)[SAMPLE:]:
            item.add_marker("rest")


def on_ptx(item: pytest.Item) -> bool:
    """Whether a test has the fixture ``ptx``, or the PTX as its ``backend``."""
    case = getattr(item, "callspec", None)
    return "ptx" in item.fixturenames or (case is not None and case.params.get("backend") == "ptx")


def drawn(items: Iterable[pytest.Item], seed: bytes) -> list[pytest.Item]:
    """In an order that the seed decides, whatever other items there are."""
    return sorted(items, key=lambda item: hashlib.blake2b(item.nodeid.encode(), key=seed).digest())


def _digest_of_kernels() -> bytes:
    digest = hashlib.blake2b()
    for folder in (CSRC / "cuda", CSRC / "include" / "tokendance"):
        for path in sorted(folder.iterdir()):
            digest.update(path.read_bytes())
    return digest.digest()
