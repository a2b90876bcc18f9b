"""Who is at a scheduler's books, and when what it orders is copied.

The host half knows no threads: its calls follow one another, and copies are made when they are
ordered. A front that serves threads hands a `Guard` of its own to its scheduler, which lets one
thread in at a time, and makes copies when that thread has left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from types import TracebackType
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from tokendance.host.agent import AgentState, Copying
from tokendance.host.mirror import Pages, no_pages
from tokendance.host.record import Copies


@dataclass(eq=False)
class CopyOrder:
    """Copies, and what follows them.

    Pages that are read or written by them stay where they are, and the states take part in nothing
    else, until one of the two functions has been called.

    Attributes:
        copies: in order.
        states: whose rows they write or read.
        done: ends the order.
        undo: ends it when the copies could not be made.
        cleared: pages that are overwritten with zeros instead.
    """

    copies: list[Copies]
    states: Sequence[AgentState]
    done: Callable[[], None]
    undo: Callable[[], None]
    cleared: Pages = field(default_factory=no_pages)

    def ordered(self) -> None:
        self._mark(Copying.ORDERED)

    def begin(self) -> None:
        self._mark(Copying.RUNNING)

    def end(self, well: bool) -> None:
        self._mark(Copying.NONE)
        self.done() if well else self.undo()

    def _mark(self, how: Copying) -> None:
        for state in self.states:
            state.copying = how


class Guard:
    """Without threads: whoever comes is let in, and copies are made at once.

    Args:
        copy: makes copies.
    """

    def __init__(self, copy: Callable[[Sequence[Copies]], None]) -> None:
        self._copy = copy

    def __enter__(self) -> object:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def order(self, order: CopyOrder) -> None:
        """Has copies made before whoever is let in now returns."""
        order.ordered()
        self.make(order)

    def compute(self, order: CopyOrder) -> None:
        """What an order is about."""
        self._copy(order.copies)

    def make(self, order: CopyOrder) -> None:
        """Makes copies, now."""
        order.begin()
        try:
            self.compute(order)
        except BaseException:
            with self:
                order.end(well=False)
                self.rows_are_free()
            raise
        with self:
            order.end(well=True)
            self.rows_are_free()

    def rows_are_free(self) -> None:
        """A step or a copy has ended: what waited for its rows may be computed."""

    def tell(self, message: str, *values: object) -> None:
        """Something that a log has."""


class _Guarded(Protocol):
    @property
    def guard(self) -> Guard: ...


Self = TypeVar("Self", bound=_Guarded)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def guarded(
    method: Callable[Concatenate[Self, Arguments], Result],
) -> Callable[Concatenate[Self, Arguments], Result]:
    """A method that is run by one thread at a time, of all methods of one guard."""

    @wraps(method)
    def inside(self: Self, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with self.guard:
            return method(self, *args, **kwargs)

    return inside
