"""Rows in vLLM's own cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokendance.device.executor import Executor
from tokendance.host.record import RestoreRecord

_STAGED_BYTES = 64 << 20  # of dense rows on their way into the cache
_DIGIT = 128  # any dtype of a cache holds whole numbers below it exactly


class EngineCache:
    """The cache of a worker's attention layers.

    How a backend lays rows out is its own business (keys may be packed for an instruction set).
    Where a row stands is found by having the backend's own writer fill one block with numbers. If
    that is at constant strides, as it is on CUDA, rows are written through views of the cache, of
    all layers at once. If not, the backend's writer writes them.

    Args:
        layers: vLLM's, in order; all of one shape and backend.
        num_blocks: of the cache, as vLLM's scheduler numbers them. A backend may have each of them
            as several.

    Attributes:
        block_size: rows of one of the ``num_blocks``.
        views: keys and values ``[blocks, rows of a block, Hk, D]`` of each layer, if rows stand at
            constant strides; None if they do not.

    Raises:
        ValueError: a backend without a writer, or one whose cache is not made of blocks.
    """

    def __init__(self, layers: list[Any], num_blocks: int) -> None:
        first = layers[0]
        self._layers = layers
        for layer in layers:
            shape = list(layer.kv_cache.shape)
            if not hasattr(layer.impl, "do_kv_cache_update"):
                raise ValueError(
                    "attention: expected a backend that writes its cache apart from attention, got "
                    f"{type(layer.impl).__name__}"
                )
            if shape[0] % num_blocks or layer.kv_cache.shape != first.kv_cache.shape:
                raise ValueError(f"kv_cache: expected {num_blocks} blocks first, got {shape}")
        per_row = 2 * first.num_kv_heads * first.head_size
        self._rows = first.kv_cache[0].numel() // per_row
        self.block_size = self._rows * (len(first.kv_cache) // num_blocks)
        self._keys_at, self._values_at = self._probe(first)
        keys, values = self._views(self._keys_at), self._views(self._values_at)
        self.views = None if keys is None or values is None else (keys, values)

    def _probe(self, layer: Any) -> tuple[Tensor, Tensor]:
        """Which element of a block is element ``[row, head, dim]`` of its keys and values."""
        shape = (self._rows, layer.num_kv_heads, layer.head_size)
        count = 2 * self._rows * layer.num_kv_heads * layer.head_size
        numbers = torch.arange(count, device=layer.kv_cache.device)
        rows = numbers[: self._rows]
        found = torch.zeros_like(numbers)
        weight = 1
        while weight < count:
            digits = (numbers // weight % _DIGIT).to(layer.kv_cache.dtype)
            block = torch.zeros_like(layer.kv_cache[:1])
            k, v = (half.view(shape) for half in digits.chunk(2))
            layer.impl.do_kv_cache_update(layer, k, v, block, rows)
            found += block.flatten().long() * weight
            weight *= _DIGIT
        order = found.argsort()
        if not torch.equal(found[order], numbers):
            raise ValueError("kv_cache: expected a block that holds each element once, got another")
        keys_at, values_at = (half.view(shape) for half in order.chunk(2))
        return keys_at, values_at

    def _views(self, element: Tensor) -> list[Tensor] | None:
        """Keys or values of each layer, whose elements of a block these are."""
        caches = [layer.kv_cache for layer in self._layers]
        first = caches[0]
        if any(cache.stride() != first.stride() for cache in caches):
            return None
        offset, rest = torch.zeros_like(element), element
        for size, stride in zip(first.shape[:0:-1], first.stride()[:0:-1], strict=True):
            offset += rest % size * stride
            rest = rest // size
        strides = [first.stride(0)]
        for axis in range(offset.dim()):
            steps = set(offset.diff(dim=axis).flatten().tolist())
            if len(steps) > 1:
                return None
            strides.append(steps.pop() if steps else offset.shape[-1])  # of one element: any
        if strides[-1] != 1:
            return None
        shape, begin = (len(first), *offset.shape), int(offset[0, 0, 0])
        return [
            cache.as_strided(shape, strides, cache.storage_offset() + begin) for cache in caches
        ]

    def write(self, executor: Executor, record: RestoreRecord) -> None:
        """Runs a record whose slots are rows of this cache."""
        if self.views is not None:
            executor.restore(record, range(executor.geometry.num_layers), *self.views)
        else:
            self._write_staged(executor, record)

    def _write_staged(self, executor: Executor, record: RestoreRecord) -> None:
        device = executor.device
        wanted = record.slots >= 0
        slots = torch.from_numpy(record.slots[wanted]).to(device)
        count = len(slots)
        dense = np.full(record.slots.shape, -1, dtype=np.int64)
        dense[wanted] = np.arange(count)
        into = torch.from_numpy(dense).to(device)
        geometry = executor.geometry
        shape = (count, geometry.num_kv_heads, geometry.head_dim)
        layer_bytes = max(1, count * geometry.row_bytes // geometry.num_layers)
        at_once = max(1, _STAGED_BYTES // layer_bytes)
        for begin in range(0, geometry.num_layers, at_once):
            which = range(begin, min(begin + at_once, geometry.num_layers))
            keys, values = (
                [torch.empty(shape, dtype=executor.pool.dtype, device=device) for _ in which]
                for _ in range(2)
            )
            executor.restore(record, which, keys, values, into)
            for layer, k, v in zip(which, keys, values, strict=True):
                one = self._layers[layer]
                one.impl.do_kv_cache_update(one, k, v, one.kv_cache, slots)

    def read(self, slots: NDArray[np.int64]) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values ``[R, Hk, D]`` of every layer."""
        device = self._layers[0].kv_cache.device
        row = torch.from_numpy(slots % self._rows).to(device)
        if self.views is not None:
            block = torch.from_numpy(slots // self._rows).to(device)
            k, v = ([view[block, row] for view in views] for views in self.views)
            return k, v
        there, which = np.unique(slots // self._rows, return_inverse=True)
        blocks = torch.from_numpy(there).to(device)
        block = torch.from_numpy(which).to(device)[:, None, None]
        keys, values = [], []
        for layer in self._layers:
            memory = layer.kv_cache[blocks].flatten(1)
            keys.append(memory[block, self._keys_at[row]])
            values.append(memory[block, self._values_at[row]])
        return keys, values
