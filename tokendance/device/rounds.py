"""A packed round on a device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tokendance.device.arrays import Array, as_tensor
from tokendance.host.round import IntArray, RoundExtents, pack


class RoundTensors:
    """A packed round on a device.

    ``buffer`` is int32 ``[total]``; ``extents`` are its capacities. Every field of round.h is an
    attribute: a view of the buffer (``round.use_masks``: ``[use_pages]``).
    """

    def __init__(self, buffer: Array, extents: RoundExtents) -> None:
        buffer = as_tensor(buffer)
        ranges, total = extents.offsets()
        if buffer.dtype != torch.int32 or buffer.shape != (total,) or not buffer.is_contiguous():
            raise ValueError(
                f"buffer: expected contiguous int32 [{total}], "
                f"got {buffer.dtype} {list(buffer.shape)}"
            )
        self.buffer = buffer
        self.extents = extents
        self._ranges = ranges
        self._shapes = extents.shapes()

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, IntArray],
        filled: RoundExtents,
        capacity: RoundExtents | None = None,
        device: torch.device | str = "cpu",
    ) -> RoundTensors:
        """Packs and uploads; see :func:`pack`."""
        buffer = torch.from_numpy(pack(arrays, filled, capacity)).to(device)
        return cls(buffer, capacity or filled)

    def __getattr__(self, name: str) -> Tensor:
        ranges = self.__dict__.get("_ranges", {})
        if name not in ranges:
            raise AttributeError(name)
        offset, length = ranges[name]
        return self.buffer[offset : offset + length].view(self._shapes[name])

    @property
    def device(self) -> torch.device:
        return self.buffer.device
