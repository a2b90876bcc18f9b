"""Threads as generated code sees them: one object with every instruction that needs the machine."""

from .async_copy import AsyncCopies
from .atomics import Atomics
from .collectives import Collectives


class Lanes(Atomics, AsyncCopies, Collectives):
    """A set of threads that execute together."""

    __slots__ = ()

    def subset(self, chosen):
        """The threads at the given indices of this set."""
        rows = chosen if self.rows is None else self.rows[chosen]
        return Lanes(self.chunk, self.slots[chosen], rows)
