"""Pages that hold rows, and the books of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tokendance.device.host_pages import HostPages
from tokendance.device.pool import PagePool
from tokendance.host.books import Books
from tokendance.host.mirror import Master, Mirror


@dataclass(frozen=True, eq=False)
class Memory:
    """A tier of memory: pages of a device or of the host.

    Attributes:
        books: who uses which page.
        pool: the pages.
    """

    books: Books
    pool: PagePool | HostPages


@dataclass(frozen=True, eq=False)
class DeviceMemory(Memory):
    """That of a device, to which rows are brought up."""

    pool: PagePool


class Held(NamedTuple):
    """What a memory has.

    Attributes:
        memory: it.
        mirrors: by agent.
        masters: that later rounds find.
    """

    memory: Memory
    mirrors: Mapping[str, Mirror]
    masters: Sequence[Master]
