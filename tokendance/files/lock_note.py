"""How many transactions there have been, noted in the lock file after each.

SQLite ends its write-ahead log at the first frame that is damaged, and so goes back to an earlier
state without a word. The note tells: it is written behind a transaction, and so is never ahead.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def write_generation(path: Path, generation: int) -> None:
    """Notes it, where that is possible; it is not waited for."""
    text = f"{os.getpid()} {generation}"
    try:
        path.write_text(f"{text} {_sum(text)}\n")
    except OSError:
        return


def read_generation(path: Path) -> int | None:
    """What was noted last; None where that is not whole."""
    try:
        parts = path.read_text(errors="replace").split()
    except OSError:
        return None
    if len(parts) != 3 or parts[2] != _sum(" ".join(parts[:2])) or not parts[1].isdecimal():
        return None
    return int(parts[1])


def _sum(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
