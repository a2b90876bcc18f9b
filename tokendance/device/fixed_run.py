"""A forward pass in buffers that stay where they are, for CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokendance.device.arrays import Array
from tokendance.device.executor import Executor, Scores
from tokendance.device.rounds import RoundTensors
from tokendance.host.record import VERSION, StepRecord
from tokendance.host.round import RoundExtents

_ALIGNMENT = 16  # bytes, of each field of the buffer


class FixedRun:
    """Runs padded decode records, one after the other, with the same tensors for all of them.

    `load` fills the buffers by one copy; `attend` allocates nothing, waits for nothing, and has
    shapes that depend on the capacity alone. So the layers of a whole decode step can be captured
    once and replayed for every record that is loaded.

    Args:
        executor: whose pool and tables are used.
        capacity: extents of the records' rounds; ``capacity.rows`` is R.
        windows: sliding windows of the model's layers, 0 for none.

    Attributes:
        token_ids: int64 ``[R]``; behind the rows of the record that was loaded last, 0.
        positions: int32 ``[R]``, likewise.
    """

    def __init__(
        self, executor: Executor, capacity: RoundExtents, windows: Sequence[int] = (0,)
    ) -> None:
        self.executor = executor
        self.capacity = capacity
        rows, ints = capacity.rows, capacity.offsets()[1]
        fields = {"token_ids": (8, rows), "slots": (8, rows), "positions": (4, rows)}
        fields |= {f"round {window}": (4, ints) for window in windows}
        self._ranges: dict[str, tuple[int, int]] = {}
        total = 0
        for name, (itemsize, count) in fields.items():
            length = count * itemsize
            self._ranges[name] = (total, total + length)
            total += -(-length // _ALIGNMENT) * _ALIGNMENT
        self._staged = np.zeros(total, dtype=np.uint8)
        device, geometry = executor.device, executor.geometry
        self._buffer = torch.zeros(total, dtype=torch.uint8, device=device)

        def field(name: str, dtype: torch.dtype) -> Tensor:
            begin, end = self._ranges[name]
            return self._buffer[begin:end].view(dtype)

        self.token_ids = field("token_ids", torch.int64)
        self.positions = field("positions", torch.int32)
        self._slots = field("slots", torch.int64)
        self._rounds = {
            window: RoundTensors(field(f"round {window}", torch.int32), capacity)
            for window in windows
        }
        heads, dim = geometry.num_q_heads, geometry.head_dim
        self._out = torch.zeros(rows, heads, dim, dtype=geometry.dtype, device=device)
        self._lse = torch.zeros(rows, heads, dtype=torch.float32, device=device)
        floats = capacity.partials * heads * (dim + 1)
        self._workspace = torch.zeros(floats, dtype=torch.float32, device=device)

    def load(self, record: StepRecord) -> None:
        """Fills the buffers with a record: one copy, from pinned memory on a GPU.

        Its own copies of rows and pages are made before.

        Raises:
            ValueError: a record of another version, of other rows or extents, one that chooses
                rows, or one without the round of a window.
        """
        if record.version != VERSION:
            raise ValueError(f"record: expected version {VERSION}, got {record.version}")
        if record.choices:
            raise ValueError("record: expected one that chooses no rows, got one that does")
        if record.num_rows != self.capacity.rows:
            raise ValueError(f"record: expected {self.capacity.rows} rows, got {record.num_rows}")
        arrays: dict[str, NDArray[Any]] = {
            "token_ids": record.token_ids,
            "slots": record.slots,
            "positions": record.positions,
        }
        for window in self._rounds:
            if window not in record.rounds:
                raise ValueError(
                    f"record: expected a round of window {window}, got {sorted(record.rounds)}"
                )
            packed = record.rounds[window]
            if packed.extents != self.capacity:
                raise ValueError(f"record: expected {self.capacity}, got {packed.extents}")
            arrays[f"round {window}"] = packed.buffer
        for name, array in arrays.items():
            begin, end = self._ranges[name]
            self._staged[begin:end] = array.view(np.uint8)
        self.executor.copy(record.copies)
        staged = torch.from_numpy(self._staged)
        if self.executor.device.type == "cuda":
            # Pinned afresh each time: the allocator of pinned memory gives it to nobody else
            # before the copy is done, and the next record may be staged meanwhile.
            staged = staged.pin_memory()
        self._buffer.copy_(staged, non_blocking=True)

    def attend(
        self,
        layer: int,
        q: Array,
        k: Array,
        v: Array,
        *,
        softmax_scale: float | None = None,
        window: int = 0,
        soft_cap: float = 0.0,
        sinks: Array | None = None,
    ) -> Tensor:
        """Rotates, stores and attends for one layer; see `Run.attend`.

        Args:
            q, k, v: of all R rows; what padding rows hold is of no consequence.

        Returns:
            ``[R, Hq, D]``, the same tensor each time: the next call overwrites it.

        Raises:
            ValueError: an unknown layer or window, or a number or a tensor that does not fit.
        """
        executor, geometry, rows = self.executor, self.executor.geometry, self.capacity.rows
        if not 0 <= layer < geometry.num_layers:
            raise ValueError(f"layer: expected 0 .. {geometry.num_layers - 1}, got {layer}")
        queries = executor.checked("q", q, rows, geometry.num_q_heads)
        keys = executor.checked("k", k, rows, geometry.num_kv_heads)
        values = executor.checked("v", v, rows, geometry.num_kv_heads)
        scores = Scores(executor, softmax_scale, window, soft_cap, sinks)
        if window not in self._rounds:
            raise ValueError(f"window: expected one of {sorted(self._rounds)}, got {window}")
        executor.write(layer, keys, values, self._slots, self.positions)
        executor.attend(
            layer, queries, self._rounds[window], scores, self._workspace, self._out, self._lse
        )
        return self._out
