"""The most agents whose rounds end within a limit, of several servers that take turns."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

from evals.capacity.limits import searching

Holds = Callable[[str, int], bool]
"""Whether a system's rounds of so many agents end within the limit."""


def agents_of_each(names: Sequence[str], holds: Holds, most: int) -> dict[str, int]:
    """The largest number up to ``most`` for which ``holds`` is true, per system.

    Each is asked once, then each once more, and so on, so that whatever else the machine does meets
    all of them.
    """
    found: dict[str, int] = {}
    searches: dict[str, Generator[int, bool, int]] = {name: searching(most) for name in names}
    asked = {name: next(search) for name, search in searches.items()}
    while asked:
        for name, count in list(asked.items()):
            try:
                asked[name] = searches[name].send(holds(name, count))
            except StopIteration as end:
                found[name] = end.value
                del asked[name]
    return found
