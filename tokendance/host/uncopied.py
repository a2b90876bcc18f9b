"""Objects of which there is one: copies would take pages from, or give them to, one free list."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn


class Uncopied:
    """Refuses `copy.copy`, `copy.deepcopy` and `pickle`, and says what to do instead.

    ``class Store(Uncopied, instead="...")`` names the way in its errors.
    """

    __slots__ = ()
    _instead: ClassVar[str]

    def __init_subclass__(cls, instead: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if instead:
            cls._instead = instead

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__}: expected to stay one object, since a copy would hold the same "
            f"pages, got a request to copy or pickle it; {self._instead}"
        )
