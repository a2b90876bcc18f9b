"""Pools of any layout, NaN wherever a test has written nothing."""

from __future__ import annotations

import mmap
from typing import Literal, get_args

import torch
from torch import Tensor

ABSURD = 1_900_000_001
"""Stands in every int32 slot that must not be read: no page, row or position is so large."""

QUANTIZED = (torch.float8_e4m3fn, torch.int8)
"""Dtypes of keys and values that stand for themselves times a scale per KV head."""


def is_quantized(dtype: torch.dtype) -> bool:
    """Whether the elements of keys and values of this dtype have scales."""
    return dtype in QUANTIZED


def poison(dtype: torch.dtype) -> float:
    """What stands where nothing is to be read: NaN, or in int8 the number that is never made."""
    return torch.nan if dtype.is_floating_point else -128


Layout = Literal["separate", "interleaved", "heads_first", "packed", "padded", "unaligned", "mixed"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


def pools(
    num_pages: int, block_size: int, heads: int, head_dim: int, dtype: torch.dtype, layout: Layout
) -> tuple[Tensor, Tensor]:
    """K and V of one layer, ``[num_pages, block_size, heads, head_dim]`` each, NaN throughout.

    In int8, which has no NaN, all elements are -128 (:func:`poison`).

    Args:
        layout: how they lie in memory. ``separate``: each contiguous. ``interleaved``: K and V
            pages alternate in one allocation. ``heads_first``: so, too, and the heads of a page lie
            apart (HND). ``packed``: K and V of a head lie side by side. ``padded``: gaps between
            heads, rows and pages, all multiples of 16 bytes. ``unaligned``: gaps of one element.
            ``mixed``: K heads first, V padded.
    """

    def allocate(*shape: int) -> Tensor:
        return torch.full(shape, poison(dtype), dtype=dtype, device="cpu")

    def padded(gap: int = 16) -> Tensor:
        pages = allocate(num_pages, block_size + 1, heads + 1, head_dim + gap)
        return pages[:, :block_size, :heads, :head_dim]

    if layout == "separate":
        shape = (num_pages, block_size, heads, head_dim)
        return allocate(*shape), allocate(*shape)
    if layout == "interleaved":
        both = allocate(num_pages, 2, block_size, heads, head_dim)
        return both[:, 0], both[:, 1]
    if layout == "heads_first":
        both = allocate(num_pages, 2, heads, block_size, head_dim).transpose(2, 3)
        return both[:, 0], both[:, 1]
    if layout == "packed":
        both = allocate(num_pages, block_size, heads, 2, head_dim)
        return both[:, :, :, 0], both[:, :, :, 1]
    if layout == "padded":
        return padded(), padded()
    if layout == "unaligned":
        return padded(1), padded(1)
    return allocate(num_pages, heads, block_size, head_dim).transpose(1, 2), padded()


_MAP_NORESERVE = 0x4000  # Linux's; Python's mmap has no name for it before 3.13


def far_apart(pages: Tensor, stride: int = 1_100_000_000) -> Tensor:
    """A copy of ``[pages, block_size, heads, D]`` whose pages lie ``stride`` elements apart.

    At 16 bits and the stride by default, page 2 lies 4.4 GB behind page 0. The memory is reserved
    and not filled: only what is touched exists. Linux only.
    """
    nbytes = ((len(pages) - 1) * stride + pages[0].numel()) * pages.element_size()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    memory = torch.frombuffer(mmap.mmap(-1, nbytes, flags=flags), dtype=pages.dtype)
    return memory.as_strided(pages.shape, (stride, *pages[0].contiguous().stride())).copy_(pages)


class StorageCopies:
    """Copies tensors with their whole storages: strides, gaps and sharing stay as they are.

    Tensors that share a storage share its copy, so K and V of one allocation stay interleaved.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage().data_ptr()
        if tensor.numel() == 0:
            return tensor.to(self._device, copy=True)
        if key not in self._copies:
            # The original is kept alive, or its address could be another's by the next call.
            self._copies[key] = tensor, whole_storage(tensor).to(self._device, copy=True)
        whole = self._copies[key][1]
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def whole_storage(tensor: Tensor) -> Tensor:
    """The storage of a tensor as a 1-D tensor of its dtype, gaps included."""
    whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return whole.set_(tensor.untyped_storage())
