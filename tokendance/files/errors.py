"""What can be wrong with a store's directory, beside what the system calls wrong with it."""

from __future__ import annotations


class DamagedError(RuntimeError):
    """What lies on disk is not what was written there: its checksum, its length or its form is
    another. The text names the file, what was expected and what came."""


class StoreInUseError(OSError):
    """Another process, or another store of this one, has the directory open."""
