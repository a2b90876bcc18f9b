"""Names for a profiler: what the library does, as NVTX ranges."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

_NOTHING = nullcontext()


def marked(device: torch.device, name: str) -> AbstractContextManager[object]:
    """A range of the thread that enters it, where the device is a GPU; otherwise nothing."""
    return _range(name) if device.type == "cuda" else _NOTHING


@contextmanager
def _range(name: str) -> Iterator[None]:
    torch.cuda.nvtx.range_push(name)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]


def begun(device: torch.device, name: str) -> Callable[[], None]:
    """Begins a range that any thread may end, by what is returned."""
    if device.type != "cuda":
        return _end_nothing
    number = torch.cuda.nvtx.range_start(name)
    return lambda: torch.cuda.nvtx.range_end(number)


def _end_nothing() -> None:
    pass
