"""One thread at a time at a store's books, and none of them while anything is computed."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from tokendance.host.guard import CopyOrder, Guard
from tokendance.host.mirror import Pages
from tokendance.host.record import Copies

LOG = logging.getLogger("tokendance")


class ClosedError(ValueError):
    """Of a tenant that has been closed."""


class StoreLock(Guard):
    """The guard of a store that any number of threads use.

    It is held for what the host half does: decisions, books, records. What a thread orders while it
    holds the lock is done when it has let go of it, and before its call returns: copies are made,
    and the log is written.

    Args:
        copy: makes copies.
        clear: overwrites pages with zeros.
        tenant: whose it is, for the log.

    Attributes:
        before_leaving: called by a thread that is about to let go of the lock, in order.
    """

    def __init__(
        self,
        copy: Callable[[Sequence[Copies]], None],
        clear: Callable[[Pages], None],
        tenant: str | None = None,
    ) -> None:
        super().__init__(copy)
        self._clear = clear
        self.before_leaving: list[Callable[[], None]] = []
        self._prefix = "" if tenant is None else f"tenant {tenant!r}: ".replace("%", "%%")
        self._condition = threading.Condition(threading.RLock())
        self._depth = 0  # how often the thread that holds the lock has entered it
        self._process = os.getpid()
        self._orders: list[CopyOrder] = []
        self._told: list[tuple[str, tuple[object, ...]]] = []
        self._changes = 0
        self._closed: str | None = None

    def __enter__(self) -> object:
        if os.getpid() != self._process:
            # The thread that held the lock in the parent is not there to let go of it.
            raise RuntimeError(
                f"store: expected the process that made it ({self._process}), got a fork of it "
                f"({os.getpid()}); make a store in each process, or start processes by 'spawn'"
            )
        self._condition.acquire()
        if self._closed is not None and not self._depth:
            self._condition.release()
            raise ClosedError(self._closed)
        self._depth += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        orders: list[CopyOrder] = []
        told: list[tuple[str, tuple[object, ...]]] = []
        if self._depth == 1:
            for call in self.before_leaving:
                call()
            orders, self._orders = self._orders, []
            told, self._told = self._told, []
            for order in orders:
                order.begin()
        self._depth -= 1
        self._condition.release()
        try:
            self._make(orders)
        finally:
            for message, values in told:
                LOG.info(message, *values)

    def _make(self, orders: Sequence[CopyOrder]) -> None:
        for i, order in enumerate(orders):
            try:
                self.make(order)
            except BaseException:
                with self:
                    for other in orders[i + 1 :]:
                        other.end(well=False)
                raise

    def compute(self, order: CopyOrder) -> None:
        if order.copies:
            self._copy(order.copies)
        if len(order.cleared):
            self._clear(order.cleared)

    def order(self, order: CopyOrder) -> None:
        order.ordered()
        self._orders.append(order)

    def close(self, why: str) -> None:
        """Lets nobody in any more; to be called by who holds the lock."""
        self._closed = why

    def tell(self, message: str, *values: object) -> None:
        if LOG.isEnabledFor(logging.INFO):
            self._told.append((self._prefix + message, values))

    def rows_are_free(self) -> None:
        self._changes += 1
        self._condition.notify_all()

    @property
    def changes(self) -> int:
        """How often rows that a step or a copy had have become free."""
        return self._changes

    def wait_for_change(self, since: int, until: float) -> bool:
        """Waits for the end of a step or of a copy.

        Args:
            since: what `changes` was when there was nothing to compute.
            until: of `time.monotonic`.

        Returns:
            Whether one has ended since.
        """
        with self._condition:
            self._condition.wait_for(
                lambda: self._changes != since, max(until - time.monotonic(), 0)
            )
            return self._changes != since
